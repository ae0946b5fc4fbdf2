"""Memory for the pixels of a few batches that worker processes write and this process reads, used over and over.

Fresh pages cost more than writing the pixels: the system has to find and clear them, and a virtual machine to ask its
host for them. So a batch's memory goes to a later one as soon as nobody has its pixels any more.
"""

from __future__ import annotations

import mmap
import multiprocessing
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Pool:
    """Room for `count` batches of at most `size` bytes, in memory that processes forked later share with this one.

    Pages are taken when they are first written to, those of a batch that was given back before new ones. Nothing stays
    behind when the processes end, however they end.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self._memory = mmap.mmap(-1, count * size)
        self._free = [number * size for number in reversed(range(count))]

    def take(self, size: int) -> int | None:
        """Where so many bytes are free, until `tensor` has given them out and nobody has them; None if nowhere."""
        return self._free.pop() if size <= self.size and self._free else None

    def array(self, at: int, shape: Sequence[int]) -> NDArray[np.uint8]:
        """The memory from there on, for a worker to write to."""
        return np.frombuffer(self._memory, np.uint8, int(np.prod(shape)), at).reshape(shape)

    def tensor(self, at: int, shape: Sequence[int]) -> Tensor:
        """The same for good: when this tensor and all views of it are gone, the memory is free again."""
        array = np.frombuffer(self._memory, np.uint8, int(np.prod(shape)), at)
        weakref.finalize(array, self._free.append, at).atexit = False
        return torch.from_numpy(array.reshape(shape))


def can_share() -> bool:
    """Whether worker processes are forked, and so have the memory that this process made before."""
    return multiprocessing.get_start_method() == "fork"
