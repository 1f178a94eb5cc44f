"""Which modules of a base become sites, and what they take of a bank row."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.geometry import Graph, HeadShape, SiteShape, TaskType
from deployments.base import BaseUnavailable
from deployments.model.bank import Field
from deployments.model.checkpoint import Checkpoint, linears_of
from deployments.model.sites import EmbeddingSite, HeadSite, LinearSite, ShiftSite, features

# What adapters may bring whole.
_WHOLE = (nn.Linear, nn.LayerNorm)
# What, beside linears that are not targeted, may have a bias of an adapter's own.
_BIASED = (nn.Linear, Conv1D, nn.LayerNorm, nn.Conv1d)


@dataclass(frozen=True, slots=True)
class Layout:
    """The modules of a base by what becomes of them, found on weights or on the meta device alike.

    Attributes:
        model: The classifier of sequences, whose encoder all task types share.
        linears: Every linear of the encoder that is not a head's.
        embeddings: Every embedding of the encoder that adapters may target.
        whole: Every module of the encoder that adapters could bring whole.
        sites: Module path -> what kind of site it becomes.
        heads: Task type -> module path -> linear or norm that adapters bring whole. The last one
            gives the logits.
        graphs: Task type -> how it is answered.
    """

    model: PreTrainedModel
    linears: frozenset[str]
    embeddings: frozenset[str]
    whole: frozenset[str]
    sites: dict[str, Literal["linear", "embedding", "shift"]]
    heads: dict[TaskType, dict[str, nn.Module]]
    graphs: dict[TaskType, Graph]

    @property
    def prefix(self) -> str:
        """What the path of every module of the encoder begins with, its dot included."""
        return f"{self.model.base_model_prefix}."

    def shapes(self) -> dict[str, SiteShape]:
        """Return the shape of every site."""
        shapes = {}
        for path, kind in self.sites.items():
            module = self.model.get_submodule(path)
            bias = getattr(module, "bias", None)
            width, rows = (0, 0) if bias is None else (0, len(bias))
            if isinstance(module, nn.Embedding):
                width, rows = module.num_embeddings, module.embedding_dim
            elif path in self.linears:
                width, rows = features(module)
            shapes[path] = SiteShape(kind, width, rows, bias is not None)
        return shapes

    def fields(self, dtype: torch.dtype, max_rank: int, max_labels: int) -> list[Field]:
        """Return all that an adapter may fill of a bank row."""
        fields: list[Field] = []
        for path, kind in self.sites.items():
            module = self.model.get_submodule(path)
            if kind == "linear":
                fields += LinearSite.fields(module, path, dtype, max_rank)
            elif kind == "embedding":
                assert isinstance(module, nn.Embedding)
                fields += EmbeddingSite.fields(module, path, dtype, max_rank)
            else:
                fields += ShiftSite.fields(module, path, dtype)
        named = {field.name for field in fields}
        for task_type in self.heads:
            for _, name, module, labels in self.head_sites(task_type, max_labels):
                of_head = HeadSite.fields(module, name, labels)
                # A pooler is the encoder's, and in the heads of several task types.
                fields += [field for field in of_head if field.name not in named]
                named.update(field.name for field in of_head)
        return fields

    def head_sites(
        self, task_type: TaskType, max_labels: int
    ) -> Iterator[tuple[str, str, nn.Module, int | None]]:
        """Go through a head: module path, name in the bank, module, width if it gives logits."""
        for path, module in self.heads[task_type].items():
            labelled = self.graphs[task_type].heads[path].labelled
            yield path, self.head_name(task_type, path), module, max_labels if labelled else None

    def head_name(self, task_type: TaskType, path: str) -> str:
        """Return a head module's name in the bank: two task types may both have a `classifier`."""
        return path if path.startswith(self.prefix) else f"{task_type}:{path}"


def find_layout(
    checkpoint: Checkpoint, lora_targets: Collection[str] | None, saved_modules: Collection[str]
) -> Layout:
    """Find the sites of a base.

    Args:
        checkpoint: The base.
        lora_targets: Ends of the paths of modules that adapters may target; None for all linears.
        saved_modules: Ends of the paths of the encoder's modules that adapters may bring whole.

    Raises:
        BaseUnavailable: A head has parameters that no site holds.
    """
    model = checkpoint.models["SEQ_CLS"]
    prefix, every = model.base_model_prefix + ".", linears_of(model)
    lacking = frozenset(n for n in checkpoint.missing["SEQ_CLS"] if n.startswith(prefix))
    heads = {
        task_type: _head(of_type, model, lacking, saved_modules)
        for task_type, of_type in checkpoint.models.items()
    }
    inside = {path for head in heads.values() for path in head if path.startswith(prefix)}
    linears = {p: m for p, m in every.items() if p.startswith(prefix) and p not in inside}
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    sites: dict[str, Literal["linear", "embedding", "shift"]] = {}
    for path, module in model.named_modules():
        targeted = is_target(path, lora_targets)
        if path in linears and targeted:
            sites[path] = "linear"
        elif path == embedding and lora_targets is not None and targeted:
            sites[path] = "embedding"
        elif path.startswith(prefix) and path not in inside and _has_bias(module):
            sites[path] = "shift"
    graphs = {
        task_type: Graph(
            architecture=type(of_type).__name__,
            heads=_head_shapes(heads[task_type], checkpoint.missing[task_type] | lacking, prefix),
            absent=frozenset(linears) - frozenset(linears_of(of_type)),
        )
        for task_type, of_type in checkpoint.models.items()
    }
    return Layout(
        model=model,
        linears=frozenset(linears),
        embeddings=frozenset([embedding]),
        whole=frozenset(
            path
            for path, module in model.named_modules()
            if isinstance(module, _WHOLE) and path.startswith(prefix)
        ),
        sites=sites,
        heads=heads,
        graphs=graphs,
    )


def is_target(path: str, targets: Collection[str] | None) -> bool:
    """Tell whether a module path ends in one of the targets; None is every path."""
    return targets is None or any(path == t or path.endswith("." + t) for t in targets)


def _has_bias(module: nn.Module) -> bool:
    return isinstance(module, _BIASED) and module.bias is not None


def _head(
    of_type: PreTrainedModel,
    model: PreTrainedModel,
    lacking: frozenset[str],
    saved_modules: Collection[str],
) -> dict[str, nn.Module]:
    """Return the modules that adapters of a task type bring whole, in the order of the model.

    They are those outside the encoder (`classifier`), those that the checkpoint does not bring (a
    pooler, say; both would else answer at random), and those that adapters may bring.
    """
    prefix = model.base_model_prefix + "."
    head: dict[str, nn.Module] = {}
    held: set[str] = set()
    needed: set[str] = set()
    for path, module in of_type.named_modules():
        own = {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
        inside = path.startswith(prefix)
        chosen = inside and _is_below(path, saved_modules)
        if not own or (inside and not own & lacking and not chosen):
            continue
        if chosen and not isinstance(module, _WHOLE):
            raise BaseUnavailable(
                f"saved_modules={path!r} is a {type(module).__name__}; only linears and LayerNorms "
                "can be brought whole"
            )
        needed |= own
        if isinstance(module, _WHOLE):
            # The encoder's modules are the shared model's, whichever class names them.
            head[path] = model.get_submodule(path) if inside else module
            held |= own
    left = sorted(needed - held)
    if left or not head:
        raise BaseUnavailable(
            f"{type(of_type).__name__} is not served: its head is not made of linears and norms"
            + (f" ({', '.join(left[:4])})" if left else "")
        )
    return head


def _is_below(path: str, names: Collection[str]) -> bool:
    """Tell whether a module, or one that it is part of, ends in one of the names."""
    parts = path.split(".")
    above = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(is_target(module, names) for module in above)


def _head_shapes(
    head: dict[str, nn.Module], missing: frozenset[str], prefix: str
) -> dict[str, HeadShape]:
    linears = [path for path, module in head.items() if isinstance(module, nn.Linear)]
    labelled = [path for path in linears if not path.startswith(prefix)][-1]
    return {
        path: HeadShape(
            parameters={n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)},
            labelled=path == labelled,
            in_base=not any(
                f"{path}.{n}" in missing for n, _ in module.named_parameters(recurse=False)
            ),
        )
        for path, module in head.items()
    }
