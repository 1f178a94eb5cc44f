"""What a change needs of the model replicas and the ingresses before it holds. No ray."""

from __future__ import annotations

from typing import Any, Protocol

from deployments.rows import Facts


class Effects(Protocol):
    """The others, as the catalog asks them; `catalog/deployment.py` does so over handles."""

    async def check(self, task: str, staging: str | None, rules: dict[str, Any]) -> Facts:
        """Validate a staged upload, or with None the plain folder, as a load would.

        Raises:
            AdapterError: It cannot be served; with all problems.
            NotReady: No model replica is running.
        """

    async def describe(self, task: str, version: str, rules: dict[str, Any]) -> Facts:
        """Validate a version with rules laid over its own; raises as `check`."""

    async def warm(self, task: str, version: str) -> None:
        """Bring a version into a slot of every model replica; raises as `check`."""

    async def forget(self, task: str, version: str) -> None:
        """Have every model replica let go of a version that is none; raises nothing."""

    async def golden(self, task: str, version: str, rules: dict[str, Any]) -> list[str]:
        """Run a version's golden.jsonl; return a sentence a miss."""

    async def reach(self, revision: int) -> list[str]:
        """Wait until every live ingress holds a revision; return those that do not in time."""
