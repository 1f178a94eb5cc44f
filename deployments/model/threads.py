"""How many threads a forward has: the CPUs that are really this replica's. See docs/adr/0005."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from deployments.config import Args

A = TypeVar("A")
T = TypeVar("T")

# By which a forward on the CPU gives way to event loops: a row that has to wait for a CPU waits for
# those that compute, and a door that has none to refuse a flood lets nobody in.
_GIVES_WAY = 5
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def forward_threads(args: Args, num_nodes: int) -> int:
    """Return the threads of a replica's forward: `num_cpus`, else its share of all CPUs but one.

    That one is the event loops' and the tokeniser's: threads of a forward wait for each other in
    every operation, and so for whichever of them lost its CPU.

    Args:
        args: The configuration, `device` decided.
        num_nodes: Nodes that replicas are spread over.
    """
    if args.num_cpus is not None:
        return args.num_cpus
    if args.device == "cuda":  # what is left to the CPU there is one thread's work
        return count_cpus()
    replicas = args.num_replicas or args.max_replicas or 1
    return max(1, (count_cpus() - 1) // math.ceil(replicas / max(1, num_nodes)))


def forward_thread(threads: int, *, on_cpu: bool) -> ThreadPoolExecutor:
    """Return the thread that runs forwards, which compute with so many threads.

    How many those are, and how nice they are, is a thread's own: others that it starts inherit it.
    """

    def begin() -> None:
        torch.set_num_threads(threads)
        if on_cpu:
            os.nice(_GIVES_WAY)

    return ThreadPoolExecutor(1, "forward", begin)


def count_cpus(quota: Path = _QUOTA) -> int:
    """Return the CPUs that this process may use, by affinity and by its container's quota.

    torch sees the whole machine in a container that may use four CPUs of it, and its threads then
    wait for each other's turn in every operation.
    """
    cpus = len(os.sched_getaffinity(0))
    try:
        most, period = quota.read_text().split()
    except (OSError, ValueError):  # no cgroup of version 2 here
        return cpus
    return cpus if most == "max" else min(cpus, max(1, int(most) // int(period)))


def timed(work: Callable[[A], T], given: A) -> tuple[T, float]:
    """Work, and say in how many seconds: called on the device's thread, so that no wait counts."""
    started_s = time.perf_counter()
    done = work(given)
    return done, time.perf_counter() - started_s
