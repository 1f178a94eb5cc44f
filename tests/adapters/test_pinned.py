import asyncio
import logging

import pytest

from adapters.errors import AdapterRefused, TaskNotFound
from adapters.pinned import Pinned


class Seats:
    """Keeps what it is told to, as slots do."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.full = False

    async def keep(self, version: str) -> None:
        await asyncio.sleep(0)
        if self.full:
            raise ValueError("no slot is left")
        if version not in self.kept:
            self.kept.append(version)

    def let_go(self, version: str) -> None:
        self.kept.remove(version)


class Folders:
    """Finds task@1 of all but two tasks, and counts how many are looked for at a time."""

    def __init__(self) -> None:
        self.running = self.most = 0

    async def __call__(self, task: str) -> str:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.01)
        self.running -= 1
        if task == "broken":
            raise AdapterRefused(task, ["it has no head"])
        if task == "absent":
            raise TaskNotFound(task)
        return f"{task}@1"


async def loaded(*tasks: str) -> tuple[Pinned, Seats, Folders]:
    seats, folders = Seats(), Folders()
    pinned = Pinned(tasks, seats, folders)
    await pinned.load()
    return pinned, seats, folders


async def test_all_are_kept_and_brought_side_by_side() -> None:
    _, seats, folders = await loaded("mood", "spam", "topic")
    assert sorted(seats.kept) == ["mood@1", "spam@1", "topic@1"]
    assert folders.most == 3


async def test_one_that_cannot_be_served_is_told_and_stops_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "ray.serve"):
        _, seats, _ = await loaded("mood", "broken", "absent")
    assert seats.kept == ["mood@1"]
    told = [record.getMessage() for record in caplog.records]
    assert "pinned_tasks: 1 of 3 are in their slots" in told
    assert any("broken" in line and "it has no head" in line for line in told)
    assert any("there is no task 'absent'" in line for line in told)


async def test_no_pinned_tasks_are_not_worth_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ray.serve"):
        await loaded()
    assert caplog.records == []


async def test_a_new_version_takes_the_place_of_the_old_one() -> None:
    pinned, seats, _ = await loaded("mood", "spam")
    await pinned.answered("mood", "mood@2")
    assert sorted(seats.kept) == ["mood@2", "spam@1"]
    await pinned.answered("mood", "mood@2")
    assert sorted(seats.kept) == ["mood@2", "spam@1"]


async def test_one_that_could_not_be_loaded_is_kept_from_its_first_answer_on() -> None:
    pinned, seats, _ = await loaded("absent")
    await pinned.answered("absent", "absent@1")
    assert seats.kept == ["absent@1"]


async def test_others_are_not_kept() -> None:
    pinned, seats, _ = await loaded("mood")
    await pinned.answered("spam", "spam@1")
    assert seats.kept == ["mood@1"]


async def test_calls_at_once_keep_a_version_once() -> None:
    pinned, seats, _ = await loaded("mood")
    await asyncio.gather(*(pinned.answered("mood", "mood@2") for _ in range(10)))
    assert seats.kept == ["mood@2"]


async def test_a_version_for_which_no_slot_is_left_is_answered_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pinned, seats, _ = await loaded("mood")
    seats.full = True
    await pinned.answered("mood", "mood@2")
    assert "mood@2 cannot be kept: no slot is left" in caplog.text


async def test_versions_that_are_said_stay_in_the_place_of_the_one_that_answered() -> None:
    pinned, seats, _ = await loaded("mood")
    pinned.say("mood", ["mood@2", "mood@3"])
    assert seats.kept == []
    assert await pinned.bring(["mood", "other"]) == {}
    assert sorted(seats.kept) == ["mood@2", "mood@3"]
    await pinned.answered("mood", "mood@4")
    assert sorted(seats.kept) == ["mood@2", "mood@3"]
    pinned.say("mood", ["mood@3"])
    assert seats.kept == ["mood@3"]
    pinned.say("mood", None)  # goes by its answers again
    assert seats.kept == []
    await pinned.answered("mood", "mood@5")
    assert seats.kept == ["mood@5"]
    pinned.say("mood", [])
    await pinned.answered("mood", "mood@5")
    assert seats.kept == []


async def test_a_task_that_no_name_pins_is_pinned_as_said() -> None:
    pinned, seats, _ = await loaded()
    pinned.say("mood", ["mood@1"])
    await pinned.bring(["mood"])
    pinned.say("mood", None)
    await pinned.answered("mood", "mood@1")
    assert seats.kept == []


@pytest.mark.parametrize("turns", range(8))
async def test_what_is_let_go_while_it_comes_does_not_stay(turns: int) -> None:
    pinned, seats, _ = await loaded()
    pinned.say("mood", ["mood@1"])
    coming = asyncio.ensure_future(pinned.bring(["mood"]))
    for _ in range(turns):
        await asyncio.sleep(0)
    pinned.say("mood", [])
    await coming
    assert seats.kept == []


async def test_what_found_no_room_is_tried_again_when_pins_have_changed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pinned, seats, _ = await loaded()
    pinned.say("mood", ["mood@1"])
    seats.full = True
    assert [str(problem) for problem in (await pinned.bring(["mood"])).values()] == [
        "no slot is left"
    ]
    for _ in range(3):
        await pinned.answered("mood", "mood@1")
    assert caplog.text.count("cannot be kept") == 1
    seats.full = False
    await pinned.answered("mood", "mood@1")
    assert seats.kept == []
    pinned.say("spam", None)
    await pinned.answered("mood", "mood@1")
    assert seats.kept == ["mood@1"]
