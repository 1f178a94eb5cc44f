"""What Ray Serve knows and has no public name for: the one file with its private calls.

Pinned to Ray's minor version by tests/serve/test_internals.py.
"""

from __future__ import annotations

from ray.serve.context import _get_global_client


def bind_host() -> str:
    """Return the host that this cluster's HTTP proxies were configured to listen on."""
    client = _get_global_client()
    assert client is not None  # it raises where Serve does not run
    return str(client.http_config.host)
