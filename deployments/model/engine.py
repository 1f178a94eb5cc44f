"""Rows of token ids in, predictions out. Knows no Ray, no HTTP and no event loop."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from adapters.artifact import Artifact, read_artifact
from adapters.store import RULES, Files
from deployments.base import BaseName
from deployments.model.encoder import Encoder, Logits, default_dtype
from deployments.model.quantize import choose
from deployments.model.scores import to_predictions
from deployments.model.vocabulary import base_tokenizer
from deployments.rows import Prediction, Row


class BadRow(ValueError):
    """A row that the base cannot read; the message says why."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """An artifact and its bank row: all that a slot needs.

    Attributes:
        artifact: The adapter, without its tensors.
        row: [row_bytes], uint8, CPU.
        fields: The bank fields that it fills.
    """

    artifact: Artifact
    row: torch.Tensor
    fields: frozenset[str]


class Engine:
    """One base, many adapters, one forward for rows of any of them.

    Used by one thread at a time, but for `read`, which touches no slot.
    """

    def __init__(
        self,
        base_model: str,
        *,
        quantization: str = "auto",
        device: str = "auto",
        adapter_slots: int = 64,
        max_lora_rank: int = 16,
        max_labels: int = 16,
        lora_targets: Collection[str] | None = None,
        saved_modules: Collection[str] = (),
        dtype: torch.dtype | None = None,
        base_aliases: Collection[str] = (),
    ) -> None:
        """Load the base once.

        Args:
            base_model: A folder, or a hub id `org/name@revision`.
            quantization: `none`, `int8`, `nf4`; `auto` is nf4 on a GPU and int8 on a CPU.
            device: `cpu`, `cuda`; `auto` is cuda where there is one.
            adapter_slots: Adapters that can be resident at a time.
            max_lora_rank: Largest rank that can be loaded.
            max_labels: Most labels that can be loaded.
            lora_targets: Ends of module paths that adapters may target; None for all linears.
            saved_modules: Ends of the paths of modules before the head that adapters may bring.
            dtype: What base and LoRA compute in; None is bf16 on a GPU and fp32 on a CPU.
            base_aliases: Hub ids that are the same base as `base_model`.

        Raises:
            BaseUnavailable: The base cannot be loaded or served.
            ValueError: The device or the quantisation is not to be had here.
        """
        self.device = choose_device(device)
        self.quantization = choose(quantization, self.device)
        self.encoder = Encoder(
            BaseName.parse(base_model),
            quantization=self.quantization,
            device=self.device,
            dtype=dtype or default_dtype(self.device),
            num_slots=adapter_slots + 1,
            max_rank=max_lora_rank,
            max_labels=max_labels,
            lora_targets=lora_targets,
            saved_modules=saved_modules,
        )
        self.geometry = replace(
            self.encoder.geometry,
            base_aliases=frozenset(base_aliases),
            tokenizer=base_tokenizer(self.encoder),
        )
        config = self.encoder.config.get_text_config()
        self._num_ids: int = config.vocab_size
        self._pad_id = self.encoder.pad_id or 0  # any will do where the base has none
        self._num_labels = [0] * (adapter_slots + 1)
        self._of_tokens = [False] * (adapter_slots + 1)

    def read(self, files: Files) -> Loaded:
        """Validate an adapter's files against this base and pack them for a slot.

        Raises:
            AdapterRefused: With every problem that was found.
        """
        # Only where it is compared: hashing a large base takes a minute.
        compared = b"base_sha256" in files.contents.get(RULES, b"")
        sha256 = self.encoder.sha256 if compared else None
        artifact = read_artifact(files, self.geometry, sha256)
        fields = self.encoder.deltas.fields(artifact)
        row = self.encoder.bank.pack(fields)
        return Loaded(artifact.without_tensors(), row, frozenset(fields))

    def write(self, slot: int, loaded: Loaded) -> None:
        """Put an adapter into a slot (1 to adapter_slots), in the place of what was there."""
        self.encoder.bank.write(slot, loaded.row, loaded.fields)
        self._num_labels[slot] = loaded.artifact.num_labels
        self._of_tokens[slot] = loaded.artifact.spec.task_type == "TOKEN_CLS"

    def problem(self, row: Row) -> BadRow | None:
        """Return why a row cannot be read, or None if it can."""
        ids, type_ids = row.tokens
        if not 0 < row.slot < len(self._num_labels) or not self._num_labels[row.slot]:
            return BadRow(f"slot {row.slot} holds no adapter")
        if not ids:
            return BadRow("the input has no tokens")
        longest = self.encoder.max_positions
        if longest is not None and len(ids) > longest:
            return BadRow(f"{len(ids)} tokens exceed the base's {longest} positions")
        if min(ids) < 0 or max(ids) >= self._num_ids:
            return BadRow(f"a token id is outside the base's vocabulary of {self._num_ids}")
        if type_ids is not None and len(type_ids) != len(ids):
            return BadRow(f"{len(type_ids)} type ids for {len(ids)} token ids")
        return None

    def logits(self, rows: Sequence[Row], num_tokens: int | None = None) -> torch.Tensor:
        """Run one forward of rows that are all of one task type.

        Args:
            rows: Rows without a `problem`, of any mix of slots.
            num_tokens: Pad to so many tokens; None for the longest row.

        Returns:
            [rows, max_labels], of token classifiers [rows, tokens, max_labels], fp32, on the
            device; zero beyond a row's own labels. Gradients flow if the caller has them on.
        """
        sequences, tokens = self.forward(rows, num_tokens)
        assert (sequences is None) is not (tokens is None)
        return sequences if sequences is not None else tokens  # type: ignore[return-value]

    def forward(self, rows: Sequence[Row], num_tokens: int | None = None) -> Logits:
        """Run one forward of rows of any task types; arguments as for `logits`."""
        width = max(max(row.num_tokens for row in rows), num_tokens or 0)
        ids = torch.full((len(rows), width), self._pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        segments = torch.zeros_like(mask) if any(row.tokens.type_ids for row in rows) else None
        for index, row in enumerate(rows):
            ids[index, : row.num_tokens] = torch.tensor(row.tokens.ids)
            mask[index, : row.num_tokens] = 1
            if segments is not None and row.tokens.type_ids:
                segments[index, : row.num_tokens] = torch.tensor(row.tokens.type_ids)
        return self.encoder.forward(
            ids.to(self.device),
            mask.to(self.device),
            None if segments is None else segments.to(self.device),
            [row.slot for row in rows],
            [self._of_tokens[row.slot] for row in rows],
        )

    def predict(self, rows: Sequence[Row]) -> list[Prediction | Exception]:
        """Answer rows of any mix of slots with one forward; a row's problem stands in its place."""
        answers: list[Prediction | Exception | None] = [self.problem(row) for row in rows]
        good = [index for index, problem in enumerate(answers) if problem is None]
        if good:
            with torch.inference_mode():
                logits = self.forward([rows[index] for index in good])
            for of_tokens, part in enumerate(logits):
                chosen = [i for i in good if self._of_tokens[rows[i].slot] == bool(of_tokens)]
                if part is not None:
                    counts = [self._num_labels[rows[index].slot] for index in chosen]
                    scored = to_predictions(part, counts, [rows[index] for index in chosen])
                    for index, prediction in zip(chosen, scored, strict=True):
                        answers[index] = prediction
        return answers  # type: ignore[return-value]  # no None is left


def choose_device(device: str) -> torch.device:
    """Return the device to use.

    Raises:
        ValueError: It is not auto, cpu or cuda, or cuda where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r} is not one of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU here; use device=cpu or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
