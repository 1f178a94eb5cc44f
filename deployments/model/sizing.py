"""How much memory, how many slots, how many replicas: `python -m deployments.model.sizing BASE …`.

Plain arithmetic from a base's config; no weights are read. An adapter's bytes are exact, since the
bank's own pages are counted; docs/operations.md has the formulas.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from deployments.base import BaseName, BaseUnavailable
from deployments.config import GIB
from deployments.model.checkpoint import Checkpoint
from deployments.model.graphs import MAX_TOKENS
from deployments.model.layout import Layout, find_layout, is_target
from deployments.model.memory import activation_bytes, output_bytes
from deployments.model.pages import page_bytes, pages_of

_FP32 = 4
# Of a replica's measured speed: above it queues grow faster than they are worked off.
_UTILISATION = 0.6
# Bytes a weight. nf4: half a byte, an int8 scale for 64, a float scale for 256 of those. int8 has a
# float scale an output besides.
_BYTES = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1.0}


@dataclass(frozen=True, slots=True)
class Group:
    """Adapters of a kind: `300x8:query,value:2`.

    Attributes:
        count: How many.
        rank: LoRA's.
        targets: As PEFT's `target_modules`; `all-linear` is every linear of the encoder.
        labels: Outputs of the head.
    """

    count: int
    rank: int
    targets: tuple[str, ...]
    labels: int

    @classmethod
    def parse(cls, text: str) -> Group:
        """Read `COUNTxRANK:TARGET,…:LABELS`.

        Raises:
            ValueError: It is not of that form.
        """
        try:
            size, targets, labels = text.split(":")
            count, rank = size.split("x")
            group = cls(int(count), int(rank), tuple(targets.split(",")), int(labels))
        except ValueError:
            group = None
        if group is None or min(group.count, group.rank, group.labels) < 1 or "" in group.targets:
            raise ValueError(f"{text!r} is not COUNTxRANK:TARGET,…:LABELS (300x8:query,value:2)")
        return group


class Base:
    """A base's shapes, which is all that sizes follow from."""

    def __init__(self, name: str) -> None:
        """Read the base's config.

        Raises:
            BaseUnavailable: It cannot be had, or is not served.
        """
        self._layout: Layout = find_layout(Checkpoint.on_meta(BaseName.parse(name)))
        self._shapes = self._layout.shapes()
        self.config: PretrainedConfig = self._layout.model.config

    def adapter_bytes(self, group: Group, itemsize: int) -> int:
        """Return what one adapter takes of the bank, and of the host's RAM.

        Args:
            group: What it is; it classifies sequences.
            itemsize: Bytes of an element of LoRA in the bank; heads are fp32.

        Raises:
            ValueError: The base has no linear of a target's name.
        """
        page = page_bytes(self.config.get_text_config().hidden_size, itemsize)
        pages = 0
        for path in self._targets(group.targets):
            site = self._shapes[path]
            for width in (site.in_features, site.out_features):
                pages += pages_of(group.rank * width * itemsize, page)
        for head in self._layout.graphs["SEQ_CLS"].heads.values():
            shape = head.parameters["weight"]
            rows = group.labels if head.labelled else shape[0]
            # One tensor with its bias, which is there whether or not the adapter has one.
            pages += pages_of(rows * (math.prod(shape[1:]) + 1) * _FP32, page)
        return pages * page

    def weight_bytes(self, quantization: str, itemsize: int) -> int:
        """Return what the base takes: its linears quantised, all else as it computes."""
        model = self._layout.model
        total = sum(parameter.numel() for parameter in model.parameters())
        linears = [model.get_parameter(f"{path}.weight") for path in self._layout.linears]
        if quantization == "none":
            return total * itemsize
        quantized = sum(weight.numel() for weight in linears)
        outputs = sum(self._shapes[path].out_features for path in self._layout.linears)
        scales = outputs * _FP32 if quantization == "int8" else 0
        return int(quantized * _BYTES[quantization] + scales + (total - quantized) * itemsize)

    def activation_bytes(self, max_tokens: int, itemsize: int, graphs: bool) -> int:
        """Return what the largest forward takes at most, with what CUDA graphs take."""
        widest = max(shape.out_features for shape in self._shapes.values())
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        shapes = (self.config, widest, longest, itemsize)
        taken = activation_bytes(*shapes, max_tokens)
        if graphs:
            taken += activation_bytes(*shapes, min(max_tokens, MAX_TOKENS))
            taken += output_bytes(self.config, itemsize, max_tokens)
        return taken

    def _targets(self, names: Collection[str]) -> list[str]:
        if tuple(names) == ("all-linear",):
            return sorted(self._layout.linears)
        found = [path for path in self._layout.linears if is_target(path, names)]
        lacking = [name for name in names if not any(is_target(path, [name]) for path in found)]
        if lacking:
            known = sorted({path.rpartition(".")[2] for path in self._layout.linears})
            raise ValueError(f"no linear is called {lacking[0]!r}; there are {', '.join(known)}")
        return found


def hit_rate(num_adapters: int, num_slots: int, exponent: float) -> float:
    """Return how often an adapter is in a slot when it is asked for, of 1.

    Che's approximation of an LRU: an adapter asked for with probability p is in with probability
    1 - exp(-p·t), where t is such that they fill the slots (Che, Tung and Wang, 2002).

    Args:
        num_adapters: How many are asked for.
        num_slots: How many fit.
        exponent: Zipf's, of how often each is asked for; 0 is all alike.
    """
    if num_slots >= num_adapters:
        return 1.0
    weights = [1 / rank**exponent for rank in range(1, num_adapters + 1)]
    probabilities = [weight / sum(weights) for weight in weights]
    low, high = 0.0, 1.0
    while sum(-math.expm1(-p * high) for p in probabilities) < num_slots:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        inside = sum(-math.expm1(-p * middle) for p in probabilities)
        low, high = (middle, high) if inside < num_slots else (low, middle)
    return float(sum(p * -math.expm1(-p * low) for p in probabilities))


def num_replicas(texts_per_s: float, tokens: float, tokens_per_s: float) -> int:
    """Return the replicas that a load needs, and one more, so that one may fail.

    Args:
        texts_per_s: The load's peak.
        tokens: Of a text, on average.
        tokens_per_s: What one replica was measured to do.
    """
    return math.ceil(texts_per_s * tokens / (tokens_per_s * _UTILISATION)) + 1


def report(base: Base, groups: Sequence[Group], args: argparse.Namespace) -> list[str]:
    """Return what to tell, a line a key."""
    on_gpu = args.device == "cuda"
    quantization = args.quantization or ("nf4" if on_gpu else "int8")
    itemsize, tokens = (2, 16384) if on_gpu else (_FP32, 1024)
    each = [base.adapter_bytes(group, itemsize) for group in groups]
    bank = sum(group.count * size for group, size in zip(groups, each, strict=True))
    count = sum(group.count for group in groups)
    weights = base.weight_bytes(quantization, itemsize)
    activations = base.activation_bytes(args.max_batch_tokens or tokens, itemsize, on_gpu)
    all_of_it = weights + activations + (bank if on_gpu else 2 * bank)
    lines = [f"weights        {weights / GIB:.2f} GiB ({quantization} on {args.device})"]
    lines += [f"activations    {activations / GIB:.2f} GiB at most"]
    for group, size in zip(groups, each, strict=True):
        lines += [f"an adapter     {size / 1024:,.0f} KiB (rank {group.rank}), {group.count} of it"]
    lines += [f"bank_gib       {bank / GIB:.3f} holds all {count}"]
    for slots in sorted({max(1, count // part) for part in (2, 4, 8)} - {count}, reverse=True):
        hits = hit_rate(count, slots, args.zipf)
        lines += [f"               {bank * slots / count / GIB:.3f} holds {slots}: {hits:.0%} hits"]
    lines += [f"max_host_gib   {bank / GIB:.3f} holds all"]
    where = "on the GPU" if on_gpu else "of RAM, with max_host_gib"
    lines += [f"a replica      {all_of_it / GIB:.2f} GiB {where}, all adapters resident"]
    if args.rate:
        replicas = num_replicas(args.rate, args.tokens, args.tokens_per_s)
        lines += [f"max_replicas   {replicas}, one of them to spare"]
    return lines


def main(arguments: Sequence[str]) -> int:
    """Print the sizes; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deployments.model.sizing")
    parser.add_argument("base", help="a local folder with config.json, or a hub id")
    parser.add_argument("adapters", nargs="+", metavar="COUNTxRANK:TARGET,…:LABELS")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quantization", choices=["none", "int8", "nf4"])
    parser.add_argument("--max-batch-tokens", type=int)
    parser.add_argument("--zipf", type=float, default=1.0, help="0: all are asked for alike")
    parser.add_argument("--rate", type=float, help="texts a second at the peak")
    parser.add_argument("--tokens", type=float, default=32, help="tokens of a text")
    parser.add_argument("--tokens-per-s", type=float, help="what one replica was measured to do")
    args = parser.parse_args(arguments)
    if args.rate and not args.tokens_per_s:
        parser.error("--rate needs --tokens-per-s, which is measured, not computed")
    try:
        groups = [Group.parse(text) for text in args.adapters]
        lines = report(Base(args.base), groups, args)
    except (BaseUnavailable, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
