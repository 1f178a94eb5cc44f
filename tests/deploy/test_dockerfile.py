"""The image: a linter, and what a linter cannot see. Nothing is built here: that needs Docker."""

import hashlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))


def lint(text: str) -> subprocess.CompletedProcess[str]:
    assert HADOLINT is not None, "hadolint is one of the dev dependencies"
    return subprocess.run(
        [HADOLINT, "--no-color", "--failure-threshold", "style", "-"],
        input=text, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def instructions(name: str) -> list[str]:
    """Arguments of an instruction, lines joined."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    return [line.split(" ", 1)[1] for line in text.splitlines() if line.startswith(f"{name} ")]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out of the build; the last line that matches decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        above = [str(p) for p in (Path(path), *Path(path).parents)][:-1]
        if (
            line
            and line[0] != "#"
            and any(
                fnmatch(p, pattern) or fnmatch(f"/{p}", pattern.replace("**", "*")) for p in above
            )
        ):
            out = not line.startswith("!")
    return out


def test_the_dockerfile_passes_the_linter() -> None:
    done = lint(DOCKERFILE.read_text())
    assert (done.returncode, done.stdout) == (0, "")
    assert "DL3002" in lint(DOCKERFILE.read_text().replace("USER 10001:10001", "USER root")).stdout


def test_what_is_copied_is_there_and_nothing_else_is_sent() -> None:
    copied = [part for line in instructions("COPY") for part in line.split()[:-1]]
    copied = [part for part in copied if not part.startswith(("--from", "/"))]
    assert {"adapters", "deployments", "requirements.lock"} <= set(copied)
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for path in copied:
        assert (ROOT / path).exists()
    sent = {path for path in tracked if not ignored(path)}
    assert {path.split("/")[0] for path in sent} == set(copied)
    for path in (".git/config", ".env", "deploy/ray.env", "adapters/__pycache__/x.pyc", "a/.env"):
        assert ignored(path), path


def test_every_package_is_checked_against_the_lock() -> None:
    (uv,) = re.findall(r"uv pip install .*", "\n".join(instructions("RUN")))
    assert "--require-hashes" in uv
    assert "-r pyproject.toml --constraints requirements.lock" in uv
    assert "--compile-bytecode" in uv
    for pip in re.findall(r"/pip install [^&]*", "\n".join(instructions("RUN"))):
        assert "--require-hashes" in pip
    # As constraints its hashes are all that is checked, so what is asked for must be in it.
    lock = (ROOT / "requirements.lock").read_text()
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", need)[0].lower() for need in needed}
    assert names <= set(re.findall(r"^([\w.-]+?)(?:\[.*\])?==", lock, re.MULTILINE))


def test_a_changed_hash_is_refused(tmp_path: Path) -> None:
    """The command of the image, on a project of one small package and without a network."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    (tmp_path / "dist").mkdir()
    wheel = _wheel(tmp_path / "dist")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\nversion = "1"\ndependencies = ["onebase-probe>=1"]\n'
    )
    for digest, status in ((wheel, 0), ("0" * 64, 1)):
        (tmp_path / "lock").write_text(f"onebase-probe==1.0 --hash=sha256:{digest}\n")
        done = subprocess.run(
            [uv, "pip", "install", "--no-cache", "--offline", "--no-index", "--target", "out",
             "--find-links", "dist", "--require-hashes", "-r", "pyproject.toml",
             "--constraints", "lock"],
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode != 0) == (status != 0), done.stderr
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def _wheel(folder: Path) -> str:
    """Write a wheel with nothing in it; return its SHA-256."""
    path = folder / "onebase_probe-1.0-py3-none-any.whl"
    info = "onebase_probe-1.0.dist-info"
    files = {
        "METADATA": "Metadata-Version: 2.1\nName: onebase-probe\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(f"{info}/{name}", content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_ends_as_a_user_that_is_a_number_and_owns_no_code() -> None:
    assert instructions("USER") == ["10001:10001"]
    copies = instructions("COPY")
    assert not [line for line in copies if "--chown" in line]
    assert instructions("WORKDIR")[-1] == "/opt/onebase"
    assert not instructions("ADD")


@pytest.mark.parametrize("word", ["TOKEN", "SECRET", "PASSWORD", "KEY"])
def test_no_secret_is_built_in(word: str) -> None:
    assert word not in " ".join(instructions("ENV") + instructions("ARG")).upper()
