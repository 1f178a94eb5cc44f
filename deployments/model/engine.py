"""Rows of token ids in, predictions out. Knows no Ray, no HTTP and no event loop."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from adapters.artifact import Artifact, read_artifact, under_rules
from adapters.errors import AdapterRefused
from adapters.store import RULES, Files
from deployments.base import BaseName
from deployments.config import GIB, Args
from deployments.model.encoder import Encoder, Logits, default_dtype
from deployments.model.fitting import fitting
from deployments.model.packing import Packed
from deployments.model.quantize import choose
from deployments.model.scores import to_predictions
from deployments.model.vocabulary import base_tokenizer
from deployments.rows import Prediction, Row


class BadRow(ValueError):
    """A row that the base cannot read; the message says why."""


class EmptySlot(BadRow):
    """A row whose slot holds no adapter, because it could not be written."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """An artifact and its pages: all that a slot needs.

    Attributes:
        artifact: The adapter, without its tensors.
        packed: Its tensors as the bank has them.
    """

    artifact: Artifact
    packed: Packed

    @property
    def num_pages(self) -> int:
        """Pages that it takes of the bank."""
        return len(self.packed.pages)

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes of the bank, and of the host's RAM."""
        return self.packed.pages.nbytes


class Engine:
    """One base, many adapters, one forward for rows of any of them.

    Used by one thread at a time, but for `read` and its halves, which touch no slot.
    """

    def __init__(
        self,
        base_model: str,
        *,
        quantization: str = "auto",
        device: str = "auto",
        bank_bytes: int = GIB,
        dtype: torch.dtype | None = None,
        base_aliases: Collection[str] = (),
    ) -> None:
        """Load the base once.

        Args:
            base_model: A folder, or a hub id `org/name@revision`.
            quantization: `none`, `int8`, `nf4`; `auto` is nf4 on a GPU and int8 on a CPU.
            device: `cpu`, `cuda`; `auto` is cuda where there is one.
            bank_bytes: Memory for resident adapters; on a CPU it is taken as they come.
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
            bank_bytes=bank_bytes,
        )
        self.geometry = replace(
            self.encoder.geometry,
            base_aliases=frozenset(base_aliases),
            tokenizer=base_tokenizer(self.encoder),
        )
        config = self.encoder.config.get_text_config()
        self.num_ids: int = config.vocab_size
        self._pad_id = self.encoder.pad_id or 0  # any will do where the base has none
        self._residents: dict[int, Artifact] = {}

    def read(self, files: Files) -> Loaded:
        """Validate an adapter's files against this base and pack them for a slot.

        Raises:
            AdapterRefused: With every problem that was found.
        """
        return self.pack(self.validate(files))

    def validate(self, files: Files, ruled: bool = True) -> Artifact:
        """Do the first half of `read`; what `ruled` is, see `adapters.artifact.read_artifact`."""
        sha256 = self._compared(files.contents.get(RULES, b"")) if ruled else None
        return read_artifact(files, self.geometry, sha256, ruled=ruled)

    def under_rules(self, artifact: Artifact, task_json: bytes) -> Artifact:
        """Return an artifact that has other rules.

        Raises:
            AdapterRefused: They do not fit it; with every problem that was found.
        """
        return under_rules(artifact, task_json, self.geometry, self._compared(task_json))

    def _compared(self, task_json: bytes) -> str | None:
        """Return the base's digest only where it is compared: hashing a large base is a minute."""
        return self.encoder.sha256 if b"base_sha256" in task_json else None

    def pack(self, artifact: Artifact) -> Loaded:
        """Do the second half of `read`."""
        delta, bank = self.encoder.deltas.of(artifact), self.encoder.bank
        loaded = Loaded(artifact.without_tensors(), bank.pack(delta.body, delta.heads))
        if loaded.num_pages > bank.num_pages:
            mib, has = loaded.num_bytes / 2**20, bank.num_pages * bank.page_bytes / 2**20
            problem = f"it takes {mib:.1f} MiB and the bank has {has:.1f}; raise bank_gib"
            raise AdapterRefused(artifact.task, [problem])
        return loaded

    def write(self, slot: int, loaded: Loaded, gone: Iterable[int] = ()) -> None:
        """Put an adapter into a slot (1 or more), in the place of what was there.

        Args:
            slot: The slot.
            loaded: The adapter.
            gone: Slots whose adapters leave first.

        Raises:
            MemoryError: The bank has no room for it; the slot is empty then.
        """
        self.forget((*gone, slot))
        self.encoder.bank.write(slot, loaded.packed)
        self._residents[slot] = loaded.artifact

    def forget(self, slots: Iterable[int]) -> None:
        """Free slots and their pages; they need not hold anything."""
        for slot in slots:
            self.encoder.bank.forget(slot)
            self._residents.pop(slot, None)

    def problem(self, row: Row) -> BadRow | None:
        """Return why a row cannot be read, or None if it can."""
        ids, type_ids = row.tokens
        if row.slot not in self._residents:
            return EmptySlot(f"slot {row.slot} holds no adapter")
        if not ids:
            return BadRow("the input has no tokens")
        longest = self.encoder.max_positions
        if longest is not None and len(ids) > longest:
            return BadRow(f"{len(ids)} tokens exceed the base's {longest} positions")
        if min(ids) < 0 or max(ids) >= self.num_ids:
            return BadRow(f"a token id is outside the base's vocabulary of {self.num_ids}")
        if type_ids is not None and len(type_ids) != len(ids):
            return BadRow(f"{len(type_ids)} type ids for {len(ids)} token ids")
        return None

    def logits(self, rows: Sequence[Row], num_tokens: int | None = None) -> torch.Tensor:
        """Run one forward of rows that are all of one task type.

        Args:
            rows: Rows without a `problem`, of any mix of slots.
            num_tokens: Pad to so many tokens; None for the longest row.

        Returns:
            [rows, most labels], of token classifiers [rows, tokens, most labels], fp32, on the
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
            [self._of_tokens(row) for row in rows],
        )

    def _of_tokens(self, row: Row) -> bool:
        return self._residents[row.slot].spec.task_type == "TOKEN_CLS"

    def predict(self, rows: Sequence[Row]) -> list[Prediction | Exception]:
        """Answer rows of any mix of slots with one forward; a row's problem stands in its place."""
        answers: list[Prediction | Exception | None] = [self.problem(row) for row in rows]
        good = [index for index, problem in enumerate(answers) if problem is None]
        if not self.encoder.is_ragged:  # rows whose adapters are packed alike share a product
            good.sort(key=lambda index: self.encoder.bank.likeness(rows[index].slot))
        if good:
            batch = [rows[index] for index in good]
            with fitting(len(batch) * max(row.num_tokens for row in batch)):
                logits = self.forward(batch)
            for of_tokens, part in enumerate(logits):
                chosen = [i for i in good if self._of_tokens(rows[i]) == bool(of_tokens)]
                if part is not None:
                    counts = [self._residents[rows[index].slot].num_labels for index in chosen]
                    scored = to_predictions(part, counts, [rows[index] for index in chosen])
                    for index, prediction in zip(chosen, scored, strict=True):
                        answers[index] = prediction
        return answers  # type: ignore[return-value]  # no None is left

    def gives_numbers(self, num_rows: int = 1, num_tokens: int = 8) -> bool:
        """Run rows of the plain base, no adapter with them; tell whether it gives finite numbers.

        If it does not, no adapter's answer on this device is worth anything.

        Raises:
            DoesNotFit: It takes more memory than there is.
        """
        self.encoder.bank.route([0] * num_rows)
        ids = (torch.arange(num_tokens) % (self.num_ids - 1) + 1).repeat(num_rows, 1)
        ids = ids.to(self.device)
        with fitting(ids.numel()):
            hidden = self.encoder.model.base_model(ids, attention_mask=torch.ones_like(ids))[0]
            return bool(hidden.isfinite().all())


def make_engine(args: Args) -> Engine:
    """Make the engine that a configuration describes; see `Engine`."""
    return Engine(
        args.base_model,
        quantization=args.quantization,
        device=args.device,
        bank_bytes=int(args.bank_gib * GIB),
        base_aliases=args.base_aliases,
    )


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
