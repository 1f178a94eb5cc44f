"""Who goes next: fair shares of the tokens, over priorities, tasks and requests. Plain Python.

The row that leads a batch is that of the priority, the task and the request with the least service,
as in start-time fair queueing (Goyal, Vin and Cheng, 1996); the rest of the batch are, again of
those with the least service first, rows near to it in length where layers see padding, and of any
length where they do not. So however many rows a task sends, or a request has, a row of another one
leads the next batch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Protocol

from adapters.rules import Priority
from deployments.model.accounts import Level, Request, Task
from deployments.model.planner import Filling
from deployments.model.waiter import Waiter, Waits

# Of the tokens, while all of them wait: 16/21, 4/21, 1/21. Within that a higher one goes at once.
WEIGHTS: dict[Priority, int] = {"high": 16, "normal": 4, "low": 1}
# Beside other requests of its task, a request has its turn for so many tokens at a time. Short ones
# have their turns in the order they came.
_TURN_TOKENS = 64
# Beside more requests than these it waits no longer: else it would for ever, as more and more come.
_MOST_BESIDE = 16
# A batch is filled in so many turns, in each of which everyone may have a part of it.
_TURNS = 8
# Of a batch in which all rows of some tasks go, tasks with more than a batch of them have so much:
# the former wait for all of it, the latter wait anyway. And so much have the latter of each of the
# next batches, in which nobody else goes: who was answered asks again, and would wait for it.
_BESIDE_OTHERS, _BEFORE_OTHERS, _NUM_BEFORE = 1 / 8, 1 / 2, 16
# Of more tasks than these, the others only have what they leave.
_MOST_COMPARED = 128


class Starts(Protocol):
    """What limits a batch; see `deployments.model.planner.Planner`."""

    @property
    def padded(self) -> bool:
        """Whether rows of like length belong together."""

    def start(self, length: int) -> Filling:
        """Begin a batch with a row of so many tokens."""


class Shares:
    """Rows that wait, and which go next.

    Rows are of a kind if they are of a length, or all of one if it does not matter.

    Attributes:
        num_tokens: Of all rows that wait.
    """

    def __init__(self, *, padded: bool = True) -> None:
        """Begin with none; `padded` says whether rows of like length belong together."""
        self._padded = padded
        self._number = 0
        self._start()

    def _start(self) -> None:
        """Begin all accounts anew: whoever comes next has nobody to share with."""
        self.num_tokens = self._num_rows = self._num_gone = 0
        self._levels = {name: Level(weight) for name, weight in WEIGHTS.items()}
        self._clock = 0.0
        self._num_before = 0  # batches that are kept short for tasks that were answered
        self._at: dict[int, dict[Task, None]] = {}  # whose rows there are, by kind

    def __len__(self) -> int:
        """How many rows wait."""
        return self._num_rows

    def add(self, waiter: Waiter) -> None:
        """Let a row wait."""
        row: Waits = waiter.row
        task, length = self._task(row), row.num_tokens
        request = task.requests.get(row.request)
        if request is None:
            request = task.requests[row.request] = Request(task.clock)
        request.num_tokens += length
        request.num_rows += 1
        task.num_rows += 1
        task.num_tokens += length
        self._number += 1
        due = request.start + -(-request.num_tokens // _TURN_TOKENS) * _TURN_TOKENS
        kind = self._kind(waiter)
        heapq.heappush(task.heaps.setdefault(kind, []), (due, self._number, waiter))
        self._at.setdefault(kind, {})[task] = None
        waiter.gone = False
        self._num_rows += 1
        self.num_tokens += length

    def discard(self, waiter: Waiter) -> None:
        """Let a row wait no more, if it does."""
        if waiter.gone:
            return
        self._num_gone += 1
        self._forget(waiter, self._levels[waiter.row.priority].tasks[waiter.row.share])
        if self._num_gone > 1024 + self._num_rows:
            self._sweep()

    def clear(self) -> list[Waiter]:
        """Let no row wait any more; return those that did."""
        waiters = [one[2] for heap in self._heaps() for one in heap if not one[2].gone]
        for waiter in waiters:
            waiter.gone = True
        self._start()
        return waiters

    def take(self, planner: Starts, taken: list[Waiter]) -> None:
        """Choose the next batch from all that wait, of whom there must be some.

        Args:
            planner: Limits it.
            taken: What goes, added as it is chosen, so that nothing is lost if the planner raises.
        """
        waiting = [level for level in self._levels.values() if level.tasks]
        for level in waiting:
            level.clock = max(level.clock, min(task.served for task in level.tasks.values()))
        level = min(waiting, key=lambda level: level.served)  # of equal ones the highest
        self._clock = max(self._clock, level.served)
        task = min(level.tasks.values(), key=lambda task: task.served)
        kind = task.first()
        filling = planner.start(task.next_length(kind))
        tasks = [task for level in waiting for task in level.tasks.values()]
        taken.append(self._pop(task, kind))
        if len(tasks) > _MOST_COMPARED:
            tasks = heapq.nsmallest(_MOST_COMPARED, tasks, key=self._ahead)
        self._num_before = max(0, self._num_before - 1)
        limit, kinds = 0.0, filling.near(self._at)
        while kinds and not filling.full:
            limit += filling.max_tokens / _TURNS
            lags = {kind: self._fill(filling, kind, tasks, limit, taken) for kind in kinds}
            kinds = [kind for kind in kinds if lags[kind] < math.inf]
            limit = max(limit, min(lags.values()))
            if self._suffices(filling.max_tokens, tasks, taken):
                return
        for kind in filling.near(self._at):
            for task in list(self._at.get(kind, ())):
                while kind in task.heaps and filling.offer(task.next_length(kind)):
                    taken.append(self._pop(task, kind))

    def _suffices(self, most: int, tasks: Sequence[Task], taken: Sequence[Waiter]) -> bool:
        """Whether only such tasks have rows left as wait anyway, and others would wait for more."""
        left = [task for task in tasks if task.num_rows]
        if not left or any(task.num_tokens <= most for task in left):
            return False
        part, weight = 1.0, max(task.level.weight for task in left)
        # What is urgent does not go slowly for what is not.
        if any(not task.num_rows and task.level.weight >= weight for task in tasks):
            self._num_before, part = 1 + _NUM_BEFORE, _BESIDE_OTHERS  # the next one counts it first
        elif self._num_before:
            part = _BEFORE_OTHERS
        names = {task.name for task in left}
        theirs: int = sum(one.row.num_tokens for one in taken if one.row.share in names)
        return theirs >= part * most

    def _fill(
        self,
        filling: Filling,
        kind: int,
        tasks: Sequence[Task],
        limit: float,
        taken: list[Waiter],
    ) -> float:
        """Take rows of a kind, of tasks that have had no more than a limit over their share.

        Returns:
            How much more the next one has had, in tokens; infinite if none of that kind can go.
        """
        if not filling.fits(kind):
            return math.inf
        lags = [
            (self._lag(task, kind), -task.level.weight, task.name, task)
            for task in tasks
            if kind in task.heaps
        ]
        heapq.heapify(lags)
        while lags:
            lag, rank, name, task = lags[0]
            if lag > limit:
                return lag
            if not filling.offer(task.next_length(kind)):
                heapq.heappop(lags)
                continue
            taken.append(self._pop(task, kind))
            if kind in task.heaps:
                heapq.heapreplace(lags, (self._lag(task, kind), rank, name, task))
            else:
                heapq.heappop(lags)
        return math.inf

    def _lag(self, task: Task, kind: int) -> float:
        """Return how many tokens over its share a row is: as priority, as task or as request."""
        lag = self._ahead(task)
        if len(task.requests) == 1:  # nobody is kept waiting by whichever of its rows go
            return lag
        return max(lag, task.heaps[kind][0][0] - task.clock)

    def _ahead(self, task: Task) -> float:
        return max(task.level.served - self._clock, task.served - task.level.clock)

    def _kind(self, waiter: Waiter) -> int:
        row: Waits = waiter.row
        return row.num_tokens if self._padded else 0

    def _pop(self, task: Task, kind: int) -> Waiter:
        """Take the first row of a task and kind, and count it as its service."""
        waiter = heapq.heappop(task.heaps[kind])[2]
        length: int = waiter.row.num_tokens
        task.clock += length / min(len(task.requests), _MOST_BESIDE)
        task.served += length
        task.level.served += length / task.level.weight
        self._forget(waiter, task)
        return waiter

    def _forget(self, waiter: Waiter, task: Task) -> None:
        """Count a row as waiting no more; with its task's last one the task leaves."""
        waiter.gone = True
        request = task.requests[waiter.row.request]
        request.num_rows -= 1
        if not request.num_rows:
            del task.requests[waiter.row.request]
        task.num_rows -= 1
        task.num_tokens -= waiter.row.num_tokens
        self._num_rows -= 1
        self.num_tokens -= waiter.row.num_tokens
        if not task.num_rows:
            self._leave(task)
        else:
            self._prune(task, self._kind(waiter))

    def _prune(self, task: Task, kind: int) -> None:
        """Bring a row that waits to the top of a heap; without one the heap goes."""
        heap = task.heaps.get(kind)
        if heap is None:
            return
        while heap and heap[0][2].gone:
            heapq.heappop(heap)
            self._num_gone = max(0, self._num_gone - 1)
        if not heap:
            del task.heaps[kind]
            self._unlist(task, kind)

    def _unlist(self, task: Task, kind: int) -> None:
        del self._at[kind][task]
        if not self._at[kind]:
            del self._at[kind]

    def _task(self, row: Waits) -> Task:
        """Return a row's task; one that comes again has no more of a claim than who waited."""
        level = self._levels[row.priority]
        task = level.tasks.get(row.share)
        if task is None:
            if not level.tasks:
                level.served = max(level.served, self._clock)
            served = max(level.left.pop(row.share, 0.0), level.clock)
            task = level.tasks[row.share] = Task(row.share, level, served)
        return task

    def _leave(self, task: Task) -> None:
        """Take a task without rows out, and remember what it had until others have had as much."""
        level = task.level
        for kind in list(task.heaps):
            self._unlist(task, kind)
        task.heaps.clear()
        del level.tasks[task.name]
        if task.served > level.clock:
            level.left[task.name] = task.served
        if not self._num_rows:
            self._start()
        elif len(level.left) > 1024 + len(level.tasks):
            level.left = {name: had for name, had in level.left.items() if had > level.clock}

    def _heaps(self) -> list[list[tuple[float, int, Waiter]]]:
        tasks = (task for level in self._levels.values() for task in level.tasks.values())
        return [heap for task in tasks for heap in task.heaps.values()]

    def _sweep(self) -> None:
        """Let go of rows that were given up."""
        for heap in self._heaps():  # none is left empty: its first row waits
            heap[:] = [one for one in heap if not one[2].gone]
            heapq.heapify(heap)
        self._num_gone = 0
