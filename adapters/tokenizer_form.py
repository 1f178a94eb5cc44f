"""A tokenizer.json without what changes no id, so that two of them can be compared. No torch.

An adapter's file is read as JSON only: the tokenizers library panics on some broken ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SECTIONS = ("model", "normalizer", "pre_tokenizer", "post_processor", "added_tokens")

# What older versions of the tokenizers library leave out, by `type`.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "BPE": {
        "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False,
    },
    "Unigram": {"byte_fallback": False},
    "ByteLevel": {"use_regex": True},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TokenizerForm:
    """What of a tokenizer.json decides ids; padding, truncation, decoder and version do not.

    Attributes:
        digests: Section -> SHA-256 of its JSON, keys sorted.
        added: Texts of the added tokens.
        steps: (type, key) -> value of the normalizer's and pre-tokenizer's steps.
    """

    digests: Mapping[str, bytes]
    added: tuple[str, ...]
    steps: Mapping[tuple[str, str], Any]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> TokenizerForm:
        """Take what a tokenizer.json holds.

        Raises:
            TypeError, ValueError, RecursionError: It is not one.
        """
        sections = {name: _plain(raw.get(name)) for name in SECTIONS}
        added = sections["added_tokens"] or []
        if not all(isinstance(part, dict) for part in (sections["model"], *added)):
            raise TypeError
        sections["added_tokens"] = sorted(added, key=_dump)
        steps: dict[tuple[str, str], Any] = {}
        for name in ("normalizer", "pre_tokenizer"):
            _collect(sections[name], steps)
        return cls(
            {name: hashlib.sha256(_dump(section)).digest() for name, section in sections.items()},
            tuple(str(token.get("content")) for token in added),
            steps,
        )

    def differing(self, other: TokenizerForm) -> list[str]:
        """Return the names of the sections that are not the other's."""
        return [name for name in SECTIONS if self.digests[name] != other.digests[name]]


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _plain(node: Any) -> Any:
    """Write a part as today's tokenizers library would."""
    if isinstance(node, list):
        return [_plain(part) for part in node]
    if not isinstance(node, dict):
        return node
    # Vocabularies and merges have no parts of their own, and hundreds of thousands of entries.
    plain = {key: v if key in ("vocab", "merges") else _plain(v) for key, v in node.items()}
    plain = {**_DEFAULTS.get(plain.get("type", ""), {}), **plain}
    if isinstance(plain.get("merges"), list):
        plain["merges"] = [m.split(" ") if isinstance(m, str) else m for m in plain["merges"]]
    if plain.get("type") == "Metaspace" and "prepend_scheme" not in plain:
        prefix = plain.pop("add_prefix_space", True)
        plain.pop("str_rep", None)
        plain |= {"prepend_scheme": "always" if prefix else "never", "split": True}
    return plain


def _collect(node: Any, steps: dict[tuple[str, str], Any]) -> None:
    """Gather the values of all steps, one that stands in a sequence too."""
    if isinstance(node, list):
        for part in node:
            _collect(part, steps)
    elif isinstance(node, dict):
        for key, value in node.items():
            if isinstance(value, list):
                _collect(value, steps)
            else:
                steps[str(node.get("type")), key] = value
