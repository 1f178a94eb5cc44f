"""What `user_config` may change, and what it is told otherwise."""

from pathlib import Path
from typing import Any

import pytest

from deployments.config import Args, ConfigError
from deployments.settings import INGRESS_KEYS, MODEL_KEYS, laid_over


@pytest.fixture
def args(tmp_path: Path) -> Args:
    return Args(base_model="org/base", adapter_store=str(tmp_path), max_batch_rows=7)


def test_what_is_named_changes_and_all_else_stays(args: Args) -> None:
    laid = laid_over(args, {"adapter_slots": 5}, MODEL_KEYS)
    assert (laid.adapter_slots, laid.max_batch_rows) == (5, 7)
    assert laid.model_dump(exclude={"adapter_slots"}) == args.model_dump(exclude={"adapter_slots"})
    assert laid_over(args, {}, MODEL_KEYS) == args


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"bank_gib": 3}, "'bank_gib', which cannot be changed in place; the keys that can are"),
        ({"adapter_slots": 0}, "adapter_slots=0 is wrong"),
        ([], r"user_config is \[\]; it must be keys with values"),
        (None, "user_config is None"),
    ],
)
def test_what_is_wrong_is_named(args: Args, given: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        laid_over(args, given, MODEL_KEYS)


def test_all_keys_are_arguments() -> None:
    assert {*MODEL_KEYS, *INGRESS_KEYS} <= Args.model_fields.keys()
