import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests import clouds
from tests.clouds import Cloud

# Nothing here is downloaded: a test that would need the hub fails at once instead of hanging.
os.environ["HF_HUB_OFFLINE"] = "1"

# Shared, noisy cores: an example that is slow once says nothing.
settings.register_profile("onebase", deadline=None)
settings.load_profile("onebase")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Cloud]:
    with clouds.s3() as cloud:
        yield cloud


@pytest.fixture(scope="session")
def gs_server() -> Iterator[Cloud]:
    with clouds.gs() as cloud:
        yield cloud


def _emptied(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)
    for key in cloud.names():
        cloud.delete(key)
    return cloud


@pytest.fixture
def s3(s3_server: Cloud, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """An empty bucket `bucket`; s3:// leads there."""
    return _emptied(s3_server, monkeypatch)


@pytest.fixture
def gs(gs_server: Cloud, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """An empty bucket `bucket`; gs:// leads there."""
    return _emptied(gs_server, monkeypatch)


@pytest.fixture(params=["s3", "gs"])
def cloud(request: pytest.FixtureRequest) -> Cloud:
    found: Cloud = request.getfixturevalue(request.param)
    return found
