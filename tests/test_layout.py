"""The house of the design: which room may import which, and how large a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("adapters", "deployments", "onebase_client")
ROOMS = ("ingress", "model", "catalog")
FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("adapters", "deployments", "clients/onebase_client")
    for path in (ROOT / folder).rglob("*.py")
)
# Ray Serve pickles them into every process that calls a deployment, which may have none of ours.
PICKLED = ("router.py", "scaling.py")
every_file = pytest.mark.parametrize("path", FILES, ids=str)


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


def imports(path: Path) -> Iterator[str]:
    """Names of all modules that a file imports, inside functions too."""
    package = (path.relative_to("clients") if path.parts[0] == "clients" else path).parts[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *(node.module or "").split(".")]).rstrip(".")
            # `from deployments import model` names a module as `import deployments.model` does.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    """adapters, onebase_client, app, one of the rooms, or shared; empty for what is not ours."""
    top, *rest = module.split(".")
    if top != "deployments":
        return top if top in OURS else ""
    if rest and rest[0] in (*ROOMS, "app"):
        return rest[0]
    return "app" if rest and rest[0] in ("__main__", "run") else "shared"


def allowed(own: str) -> set[str]:
    if own in ("adapters", "onebase_client"):
        return {own}
    if own == "app":
        return {"adapters", "shared", "app", *ROOMS}
    return {"adapters", "shared", own}


def module_of(path: Path) -> str:
    if path.parts[0] == "clients":
        path = path.relative_to("clients")
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def test_the_rooms_are_all_looked_at() -> None:
    assert {room(module_of(path)) for path in FILES} >= {
        "adapters", "onebase_client", "app", "shared", "ingress", "model", "catalog",
    }  # fmt: skip


@every_file
def test_imports_run_one_way(path: Path) -> None:
    own = room(module_of(path))
    wrong = [name for name in imports(path) if room(name) and room(name) not in allowed(own)]
    assert not wrong


@every_file
def test_ray_stays_in_its_files(path: Path) -> None:
    own = ("deployment.py", "handles.py", "app.py", "run.py", "internals.py", *PICKLED)
    if path.parts[0] == "deployments" and path.name in own:
        return
    assert not [name for name in imports(path) if name.split(".")[0] == "ray"]


@pytest.mark.parametrize("name", PICKLED)
def test_what_ray_pickles_imports_ray_and_the_standard_library_alone(name: str) -> None:
    tops = {module.split(".")[0] for module in imports(Path("deployments") / name)}
    assert tops <= {"ray", *sys.stdlib_module_names}


@every_file
def test_adapters_know_no_web_server_and_the_ingress_no_torch(path: Path) -> None:
    own = room(module_of(path))
    web, tensors = {"fastapi", "starlette", "uvicorn"}, {"torch", "transformers", "peft"}
    barred = {"adapters": web, "model": web, "onebase_client": web | tensors}.get(own, tensors)
    if own == "app":
        barred = set()
    assert not [name for name in imports(path) if name.split(".")[0] in barred]


@pytest.mark.parametrize(
    ("modules", "barred"),
    [
        ("deployments.ingress.deployment", "torch transformers peft"),
        ("deployments.catalog.deployment", "torch transformers peft"),
        ("deployments.config deployments.tokens deployments.rows deployments.errors", "torch ray"),
        (
            "adapters.store adapters.spec adapters.slots adapters.host adapters.geometry",
            "torch ray fastapi",
        ),
        ("onebase_client", "torch ray fastapi pydantic"),
    ],
)
def test_importing_brings_nothing_heavy(modules: str, barred: str) -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {modules.split()!r}: importlib.import_module(name)\n"
        f"print(*({set(barred.split())!r} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@every_file
def test_a_file_has_one_noun_and_at_most_300_lines(path: Path) -> None:
    assert path.stem not in {"util", "utils", "helper", "helpers", "common", "misc", "manager"}
    assert len((ROOT / path).read_text().splitlines()) <= 300


@every_file
def test_a_function_has_at_most_60_lines(path: Path) -> None:
    functions = (
        node
        for node in ast.walk(parse(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    long = [f.name for f in functions if (f.end_lineno or f.lineno) - f.lineno >= 60]
    assert not long


@every_file
def test_only_the_config_reads_the_environment(path: Path) -> None:
    if path.name == "config.py":
        return
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    reads = [
        node.attr
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute)
        and node.attr in names
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
    ]
    reads += [name for name in imports(path) if name in {f"os.{name}" for name in names}]
    assert not reads
