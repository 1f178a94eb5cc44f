"""The catalog of one cluster without Ray: `python -m tests.catalog.cluster URL NAME NUM_CHANGES`.

The process makes random changes, purges what was deleted, and says as JSON, a line each, what was
acknowledged. The replicas are one that computes nothing.
"""

import asyncio
import io
import json
import random
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from adapters.documents import open_documents
from adapters.errors import AdapterError
from adapters.store import CONFIG, WEIGHTS, Store, open_store
from deployments.catalog import upkeep
from deployments.catalog.adoption import Adoption
from deployments.catalog.changes import Changes
from deployments.catalog.ledger import Ledger
from deployments.catalog.usage import UsageSums
from deployments.catalog.writer import Writer
from deployments.errors import RequestError, Stale
from deployments.snapshot import TaskPatch

TASKS = ("mood", "spam")
NUM_CONTENTS = 5


class Replicas:
    """Validates by reading; everybody knows everything at once.

    Attributes:
        meanwhile: Awaited once, when a version is warmed.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.meanwhile: Callable[[], Awaitable[Any]] | None = None
        self.error: Exception | None = None

    async def check(self, task: str, staging: str | None, rules: dict[str, Any]) -> Any:
        assert staging is not None
        return {"version": self._store.read_staged(staging, task).version}

    async def describe(self, task: str, version: str, rules: dict[str, Any]) -> Any:
        return {"version": (await asyncio.to_thread(self._store.read, task, version)).version}

    async def warm(self, task: str, *versions: str) -> None:
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            await meanwhile()
        if self.error is not None:
            raise self.error

    async def forget(self, task: str, version: str) -> None:
        return

    async def golden(self, task: str, version: str, rules: dict[str, Any]) -> list[str]:
        return []

    async def reach(self, revision: int) -> list[str]:
        return []


class Cluster:
    """One catalog; several may share a store."""

    def __init__(self, url: str, name: str, store: Store | None = None) -> None:
        self.name = name
        self.store = store or open_store(url)
        self.writer = Writer(open_documents(url))
        self.writer.refresh()
        usage = UsageSums()
        self.ledger = Ledger(self.writer, usage)
        self.replicas = Replicas(self.store)
        adoption = Adoption(self.ledger, self.store, self.replicas)
        self.changes = Changes(self.ledger, self.store, self.replicas, adoption)
        self.upkeep = upkeep.Upkeep(
            self.ledger, usage, self.store, self.replicas, adoption, scan_every_s=0.75
        )

    async def publish(self, task: str, number: int, **given: Any) -> dict[str, Any]:
        files = {CONFIG: io.BytesIO(b"{}"), WEIGHTS: io.BytesIO(content(number))}
        staging = await asyncio.to_thread(self.store.stage, files)
        options = {"source": "upload", "by": self.name, "activate": False, "if_match": None}
        return await self.changes.publish(task, staging, **{**options, **given})

    async def patch(self, task: str, if_match: int | None, **patch: Any) -> dict[str, Any]:
        given = TaskPatch.model_validate(patch)
        return await self.changes.patch(task, given, by=self.name, if_match=if_match)

    async def delete(self, task: str, version: str | None, if_match: int | None = None) -> Any:
        return await self.changes.delete(task, version, by=self.name, if_match=if_match)

    async def lost(self, task: str, version: str) -> bool:
        """Tell whether a version has no files though it was not deleted."""
        try:
            await asyncio.to_thread(self.store.read, task, version)
        except AdapterError:
            record = (await self.ledger.refresh()).tasks.get(task)
            return record is not None and not record.deleted and version in record.versions
        return False


def content(number: int) -> bytes:
    """An empty safetensors file; another number makes another version."""
    header = b'{"__metadata__":{"n":"%d"}}' % number
    return len(header).to_bytes(8, "little") + header


class Client:
    """Random changes to one cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._chance = random.Random(cluster.name)
        self._number = 0

    async def change(self) -> dict[str, Any]:
        chance, cluster = self._chance, self._cluster
        self._number += 1
        task = chance.choice(TASKS)
        record = cluster.ledger.snapshot.tasks.get(task)
        kinds = ("publish", "publish", "patch", "patch", "rollback", "delete", "delete", "end")
        kind = chance.choices(kinds, [*[4] * 7, 1])[0] if record is not None else "publish"
        if_match = record.revision if record is not None and chance.random() < 0.5 else None
        told: dict[str, Any]
        try:
            if kind == "publish" or record is None:
                activate = chance.random() < 0.3
                number = chance.randrange(NUM_CONTENTS)
                given = {"activate": activate, "if_match": if_match}
                told = await cluster.publish(task, number, **given)
                told["lost"] = await cluster.lost(task, told["version"])
            elif kind == "patch":
                some = chance.choice([*record.versions])
                # Nobody else's, so that it always changes something.
                patch = {"rules": {"labels": [cluster.name, str(self._number)]}}
                extra = {} if some == record.active else {"traffic": {some: 0.5}}
                told = await cluster.patch(task, if_match, **patch, **extra)
            elif kind == "rollback":
                given = {"by": cluster.name, "if_match": if_match}
                told = await cluster.changes.rollback(task, **given)
            else:
                # Of those that can be deleted, so that some are purged however the race goes.
                idle = sorted(record.versions.keys() - record.in_use) or [*record.versions]
                version = chance.choice(idle) if kind == "delete" else None
                told = await cluster.delete(task, version, if_match)
        except (RequestError, AdapterError) as error:
            return {"refused": type(error).__name__, "stale": isinstance(error, Stale)}
        return {"kind": kind, "if_match": if_match, **told}


async def main(url: str, name: str, num_changes: int) -> None:
    upkeep._EVERY_S = upkeep._GRACE_S = 0.02
    cluster = Cluster(url, name)
    client = Client(cluster)
    cluster.upkeep.start()
    for _ in range(num_changes):
        print(json.dumps(await client.change()), flush=True)
        await asyncio.sleep(client._chance.random() * 0.01)
    cluster.upkeep.stop()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
