"""`serve deploy serve_config.yaml` on a head node that `ray start` has started, as in a cluster."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.head import Head, wait_until


@pytest.fixture
def head(short_dir: Path) -> Iterator[Head]:
    folder = short_dir / "head"
    folder.mkdir()
    node = Head(folder)
    try:
        yield node
    finally:
        node.stop()


@pytest.mark.slow
def test_the_example_is_deployed_to_a_running_cluster(head: Head) -> None:
    head.deploy(quantization="none")
    wait_until(lambda: head.application().get("status") == "RUNNING")
    (result,) = head.predict().json()["results"]
    assert result["prediction"] == "Positive"
    refused = head.serve("status", token="another")
    assert refused.returncode != 0
    assert re.search("40[13]|[Aa]uthentication", refused.stdout + refused.stderr)
    # A wrong change costs nothing but itself.
    head.deploy(quantization="int3")
    wait_until(lambda: head.application().get("status") == "DEPLOY_FAILED")
    assert "quantization='int3' is wrong" in head.application()["message"]
    assert head.predict().status_code == 200
