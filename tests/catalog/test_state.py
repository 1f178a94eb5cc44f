from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import TaskNotFound, VersionNotFound
from adapters.rules import Rules
from deployments.catalog import state
from deployments.errors import BadInput, Conflict, NotReady, Stale
from deployments.snapshot import Snapshot, TaskPatch, TaskRecord

A, B, C, D = (letter * 8 for letter in "abcd")


def add(snapshot: Snapshot, version: str, task: str = "mood", **given: Any) -> Snapshot:
    fields = {"activate": False, "if_match": None, **given}
    return state.add_version(snapshot, task, version, "upload", "us", 1.5, **fields)


def patch(snapshot: Snapshot, if_match: int | None = None, **given: Any) -> Snapshot:
    return state.patch(snapshot, "mood", TaskPatch.model_validate(given), if_match)


def mood(snapshot: Snapshot) -> TaskRecord:
    return snapshot.tasks["mood"]


@pytest.fixture
def three() -> Snapshot:
    """Versions A, active, B and C."""
    return add(add(add(Snapshot(), A), B), C)


def invariants(snapshot: Snapshot) -> None:
    """What holds of every snapshot that transitions made."""
    assert Snapshot.model_validate_json(snapshot.model_dump_json()) == snapshot
    for record in snapshot.tasks.values():
        versions = record.versions.keys()
        assert 0 < record.revision <= snapshot.revision
        assert not versions & set(record.doomed)
        assert len(set(record.doomed)) == len(record.doomed)
        Rules.model_validate(record.rules)
        if record.deleted:
            assert (record.traffic, record.shadow, record.fallback) == ({}, None, None)
            assert not record.pinned
            continue
        assert record.in_use <= versions
        assert record.active not in record.traffic
        assert all(0 < share <= 1 for share in record.traffic.values())
        assert sum(record.traffic.values()) <= 1 + 1e-6
        assert record.fallback != record.active
        assert record.shadow is None or record.shadow.version != record.active
        walk = (*record.previous, record.active)
        assert set(walk) <= versions
        assert all(one != two for one, two in pairwise(walk))
        assert len(record.previous) <= state.MAX_PREVIOUS


def test_the_first_version_answers_and_a_later_one_when_told(three: Snapshot) -> None:
    invariants(three)
    assert (mood(three).active, list(mood(three).versions)) == (A, [A, B, C])
    assert three.revision == mood(three).revision == 3
    assert mood(add(three, D, activate=True)).active == D
    assert mood(add(three, B, activate=True)).active == B


def test_the_same_version_again_changes_nothing(three: Snapshot) -> None:
    assert add(three, B) is three
    assert add(three, A, activate=True) is three
    with pytest.raises(Stale):
        add(three, B, if_match=2)


def test_an_etag_is_the_revision_of_the_last_change(three: Snapshot) -> None:
    other = add(three, A, task="topic")
    assert mood(other).revision == 3
    pinned = patch(other, if_match=3, pinned=True)
    assert (mood(pinned).revision, pinned.tasks["topic"].revision) == (5, 4)
    calls: list[Callable[[], Snapshot]] = [
        lambda: patch(pinned, if_match=3, pinned=False),
        lambda: add(pinned, D, if_match=3),
        lambda: add(pinned, A, task="new", if_match=3),
        lambda: state.adopt(pinned, "mood", D, "us", 1.5, if_match=3),
        lambda: state.rollback(pinned, "mood", 3),
        lambda: state.delete_version(pinned, "mood", B, 3),
        lambda: state.delete_task(pinned, "mood", 3),
    ]
    for call in calls:
        with pytest.raises(Stale, match=r"etag (5|0), not 3"):
            call()
    assert add(pinned, A, task="new", if_match=0).tasks["new"].revision == 6


def test_a_patch_changes_what_it_gives(three: Snapshot) -> None:
    snapshot = patch(
        three, traffic={B: 0.25}, shadow={"version": C}, fallback=C, pinned=True, max_error_rate=0.1
    )
    record = mood(snapshot)
    assert record.traffic == {B: 0.25}
    assert record.shadow is not None
    assert (record.shadow.version, record.shadow.share) == (C, 1.0)
    assert (record.fallback, record.pinned, record.max_error_rate) == (C, True, 0.1)
    assert patch(snapshot) is snapshot
    assert patch(snapshot, pinned=True) is snapshot
    ended = mood(patch(snapshot, traffic={}, shadow=None, fallback=None, max_error_rate=None))
    assert ended == mood(patch(three, pinned=True)).model_copy(update={"revision": 5})


def test_shares_of_nothing_and_of_the_active_version_are_dropped(three: Snapshot) -> None:
    assert mood(patch(three, traffic={A: 0.7, B: 0.3, C: 0.0})).traffic == {B: 0.3}
    tenths = {A: 0.1, B: 0.7, C: 0.2}
    assert mood(patch(three, traffic=tenths)).traffic == {B: 0.7, C: 0.2}


@pytest.mark.parametrize("shares", [{A: 0.5}, {A: 0.0, B: 0.5}, {A: 0.5, B: 0.25}])
def test_a_share_of_the_active_version_is_what_the_others_leave(
    three: Snapshot, shares: dict[str, float]
) -> None:
    with pytest.raises(BadInput, match="gets what the others leave: leave it out"):
        patch(three, traffic=shares)
    with pytest.raises(BadInput, match=f"traffic gives {B} a share of 0.5"):
        patch(three, active=B, traffic={B: 0.5})
    assert mood(patch(three, active=B, traffic={B: 0.5, A: 0.5})).traffic == {A: 0.5}
    assert patch(three, traffic={A: 1.0}) is three


def test_of_unknown_rules_few_are_told_and_the_size_of_wrong_ones_is_not_asked(
    three: Snapshot,
) -> None:
    with pytest.raises(BadInput) as told:
        patch(three, rules={f"key-{number}": None for number in range(20_000)})
    sentences = told.value.detail.split("; ")
    assert len(sentences) == 65
    assert sentences[-1] == "rules: and 19936 more that are not known"
    with pytest.raises(BadInput, match="rules: labels: "):
        patch(three, rules={"labels": ["a", 2**70]})  # which has no size as JSON


def test_who_is_activated_is_nothing_else_beside(three: Snapshot) -> None:
    before = patch(three, traffic={B: 0.5, C: 0.25}, shadow={"version": B})
    after = mood(patch(before, active=B))
    assert (after.active, after.traffic, after.shadow) == (B, {C: 0.25}, None)
    assert after.previous == (A,)


def test_a_rollback_goes_back_and_further_back(three: Snapshot) -> None:
    snapshot = patch(patch(three, active=B), active=C)
    assert mood(snapshot).previous == (A, B)
    snapshot = patch(snapshot, fallback=B, traffic={B: 0.5})
    once = state.rollback(snapshot, "mood", None)
    record = mood(once)
    assert (record.active, record.previous) == (B, (A,))
    assert (record.fallback, record.traffic) == (None, {})
    twice = state.rollback(once, "mood", mood(once).revision)
    assert (mood(twice).active, mood(twice).previous) == (A, ())
    with pytest.raises(Conflict, match="name one: PATCH"):
        state.rollback(twice, "mood", None)


def test_sixteen_versions_back_are_remembered() -> None:
    snapshot = Snapshot()
    for number in range(20):
        snapshot = add(snapshot, f"{number:08x}", activate=True)
    assert mood(snapshot).previous == tuple(f"{number:08x}" for number in range(3, 19))


def test_all_that_is_wrong_with_a_patch_is_told_at_once(three: Snapshot) -> None:
    snapshot = state.delete_version(patch(three, fallback=B), "mood", C, None)
    with pytest.raises(BadInput) as told:
        patch(
            snapshot,
            active=B,
            traffic={D: 0.75, A: 0.75},
            shadow={"version": C},
            rules={"threshold": 2, "max_length": -1, "nonsense": 1},
        )
    sentences = told.value.detail.split("; ")
    for part in (
        f"traffic names {D}, which is no version",
        f"shadow names {C}, which is being deleted",
        "shares of traffic are over 1",
        f"active names {B}, which is the fallback",
        "rules: threshold: ",
        "rules: max_length: ",
        "rules: nonsense: is not a known rule",
    ):
        assert len([one for one in sentences if part in one]) == 1, part


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"active": None}, "active must name a version"),
        ({"active": D}, f"active names {D}"),
        ({"fallback": A}, "fallback names .* itself"),
        ({"active": B, "fallback": B}, "fallback names .* itself"),
        ({"active": B, "shadow": {"version": B}}, "shadow names .* itself"),
        ({"rules": {"nonsense": None}}, "nonsense: is not a known rule"),
        ({"rules": {"labels": ["same", "same"]}}, "must differ"),
        ({"rules": {"labels": ["x" * 70_000]}}, "more than 65536 bytes"),
    ],
)
def test_a_patch_is_refused(three: Snapshot, given: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        patch(three, **given)


def test_rules_are_merged_and_taken_back(three: Snapshot) -> None:
    snapshot = patch(three, rules={"threshold": 0.5, "max_length": 64})
    snapshot = patch(snapshot, rules={"threshold": None, "labels": ["no", "yes"]})
    assert mood(snapshot).rules == {"max_length": 64, "labels": ["no", "yes"]}


def test_a_version_in_use_stays_and_says_why(three: Snapshot) -> None:
    used = patch(three, traffic={B: 0.5}, fallback=B, shadow={"version": C})
    for version, why in (
        (A, "is active"), (B, "has traffic and is the fallback"), (C, "is the shadow")
    ):  # fmt: skip
        with pytest.raises(Conflict, match=f"mood@{version} .*{why};"):
            state.delete_version(used, "mood", version, None)


def test_a_version_is_doomed_then_forgotten_then_may_come_again(three: Snapshot) -> None:
    moved = patch(patch(three, active=B), active=C)
    moved = state.delete_version(patch(moved, active=B), "mood", C, None)
    record = mood(moved)
    assert (list(record.versions), record.previous, record.doomed) == ([A, B], (A,), (C,))
    with pytest.raises(NotReady, match="being deleted; try again in a few seconds"):
        add(moved, C)
    with pytest.raises(VersionNotFound):
        state.delete_version(moved, "mood", C, None)
    gone = state.purged(moved, "mood", C)
    assert mood(gone).doomed == ()
    assert state.purged(gone, "mood", C) is gone
    assert C in mood(add(gone, C)).versions


def test_a_task_is_deleted_then_forgotten(three: Snapshot) -> None:
    used = patch(three, traffic={B: 0.5}, fallback=B, shadow={"version": C}, pinned=True)
    deleted = state.delete_task(used, "mood", None)
    invariants(deleted)
    assert mood(deleted).deleted
    for call in (
        lambda: patch(deleted, pinned=True),
        lambda: state.rollback(deleted, "mood", None),
        lambda: state.delete_version(deleted, "mood", C, None),
        lambda: state.delete_task(deleted, "mood", None),
    ):
        with pytest.raises(TaskNotFound):
            call()
    for call in (
        lambda: add(deleted, A),
        lambda: state.adopt(deleted, "mood", A, "us", 1.5),
    ):
        with pytest.raises(NotReady):
            call()
    assert state.purged(three, "mood", None) is three
    gone = state.purged(deleted, "mood", None)
    assert gone.tasks == {}
    assert add(gone, A, if_match=0).revision == gone.revision + 1


def test_a_folder_without_a_record_can_be_deleted() -> None:
    deleted = state.delete_task(Snapshot(), "mood", 0)
    invariants(deleted)
    assert mood(deleted).deleted
    assert state.purged(deleted, "mood", None).tasks == {}


def test_the_folder_is_followed_by_those_who_only_drop_folders() -> None:
    first = state.adopt(Snapshot(), "mood", A, "us", 1.5)
    assert (mood(first).active, mood(first).folder) == (A, A)
    assert mood(first).versions[A].source == "folder"
    assert state.adopt(first, "mood", A, "us", 9.5) is first
    second = state.adopt(first, "mood", B, "us", 1.5)
    assert (mood(second).active, mood(second).folder, mood(second).previous) == (B, B, (A,))
    chosen = patch(second, active=A)
    third = state.adopt(chosen, "mood", C, "us", 1.5)
    assert (mood(third).active, mood(third).folder) == (A, C)
    beside = state.adopt(add(Snapshot(), A), "mood", B, "us", 1.5)
    assert (mood(beside).active, mood(beside).folder) == (A, B)


def test_what_was_deleted_does_not_come_back_from_its_folder() -> None:
    snapshot = state.adopt(Snapshot(), "mood", A, "us", 1.5)
    snapshot = add(snapshot, B, activate=True)
    snapshot = state.delete_version(snapshot, "mood", A, None)
    assert state.adopt(snapshot, "mood", A, "us", 1.5) is snapshot
    snapshot = state.purged(snapshot, "mood", A)
    assert state.adopt(snapshot, "mood", A, "us", 1.5) is snapshot


def test_a_canary_loses_its_share_alone(three: Snapshot) -> None:
    snapshot = patch(three, traffic={B: 0.25, C: 0.5}, max_error_rate=0.1)
    ended = state.return_traffic(snapshot, "mood", B)
    assert (mood(ended).traffic, mood(ended).max_error_rate) == ({C: 0.5}, 0.1)
    assert state.return_traffic(ended, "mood", B) is ended
    assert state.return_traffic(ended, "topic", B) is ended


@pytest.mark.parametrize("name", ["Mood", "../up", "", "mood\n", "a" * 65])
def test_a_name_that_no_task_can_have(name: str) -> None:
    for call in (
        lambda: add(Snapshot(), A, task=name),
        lambda: state.adopt(Snapshot(), name, A, "us", 1.5),
        lambda: state.delete_task(Snapshot(), name, None),
    ):
        with pytest.raises(TaskNotFound):
            call()


TASKS = st.sampled_from(["mood", "topic"])
VERSIONS = st.sampled_from([A, B, C, D])
PATCHES = st.fixed_dictionaries(
    {},
    optional={
        "active": VERSIONS,
        "traffic": st.dictionaries(VERSIONS, st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "shadow": st.none() | st.fixed_dictionaries({"version": VERSIONS}),
        "fallback": st.none() | VERSIONS,
        "pinned": st.booleans(),
        "max_error_rate": st.none() | st.floats(0, 1),
        "rules": st.sampled_from([{"threshold": 0.5}, {"threshold": None}, {"max_length": 9}]),
    },
)
STEPS: st.SearchStrategy[Callable[[Snapshot], Snapshot]] = st.one_of(
    st.builds(
        lambda t, v, on: lambda s: add(s, v, task=t, activate=on), TASKS, VERSIONS, st.booleans()
    ),
    st.builds(lambda t, v: lambda s: state.adopt(s, t, v, "us", 1.5), TASKS, VERSIONS),
    st.builds(
        lambda t, p: lambda s: state.patch(s, t, TaskPatch.model_validate(p), None), TASKS, PATCHES
    ),
    st.builds(lambda t: lambda s: state.rollback(s, t, None), TASKS),
    st.builds(lambda t, v: lambda s: state.delete_version(s, t, v, None), TASKS, VERSIONS),
    st.builds(lambda t: lambda s: state.delete_task(s, t, None), TASKS),
    st.builds(lambda t, v: lambda s: state.purged(s, t, v), TASKS, st.none() | VERSIONS),
    st.builds(lambda t, v: lambda s: state.return_traffic(s, t, v), TASKS, VERSIONS),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=40))
def test_no_sequence_of_transitions_breaks_a_record(steps: list[Any]) -> None:
    snapshot = Snapshot()
    for step in steps:
        before = snapshot.model_dump_json()
        try:
            after = step(snapshot)
        except (BadInput, Conflict, NotReady, TaskNotFound, VersionNotFound):
            after = snapshot
        assert snapshot.model_dump_json() == before
        assert after.revision == snapshot.revision + (after is not snapshot)
        assert (after is snapshot) == (after.tasks == snapshot.tasks)
        invariants(after)
        snapshot = after
