"""What of a folder is an adapter."""

from collections.abc import Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import BinaryIO

# A training folder has optimizer states, checkpoints and pickles beside them.
NAMES = (
    "adapter_config.json", "adapter_model.safetensors", "config.json", "task.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "golden.jsonl",
)  # fmt: skip


def open_files(
    files: str | PathLike[str] | Mapping[str, bytes | BinaryIO], opened: ExitStack
) -> list[tuple[str, bytes | BinaryIO]]:
    """Returns the names and contents of an adapter's files.

    Args:
        files: Its folder, or contents by name, which are taken as they are.
        opened: What closes the files again.

    Raises:
        ValueError: The folder has no adapter_config.json.
        OSError: A file cannot be read.
    """
    if isinstance(files, Mapping):
        return list(files.items())
    folder = Path(files)
    if not (folder / NAMES[0]).is_file():
        raise ValueError(f"{folder} has no {NAMES[0]}.")
    paths = [folder / name for name in NAMES if (folder / name).is_file()]
    return [(path.name, opened.enter_context(path.open("rb"))) for path in paths]
