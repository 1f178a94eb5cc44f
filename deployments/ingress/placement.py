"""Which replica a row goes to. Plain Python: no ray, no event loop."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from deployments.rows import Residency

# Load that a replica may have more than another before that one loads a version that would push
# others out: eight short rows, which share the micro-batch after the one that runs.
_SLACK = 256
# A version whose rows would have waited behind others for that, so often within a second, is worth
# its place on another replica too.
_OFTEN = 8
# A replica that could not answer gets rows again after so long, if there is another.
_SHUNNED_S = 5.0
# Versions whose order is remembered.
_MOST_ORDERS = 2**16


@dataclass
class _Replica:
    name: str
    load: int = 0  # of rows that were placed there and are not answered; see `outbox.Asked`
    heard: int = 0  # the number of the last change of its residents
    crowded: bool = False
    shunned_until_s: float = 0.0
    held: set[str] = field(default_factory=set)


class Placement:
    """Who holds which version, and how much each has to do; owned by one event loop.

    Where all hold a version, the replica with the least load gets the next rows. Else a version
    has an order of the replicas of its own, by hash, so that all ingresses take the same ones: the
    first in it that holds the version gets its rows, and others only as it fills. While nobody is
    pushed out of a slot, anything more than elsewhere is full; after that it is more than a replica
    computes in a micro-batch, but for a version that is asked for all the time: that one waits
    behind nobody. Copies that are not needed any more leave by their age.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with no replica."""
        self._replicas: dict[str, _Replica] = {}
        self._clock = clock
        self._orders: dict[str, list[str]] = {}
        self._waits: Counter[str] = Counter()
        self._waits_since_s = 0.0

    @property
    def names(self) -> Collection[str]:
        """The replicas that rows go to."""
        return self._replicas.keys()

    @property
    def heard(self) -> dict[str, int]:
        """By replica, the number of the last change that is known here."""
        return {name: replica.heard for name, replica in self._replicas.items()}

    def heard_of(self, name: str) -> int:
        """Return the number of the last change of a replica that is known here, 0 if none is."""
        replica = self._replicas.get(name)
        return 0 if replica is None else replica.heard

    def join(self, name: str) -> None:
        """Place rows on a replica too."""
        if name not in self._replicas:
            self._replicas[name] = _Replica(name)
            self._orders.clear()

    def leave(self, name: str) -> None:
        """Place no more rows on a replica; it need not have joined."""
        if self._replicas.pop(name, None) is not None:
            self._orders.clear()

    def hear(self, name: str, residency: Residency | None) -> None:
        """Take what a replica says of its residents; None is nothing new."""
        replica = self._replicas.get(name)
        if replica is None or residency is None:
            return
        if residency["whole"]:
            replica.held.clear()
        elif residency["number"] < replica.heard:
            return  # an older reply, overtaken by a newer one
        replica.heard, replica.crowded = residency["number"], residency["crowded"]
        for version, is_held in residency["held"].items():
            (replica.held.add if is_held else replica.held.discard)(version)

    def shun(self, name: str) -> None:
        """Avoid a replica for a while, as far as there are others."""
        if name in self._replicas:
            self._replicas[name].shunned_until_s = self._clock() + _SHUNNED_S

    def place(self, version: str, load: int, tried: Collection[str] = ()) -> str | None:
        """Choose a replica for rows of a version, and count them there.

        Args:
            version: `task@version`.
            load: How much they are together.
            tried: Replicas that have failed them; they get them only where there is no other.

        Returns:
            The replica's name; None if there is none.
        """
        able = self._able(tried)
        if not able:
            return None
        chosen = self._choose(version, able)
        chosen.held.add(version)  # it loads it now, if it has not
        chosen.load += load
        return chosen.name

    def done(self, name: str, load: int) -> None:
        """Count rows out: they are answered, gone, or placed elsewhere."""
        replica = self._replicas.get(name)
        if replica is not None:
            replica.load -= load

    def missing(self, name: str, version: str) -> None:
        """Note that a version could not be loaded by a replica."""
        if name in self._replicas:
            self._replicas[name].held.discard(version)

    def _able(self, tried: Collection[str]) -> list[_Replica]:
        replicas = [*self._replicas.values()]
        if len(replicas) == 1:
            return replicas
        now_s = self._clock()
        sound = [r for r in replicas if r.shunned_until_s <= now_s]
        return (
            [r for r in sound if r.name not in tried]
            or [r for r in replicas if r.name not in tried]
            or replicas
        )

    def _choose(self, version: str, able: list[_Replica]) -> _Replica:
        if len(able) == 1:
            return able[0]
        least = min(replica.load for replica in able)
        if all(version in replica.held for replica in able):
            return _idlest(able)
        rank = {name: place for place, name in enumerate(self._order(version))}
        ordered = sorted(able, key=lambda replica: rank[replica.name])
        holders = [replica for replica in ordered if version in replica.held]
        # A copy costs others their place only where slots are few.
        slack = _SLACK if any(replica.crowded for replica in able) else 0
        for replica in holders or ordered:
            if replica.load <= least + slack:
                if replica.load > least and self._waits_often(version):
                    break
                return replica
        return _idlest(ordered)

    def _waits_often(self, version: str) -> bool:
        """Count that a version would wait behind others; tell if it often does."""
        now_s = self._clock()
        if now_s - self._waits_since_s > 1.0:
            self._waits.clear()
            self._waits_since_s = now_s
        self._waits[version] += 1
        return self._waits[version] > _OFTEN

    def _order(self, version: str) -> list[str]:
        """Return all replicas in a version's own order (rendezvous hashing)."""
        order = self._orders.get(version)
        if order is None:
            if len(self._orders) >= _MOST_ORDERS:
                self._orders.clear()
            order = sorted(self._replicas, key=lambda name: _weight(version, name))
            self._orders[version] = order
        return order


def _idlest(replicas: Iterable[_Replica]) -> _Replica:
    return min(replicas, key=lambda replica: replica.load)


def _weight(version: str, name: str) -> bytes:
    return blake2b(f"{version}\0{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
