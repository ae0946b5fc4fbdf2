"""The processes that torchrun starts for one command: which of them this one is, and its share of the machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kdcache.cache.errors import InputError


@dataclass(frozen=True)
class Rank:
    """Rank of `world` processes, and local_rank of `local_world` on this machine; a process alone is rank 0 of 1."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def this_rank() -> Rank:
    """This process's place, as torchrun tells it in the environment. InputError where it is told only in part."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if unclear := [name for name in names if not os.environ.get(name, "").isdecimal()]:
        if os.environ.get("WORLD_SIZE", "1") in ("", "0", "1"):
            return Rank()
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {unclear[0]} is {os.environ.get(unclear[0], 'not set')}: "
            "start the ranks with torchrun, or unset WORLD_SIZE"
        )
    return Rank(*(int(os.environ[name]) for name in names))


def cores() -> int:
    """Cores for this process: those that the system grants it, shared with the other local ranks."""
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, granted // this_rank().local_world)


def share_cores() -> None:
    """Let torch compute with this rank's share of the cores, where only torchrun has set a number (1)."""
    if this_rank().local_world > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        import torch  # only here: it takes seconds

        torch.set_num_threads(cores())
