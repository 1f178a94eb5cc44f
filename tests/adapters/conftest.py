import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from adapters.artifact import Artifact, read_artifact
from adapters.directory import Directory
from adapters.errors import AdapterRefused
from adapters.geometry import Geometry, Graph, HeadShape, SiteShape

PREFIX = "base_model.model."


@pytest.fixture
def geometry() -> Geometry:
    """A base with two layers of two linears, and a head of two."""
    linears = [f"bert.layer.{n}.{name}" for n in (0, 1) for name in ("query", "dense")]
    sites = {path: SiteShape("linear", 6, 4, bias=True) for path in linears}
    heads = {
        "bert.pooler": HeadShape({"weight": (6, 6), "bias": (6,)}),
        "classifier": HeadShape({"weight": (2, 6), "bias": (2,)}, labelled=True),
    }
    return Geometry(
        base_id="org/base",
        sites=sites,
        graphs={"SEQ_CLS": Graph("BertForSequenceClassification", heads)},
        linears=frozenset(linears),
        max_positions=64,
    )


@pytest.fixture
def config() -> dict[str, Any]:
    """What PEFT writes into adapter_config.json, as far as it says anything."""
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "org/base",
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["query"],
        "modules_to_save": ["classifier", "pooler"],
        "bias": "none",
        "inference_mode": True,
        "lora_dropout": 0.1,
    }


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """A good adapter's tensors for `geometry` and `config`, three labels, as PEFT names them."""
    torch.manual_seed(0)
    shapes = {
        f"bert.layer.{n}.query.lora_{half}.weight": (2, 6) if half == "A" else (4, 2)
        for n in (0, 1)
        for half in "AB"
    }
    shapes |= {"bert.pooler.weight": (6, 6), "bert.pooler.bias": (6,)}
    shapes |= {"classifier.weight": (3, 6), "classifier.bias": (3,)}
    return {PREFIX + name: torch.randn(shape) for name, shape in shapes.items()}


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Write:
    """Write an adapter's folder; a file's content is bytes, JSON, tensors, or None for no file."""

    def write(task: str = "mood", **files: Any) -> Path:
        folder = tmp_path / "store" / task
        folder.mkdir(parents=True, exist_ok=True)
        named: dict[str, Any] = {
            "adapter_config.json": config,
            "adapter_model.safetensors": tensors,
        }
        named |= {name.replace("__", "."): content for name, content in files.items()}
        for name, content in named.items():
            if isinstance(content, Mapping) and name.endswith(".safetensors"):
                content = save(dict(content))
            if content is not None:
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                (folder / name).write_bytes(raw)
        return folder

    return write


@pytest.fixture
def store(tmp_path: Path) -> Directory:
    return Directory(tmp_path / "store")


@pytest.fixture
def read(
    write: Callable[..., Path], store: Directory, geometry: Geometry
) -> Callable[..., Artifact]:
    def read(
        *, geometry: Geometry = geometry, base_sha256: str | None = None, **files: Any
    ) -> Artifact:
        write(**files)
        return read_artifact(store.read("mood"), geometry, base_sha256)

    return read


@pytest.fixture
def refused(read: Callable[..., Artifact]) -> Callable[..., tuple[str, ...]]:
    def refused(**files: Any) -> tuple[str, ...]:
        """Read what must be refused; return its problems, all of which its message tells."""
        with pytest.raises(AdapterRefused) as caught:
            read(**files)
        assert caught.value.task == "mood"
        for problem in caught.value.problems:
            assert problem in str(caught.value)
        return caught.value.problems

    return refused


_OPENED: list[str] | None = None


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if _OPENED is not None and event == "open" and isinstance(arguments[0], (str, bytes, Path)):
        _OPENED.append(str(arguments[0]))


@pytest.fixture(scope="session")
def _hooked() -> None:
    sys.addaudithook(_note_opened)  # cannot be taken away again, hence once


@pytest.fixture
def opened(_hooked: None) -> Iterator[list[str]]:
    """Names of all files that this process opens during the test, by whatever library."""
    global _OPENED
    _OPENED = []
    yield _OPENED
    _OPENED = None


@pytest.fixture
def settle() -> Callable[[], Awaitable[None]]:
    """Let every task run until it waits for something."""

    async def settle() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    return settle


@pytest.fixture
def contents(config: dict[str, Any]) -> Callable[..., dict[str, bytes]]:
    """Files of an adapter as a store sees them; another number makes another version."""

    def contents(number: int = 1, **files: bytes) -> dict[str, bytes]:
        weights = save({"x": torch.full((64,), float(number))})
        named = {"adapter_config.json": b"{}", "adapter_model.safetensors": weights}
        return named | {name.replace("__", "."): content for name, content in files.items()}

    return contents
