"""Rows on their way to one replica, and the calls that carry them. Knows no Ray."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import Context
from typing import NamedTuple

from deployments.ingress.calls import Question, is_cancelled
from deployments.rows import Parcel, Reply

logger = logging.getLogger("ray.serve")

# Of one call: messages are capped at 4 MB in throughput mode.
_MAX_CALL_TOKENS = 2**18
# Whatever a row's length, it has a row's share of a forward.
_LEAST_LOAD = 32
# One that waits at the replica for an answer, and one that is on its way there. That the first
# comes back tells that the second has arrived.
_MAX_CALLS = 2
# Of rows, in all outboxes of this process.
_ids = itertools.count(1)
# A call that came to nothing keeps its place for so long, so that not one follows on another.
_PAUSE_S = 0.05


class ReplicaLost(Exception):
    """The replica is dead, or is to take no rows any more: its rows are to be asked elsewhere."""


class CallLost(Exception):
    """A call did not reach its replica, or not its reply; the replica may be well."""


class NotTaken(CallLost):
    """Nobody has taken anything of a call."""


class Asked(NamedTuple):
    """One row.

    Attributes:
        question: What it is a part of.
        at: Which of its inputs it is.
        tried: The replicas that could not answer it.
        lost_s: By the event loop's clock, when a call was lost that it, or its answer, was in.
    """

    question: Question
    at: int
    tried: tuple[str, ...] = ()
    lost_s: float | None = None

    @property
    def load(self) -> int:
        """What a replica has to do for it: its tokens, or those of a short row if it has fewer."""
        return max(_LEAST_LOAD, len(self.question.inputs[self.at][0]))


Exchange = Callable[[Sequence[Parcel], Sequence[int]], Awaitable[Reply]]


class Outbox:
    """Brings rows to one replica and takes their answers back. Owned by one event loop.

    Rows leave at once, together with all others that are there; while a call is on its way, others
    gather for the next. No row waits for more to come, nor an answer for another one.

    Attributes:
        closed: Whether the replica is lost.
    """

    def __init__(
        self,
        exchange: Exchange,
        heard: Callable[[Reply], None],
        done: Callable[[int], None],
        unanswered: Callable[[Sequence[Asked], Exception], None],
    ) -> None:
        """Take the way there, and who is told.

        Args:
            exchange: Calls the replica, see `deployments.model.exchange.Exchange.call`; raises
                ReplicaLost or CallLost.
            heard: Called with each reply.
            done: Called with the load of rows that are not here any more.
            unanswered: Called with rows that are not here any more, and why.
        """
        self._exchange = exchange
        self._heard, self._done, self._unanswered = heard, done, unanswered
        self._waiting: deque[Asked] = deque()
        self._away: dict[int, Asked] = {}
        self._gone: list[int] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._beginning = False  # the last of them has yet to take its rows
        self.closed = False

    def put(self, rows: Iterable[Asked]) -> None:
        """Send rows of one question."""
        rows = list(rows)
        self._waiting.extend(rows)
        rows[0].question.answers.add_done_callback(lambda _, of=rows[0].question: self._end(of))  # type: ignore[misc]
        self._go()

    def close(self, error: Exception) -> None:
        """Give up the replica; all rows go back."""
        if self.closed:
            return
        self.closed = True
        rows = [*self._away.values(), *self._waiting]
        self._away.clear()
        self._waiting.clear()
        self._count_out(rows)
        self._tell(rows, error)

    def _go(self) -> None:
        """Make another call if there is a reason: rows, word of rows that are gone, or answers."""
        if self.closed or self._beginning or len(self._calls) >= _MAX_CALLS:
            return
        if self._waiting or self._gone or (self._away and not self._calls):
            # It begins in the loop's next turn, with all that this one still brings.
            self._beginning = True
            # Of no request: Serve would take two calls in one's context for the same, and end
            # them with it.
            call = asyncio.get_running_loop().create_task(self._call(), context=Context())
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _call(self) -> None:
        self._beginning = False
        if self.closed:
            return
        gone, self._gone = self._gone, []
        parcels = self._pack()
        sent = [row[0] for parcel in parcels for row in parcel.rows]
        try:
            reply = await self._exchange(parcels, gone)
        except ReplicaLost as error:
            self.close(error)
        except NotTaken as error:
            self._gone += gone
            self._take_back(sent, error)
            await asyncio.sleep(_PAUSE_S)
        except CallLost as error:
            self._gone += gone
            await self._doubt(error)
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            self._gone += gone
            await self._doubt(CallLost("Ray Serve has cancelled a call"))  # nobody here has
        except Exception as error:
            logger.error("a call to a model replica failed", exc_info=error)
            self._gone += [*gone, *sent]
            for row in self._remove(sent):
                row.question.fail(error)
            await self._doubt(CallLost(repr(error)))
        else:
            if not self.closed:
                self._settle(reply)
        current = asyncio.current_task()
        if current is not None:
            self._calls.discard(current)
        self._go()

    async def _doubt(self, error: CallLost) -> None:
        """Give back all rows: which of them a lost reply had answers of is not known."""
        numbers = [*self._away]
        self._gone += numbers
        self._take_back(numbers, error)
        await asyncio.sleep(_PAUSE_S)

    def _pack(self) -> list[Parcel]:
        """Take the rows that fit into a call, those of one version together."""
        parcels: dict[object, Parcel] = {}
        num_tokens = 0
        over: list[Asked] = []
        now_s = asyncio.get_running_loop().time()
        while self._waiting:
            row = self._waiting[0]
            question = row.question
            if question.over:
                self._waiting.popleft()
                over.append(row)
                continue
            ids, type_ids = question.inputs[row.at]
            num_tokens += len(ids)
            if num_tokens > _MAX_CALL_TOKENS and parcels:
                break
            self._waiting.popleft()
            number = next(_ids)
            self._away[number] = row
            question.sent.append(number)
            facts = question.facts
            key = (
                facts["task"],
                facts["version"],
                facts["problem_type"],
                facts["priority"],
                facts["latency_target_ms"],
            )
            parcel = parcels.get(key)
            if parcel is None:
                parcel = parcels[key] = Parcel(*key, [])
            left_s = None if question.deadline_s is None else question.deadline_s - now_s
            parcel.rows.append((number, ids, type_ids, question.number, left_s))
        self._count_out(over)
        return [*parcels.values()]

    def _settle(self, reply: Reply) -> None:
        """Hand out answers; one that comes twice, or for nobody, is dropped."""
        self._heard(reply)
        answered: list[Asked] = []
        for number, answer in reply["answers"]:
            row = self._away.pop(number, None)
            if row is not None:
                answered.append(row)
                row.question.answer(row.at, answer)
        self._count_out(answered)
        for numbers, error in reply["failed"]:
            self._take_back(numbers, error)

    def _remove(self, numbers: Sequence[int]) -> list[Asked]:
        """Let go of rows that are away; those that are not any more are left out."""
        rows = [self._away.pop(number) for number in numbers if number in self._away]
        self._count_out(rows)
        return rows

    def _take_back(self, numbers: Sequence[int], error: Exception) -> None:
        self._tell(self._remove(numbers), error)

    def _count_out(self, rows: Sequence[Asked]) -> None:
        if rows:
            self._done(sum(row.load for row in rows))

    def _tell(self, rows: Sequence[Asked], error: Exception) -> None:
        """Say that rows are not answered here, even if they are none: there is something wrong."""
        self._unanswered([row for row in rows if not row.question.over], error)

    def _end(self, question: Question) -> None:
        """Let go of a question's rows, of which there are some only if nobody waits for it."""
        if not question.answers.cancelled() and question.answers.exception() is None:
            return
        gone = [number for number in question.sent if number in self._away]
        if gone:
            self._remove(gone)
            self._gone += gone
            self._go()
