from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest.fixture(scope="session")
def read() -> Callable[[str], list[dict[str, Any]]]:
    """Reads a file of deploy/, anew at every call: a list of its documents."""
    return lambda name: list(yaml.safe_load_all((DEPLOY / name).read_text()))


@pytest.fixture
def ray_service(read: Callable[[str], list[dict[str, Any]]]) -> dict[str, Any]:
    """deploy/rayservice.yaml; a test may change it."""
    (manifest,) = read("rayservice.yaml")
    return manifest
