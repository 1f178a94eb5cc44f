"""Whether an adapter was trained with the base's tokenizer. No torch.

The base's tokenizer makes every task's ids: an adapter that learnt other ids must be refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from adapters.tokenizer_form import TokenizerForm

FILE, CONFIG, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
VOCABULARIES = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
# Keys of tokenizer_config.json that change ids, and the step of tokenizer.json that holds the same.
SETTINGS: dict[str, tuple[str, str] | None] = {
    "do_lower_case": ("BertNormalizer", "lowercase"),
    "strip_accents": ("BertNormalizer", "strip_accents"),
    "tokenize_chinese_chars": ("BertNormalizer", "handle_chinese_chars"),
    "add_prefix_space": ("ByteLevel", "add_prefix_space"),
    "add_bos_token": None,
    "add_eos_token": None,
    "split_special_tokens": None,
}
_SAVE = "save the tokenizer that it was trained with as tokenizer.json"
_SHOWN = 4  # names listed before "and N more"
_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Comparison:
    """What an adapter's tokenizer files say.

    Attributes:
        problems: A sentence for each way in which it is another tokenizer than the base's.
        max_length: Longest input in training in tokens, if they tell.
    """

    problems: tuple[str, ...] = ()
    max_length: int | None = None


class BaseTokenizer:
    """The base's tokenizer, to compare those of adapters with; safe to use from several threads."""

    def __init__(
        self,
        backend: str,
        *,
        file: str | None,
        settings: Mapping[str, Any],
        truncation_side: str,
        max_length: int,
    ) -> None:
        """Take what the base is read with.

        Args:
            backend: The tokenizer that makes the ids, as JSON.
            file: The base's own tokenizer.json, of which transformers made the former.
            settings: Its values of the keys in `SETTINGS`, as far as it has any.
            truncation_side: Which end of a long text goes, `left` or `right`.
            max_length: Most tokens that the base can take.
        """
        self._backend = backend
        self._forms = [TokenizerForm.of(json.loads(backend))]
        if file is not None:
            # Adapters trained on another transformers have the base's file as it lies there, or as
            # saving it again writes it.
            again = tokenizers.Tokenizer.from_str(file).to_str()
            self._forms += [TokenizerForm.of(json.loads(text)) for text in (file, again)]
        self._settings = settings
        self._side = truncation_side
        self._max_length = max_length
        self._remembered: dict[bytes, Comparison] = {}

    def compare(self, files: Mapping[str, bytes]) -> Comparison:
        """Compare an adapter's tokenizer files (name -> content), of which it may have none."""
        digest = hashlib.sha256()
        for name in (FILE, CONFIG, ADDED, *VOCABULARIES):
            if name in files:
                digest.update(f"{name}\0{len(files[name])}\0".encode())
                digest.update(files[name])
        # Thousands of adapters bring the same files.
        comparison = self._remembered.get(digest.digest())
        if comparison is None:
            comparison = self._compare(files)
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[digest.digest()] = comparison
        return comparison

    def _compare(self, files: Mapping[str, bytes]) -> Comparison:
        problems: list[str] = []
        raw = _read(FILE, files, problems)
        config = _read(CONFIG, files, problems) or {}
        if raw is not None:
            problems += self._file_problems(raw)
        elif FILE not in files:
            problems += self._vocabulary_problems(files)
        named = _named_tokens(config) | (_read(ADDED, files, problems) or {})
        if named and not problems:
            known = self._vocabulary()
            problems += _strange(
                token
                for token, index in named.items()
                if token not in known or index not in (None, known[token])
            )
        problems += self._setting_problems(config)
        truncation = (raw or {}).get("truncation")
        truncation = truncation if isinstance(truncation, dict) else {}
        side = str(config.get("truncation_side", truncation.get("direction", self._side))).lower()
        if side != self._side:
            problems.append(
                f"its tokenizer cuts long texts on the {side[:20]}, the base's on the "
                f"{self._side}; train with truncation_side={self._side!r}"
            )
        return Comparison(
            tuple(problems),
            self._training_length(truncation.get("max_length"), config.get("model_max_length")),
        )

    def _training_length(self, cut_at: object, limit: object) -> int | None:
        """Return where the tokenizer cut when it was saved, in tokens, or its lowered limit."""
        if type(cut_at) is int and cut_at > 0:
            return cut_at
        # Every tokenizer has a limit; only one that somebody lowered tells of the training.
        return limit if type(limit) is int and 0 < limit < self._max_length else None

    def _file_problems(self, raw: Mapping[str, Any]) -> list[str]:
        try:
            form = TokenizerForm.of(raw)
        except (TypeError, ValueError, RecursionError):
            return [f"{FILE} holds no tokenizer; {_SAVE}"]
        differing = min((form.differing(ours) for ours in self._forms), key=len)
        if not differing:
            return []
        known = self._vocabulary()
        strange = _strange(token for token in form.added if token not in known)
        if strange and differing == ["added_tokens"]:
            return strange
        return [
            *strange,
            f"{FILE} is not the base's ({', '.join(differing)}); "
            "train with the base's own tokenizer, unchanged",
        ]

    def _vocabulary_problems(self, files: Mapping[str, bytes]) -> list[str]:
        """Compare what older tokenizers have in the place of tokenizer.json."""
        present = [name for name in VOCABULARIES if name in files]
        if not present:
            return []
        model = json.loads(self._backend)["model"]
        if present != ["vocab.txt"] or model.get("type") != "WordPiece":
            return [f"{present[0]} cannot be compared with the base's tokenizer; {_SAVE}"]
        text = files["vocab.txt"].decode(errors="replace").replace("\r\n", "\n")
        theirs = {token: index for index, token in enumerate(text.removesuffix("\n").split("\n"))}
        other = sorted({token for token, _ in theirs.items() ^ model["vocab"].items()})
        if not other:
            return []
        return [f"vocab.txt is not the base's: {len(other)} tokens differ ({_shorten(other)})"]

    def _setting_problems(self, config: Mapping[str, Any]) -> list[str]:
        problems = []
        for key, step in SETTINGS.items():
            ours = [self._settings[key]] if key in self._settings else []
            if step is not None and step in self._forms[0].steps:
                ours.append(self._forms[0].steps[step])
            # The base's own files may contradict each other; then either is the base's.
            if key in config and ours and config[key] not in ours:
                problems.append(
                    f"{CONFIG}: {key} is {json.dumps(config[key])[:40]}, "
                    f"the base's is {json.dumps(ours[-1])}"
                )
        return problems

    def _vocabulary(self) -> dict[str, int]:
        """Token -> id; made when it is needed and not kept, as large ones take 50 MB."""
        return tokenizers.Tokenizer.from_str(self._backend).get_vocab()


def _read(name: str, files: Mapping[str, bytes], problems: list[str]) -> dict[str, Any] | None:
    if name not in files:
        return None
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        problems.append(f"{name} is not valid JSON ({error}); {_SAVE}")
        return None
    if not isinstance(value, dict):
        problems.append(f"{name} must hold a JSON object; {_SAVE}")
        return None
    return value


def _named_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokens that a tokenizer_config.json adds, with their ids as far as it has any."""
    named: dict[str, Any] = {}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key)
        tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
        if isinstance(tokens, list):
            named |= {token: None for token in tokens if isinstance(token, str)}
    decoder = config.get("added_tokens_decoder")
    for index, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            named[token["content"]] = int(index) if index.isdecimal() else index
    return named


def _strange(tokens: Iterable[str]) -> list[str]:
    """Return a sentence if there are any tokens that the base does not have."""
    names = sorted(set(tokens))
    if not names:
        return []
    return [
        f"its tokenizer has {len(names)} tokens that the base's has not ({_shorten(names)}); "
        "train without new tokens"
    ]


def _shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:40] for name in names[:_SHOWN]) + more
