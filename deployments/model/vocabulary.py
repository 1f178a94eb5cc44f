"""AutoTokenizer's backend, exported once for those that must not import torch."""

from __future__ import annotations

import zlib
from pathlib import Path

import orjson
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from adapters.tokenizer import SETTINGS, BaseTokenizer
from deployments.base import BaseName, BaseUnavailable
from deployments.model.encoder import Encoder
from deployments.tokens import Vocabulary

# Handle messages are capped at 4 MB in throughput mode, and a tokenizer may be larger.
PAGE_BYTES = 2**20


def export_vocabulary(encoder: Encoder) -> Vocabulary:
    """Return the base's tokenizer, its own truncation and padding cleared.

    Raises:
        BaseUnavailable: The base has no tokenizer, or none with a Rust backend.
    """
    return _export(_load(encoder.base), encoder)


def base_tokenizer(encoder: Encoder) -> BaseTokenizer | None:
    """Return what adapters' tokenizers are compared with, None if the base has no tokenizer."""
    try:
        tokenizer = _load(encoder.base)
    except BaseUnavailable:
        return None
    vocabulary = _export(tokenizer, encoder)
    path = cached_file(
        encoder.base.path,
        "tokenizer.json",
        revision=encoder.base.revision,
        _raise_exceptions_for_missing_entries=False,
    )
    known = {**tokenizer.init_kwargs, "split_special_tokens": tokenizer.split_special_tokens}
    return BaseTokenizer(
        vocabulary["backend"],
        file=None if path is None else Path(path).read_text("utf-8"),
        settings={key: known[key] for key in SETTINGS if key in known},
        truncation_side=vocabulary["truncation_side"],
        max_length=vocabulary["max_length"],
    )


def _load(base: BaseName) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            base.path, revision=base.revision
        )
        backend = tokenizer.backend_tokenizer
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseUnavailable(f"base_model={str(base)!r} has no fast tokenizer: {reason}") from None
    # Where the files are missing, transformers 5 makes one of special tokens alone.
    if backend.get_vocab_size() <= 2 * len(tokenizer.all_special_ids):
        raise BaseUnavailable(f"base_model={str(base)!r} has no tokenizer; add its tokenizer.json")
    return tokenizer


def _export(tokenizer: PreTrainedTokenizerBase, encoder: Encoder) -> Vocabulary:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    # A tokenizer without a limit says 1e30; a base without one (rotary positions) says nothing.
    limits = [tokenizer.model_max_length, encoder.max_positions]
    return Vocabulary(
        backend=backend.to_str(),
        max_length=min(int(limit) for limit in limits if limit is not None),
        truncation_side=tokenizer.truncation_side,
        split_special_tokens=tokenizer.split_special_tokens,
        type_ids="token_type_ids" in tokenizer.model_input_names,
        unk_id=tokenizer.unk_token_id,
    )


def to_pages(vocabulary: Vocabulary) -> list[bytes]:
    """Cut a vocabulary into compressed pages of at most `PAGE_BYTES`."""
    packed = zlib.compress(orjson.dumps(vocabulary), level=6)
    return [packed[start : start + PAGE_BYTES] for start in range(0, len(packed), PAGE_BYTES)]
