"""Versions, rules laid over them, and where they are; the deployment's class without Serve."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from adapters.directory import Directory
from adapters.errors import AdapterRefused, BankFull, VersionNotFound
from adapters.store import CONFIG, RULES, WEIGHTS, Files
from deployments.model.deployment import Model
from deployments.rows import Facts

Make = Callable[..., PeftModel]
Start = Callable[..., Awaitable[Model]]
Publish = Callable[..., str]
ROW = [([5, 6, 7], None)]
NAMED = {"labels": ["no", "yes"]}


class Counting(Directory):
    """A store that counts what it reads."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[tuple[str, str | None]] = []

    def read(self, task: str, version: str | None = None) -> Files:
        self.reads.append((task, version))
        return super().read(task, version)


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    (tmp_path / "store").mkdir()
    return Counting(tmp_path / "store")


@pytest.fixture
async def model(start_model: Start, store: Counting) -> Model:
    return await start_model(store)


@pytest.fixture
def publish(publish_to: Callable[..., str], store: Counting) -> Publish:
    return partial(publish_to, store)


@pytest.fixture
def stage(stage_in: Callable[..., str], store: Counting) -> Callable[..., str]:
    return partial(stage_in, store)


async def ask(model: Model, task: str, version: str) -> list[float]:
    [scores] = await model.predict(task, version, "single_label_classification", ROW)
    assert isinstance(scores, list)
    return scores


def holds_nothing(model: Model) -> bool:
    residents = model.residents
    return not residents.slots.resident and not residents.host.versions


async def test_each_version_answers_for_itself_whatever_the_plain_folder_holds(
    model: Model, store: Counting, publish: Publish, served_base: str, make_adapter: Make
) -> None:
    first, second = publish("mood", 1), publish("mood", 2)
    scores = {version: await ask(model, "mood", version) for version in (first, second)}
    make_adapter(store.root / "mood", served_base, num_labels=2, seed=3)
    plain = (await model.describe("mood"))["version"]
    scores[plain] = await ask(model, "mood", plain)
    assert len({tuple(of) for of in scores.values()}) == 3
    for version, of in scores.items():
        model.residents.slots.drop(f"mood@{version}")
        model.residents.host.drop(f"mood@{version}")
        assert await ask(model, "mood", version) == pytest.approx(of, abs=1e-6)


async def test_a_version_that_is_nowhere_is_not_found(model: Model, publish: Publish) -> None:
    publish("mood")
    with pytest.raises(VersionNotFound):
        await ask(model, "mood", "0" * 8)


async def test_rules_are_laid_over_a_version_s_own_without_another_read(
    model: Model, store: Counting, publish: Publish
) -> None:
    version = publish("mood", rules={"max_length": 9, "threshold": 0.75})
    own = await model.describe("mood", version)
    laid = await model.describe("mood", version, {"max_length": 7, **NAMED})
    assert (own["max_length"], own["threshold"], own["labels"]) == (9, 0.75, ["LABEL_0", "LABEL_1"])
    assert (laid["max_length"], laid["threshold"], laid["labels"]) == (7, 0.75, ["no", "yes"])
    assert own["version"] == laid["version"] == version
    assert own["rules"] != laid["rules"]
    assert await model.describe("mood", version) == own
    await ask(model, "mood", version)
    assert store.reads == [("mood", version)]


async def test_rules_are_laid_over_a_plain_folder_s(
    model: Model, store: Counting, served_base: str, make_adapter: Make
) -> None:
    make_adapter(store.root / "mood", served_base, num_labels=2)
    plain, laid = await model.describe("mood"), await model.describe("mood", rules=NAMED)
    assert laid == plain | {
        "labels": ["no", "yes"],
        "guessed": laid["guessed"],
        "rules": laid["rules"],
    }
    assert "labels" not in laid["guessed"]
    # In RAM it is without them.
    assert await model.describe("mood", plain["version"]) == plain


async def test_rules_that_do_not_fit_a_version_are_told_all_at_once(
    model: Model, store: Counting, publish: Publish
) -> None:
    version = publish("mood")
    rules = {"labels": ["a", "b", "c"], "max_length": 9999, "stride": 4, "aggregation": "max"}
    with pytest.raises(AdapterRefused) as caught:
        await model.describe("mood", version, rules)
    assert len(caught.value.problems) == 4
    with pytest.raises(AdapterRefused, match="is not a known rule"):
        await model.describe("mood", version, {"thresholds": 1})
    assert (await model.describe("mood", version))["version"] == version
    assert store.reads == [("mood", version)]


async def test_a_version_whose_rules_fit_only_with_the_catalog_s_is_answered(
    model: Model, publish: Publish
) -> None:
    version = publish("mood", rules={"threshold": {"yes": 0.9}})
    await ask(model, "mood", version)  # who asks has been told the rules that hold
    with pytest.raises(AdapterRefused, match="threshold names yes"):
        await model.describe("mood", version)
    assert (await model.describe("mood", version, NAMED))["threshold"] == {"yes": 0.9}


async def test_a_task_json_that_was_changed_by_hand_is_read(
    model: Model, store: Counting, publish: Publish
) -> None:
    version = publish("mood", rules={"max_length": 9})
    await model.describe("mood", version)
    (store.root / "mood" / version / RULES).write_text('{"max_length": 11}')
    assert (await model.describe("mood", version))["max_length"] == 11


async def test_a_check_says_what_a_load_would_and_keeps_nothing(
    model: Model, store: Counting, stage: Callable[..., str]
) -> None:
    staging = stage(rules={"max_length": 9})
    facts = await model.check("mood", staging, NAMED)
    assert holds_nothing(model)
    assert store.tasks() == []
    store.publish(staging, "mood", facts["version"])
    assert await model.describe("mood", facts["version"], NAMED) == facts


async def test_a_plain_folder_is_checked_as_it_is(
    model: Model, store: Counting, served_base: str, make_adapter: Make
) -> None:
    make_adapter(store.root / "mood", served_base, num_labels=2)
    facts = await model.check("mood", None)
    assert holds_nothing(model)
    assert await model.describe("mood") == facts


async def test_a_check_tells_all_problems_of_spec_tensors_and_rules(
    model: Model, store: Counting, served_base: str, make_adapter: Make
) -> None:
    folder = store.root / "mood"
    make_adapter(folder, served_base, num_labels=2)
    config = json.loads((folder / CONFIG).read_text()) | {"use_qalora": True}
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: torch.zeros(4, 7)}, folder / WEIGHTS)
    with pytest.raises(AdapterRefused) as caught:
        await model.check("mood", None, {"max_length": 9999})
    told = "; ".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "use_qalora" in told
    assert "[4, 7], not [4, 32]" in told
    assert "max_length 9999 is over the base's 40" in told
    with pytest.raises(AdapterRefused) as loaded:
        await model.describe("mood", rules={"max_length": 9999})
    assert loaded.value.problems == caught.value.problems


async def test_what_could_never_fit_the_bank_is_refused_by_a_check(
    start_model: Start, store: Counting, stage: Callable[..., str]
) -> None:
    model = await start_model(store, bank_gib=1e-5)
    with pytest.raises(AdapterRefused, match=r"takes .* MiB and the bank has .*; raise bank_gib"):
        await model.check("mood", stage(num_labels=500))
    assert (await model.check("mood", stage()))["task"] == "mood"


async def test_what_is_warm_is_in_a_slot(model: Model, store: Counting, publish: Publish) -> None:
    version = publish("mood")
    await model.warm("mood", version)
    assert [*model.residents.slots.resident] == [f"mood@{version}"]
    store.reads.clear()
    await ask(model, "mood", version)
    assert store.reads == []
    with pytest.raises(VersionNotFound):
        await model.warm("mood", "0" * 8)


async def test_what_has_no_room_cannot_be_warmed(
    start_model: Start, store: Counting, publish: Publish
) -> None:
    model = await start_model(store, adapter_slots=1)
    await model.residents.slots.keep(f"mood@{publish('mood')}")
    with pytest.raises(BankFull):
        await model.warm("spam", publish("spam"))


async def test_versions_that_do_not_fit_together_cannot_be_warmed_together(
    start_model: Start, store: Counting, publish: Publish
) -> None:
    model = await start_model(store, adapter_slots=2)
    await model.residents.slots.keep(f"spam@{publish('spam')}")
    versions = [publish("mood", seed) for seed in range(2)]
    for version in versions:
        await model.warm("mood", version)
    with pytest.raises(BankFull, match="beside the 2 adapters"):
        await model.warm("mood", *versions)


async def test_residency_says_where_each_version_is_and_what_is_free(
    start_model: Start, store: Counting, publish: Publish
) -> None:
    model = await start_model(store, adapter_slots=3)
    mood, spam, topic = (publish(task, seed) for seed, task in enumerate(("mood", "spam", "topic")))
    (store.root / "topic" / topic / CONFIG).write_text("{}")
    pages = model.residents.slots.pages_free
    await ask(model, "mood", mood)
    await model.describe("spam", spam)
    with pytest.raises(AdapterRefused, match=topic):
        await ask(model, "topic", topic)
    said = await model.residency("", 10)
    in_slot, in_host, failed = said["versions"]
    assert in_slot == {"task": "mood", "version": mood, "where": "slot"}
    assert in_host == {"task": "spam", "version": spam, "where": "host"}
    assert (failed["task"], failed["version"], failed["where"]) == ("topic", topic, "failed")
    assert 0 < failed["until_s"] <= 1
    assert topic in failed["reason"]
    assert (said["slots_free"], said["next"]) == (2, None)
    assert said["pages_free"] == pages - model.residents.host.peek(f"mood@{mood}").loaded.num_pages
    found, after = [], ""
    while after is not None:
        page = await model.residency(after, 1)
        found += page["versions"]
        after = page["next"]
    assert [one["task"] for one in found] == ["mood", "spam", "topic"]


async def test_a_folder_that_failed_is_listed_without_a_version(
    model: Model, store: Counting
) -> None:
    (store.root / "torn").mkdir()
    (store.root / "torn" / CONFIG).write_text("{}")
    with pytest.raises(Exception, match="missing"):
        await model.describe("torn")
    [failed] = (await model.residency("", 10))["versions"]
    assert (failed["task"], failed["version"], failed["where"]) == ("torn", None, "failed")


async def test_describes_at_once_share_a_read(
    model: Model, store: Counting, publish: Publish
) -> None:
    version = publish("mood")
    said: list[Facts] = await asyncio.gather(*(model.describe("mood", version) for _ in range(8)))
    assert all(facts == said[0] for facts in said)
    assert store.reads == [("mood", version)]


async def test_budgets_change_in_place_and_a_wrong_one_changes_nothing(
    model: Model, publish: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    versions = {task: publish(task) for task in ("one", "two", "three")}
    for task, version in versions.items():
        await ask(model, task, version)
    assert len(model.residents.slots.resident) == len(model.residents.host.versions) == 3
    await model.reconfigure({"adapter_slots": 2, "max_batch_rows": 5, "max_host_gib": 1e-9})
    assert model.residents.slots.slots_free == 0
    assert not model.residents.host.versions
    assert model.planner.rows_of(1) == 5
    for wrong in ({"adapter_slots": 0}, {"bank_gib": 2}, {"max_batch_tokens": 10**12}):
        await model.reconfigure(wrong)
        assert "user_config of Model is refused, and nothing changes" in caplog.text
        caplog.clear()
        assert model.planner.rows_of(1) == 5
    await model.reconfigure({})
    assert model.residents.slots.slots_free is None
    assert model.planner.rows_of(1) > 5
