from typing import Any

from deployments.catalog.usage import UsageSums
from deployments.snapshot import Snapshot, TaskRecord, Usage, VersionRecord

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
    sums.add([usage(NEW, 30, 3)])
    assert list(sums.failing(snapshot())) == []
    sums.add([usage(NEW, 10, 2)])
    ((task, version, reason),) = sums.failing(snapshot())
    assert (task, version) == ("mood", NEW)
    assert reason == "5 of 40 rows failed, over max_error_rate 0.1"


def test_few_rows_say_nothing() -> None:
    sums = UsageSums()
    sums.add([usage(NEW, 19, 19)])
    assert list(sums.failing(snapshot())) == []
    sums.add([usage(NEW, 1, 1)])
    assert len(list(sums.failing(snapshot()))) == 1


def test_the_active_version_and_those_without_a_rate_are_left_alone() -> None:
    sums = UsageSums()
    sums.add([usage(OLD, 100, 100), usage(NEW, 100, 100)])
    assert list(sums.failing(snapshot(traffic={}))) == []
    assert list(sums.failing(snapshot(max_error_rate=None))) == []


def test_a_new_share_is_a_new_trial() -> None:
    now_s = [0.0]
    sums = UsageSums(lambda: now_s[0])
    sums.add([usage(NEW, 100, 100)])
    before, after = snapshot(1, traffic={}), snapshot(2)
    sums.changed(before, after)
    assert list(sums.failing(after)) == []
    assert sums.of("mood")[NEW]["num_errors"] == 100
    sums.changed(after, snapshot(3, pinned=True))
    sums.add([usage(NEW, 20, 20)])
    assert list(sums.failing(after)) == [], "it may have been counted before"
    now_s[0] = 2.5
    sums.add([usage(NEW, 20, 20)])
    assert len(list(sums.failing(after))) == 1


def test_what_shadows_found_is_told_as_means() -> None:
    sums = UsageSums()
    sums.add([usage(NEW, 0, num_shadowed=3, num_agreed=2, score_shift=0.3)])
    sums.add([usage(NEW, 0, num_shadowed=1, num_agreed=1, score_shift=0.1, last_used_s=7.0)])
    told = sums.of("mood")[NEW]
    assert told["shadow"] == {"num_rows": 4, "agreement": 0.75, "mean_score_shift": 0.1}
    assert told["last_used_s"] == 7.0
    assert "shadow" not in UsageSums().of("mood").get(OLD, {})


def test_versions_and_tasks_that_are_gone_are_forgotten() -> None:
    sums = UsageSums()
    sums.add([usage(OLD, 1), usage(NEW, 1)])
    one = VersionRecord(created_s=0, by="us", source="upload")
    less = TaskRecord(revision=2, active=OLD, versions={OLD: one})
    sums.changed(snapshot(1), Snapshot(revision=2, tasks={"mood": less}))
    assert set(sums.of("mood")) == {OLD}
    sums.changed(Snapshot(revision=2, tasks={"mood": less}), Snapshot(revision=3))
    assert sums.of("mood") == {}
