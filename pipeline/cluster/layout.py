"""What each worker of a build on a Ray cluster asks of it, decided by what the cluster's nodes have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdcache.cache.errors import InputError

Resources = Mapping[str, float]  # of a node, as Ray counts them: "CPU", "GPU"

_FEWEST_DECODERS, _MOST_DECODERS = 8, 64


@dataclass(frozen=True)
class Layout:
    """What a worker gets, and where its images are decoded.

    gpus, cpus: what a worker asks for. decoders: the tasks that decode for one worker at once, on a CPU each, wherever
    Ray finds one; 0 where the worker decodes for itself. processes: those that it decodes with. capacity: how many
    workers the nodes have room for now; a cluster that grows by itself may have room for more later.
    """

    gpus: int
    cpus: int
    decoders: int
    processes: int
    capacity: int

    @property
    def device(self) -> str:
        """The type of the workers' devices."""
        return "cuda" if self.gpus else "cpu"

    def __str__(self) -> str:
        gpu = f"{self.gpus} GPU and " if self.gpus else ""
        return f"{gpu}{self.cpus} CPU{'s' if self.cpus > 1 else ''}"


def lay_out(nodes: Sequence[Resources], device: str | None, workers: int | None, files: bool) -> Layout:
    """Decide what each worker gets.

    A worker has a GPU to itself where there are any, with its share of that node's CPUs to decode with; where there are
    nodes with CPUs alone, images are decoded there. On a cluster without GPUs each worker has one CPU, or as many as
    `workers` says.

    device: "cuda", "cpu", or None for GPUs where there are any. workers: processes that decode for one worker, where
    the user says so. files: whether there are files to decode. InputError where the cluster has neither.
    """
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"--device {device} is one device, and with --ray the cluster chooses it: give cuda or cpu")
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    others = [node for node in nodes if node.get("GPU", 0) < 1 <= node.get("CPU", 0)]
    if device == "cuda" or (device is None and with_gpus):
        apart = files and bool(others) and workers is None
        share = min((int(node.get("CPU", 0) // node["GPU"]) for node in with_gpus), default=1)
        cpus = 1 if apart or not files else max(1, share if workers is None else workers)
        capacity = sum(_fits(node, 1, cpus) for node in with_gpus)
        free = sum(int(node.get("CPU", 0)) for node in nodes) - capacity
        decoders = min(max(_FEWEST_DECODERS, free // max(1, capacity)), _MOST_DECODERS) if apart else 0
        return Layout(1, cpus, decoders, (cpus if workers is None else workers) if not apart else 0, capacity)
    cpus = max(1, workers or 1)
    if not (capacity := sum(_fits(node, 0, cpus) for node in nodes)):
        has = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        raise InputError(
            f"no node of the Ray cluster has {cpus} CPUs for a worker, the largest has {has}: "
            + ("lower --workers" if has else "start nodes with CPUs, or give --device cuda to wait for GPUs")
        )
    return Layout(0, cpus, 0, cpus if cpus > 1 else 0, capacity)


def _fits(node: Resources, gpus: int, cpus: int) -> int:
    by_cpus = int(node.get("CPU", 0) // cpus)
    return min(by_cpus, int(node.get("GPU", 0) // gpus)) if gpus else by_cpus
