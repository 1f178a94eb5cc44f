"""The model replicas as one: rows in, answers out, whichever replica has which. Knows no Ray."""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import Awaitable, Sequence
from contextvars import Context
from functools import partial
from typing import Protocol

from adapters.errors import AdapterError
from deployments.errors import BatchLoopDied, NotReady, Overloaded, ReplicasLost
from deployments.ingress.calls import Answers, Encodings, Question, is_cancelled
from deployments.ingress.outbox import Asked, CallLost, NotTaken, Outbox, ReplicaLost
from deployments.ingress.placement import Placement
from deployments.rows import Facts, Parcel, Reply, Residency

logger = logging.getLogger("ray.serve")

# Rows of a request that are placed together: a large one is spread over replicas.
_CHUNK_ROWS = 32
# How often replicas are asked who they are and what they hold; more often while rows have none.
_LOOK_EVERY_S, _LOOK_AGAIN_S = 1.0, 0.1
# How long rows wait for a first replica, or one that can be reached.
_PATIENCE_S = 10.0
# A replica that died or could not answer, and another one.
_MOST_TRIES = 2
# Where a call was lost nobody knows whether the replica died, and of what: then one more.
_MOST_LOST = 3
_LOST = "the model replica was lost; try again in a second"


class Calls(Protocol):
    """How replicas are called."""

    async def publish(self, heard: dict[str, int]) -> list[tuple[str, Residency | None] | None]:
        """Ask all replicas who they are; see `deployments.model.deployment.Model.publish`.

        Returns:
            What each says, None where one could not be asked.

        Raises:
            NotReady: They did not answer in time.
        """
        ...

    def exchange(
        self, replica: str, ingress: str, heard: int, parcels: Sequence[Parcel], gone: Sequence[int]
    ) -> Awaitable[Reply]:
        """Call one replica; see `deployments.model.exchange.Exchange.call`.

        Raises:
            ReplicaLost: It is dead.
            CallLost: The call or its reply did not arrive.
        """
        ...


class Replicas:
    """Places rows, and sends them again to another replica when one is lost. One event loop's."""

    def __init__(self, calls: Calls) -> None:
        """Take how replicas are called; who they are is found out at the first question."""
        self._calls = calls
        self._placement = Placement()
        self._outboxes: dict[str, Outbox] = {}
        self._homeless: list[Asked] = []
        self._look_now = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    async def ask(
        self, facts: Facts, inputs: Encodings, deadline_s: float | None = None
    ) -> Answers:
        """Have inputs answered; when the caller goes, so do their rows.

        Raises:
            AdapterError: The version cannot be had.
            NotReady: No replica can answer.
        """
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(
                self._look(),
                context=Context(),  # of no request, whose end would be its own
            )
        question = Question(facts, inputs, deadline_s)
        self._place([Asked(question, index) for index in range(len(inputs))])
        try:
            return await question.answers
        finally:
            del question  # whose error has this frame in its traceback: a cycle

    def _place(self, rows: Sequence[Asked]) -> None:
        """Send rows of one question, those in a chunk to one replica."""
        question = rows[0].question
        for first in range(0, len(rows), _CHUNK_ROWS):
            chunk = rows[first : first + _CHUNK_ROWS]
            load = sum(row.load for row in chunk)
            tried = {name for row in chunk for name in row.tried}
            replica = self._placement.place(question.name, load, tried)
            if replica is None:
                self._homeless += chunk
                self._look_now.set()
            else:
                self._outboxes[replica].put(chunk)

    def _join(self, name: str) -> None:
        self._placement.join(name)
        if name not in self._outboxes:
            self._outboxes[name] = Outbox(
                # Each box has a name of its own: what another one asked must not answer its rows.
                partial(self._exchange, name, uuid.uuid4().hex),
                lambda reply: self._placement.hear(name, reply["residency"]),
                lambda load: self._placement.done(name, load),
                partial(self._again, name),
            )

    def _leave(self, name: str, why: Exception) -> None:
        """Do without a replica; its rows go elsewhere."""
        self._placement.leave(name)
        outbox = self._outboxes.pop(name, None)
        if outbox is not None:
            outbox.close(why)

    async def _exchange(
        self, name: str, box: str, parcels: Sequence[Parcel], gone: Sequence[int]
    ) -> Reply:
        heard = self._placement.heard_of(name)
        reply = await self._calls.exchange(name, box, heard, parcels, gone)
        if reply["replica"] != name:
            raise NotTaken(f"a call to replica {name} has reached another")
        return reply

    def _again(self, name: str, rows: Sequence[Asked], error: Exception) -> None:
        """Try rows elsewhere that a replica has not answered, or tell why not."""
        if isinstance(error, ReplicaLost):
            self._leave(name, error)
        if isinstance(error, (CallLost, BatchLoopDied)):
            self._placement.shun(name)
        if isinstance(error, (ReplicaLost, CallLost)):
            self._look_now.set()
        now_s = asyncio.get_running_loop().time()
        again: dict[int, list[Asked]] = {}
        for row in rows:
            if isinstance(error, ReplicaLost):
                row = row._replace(tried=(*row.tried, name))
                given_up = len({*row.tried}) >= _MOST_TRIES
            elif isinstance(error, (BatchLoopDied, Overloaded)):
                row = row._replace(tried=(*row.tried, name))
                # It would say the same again, as often as it is asked.
                names = {*self._placement.names}
                alone = bool(names) and names <= {*row.tried}
                given_up = alone or len({*row.tried}) >= _MOST_TRIES
            elif isinstance(error, CallLost):
                lost = () if isinstance(error, NotTaken) else (name,)
                row = row._replace(tried=(*row.tried, *lost), lost_s=row.lost_s or now_s)
                given_up = (
                    len({*row.tried}) >= _MOST_LOST or now_s - (row.lost_s or now_s) > _PATIENCE_S
                )
            else:
                if isinstance(error, AdapterError):
                    self._placement.missing(name, row.question.name)
                row.question.fail(error)
                continue
            if given_up:
                row.question.fail(error if isinstance(error, Overloaded) else ReplicasLost(_LOST))
            else:
                again.setdefault(id(row.question), []).append(row)
        for of_question in again.values():
            self._place(of_question)

    async def _look(self) -> None:
        """Keep knowing who the replicas are; rows that have none wait for the first."""
        loop = asyncio.get_running_loop()
        homeless_s: float | None = None  # since when there has been none
        while True:
            self._look_now.clear()
            try:
                await self._look_once()
            except NotReady:
                pass
            except asyncio.CancelledError:
                if is_cancelled():
                    raise
            except Exception as error:
                logger.error("the model replicas could not be asked", exc_info=error)
            if self._placement.names:
                homeless_s = None
                self._house()
            elif homeless_s is None:
                homeless_s = loop.time()
            elif loop.time() - homeless_s > _PATIENCE_S:
                self._turn_away()
            try:
                if self._homeless:
                    await asyncio.sleep(_LOOK_AGAIN_S)
                else:
                    async with asyncio.timeout(_LOOK_EVERY_S):
                        await self._look_now.wait()
            except TimeoutError:
                pass

    async def _look_once(self) -> None:
        told = await self._calls.publish(self._placement.heard)
        known = [one for one in told if one is not None]
        for name, residency in known:
            self._join(name)
            self._placement.hear(name, residency)
        if len(known) < len(told):
            return  # who it is that did not answer is not known, and it need not be dead
        for name in self._outboxes.keys() - {name for name, _ in known}:
            self._leave(name, CallLost(f"replica {name} is not there any more"))

    def _house(self) -> None:
        rows, self._homeless = self._homeless, []
        for question, of_question in itertools.groupby(rows, key=lambda row: row.question):
            if not question.over:
                self._place([*of_question])

    def _turn_away(self) -> None:
        rows, self._homeless = self._homeless, []
        for row in rows:
            row.question.fail(NotReady("no model replica is running"))
