"""Which modules of a base become sites."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from adapters.geometry import Graph, HeadShape, SiteShape, TaskType
from deployments.base import BaseUnavailable
from deployments.model.checkpoint import Checkpoint, linears_of
from deployments.model.sites import features

# What adapters may bring whole.
_WHOLE = (nn.Linear, nn.LayerNorm)


@dataclass(frozen=True, slots=True)
class Layout:
    """The modules of a base by what becomes of them, found on weights or on the meta device alike.

    Attributes:
        model: The classifier of sequences, whose encoder all task types share.
        linears: Every linear of the encoder that is not a head's.
        embeddings: Every embedding of the encoder that adapters may target.
        sites: Module path -> what kind of site it becomes.
        whole: Site -> parameter -> shape, of what an adapter brings if it brings the module. Found
            before it is quantised: that makes a Linear of a Conv1D, whose weight lies otherwise.
        heads: Task type -> module path -> linear or norm that adapters bring whole. The last one
            gives the logits.
        graphs: Task type -> how it is answered.
    """

    model: PreTrainedModel
    linears: frozenset[str]
    embeddings: frozenset[str]
    sites: dict[str, Literal["linear", "embedding", "shift"]]
    whole: dict[str, dict[str, tuple[int, ...]]]
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
            shapes[path] = SiteShape(kind, width, rows, bias is not None, self.whole[path])
        return shapes

    def head_sites(self, task_type: TaskType) -> Iterator[tuple[str, str, nn.Module]]:
        """Go through a head: module path, name in the bank, module."""
        for path, module in self.heads[task_type].items():
            yield path, self.head_name(task_type, path), module

    def head_name(self, task_type: TaskType, path: str) -> str:
        """Return a head module's name in the bank: two task types may both have a `classifier`."""
        return path if path.startswith(self.prefix) else f"{task_type}:{path}"


def find_layout(checkpoint: Checkpoint) -> Layout:
    """Find the sites of a base.

    Raises:
        BaseUnavailable: A head has parameters that no site holds.
    """
    model = checkpoint.models["SEQ_CLS"]
    prefix, every = model.base_model_prefix + ".", linears_of(model)
    lacking = frozenset(n for n in checkpoint.missing["SEQ_CLS"] if n.startswith(prefix))
    heads = {
        task_type: _head(of_type, model, lacking)
        for task_type, of_type in checkpoint.models.items()
    }
    inside = {path for head in heads.values() for path in head if path.startswith(prefix)}
    linears = {p: m for p, m in every.items() if p.startswith(prefix) and p not in inside}
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    sites: dict[str, Literal["linear", "embedding", "shift"]] = {}
    for path, module in model.named_modules():
        if path in linears:
            sites[path] = "linear"
        elif path == embedding:
            sites[path] = "embedding"
        elif path.startswith(prefix) and path not in inside and _may_change(module):
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
        sites=sites,
        whole={path: _whole(model.get_submodule(path)) for path in sites},
        heads=heads,
        graphs=graphs,
    )


def is_target(path: str, names: Collection[str]) -> bool:
    """Tell whether a module path ends in one of the names."""
    return any(path == name or path.endswith("." + name) for name in names)


def _whole(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what an adapter brings if it brings this module."""
    if not isinstance(module, _WHOLE):
        return {}
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
    if isinstance(module, nn.Linear):  # a quantised weight has a shape of its own
        shapes["weight"] = (module.out_features, module.in_features)
    return shapes


def _may_change(module: nn.Module) -> bool:
    biased = isinstance(module, nn.Conv1d) and module.bias is not None
    return biased or isinstance(module, nn.LayerNorm)


def _head(
    of_type: PreTrainedModel, model: PreTrainedModel, lacking: frozenset[str]
) -> dict[str, nn.Module]:
    """Return the modules that adapters of a task type bring whole, in the order of the model.

    They are those outside the encoder (`classifier`), and those that the checkpoint does not bring
    (a pooler, say): both would else answer at random.
    """
    prefix = model.base_model_prefix + "."
    head: dict[str, nn.Module] = {}
    held: set[str] = set()
    needed: set[str] = set()
    for path, module in of_type.named_modules():
        own = {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
        inside = path.startswith(prefix)
        if not own or (inside and not own & lacking):
            continue
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
