from typing import Any

from deployments.catalog.usage import UsageSums
from deployments.snapshot import Snapshot, TaskRecord, VersionRecord
from deployments.usage import Usage

OLD, NEW = "0" * 8, "1" * 8


def snapshot(revision: int = 1, **changes: Any) -> Snapshot:
    one = VersionRecord(created_s=0, by="us", source="upload")
    given = {"traffic": {NEW: 0.5}, "max_error_rate": 0.1, **changes}
    record = TaskRecord(revision=revision, active=OLD, versions={OLD: one, NEW: one}, **given)
    return Snapshot(revision=revision, tasks={"mood": record})


def usage(version: str, rows: int, errors: int = 0, **counts: Any) -> Usage:
    return Usage(task="mood", version=version, num_rows=rows, num_errors=errors, **counts)


def test_a_version_fails_over_its_rate_and_not_at_it() -> None:
    sums = UsageSums()
    sums.add([usage(NEW, 30, 3)], snapshot())
    assert list(sums.failing(snapshot())) == []
    sums.add([usage(NEW, 10, 2)], snapshot())
    ((task, version, reason),) = sums.failing(snapshot())
    assert (task, version) == ("mood", NEW)
    assert reason == "5 of 40 rows failed, over max_error_rate 0.1"


def test_few_rows_say_nothing() -> None:
    sums = UsageSums()
    sums.add([usage(NEW, 19, 19)], snapshot())
    assert list(sums.failing(snapshot())) == []
    sums.add([usage(NEW, 1, 1)], snapshot())
    assert len(list(sums.failing(snapshot()))) == 1


def test_the_active_version_and_those_without_a_rate_are_left_alone() -> None:
    sums = UsageSums()
    sums.add([usage(OLD, 100, 100), usage(NEW, 100, 100)], snapshot())
    assert list(sums.failing(snapshot(traffic={}))) == []
    assert list(sums.failing(snapshot(max_error_rate=None))) == []


def test_a_new_share_is_a_new_trial() -> None:
    now_s = [0.0]
    sums = UsageSums(lambda: now_s[0])
    sums.add([usage(NEW, 100, 100)], snapshot())
    before, after = snapshot(1, traffic={}), snapshot(2)
    sums.changed(before, after)
    assert list(sums.failing(after)) == []
    assert sums.of("mood")[NEW]["num_errors"] == 100
    sums.changed(after, snapshot(3, pinned=True))
    sums.add([usage(NEW, 20, 20)], snapshot())
    assert list(sums.failing(after)) == [], "it may have been counted before"
    now_s[0] = 2.5
    sums.add([usage(NEW, 20, 20)], snapshot())
    assert len(list(sums.failing(after))) == 1


def test_what_shadows_found_is_told_as_means() -> None:
    sums = UsageSums()
    sums.add([usage(NEW, 0, num_shadowed=3, num_agreed=2, score_shift=0.3)], snapshot())
    sums.add(
        [usage(NEW, 0, num_shadowed=1, num_agreed=1, score_shift=0.1, last_used_s=7.0)], snapshot()
    )
    told = sums.of("mood")[NEW]
    assert told["shadow"] == {"num_rows": 4, "agreement": 0.75, "mean_score_shift": 0.1}
    assert told["last_used_s"] == 7.0
    assert "shadow" not in UsageSums().of("mood").get(OLD, {})


def test_versions_and_tasks_that_are_gone_are_forgotten() -> None:
    sums = UsageSums()
    sums.add([usage(OLD, 1), usage(NEW, 1)], snapshot())
    one = VersionRecord(created_s=0, by="us", source="upload")
    less = TaskRecord(revision=2, active=OLD, versions={OLD: one})
    sums.changed(snapshot(1), Snapshot(revision=2, tasks={"mood": less}))
    assert set(sums.of("mood")) == {OLD}
    after = Snapshot(revision=2, tasks={"mood": less})
    sums.add([usage(NEW, 1)], after)  # told a little late
    assert set(sums.of("mood")) == {OLD}
    sums.changed(Snapshot(revision=2, tasks={"mood": less}), Snapshot(revision=3))
    assert sums.of("mood") == {}


def test_what_is_told_of_a_deleted_task_is_not_kept() -> None:
    sums = UsageSums()
    sums.add([usage(OLD, 1)], snapshot(2, traffic={}, deleted=True))
    assert sums.of("mood") == {}
    sums.add([usage(OLD, 1)], Snapshot(revision=3))  # a plain folder
    assert sums.of("mood")[OLD]["num_rows"] == 1


def test_a_version_that_was_good_for_a_million_rows_is_judged_by_its_last() -> None:
    sums = UsageSums()
    for _ in range(1000):
        sums.add([usage(NEW, 1000)], snapshot())
    assert list(sums.failing(snapshot())) == []
    for _ in range(2):
        sums.add([usage(NEW, 100, 100)], snapshot())
    assert len(list(sums.failing(snapshot()))) == 1
    assert sums.of("mood")[NEW]["num_rows"] == 1_000_200
    for _ in range(2):
        sums.add([usage(NEW, 1000)], snapshot())
    assert list(sums.failing(snapshot())) == []


def test_few_errors_among_the_last_rows_are_no_reason() -> None:
    sums = UsageSums()
    for _ in range(500):
        sums.add([usage(NEW, 10, 1)], snapshot())
        assert list(sums.failing(snapshot())) == []


def test_another_rate_is_a_new_trial() -> None:
    now_s = [0.0]
    sums = UsageSums(lambda: now_s[0])
    free, strict = snapshot(1, max_error_rate=None), snapshot(2)
    sums.add([usage(NEW, 100, 100)], free)
    sums.changed(free, strict)
    now_s[0] = 2.5
    assert list(sums.failing(strict)) == []
    sums.add([usage(NEW, 20, 20)], strict)
    assert len(list(sums.failing(strict))) == 1
