"""Several calls that came as one end one by one."""

import logging
import pickle
from typing import Any

import pytest

from adapters.errors import AdapterRefused
from deployments.errors import BatchLoopDied
from deployments.model.together import each_alone


class Odd(Exception):
    """It cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError


async def call(end: Any) -> Any:
    if isinstance(end, BaseException):
        raise end
    return end


async def test_each_ends_in_its_answers_or_its_error(caplog: pytest.LogCaptureFixture) -> None:
    refused = AdapterRefused("mood", ["no head"])
    with caplog.at_level(logging.ERROR):
        told = await each_alone(call(end) for end in ([[0.5]], refused, Odd("a secret"), [[1.0]]))
    assert told[0] == [[0.5]]
    assert told[1] is refused
    assert type(told[2]) is RuntimeError
    assert "secret" not in str(told[2])
    assert told[3] == [[1.0]]
    assert pickle.loads(pickle.dumps(told[1:3]))
    assert "a secret" in caplog.text


async def test_a_replica_that_can_answer_nothing_says_so_of_all() -> None:
    with pytest.raises(BatchLoopDied):
        await each_alone(call(end) for end in ([[0.5]], BatchLoopDied("ended")))
