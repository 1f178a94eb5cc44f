import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from adapters.rules import Rules
from adapters.spec import Spec, read_spec

Config = dict[str, Any]


def read(config: Any, /, **others: Any) -> tuple[Spec | None, Rules | None, list[str]]:
    files = {"adapter_config.json": config}
    files |= {f"{name}.json": content for name, content in others.items()}
    return read_spec(
        {
            name: content if isinstance(content, bytes) else json.dumps(content).encode()
            for name, content in files.items()
        }
    )


def good(config: Config | bytes, /, **others: Any) -> tuple[Spec, Rules]:
    spec, rules, problems = read(config, **others)
    assert problems == []
    assert spec is not None
    assert rules is not None
    return spec, rules


def refused(config: Any, /, **others: Any) -> str:
    """Read what must be refused; return all problems."""
    _, _, problems = read(config, **others)
    assert problems
    return "; ".join(problems)


# What PEFT 0.21 writes for every feature that is off.
QUIET: Config = {
    "peft_type": "LORA", "task_type": "SEQ_CLS", "auto_mapping": None, "peft_version": "0.21.2",
    "base_model_name_or_path": "org/base", "revision": None, "inference_mode": True, "r": 8,
    "target_modules": ["query", "value"], "exclude_modules": None, "lora_alpha": 16,
    "lora_dropout": 0.1, "fan_in_fan_out": False, "bias": "none", "use_rslora": False,
    "modules_to_save": ["classifier"], "init_lora_weights": True, "layers_to_transform": None,
    "layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {}, "megatron_config": None,
    "megatron_core": "megatron.core", "trainable_token_indices": None, "loftq_config": {},
    "eva_config": None, "corda_config": None, "lora_ga_config": None, "use_dora": False,
    "velora_config": None, "alora_invocation_tokens": None, "use_qalora": False,
    "qalora_group_size": 16, "monteclora_config": None, "layer_replication": None,
    "lora_bias": False, "target_parameters": None, "use_bdlora": None, "arrow_config": None,
    "kasa_config": None, "ensure_weight_tying": False,
}  # fmt: skip

LOUD: Config = {
    "bias": "some", "init_lora_weights": "pissa", "layers_to_transform": "all",
    "layers_pattern": [5], "rank_pattern": {"query": 0}, "alpha_pattern": {"query": "4"},
    "megatron_config": {"a": 1}, "trainable_token_indices": [5], "velora_config": {"a": 1},
    "alora_invocation_tokens": [7], "use_qalora": True, "monteclora_config": {"a": 1},
    "layer_replication": [[0, 4]], "target_parameters": ["w"],
    "use_bdlora": {"a": 1}, "arrow_config": {"a": 1}, "kasa_config": {"a": 1},
    "a_key_of_tomorrow": 0.5,
}  # fmt: skip


def test_what_peft_writes_is_read() -> None:
    spec, rules = good(QUIET)
    assert (spec.rank, spec.alpha, spec.scaling_of("bert.query")) == (8, 16.0, 2.0)
    assert spec.matching.target_modules == ("query", "value")
    assert spec.matching.modules_to_save == ("classifier",)
    assert (spec.method, spec.task_type, spec.bias, spec.lora_bias) == (
        "lora", "SEQ_CLS", "none", False
    )  # fmt: skip
    assert spec.base == "org/base"
    assert spec.base_class is spec.labels is spec.problem_type is None
    assert rules == Rules()


def test_what_peft_saves_is_read(tmp_path: Path) -> None:
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["a", "b"], use_rslora=True)
    config.save_pretrained(str(tmp_path))
    spec, _ = good((tmp_path / "adapter_config.json").read_bytes())
    assert (spec.rank, spec.use_rslora, set(spec.matching.target_modules)) == (
        4, True, {"a", "b"}
    )  # fmt: skip


def test_no_key_of_peft_is_unknown_to_these_tests() -> None:
    assert set(LoraConfig().to_dict()) <= set(QUIET)


@pytest.mark.parametrize("key", LOUD)
def test_a_key_that_asks_for_what_is_not_served_is_refused_by_name(key: str) -> None:
    assert key in refused({**QUIET, key: LOUD[key]})


def test_a_huge_value_makes_no_huge_sentence() -> None:
    said = refused({**QUIET, "rank_pattern": {"x" * 1000 + str(n): n for n in range(1000)}})
    assert "rank_pattern" in said
    assert len(said) < 300


def test_all_refused_keys_are_named_at_once() -> None:
    said = refused({**QUIET, **LOUD})
    assert [key for key in LOUD if key not in said] == []


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_unknown_key_that_is_off_says_nothing(value: Any) -> None:
    good({**QUIET, "a_key_of_tomorrow": value})


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_an_initialisation_that_leaves_the_base_alone_is_read(init: Any) -> None:
    good({**QUIET, "init_lora_weights": init})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga"])
def test_an_initialisation_that_changes_the_base_is_refused(init: str) -> None:
    assert "init_lora_weights" in refused({**QUIET, "init_lora_weights": init})


@pytest.mark.parametrize("method", ["OFT", "LOHA", "VERA", "PREFIX_TUNING", None, 7, ["LORA"]])
def test_another_method_is_refused(method: Any) -> None:
    said = refused({**QUIET, "peft_type": method})
    assert f"peft_type {method!r} is not served; LORA (with DoRA) and IA3 are" in said
    assert ("peft.save_as_lora" in said) == (method in ("LOHA", "VERA"))


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", 5, ["SEQ_CLS"]])
def test_another_kind_of_task_is_refused(task_type: Any) -> None:
    assert "SEQ_CLS and TOKEN_CLS are" in refused({**QUIET, "task_type": task_type})


def test_a_class_that_peft_noted_stands_for_a_task_type() -> None:
    noted = {"base_model_class": "BertForTokenClassification"}
    spec, _ = good({**QUIET, "task_type": None, "auto_mapping": noted})
    assert (spec.task_type, spec.base_class) == ("TOKEN_CLS", "BertForTokenClassification")


def test_ia3_is_read(tmp_path: Path) -> None:
    config = IA3Config(task_type="SEQ_CLS", target_modules=["k", "up"], feedforward_modules=["up"])
    config.save_pretrained(str(tmp_path))
    spec, _ = good((tmp_path / "adapter_config.json").read_bytes())
    assert (spec.method, spec.rank) == ("ia3", 0)
    assert spec.matching.feeds_forward("a.up")
    assert not spec.matching.feeds_forward("a.k")


def test_ranks_and_alphas_by_pattern_are_peft_s() -> None:
    patterns = {"rank_pattern": {"query": 4, r"layer\.\d\.key": 2}, "alpha_pattern": {"a.query": 3}}
    spec, _ = good({**QUIET, "r": 8, "lora_alpha": 16, **patterns})
    for path, rank, alpha in (
        ("a.query", 4, 3), ("b.query", 4, 16), ("a.layer.7.key", 2, 16), ("a.key", 8, 16),
    ):  # fmt: skip
        assert (spec.rank_of(path), spec.scaling_of(path)) == (rank, alpha / rank)
        assert rank == patterns["rank_pattern"].get(
            get_pattern_key(patterns["rank_pattern"], path), 8
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in ("r", "lora_alpha") for value in (None, True, "8", [8], {})]
    + [("r", 0), ("r", -1), ("r", 8.0), ("lora_alpha", math.nan), ("lora_alpha", math.inf)]
    + [("lora_alpha", 10**400), ("target_modules", None), ("target_modules", [])]
    + [(f"{m}_modules", v) for m in ("target", "exclude") for v in (5, [5], [""], "(", {"a": 1})]
    + [("modules_to_save", 5), ("modules_to_save", [None])]
    + [("base_model_name_or_path", 5), ("base_model_name_or_path", ["org/base"])],
)
def test_an_absurd_value_is_refused_by_its_key(key: str, value: Any) -> None:
    assert key in refused({**QUIET, key: value})


@given(
    st.dictionaries(
        st.sampled_from([*QUIET, *LOUD]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
            ),
            max_leaves=5,
        ),
        max_size=6,
    ),
    st.none() | st.dictionaries(st.sampled_from(["id2label", "problem_type"]), st.integers()),
)
def test_no_config_crashes_the_reader(changes: Config, model_config: Config | None) -> None:
    spec, _, problems = read({**QUIET, **changes}, config=model_config or {})
    assert spec is not None or problems
    if spec is not None:
        assert isinstance(spec.scaling_of("bert.query"), float)
        assert isinstance(spec.matching.targets("bert.query"), bool)


@pytest.mark.parametrize("name", ["adapter_config", "config", "task"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b"nul"]
)
def test_broken_json_is_refused_by_its_file(name: str, content: bytes) -> None:
    files = {"adapter_config": QUIET, name: content}
    assert f"{name}.json is not valid JSON" in refused(files.pop("adapter_config"), **files)


@pytest.mark.parametrize("name", ["adapter_config", "config", "task"])
@pytest.mark.parametrize("content", [[], "x", 5, None, [{}]])
def test_json_that_is_no_object_is_refused_by_its_file(name: str, content: Any) -> None:
    files = {"adapter_config": QUIET, name: content}
    said = refused(files.pop("adapter_config"), **files)
    assert f"{name}.json must hold a JSON object" in said


def test_problems_of_all_files_are_told_at_once() -> None:
    said = refused({**QUIET, "r": 0}, task={"threshold": 2}, config={"problem_type": "odd"})
    for part in ("r must be", "task.json: threshold", "config.json: problem_type 'odd'"):
        assert part in said


def test_scaling_is_peft_s() -> None:
    assert good({**QUIET, "r": 16, "lora_alpha": 8})[0].scaling_of("a") == 0.5
    assert good({**QUIET, "r": 16, "lora_alpha": 8, "use_rslora": True})[0].scaling_of("a") == 2.0


PATHS = st.lists(
    st.sampled_from(["a", "b", "0", "10", "query", "subquery"]), min_size=1, max_size=4
)
LAYERS = st.none() | st.integers(0, 2) | st.lists(st.sampled_from([0, 1, 10]), max_size=2)
NAMES = st.lists(PATHS.map(".".join), max_size=3)
PATTERNS = st.sampled_from([r".*\.query", "query", r"a\..*(query|0)", r"(.*\.)?[01]\.a", ""])


@example(["query"], [], None, [], "a.subquery")
@example(["a"], ["query"], None, [], "query.a")
@example("query", [], None, [], "a.query")
@example(["query"], [], [0], ["a"], "a.a.0.query")
@given(
    NAMES.filter(bool) | PATTERNS.filter(bool),
    NAMES | PATTERNS,
    LAYERS,
    st.lists(st.sampled_from(["a", "b", "query"]), max_size=2),
    PATHS.map(".".join),
)
def test_modules_match_as_in_peft(
    target: Any, exclude: Any, layers: Any, saved: list[str], path: str
) -> None:
    # PEFT itself refuses layers beside a regular expression.
    layers = None if isinstance(target, str) else layers
    keys = {"target_modules": target, "exclude_modules": exclude, "modules_to_save": saved}
    spec, _ = good({**QUIET, **keys, "layers_to_transform": layers})
    peft = LoraConfig(**keys, layers_to_transform=layers)
    assert spec.matching.targets(path) == bool(check_target_module_exists(peft, path))


def test_all_linear_is_every_module_but_the_excluded() -> None:
    spec, _ = good({**QUIET, "target_modules": "all-linear", "exclude_modules": ["out"]})
    assert spec.matching.targets("a.query")
    assert not spec.matching.targets("a.out")


def test_labels_and_problem_type_come_from_the_models_config() -> None:
    by_index = {"1": "b", "0": "a", "10": "k"} | {str(n): str(n) for n in range(2, 10)}
    spec, _ = good(QUIET, config={"id2label": by_index, "problem_type": "regression", "x": 1})
    assert spec.labels == ("a", "b", *"23456789", "k")
    assert spec.problem_type == "regression"


@pytest.mark.parametrize(
    "id2label", [{"1": "b"}, {"0": "a", "2": "c"}, {"zero": "a"}, ["a"], "a", 5, {"-1": "a"}]
)
def test_labels_that_are_not_numbered_from_0_are_refused(id2label: Any) -> None:
    assert "id2label" in refused(QUIET, config={"id2label": id2label})


def test_two_labels_of_one_name_are_refused() -> None:
    assert "differ" in refused(QUIET, config={"id2label": {"0": "a", "1": "b", "2": "a"}})
    assert "differ" in refused(QUIET, task={"labels": ["a", "b", "a"]})


def test_every_rule_is_read() -> None:
    said = {
        "labels": ["no", "yes"], "problem_type": "multi_label_classification", "threshold": 0.25,
        "max_length": 64, "truncation": "only_first", "padding": "max_length", "pair": True,
        "base_sha256": "ab" * 32, "overflow": "window", "stride": 8, "window_scores": "mean",
        "negative_label": "no", "aggregation": "first", "priority": "high",
        "latency_target_ms": 50,
    }  # fmt: skip
    assert set(said) == set(Rules.model_fields)
    _, rules = good(QUIET, task=said)
    assert rules.model_dump() == {**said, "labels": ("no", "yes")}


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        ("labels", []), ("labels", "no"), ("labels", [1]), ("labels", {"0": "a"}),
        ("problem_type", "multi"), ("threshold", 1.5), ("threshold", -0.1), ("threshold", "high"),
        ("threshold", math.nan), ("max_length", 0), ("max_length", "128"), ("max_length", 12.5),
        ("max_length", True), ("truncation", "right"), ("truncation", 1), ("padding", "left"),
        ("threshold", True), ("threshold", {"no": 2}), ("threshold", {"no": None}),
        ("overflow", "cut"), ("stride", -1), ("stride", 1.5), ("window_scores", "min"),
        ("negative_label", 0), ("aggregation", "average"),
        ("pair", "yes"), ("base_sha256", "abc"), ("base_sha256", "G" * 64), ("base_sha256", 5),
    ],
)  # fmt: skip
def test_a_wrong_rule_is_refused_by_name(rule: str, value: Any) -> None:
    assert f"task.json: {rule}:" in refused(QUIET, task={rule: value})


def test_a_wrong_threshold_is_told_once() -> None:
    said = "task.json: threshold: Input should be less than or equal to 1"
    assert refused(QUIET, task={"threshold": 2}) == said
    assert refused(QUIET, task={"threshold": {"no": 2}}) == said


def test_an_unknown_rule_is_refused_by_name() -> None:
    said = refused(QUIET, task={"treshold": 0.5, "threshold": 0.5})
    assert said == "task.json: treshold: is not a known rule"


def test_every_rule_is_described() -> None:
    assert [name for name, rule in Rules.model_fields.items() if not rule.description] == []
