"""The processes that train one student together: torchrun's ranks, and what they tell each other.

    torchrun --nproc-per-node 4 -m kdcache.cli train ...

Every rank takes its part of each batch. A process on its own is rank 0 of 1, for which nothing here costs anything.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdcache.cache.errors import InputError, KdcacheError
from kdcache.pipeline.process.device import pick_device
from kdcache.pipeline.process.rank import this_rank

T = TypeVar("T")

# How long a rank waits for another: the first may read the headers of a million images meanwhile.
_PATIENCE = timedelta(minutes=30)


def restarted() -> bool:
    """Whether torchrun started the ranks again, after one of them had died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def world() -> int:
    """How many ranks are joined: 1 for a process on its own."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def said_once(say: Callable[[str], None]) -> Callable[[str], None]:
    return (lambda _: None) if rank() else say


@contextmanager
def joined(device: str | None) -> Iterator[torch.device]:
    """The ranks that torchrun started as one process group, and this rank's device; nested, the group that is there.

    gloo between CPUs, nccl between GPUs, one GPU a rank. InputError for a device that cannot be divided so.
    """
    mine = pick_device(device)
    if this_rank().world == 1 or dist.is_initialized():
        yield mine
        return
    # gloo also beside nccl: for what is on the CPU, such as evaluations and short messages.
    backend = "gloo" if mine.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        store, own, all_ = next(dist.rendezvous("env://", timeout=_PATIENCE))  # type: ignore[attr-defined]
    except ValueError as e:
        raise InputError(
            f"RANK and WORLD_SIZE are set as for one of {this_rank().world} ranks, but where they meet is not known "
            f"({e}): start them with torchrun, or unset them to train in one process"
        ) from e
    # torchrun may keep one store for all its restarts, with the addresses of processes that have died.
    prefix = f"kdcache/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    fresh = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=fresh, rank=own, world_size=all_, timeout=_PATIENCE)
    yield mine
    # Not after an error: it would wait for ranks that are still busy. The end of the process closes everything.
    dist.destroy_process_group()


# What a loss needs of the other ranks' parts of the batch. Every rank has to call these alike.


def total(x: Tensor) -> Tensor:
    """The sum of the ranks' x; differentiable: each rank's x gets the sum of the gradients that all of them have."""
    if world() == 1:
        return x
    out: Tensor = _Total.apply(x)
    return out


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient)


def mean(x: Tensor) -> Tensor:
    """[1, ...] the mean of the rows of all ranks' x [B, ...], whose B may differ; differentiable like total."""
    if world() == 1:
        return x.mean(0, keepdim=True)
    rows = x.sum(0, keepdim=True)
    # The count goes along, so that it costs no message of its own.
    sums = total(torch.cat([rows.reshape(-1), rows.new_full((1,), len(x))]))
    return (sums[:-1] / sums[-1]).view_as(rows)


def largest(x: Tensor) -> Tensor:
    """The elementwise maximum of the ranks' x; without gradient."""
    if world() == 1:
        return x
    out = x.detach().clone()
    dist.all_reduce(out, dist.ReduceOp.MAX)
    return out


# Training


class _Step(nn.Module):
    """The student, and the parameters that the loss has beside it, as DDP takes them: one module."""

    def __init__(self, model: nn.Module, beside: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.model, self.beside = model, nn.ParameterList(beside)

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


def averaged(model: nn.Module, beside: Sequence[nn.Parameter] = ()) -> nn.Module:
    """The model as it is called in training: gradients, also those of `beside`, come out as the mean over ranks.

    Starts all ranks from rank 0's weights. For a process on its own, the model itself.
    """
    if world() == 1:
        return model
    at = next(model.parameters()).device
    known = inspect.signature(DistributedDataParallel).parameters
    renamed = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {renamed: False}  # see average_statistics
    return DistributedDataParallel(
        _Step(model, beside),
        device_ids=[at] if at.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **options,
    )


def weight(rows: int, batch_size: int) -> float:
    """The weight of the mean over this rank's rows by which DDP's mean over ranks is the whole batch's mean."""
    return rows * world() / batch_size


class Weighted:
    """Losses [] of this rank's rows of batches that are all of one size, times their weight."""

    def __init__(self) -> None:
        self._batch_size = 0

    def __call__(self, loss: Tensor, rows: int) -> Tensor:
        if world() == 1:
            return loss
        self._batch_size = self._batch_size or sum(everyones(rows))
        return loss * weight(rows, self._batch_size)


def gradients_stay(model: nn.Module) -> AbstractContextManager[None]:
    """Within, gradients of what `averaged` gave are added up on the rank: more batches of the same step follow."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients over the ranks in place, for a model that is not trained by way of `averaged`."""
    if world() == 1:
        return
    _average([p.grad for p in parameters if p.grad is not None])


def _average(tensors: Sequence[Tensor]) -> None:
    # In float64, in which the mean of equal float32 values is that value.
    flat = torch.cat([t.reshape(-1).double() for t in tensors])
    dist.all_reduce(flat)
    for t, values in zip(tensors, torch.split(flat / world(), [t.numel() for t in tensors]), strict=True):
        t.copy_(values.view_as(t))


def draw_apart() -> None:
    """Have each rank draw dropout of its own; the first one draws that of a single process."""
    if rank():
        torch.manual_seed(torch.initial_seed() + (rank() << 32))


@torch.no_grad()
def average_statistics(*models: nn.Module) -> None:
    """Give all ranks the mean of their running statistics (batch norm's), before a model is evaluated or kept.

    They are moving averages, so it makes no difference how often this is done.
    """
    if world() == 1:
        return
    _average([b for model in models for b in model.buffers() if b.is_floating_point()])


# Messages, on the CPU


def wait() -> None:
    """Wait until all ranks are here."""
    if world() > 1:
        dist.all_reduce(torch.zeros(1))


@contextmanager
def one_first() -> Iterator[None]:
    """One rank of each machine goes through the block first, so that the others find what it has downloaded."""
    goes_first = world() == 1 or this_rank().local_rank == 0
    if not goes_first:
        wait()
    try:
        yield
    finally:
        if goes_first:
            wait()


def from_first(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 alone, and return its result, or raise its KdcacheError, on all ranks."""
    if world() == 1:
        return make()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = make()
        except KdcacheError as e:
            told[1] = e
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    value: T = told[0]
    return value


def everyones(value: T) -> list[T]:
    """The ranks' values, in their order."""
    if world() == 1:
        return [value]
    out: list[Any] = [None] * world()
    dist.all_gather_object(out, value)
    return out


def anyones(wish: bool) -> bool:
    """Whether the wish is true on any rank."""
    return any(everyones(wish))


class Wishes:
    """What any rank wishes at a step, such as to stop: all ranks get to know it at the same step, and none waits.

    So it comes one step late; for a process on its own at once.
    """

    def __init__(self) -> None:
        self._before: tuple[dist.Work, Tensor] | None = None

    def __call__(self, *wishes: bool) -> Sequence[bool]:
        if world() == 1:
            return wishes
        before, said = self._before, torch.tensor(wishes, dtype=torch.uint8)
        self._before = dist.all_reduce(said, dist.ReduceOp.MAX, async_op=True), said
        if before is None:
            return [False] * len(wishes)
        work, heard = before
        work.wait()
        return [bool(wish) for wish in heard.tolist()]


def rows_of_all(mine: Tensor, rows: Sequence[int]) -> Tensor:
    """On rank 0 the ranks' tensors [rows[r], ...], on the CPU, one after the other; elsewhere `mine` alone."""
    if world() == 1:
        return mine
    if rank() > 0:
        if rows[rank()]:
            dist.send(mine.contiguous(), 0)
        return mine
    out = mine.new_empty((sum(rows), *mine.shape[1:]))
    parts = torch.split(out, list(rows))
    parts[0].copy_(mine)
    for r in range(1, world()):
        if rows[r]:
            dist.recv(parts[r], r)
    return out


# Ends


def first_to_say(message: str) -> bool:
    """Whether no other rank has ended with these words: one line is enough where all fail alike."""
    return _count(message) in (1, None)


def require_alike(error: Exception, where: str) -> None:
    """Raise the error unless all ranks have it here: those that went on would wait in vain for the others."""
    if world() == 1:
        return
    until = time.monotonic() + 10
    said = _count(f"{where}: {error}")
    while said is not None and said < world() and time.monotonic() < until:
        time.sleep(0.05)
        said = _count(f"{where}: {error}", add=0)
    if said != world():
        raise error


def _count(message: str, add: int = 1) -> int | None:
    """How many ranks have said this since they were (re)started; None where torchrun keeps no store to ask."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    digest = hashlib.sha256(message.encode()).hexdigest()
    try:
        address, patience = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timedelta(seconds=10)
        store = dist.TCPStore(*address, is_master=False, timeout=patience)  # type: ignore[attr-defined]
        return int(store.add(f"kdcache/{os.environ['TORCHELASTIC_RESTART_COUNT']}/{digest}", add))
    except (KeyError, ValueError, RuntimeError):  # not torchrun's own variables, or it has gone with its store
        return None
