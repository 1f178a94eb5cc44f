import json
import shutil
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PretrainedConfig,
)

from adapters.directory import Directory
from adapters.store import RULES, WEIGHTS, Store
from deployments.config import Args
from deployments.model.deployment import Model
from deployments.model.engine import Engine
from deployments.model.sites import LinearSite
from deployments.rows import Row, Tokens

EXAMPLES = Path(__file__).parents[2] / "examples"
MAX_LENGTH = 128  # as the example's adapters were trained


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    # Two threads on two busy cores mostly wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def example_base() -> str:
    return str(EXAMPLES / "base")


@pytest.fixture(scope="session")
def example_store() -> Directory:
    return Directory(EXAMPLES / "store")


@pytest.fixture(scope="session")
def example_engine(example_base: str, example_store: Directory) -> Callable[[str], Engine]:
    """Returns an engine of a quantisation, with the example's adapters from slot 1 on."""

    @cache
    def make(quantization: str) -> Engine:
        engine = Engine(example_base, quantization=quantization, device="cpu")
        for slot, task in enumerate(example_store.tasks(), start=1):
            engine.write(slot, engine.read(example_store.read(task)))
        return engine

    return make


@pytest.fixture(scope="session")
def example_labels(example_store: Directory) -> dict[str, int]:
    """How many labels each example task has."""
    heads = {t: load(example_store.read(t).contents[WEIGHTS]) for t in example_store.tasks()}
    return {t: len(head["base_model.model.classifier.bias"]) for t, head in heads.items()}


@pytest.fixture(scope="session")
def heldout(example_base: str, example_store: Directory) -> dict[str, list[Row]]:
    """The held-out texts of each example task, as rows for the slot of its adapter."""
    tokenizer = AutoTokenizer.from_pretrained(example_base)
    rows = {}
    for slot, task in enumerate(example_store.tasks(), start=1):
        lines = (EXAMPLES / "data" / f"{task}.heldout.jsonl").read_text("utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        encoded = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        rows[task] = [Row(slot, Tokens(ids)) for ids in encoded]
    return rows


@pytest.fixture(scope="session")
def save_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Saves a random base of a transformers class, the same one for the same arguments."""

    def save(cls: Any, config: PretrainedConfig, **kwargs: Any) -> str:
        torch.manual_seed(0)
        folder = str(tmp_path_factory.mktemp("base"))
        cls(config, **kwargs).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_config() -> BertConfig:
    return BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        initializer_range=0.2,  # ten times the usual: else the head's bias is most of the answer
    )


@pytest.fixture(scope="session")
def tiny_base(save_base: Callable[..., str], tiny_config: BertConfig) -> str:
    return save_base(BertModel, tiny_config)


@pytest.fixture(scope="session")
def served_base(example_base: str, tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny base with a tokenizer beside it, as the deployment needs one."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    shutil.copytree(tiny_base, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(Path(example_base) / name, folder)
    return str(folder)


@pytest.fixture
def start_model(served_base: str) -> Callable[..., Awaitable[Model]]:
    """Starts the deployment's class as Serve would, over a store."""

    async def start(store: Directory, **given: Any) -> Model:
        model = object.__new__(Model)
        given = {"adapter_store": store.url, "device": "cpu", "num_cpus": 1} | given
        await model.__init__(Args(base_model=served_base, **given))
        model.residents.reader.store = store
        return model

    return start


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., PeftModel]:
    """Saves a random adapter as PEFT does, and returns PEFT's own model of it."""

    def make(
        folder: Path,
        base: str,
        num_labels: int,
        rank: int = 4,
        targets: Collection[str] | str = ("query", "value"),
        alpha: float = 8,
        rslora: bool = False,
        seed: int = 0,
        saved: Collection[str] = (),
    ) -> PeftModel:
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=rank,
            lora_alpha=alpha,
            target_modules=targets if isinstance(targets, str) else list(targets),
            use_rslora=rslora,
            modules_to_save=[*saved] or None,
        )
        peft = get_peft_model(model, config).eval().requires_grad_(False)
        for name, parameter in peft.named_parameters():
            # PEFT starts B at zero, so that an adapter that was never trained adds nothing.
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.1)
        peft.save_pretrained(str(folder))
        return peft

    return make


@pytest.fixture(scope="session")
def base_linears() -> Callable[[Engine], dict[str, nn.Linear]]:
    """Returns the linears of an engine's base by module path, quantised as they are."""

    def find(engine: Engine) -> dict[str, nn.Linear]:
        model = engine.encoder.model
        found = {path: model.get_submodule(path) for path in engine.encoder.geometry.linears}
        return {p: m.module if isinstance(m, LinearSite) else m for p, m in found.items()}

    return find


@pytest.fixture(scope="session")
def on_inputs() -> Callable[..., Any]:
    """Runs `see(path, input)` before each of some modules; what it returns replaces the input."""

    @contextmanager
    def hooked(
        modules: dict[str, nn.Module], see: Callable[[str, torch.Tensor], torch.Tensor | None]
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for path, module in modules.items():
                hook = module.register_forward_pre_hook(
                    lambda _, given, path=path: see(path, given[0])
                )
                stack.callback(hook.remove)
            yield

    return hooked


@pytest.fixture
def stage_in(
    served_base: str, make_adapter: Callable[..., PeftModel], tmp_path: Path
) -> Callable[..., str]:
    """Stages an adapter in a store, as an upload does; another seed is another version."""

    def stage(store: Store, seed: int = 0, rules: Any = None, **given: Any) -> str:
        folder = tmp_path / "upload"
        make_adapter(folder, served_base, seed=seed, **{"num_labels": 2, **given})
        if rules is not None:
            (folder / RULES).write_text(json.dumps(rules))
        contents = {path.name: path.read_bytes() for path in folder.glob("*[!d]")}  # no README.md
        shutil.rmtree(folder)
        return store.stage({name: BytesIO(content) for name, content in contents.items()})

    return stage


@pytest.fixture
def publish_to(stage_in: Callable[..., str]) -> Callable[..., str]:
    """Publishes an adapter as a version of a task, and returns the version."""

    def publish(store: Store, task: str, seed: int = 0, **given: Any) -> str:
        staging = stage_in(store, seed, **given)
        version = store.read_staged(staging, task).version
        store.publish(staging, task, version)
        store.discard(staging)
        return version

    return publish
