import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.catalog.handles import Others
from deployments.errors import BadInput, NotReady


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Others:
    """Whose model and ingress never answer."""

    async def never(*_: Any) -> Any:
        await asyncio.sleep(60)

    monkeypatch.setattr(
        "deployments.catalog.handles.serve.get_replica_context",
        lambda: SimpleNamespace(app_name="onebase"),
    )
    call = SimpleNamespace(remote=never)
    others = Others(SimpleNamespace(describe=call))  # type: ignore[arg-type]
    others._found = SimpleNamespace(try_golden=call)  # type: ignore[assignment]
    return others


async def test_golden_answers_that_take_too_long_say_what_to_change(
    others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.catalog.handles._MODEL_S", 0.01)
    monkeypatch.setattr("deployments.catalog.handles._GOLDEN_S", 0.1)
    with pytest.raises(BadInput, match=r"golden\.jsonl of mood@0.*give it fewer lines"):
        await others.golden("mood", "0" * 8, {})


async def test_a_replica_that_does_not_answer_was_asked_all_the_same(others: Others) -> None:
    from deployments.catalog.handles import _ask

    with pytest.raises(NotReady, match="has answered within 0 s"):
        await _ask(lambda: others._model.describe.remote("mood"), 0.01)


def test_a_change_may_take_as_long_as_its_parts() -> None:
    from deployments.catalog import handles
    from deployments.ingress.handles import _CHANGE_S

    # It is checked, warmed, tried and told.
    assert 2 * handles._MODEL_S + handles._GOLDEN_S + handles._REACH_S < _CHANGE_S
