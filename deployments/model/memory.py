"""What a replica takes of its device's memory, told and checked before it takes traffic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from deployments.config import GIB, ConfigError
from deployments.model.encoder import Encoder
from deployments.model.graphs import MAX_GRAPHS, MAX_TOKENS

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the device, or of the machine's RAM if that is a CPU.

    Attributes:
        weights: The base's, quantised as it is.
        bank: All pages, used or not.
        activations: Of the largest forward, and of CUDA graphs, at most.
        host: Adapters in RAM, if the device is a CPU and they share its memory.
        available: For all of them together.
    """

    weights: int
    bank: int
    activations: int
    host: int
    available: int

    def __str__(self) -> str:
        """One line for the log."""
        parts = {
            "weights": self.weights,
            "bank": self.bank,
            "activations": self.activations,
            "host": self.host,
        }
        told = " + ".join(f"{name} {of / GIB:.2f}" for name, of in parts.items() if of)
        return f"{told} of {self.available / GIB:.2f} GiB"

    def given(self, encoder: Encoder, max_tokens: int, host_bytes: int) -> Memory:
        """Return the same with other budgets; arguments as for `take_stock`."""
        activations = largest_activations(encoder, max_tokens)
        if encoder.device.type == "cuda":
            activations += largest_graphs(encoder, max_tokens)
            host_bytes = 0
        return replace(self, activations=activations, host=host_bytes)

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            ConfigError: It cannot.
        """
        if self.weights + self.bank + self.activations + self.host > self.available:
            keys = "bank_gib, max_host_gib" if self.host else "bank_gib"
            raise ConfigError(
                f"the memory does not hold what is configured ({self}); lower {keys} or "
                "max_batch_tokens, or take another quantization"
            )


def take_stock(encoder: Encoder, max_tokens: int, host_bytes: int) -> Memory:
    """Add up what a replica takes.

    Args:
        encoder: The base, loaded, and its bank.
        max_tokens: Most tokens in a forward.
        host_bytes: Budget of adapters in RAM.
    """
    stored = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*encoder.model.parameters(), *encoder.model.buffers())
    }
    weights, bank = sum(stored.values()), encoder.bank.memory.nbytes
    if encoder.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(encoder.device)
        available = free + weights + bank
    else:
        available = available_ram() + weights  # pages that were never written take nothing yet
    return Memory(weights, bank, 0, 0, available).given(encoder, max_tokens, host_bytes)


def largest_activations(encoder: Encoder, max_tokens: int) -> int:
    """Return the bytes that a forward of so many tokens takes at most."""
    widest = max(site.out_features for site in encoder.geometry.sites.values())
    itemsize = encoder.bank.dtype.itemsize
    return activation_bytes(encoder.config, widest, encoder.max_positions, itemsize, max_tokens)


def activation_bytes(
    config: PretrainedConfig, widest: int, longest: int | None, itemsize: int, max_tokens: int
) -> int:
    """Return the bytes that a forward of so many tokens takes at most.

    Taken for eight vectors of the hidden size and eight of the widest linear a token, with what
    quantising copies of them; and for three of the scores of its attention if that is not fused.
    Measured: 0.2 to 0.75 of it.

    Args:
        config: The base's.
        widest: Outputs of its widest linear.
        longest: Its longest input in tokens, None where positions have no end.
        itemsize: Bytes of an element that it computes in.
        max_tokens: Most tokens in a forward, with padding where layers see it.
    """
    text = config.get_text_config()
    a_token = 8 * (text.hidden_size + max(text.hidden_size, widest))
    if text._attn_implementation == "eager":
        a_token += 3 * text.num_attention_heads * min(longest or max_tokens, max_tokens)
    return int(max_tokens * a_token * itemsize)


def largest_graphs(encoder: Encoder, max_tokens: int) -> int:
    """Return the bytes that CUDA graphs take at most: a forward's in common, an output each."""
    tokens = min(max_tokens, MAX_TOKENS)
    itemsize = encoder.bank.dtype.itemsize
    return largest_activations(encoder, tokens) + output_bytes(encoder.config, itemsize, tokens)


def output_bytes(config: PretrainedConfig, itemsize: int, max_tokens: int) -> int:
    """Return the bytes of what all CUDA graphs give; arguments as for `activation_bytes`."""
    hidden: int = config.get_text_config().hidden_size
    return MAX_GRAPHS * min(max_tokens, MAX_TOKENS) * hidden * itemsize


def available_ram() -> int:
    """Return the bytes of RAM that this process may still take, in its machine or container."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit, used, stat = (
            (_CGROUP / f"memory.{name}").read_text() for name in ("max", "current", "stat")
        )
    except OSError:  # no cgroup of version 2 here
        return available
    if limit.strip() == "max":
        return available
    # Files that were read count as used, and give way when memory is needed.
    cached = next(line for line in stat.splitlines() if line.startswith("inactive_file "))
    return min(available, int(limit) - int(used) + int(cached.split()[1]))
