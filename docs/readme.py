"""Writes the numbers in README.md and docs/benchmarks.md: none of them is typed by hand.

python docs/readme.py               from examples/accuracy.json and benchmarks/results/
python docs/readme.py --sizes       also what a setup downloads and takes, by doing one (3 GB)
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, it would find its own folder only
from benchmarks import report  # noqa: E402

STORE = ROOT / "examples" / "store"
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def accuracy_table() -> str:
    """The example tasks: what each is, and how well it does on rows it never saw."""
    lines = [
        "| task | labels | rank, targets | adapter | held-out rows | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for task, measured in json.loads((ROOT / "examples/accuracy.json").read_text()).items():
        config = json.loads((STORE / task / "adapter_config.json").read_text())
        rules = json.loads((STORE / task / "task.json").read_text())
        size = (STORE / task / "adapter_model.safetensors").stat().st_size
        targets = ", ".join(f"`{name}`" for name in sorted(config["target_modules"]))
        rank = f"{config['r']}{' (rsLoRA)' if config['use_rslora'] else ''}"
        accuracy = f"{measured['accuracy']:.3f}"
        if "micro_f1" in measured:
            accuracy = f"{accuracy} all labels right; micro-F1 {measured['micro_f1']:.3f}"
        lines.append(
            f"| `{task}` | {', '.join(rules['labels'])} | {rank}: {targets} | {size / 1e3:.0f} KB "
            f"| {measured['rows']} | {accuracy} |"
        )
    return "\n" + "\n".join(lines) + "\n"


def sizes() -> dict[str, str]:
    """What a fresh setup downloads, as uv says, and what it takes on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        said = subprocess.run(
            ["make", "setup"],
            cwd=clone,
            env={**os.environ, "UV_NO_CACHE": "1"},
            check=True,
            capture_output=True,
            text=True,
        ).stderr
        found = re.findall(r"Downloading .* \(([\d.]+)(KiB|MiB|GiB)\)", said)
        downloaded = sum(float(number) * _UNITS[unit] for number, unit in found)
        files = (clone / ".venv").rglob("*")
        installed = sum(file.lstat().st_size for file in files if not file.is_symlink())
    return {"download": f"{downloaded / 1e9:.1f} GB", "installed": f"{installed / 1e9:.1f} GB"}


def fill(text: str, name: str, content: str) -> str:
    """Put content between a name's two marks."""
    pattern = rf"(<!-- {name} -->).*?(<!-- /{name} -->)"
    return re.sub(pattern, lambda mark: mark[1] + content + mark[2], text, flags=re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    text = fill(readme.read_text(), "accuracy", accuracy_table())
    text = fill(text, "speed", report.sentences())
    if "--sizes" in sys.argv[1:]:
        for name, content in sizes().items():
            text = fill(text, name, content)
    readme.write_text(text)
    (ROOT / "docs" / "benchmarks.md").write_text(report.document())


if __name__ == "__main__":
    main()
