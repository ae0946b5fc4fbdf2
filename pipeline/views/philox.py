"""Philox 4x64-10, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3").

A block is four words. Block b of a view has the counter (b + 1, view, 0, 0), since NumPy steps the counter before it
draws. NumPy is the fastest, but only draws blocks that follow each other; the code here draws any blocks, with the
same bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORDS = 4
_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)  # what the two halves of the key grow by in each round
_PIECE = 4096  # blocks at a time, so that the arrays below stay in the processor's cache
_HALF, _LOW = np.uint64(32), np.uint64(2**32 - 1)


def following(seed: int, stream: int, view: int, first: int, count: int) -> NDArray[np.uint64]:
    """Draw the words [count, 4] of the blocks from `first` on. The key is (seed, stream)."""
    counter = np.array([first, view, 0, 0], np.uint64)
    philox = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=counter)
    return philox.random_raw(count * WORDS).reshape(count, WORDS)


def scattered(seed: int, stream: int, view: int, firsts: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """Draw the words [n, 4 * count] of `count` blocks from each of n blocks on. The key is (seed, stream)."""
    words = np.empty((len(firsts), count * WORDS), np.uint64)
    rows = max(1, _PIECE // count)
    offsets = np.arange(count, dtype=np.uint64)
    space: NDArray[np.uint64] = np.empty((11, rows * count), np.uint64)
    for start in range(0, len(firsts), rows):
        blocks = np.add.outer(firsts[start : start + rows], offsets).ravel()
        drawn = words[start : start + rows].reshape(len(blocks), WORDS)
        _draw((seed, stream), view, blocks, space[:, : len(blocks)], drawn)
    return words


def _draw(
    key: tuple[int, int],
    view: int,
    blocks: NDArray[np.uint64],
    space: NDArray[np.uint64],
    words: NDArray[np.uint64],
) -> None:
    """Write the words [n, 4] of n blocks. space [11, n] is scratch memory."""
    x0, x1, x2, x3, high0, low0, high1, low1, *rest = space
    np.add(blocks, np.uint64(1), out=x0)
    x1[:], x2[:], x3[:] = view, 0, 0
    for turn in range(_ROUNDS):
        _multiply(x0, _MULTIPLIERS[0], high0, low0, *rest)
        _multiply(x2, _MULTIPLIERS[1], high1, low1, *rest)
        for high, other, half, step in zip((high1, high0), (x1, x3), key, _STEPS, strict=True):
            np.bitwise_xor(high, other, out=high)
            np.bitwise_xor(high, np.uint64((half + turn * step) % 2**64), out=high)
        x0, x1, x2, x3, high0, low0, high1, low1 = high1, low1, high0, low0, x0, x1, x2, x3
    np.stack([x0, x1, x2, x3], 1, out=words)


def _multiply(
    x: NDArray[np.uint64],
    factor: int,
    high: NDArray[np.uint64],
    low: NDArray[np.uint64],
    a: NDArray[np.uint64],
    b: NDArray[np.uint64],
    c: NDArray[np.uint64],
) -> None:
    """Write the high and the low 64 bits of x * factor, from the products of halves of 32 bits. a, b, c are scratch."""
    upper, lower = np.uint64(factor >> 32), np.uint64(factor % 2**32)
    np.multiply(x, np.uint64(factor), out=low)
    np.right_shift(x, _HALF, out=a)
    np.bitwise_and(x, _LOW, out=b)
    np.multiply(a, upper, out=high)
    np.multiply(a, lower, out=a)
    np.multiply(b, lower, out=c)
    np.multiply(b, upper, out=b)
    # No sum overflows: a product of two halves leaves room for two more numbers below 2^32.
    np.right_shift(c, _HALF, out=c)
    np.add(a, c, out=a)
    np.bitwise_and(a, _LOW, out=c)
    np.add(b, c, out=b)
    for carry in (a, b):
        np.right_shift(carry, _HALF, out=carry)
        np.add(high, carry, out=high)
