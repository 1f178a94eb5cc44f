from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deployments.config import Args, ConfigError

ROOT = Path(__file__).parents[1]
LEAST = {"base_model": "org/base@main", "adapter_store": "."}


def args(**given: Any) -> Args:
    return Args.model_validate(LEAST | given)


def refused(given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Args.model_validate(given)
    said = str(caught.value)
    assert "\n" not in said  # one sentence, not pydantic's lines
    return said


def test_two_keys_are_enough() -> None:
    read = args()
    assert read.model_dump(exclude_unset=True) == LEAST
    assert (read.quantization, read.device, read.adapter_slots) == ("auto", "auto", "auto")
    assert read.bank_gib == 1.0


def test_every_key_is_described() -> None:
    assert [key for key, field in Args.model_fields.items() if not field.description] == []


def test_arguments_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        args().device = "cpu"


@pytest.mark.parametrize("key", LEAST)
def test_a_missing_key_is_named(key: str) -> None:
    assert f"{key} is required" in refused({k: v for k, v in LEAST.items() if k != key})


def test_an_unknown_key_is_named_beside_those_that_exist() -> None:
    said = refused({**LEAST, "quantisation": "int8", "slots": 4})
    assert "unknown key 'quantisation'" in said
    assert "unknown key 'slots'" in said
    assert all(key in said for key in Args.model_fields)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_model", 5), ("base_model", "./nowhere/at/all"), ("base_model", "justaname"),
        ("adapter_store", None), ("adapter_store", "no/such"), ("adapter_store", "file:///no/such"),
        ("adapter_store", "file://relative"), ("adapter_store", "s3://"),
        ("adapter_store", "ftp://host/store"), ("adapter_store", "hf://org/name"),
        ("disk_cache", 5), ("max_disk_gib", 0), ("max_disk_gib", "nan"),
        ("default_task", 5), ("quantization", "int4"),
        ("quantization", None), ("device", "tpu"), ("adapter_slots", 0), ("adapter_slots", "many"),
        ("adapter_slots", 2.5), ("adapter_slots", -1), ("base_aliases", [5]),
        ("bank_gib", 0), ("bank_gib", "much"), ("bank_gib", "inf"),
        ("max_host_gib", -1), ("max_host_gib", "nan"), ("max_batch_rows", 0),
        ("max_batch_tokens", 0), ("max_batch_tokens", "all"), ("num_replicas", 0),
        ("max_replicas", 0), ("num_gpus", -0.5), ("num_gpus", "inf"), ("num_cpus", 0),
        ("max_request_rows", 0), ("max_body_bytes", 10), ("base_aliases", "base"),
        ("base_aliases", ["org/base@main"]), ("base_aliases", 5), ("base_aliases", "a/b,,c/d"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_by_its_key(key: str, value: Any) -> None:
    said = refused({**LEAST, key: value})
    assert said.startswith(key), said
    assert "unknown key" not in said


def test_all_wrong_keys_are_named_at_once() -> None:
    said = refused({"base_model": "org/base", "device": "tpu", "adapter_slots": "x", "odd": 1})
    for part in ("adapter_store is required", "device='tpu'", "adapter_slots='x'", "'odd'"):
        assert part in said
    assert said.count("adapter_slots='x'") == 1  # though it is wrong in two ways


@pytest.mark.parametrize(
    "given",
    [
        {"num_replicas": 2, "min_replicas": 1},
        {"num_replicas": 2, "max_replicas": 4},
        {"min_replicas": 1},
        {"min_replicas": 5, "max_replicas": 4},
    ],
)
def test_keys_that_exclude_each_other_are_named(given: dict[str, int]) -> None:
    said = refused({**LEAST, **given})
    assert all(key in said for key in given)


def test_no_replicas_at_rest_is_allowed() -> None:
    assert args(min_replicas=0, max_replicas=1).min_replicas == 0


@pytest.mark.parametrize("given", [None, [], "base_model=x", 5])
def test_arguments_that_are_no_mapping_are_refused(given: Any) -> None:
    assert refused(given)


def test_strings_from_the_command_line_are_read() -> None:
    read = args(
        adapter_slots="8", bank_gib="0.5", max_batch_tokens="4096",
        num_gpus="0.25", max_replicas="3",
    )  # fmt: skip
    assert read == args(
        adapter_slots=8, bank_gib=0.5, max_batch_tokens=4096, num_gpus=0.25, max_replicas=3,
    )  # fmt: skip
    assert args(base_aliases="a/b, c/d").base_aliases == ("a/b", "c/d")
    assert args().base_aliases == ()
    assert args(base_aliases="a/b").base_aliases == ("a/b",)
    assert args(base_aliases=["a/b", "c/d"]).base_aliases == ("a/b", "c/d")


def test_gpus_follow_the_device_unless_said() -> None:
    assert args().gpus == 0
    assert args(device="cuda").gpus == 1
    assert args(device="cuda", num_gpus=0.5).gpus == 0.5
    assert args(device="cuda", num_gpus=0).gpus == 0


def test_local_paths_become_absolute_and_hub_ids_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "store").mkdir()
    local = args(base_model="base", adapter_store="store").absolute()
    assert local.base_model == str(tmp_path / "base")
    assert local.adapter_store == str(tmp_path / "store")
    assert args().absolute().base_model == "org/base@main"


def test_a_store_s_url_stays_and_its_disk_cache_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bucket = args(adapter_store="s3://bucket/store", disk_cache="cache").absolute()
    assert bucket.adapter_store == "s3://bucket/store"
    assert bucket.disk_cache == str(tmp_path / "cache")
    assert args(adapter_store="memory://store").absolute().disk_cache is None
    local = args(adapter_store=f"file://{tmp_path}").absolute()
    assert local.adapter_store == str(tmp_path)


def test_a_store_that_cannot_be_is_refused_with_what_to_do() -> None:
    said = refused({**LEAST, "adapter_store": "hf://org/name"})
    assert said.startswith("adapter_store='hf://org/name' is a source of versions, not a store")
    assert "names nothing" in refused({**LEAST, "adapter_store": "gs://"})


def test_the_store_is_opened_with_its_disk_cache(tmp_path: Path) -> None:
    folder = args(adapter_store=str(tmp_path), disk_cache=str(tmp_path / "cache")).open_store()
    assert folder.url == str(tmp_path)
    assert not (tmp_path / "cache").exists()
    bucket = args(adapter_store="memory://s", disk_cache=str(tmp_path / "cache")).open_store()
    assert bucket.url == "memory://s"
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_the_example_s_configuration_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    (application,) = config["applications"]
    assert application["name"] == "onebase"
    assert application["import_path"] == "deployments.app:build"
    assert config["http_options"]["host"] == "127.0.0.1"
    assert Args.model_validate(application["args"]).default_task == "sentiment"
