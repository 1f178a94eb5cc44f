"""The peers of `make bench-gpu` that are no package of ours: vLLM, and merged models under TEI.

Each runs where it is installed. Where it is not, or where it fails, the table says so with the
reason, and goes on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.peers import NotRun, tei, vllm_lora
from benchmarks.peers.merged import merged_model
from benchmarks.timing import in_turns

Work = Callable[[], object]
LABELS = {0: "no", 1: "yes"}
NUM_SPECIAL = 5
MAX_REASON = 160  # characters


@dataclass(frozen=True)
class Job:
    """What is to be answered.

    Attributes:
        base: Folder of the base.
        adapters: Folders of PEFT's adapters; row i is the i-th's, and so on in turn.
        ids: [rows, tokens], int64, on the CPU; none is special.
        dtype: Of the model.
    """

    base: str
    adapters: Sequence[Path]
    ids: torch.Tensor
    dtype: torch.dtype

    @property
    def of(self) -> list[int]:
        """The adapter of each row."""
        return [row % len(self.adapters) for row in range(len(self.ids))]


Start = Callable[[Job], AbstractContextManager[tuple[str, Work]]]


@contextmanager
def with_vllm(job: Job) -> Iterator[tuple[str, Work]]:
    """Give vLLM's version, and what answers the job's rows once."""
    version = vllm_lora.find()
    with tempfile.TemporaryDirectory() as folder:
        base = AutoModelForSequenceClassification.from_pretrained(job.base, num_labels=len(LABELS))
        _save(base.to(job.dtype), Path(folder))
        with vllm_lora.classifier(folder, job.adapters, job.ids.tolist(), job.of) as answer:
            yield version, answer


@contextmanager
def with_tei(job: Job) -> Iterator[tuple[str, Work]]:
    """Give TEI's version, and what answers the job's rows once. It has no bf16."""
    version = tei.find(AutoConfig.from_pretrained(job.base).model_type)
    half = job.dtype != torch.float32
    with tempfile.TemporaryDirectory() as folder:
        merged = [Path(folder) / str(index) for index in range(len(job.adapters))]
        for path, adapter in zip(merged, job.adapters, strict=True):
            model = merged_model(job.base, str(adapter))
            _save(model.half() if half else model, path)
        # As many tokens as the others' rows, with [CLS] and [SEP].
        texts = [" ".join(f"w{id_}" for id_ in row[:-2]) for row in job.ids.tolist()]
        with tei.servers(merged, "float16" if half else "float32") as answer:
            yield version, lambda: answer(texts, job.of)


PEERS: Mapping[str, Start] = {"vLLM": with_vllm, "TEI": with_tei}


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Save a classifier with the labels' names, and a tokenizer whose word w7 is token 7."""
    model.config.id2label = dict(LABELS)
    model.config.label2id = {label: index for index, label in LABELS.items()}
    model.save_pretrained(folder)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    count: int = model.config.vocab_size
    names = [*special, *(f"w{index}" for index in range(NUM_SPECIAL, count))]
    words = models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)


def beside(
    plain: Work, job: Job, rounds: int, warm: int, peers: Mapping[str, Start] | None = None
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str], dict[str, str]]:
    """Time each peer in turns with the plain base.

    Returns:
        Of each that ran the seconds of every run, its own and `plain`'s; its version; and of each
        that did not run the reason, one line.
    """
    taken: dict[str, dict[str, list[float]]] = {}
    versions: dict[str, str] = {}
    not_run: dict[str, str] = {}
    for name, start in (PEERS if peers is None else peers).items():
        try:
            with start(job) as (version, work):
                for _ in range(warm):
                    work()
                taken[name] = in_turns({"plain": plain, name: work}, rounds)
                versions[name] = version
        except NotRun as reason:
            not_run[name] = str(reason)
        except Exception as error:
            not_run[name] = _in_a_line(error)
    return taken, versions, not_run


def _in_a_line(error: Exception) -> str:
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= MAX_REASON else line[: MAX_REASON - 1] + "…"


def not_run_lines(rows: Sequence[Mapping[str, Any]], num_columns: int) -> list[list[str]]:
    """One line of the table a peer and reason, with the bases that it is so for."""
    bases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for peer, reason in row.get("not_run", {}).items():
            bases.setdefault((peer, reason.replace("|", "/")), []).append(row["base"])
    return [
        [f"{peer}: {', '.join(of)}", f"not run: {reason}", *["–"] * (num_columns - 2)]
        for (peer, reason), of in bases.items()
    ]
