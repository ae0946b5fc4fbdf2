"""Who is mixed with whom: a pairing of all samples, drawn for any of them without the others.

A keyed permutation p of the samples gives each of them a place, and the places 2k and 2k + 1 are pair k:
partner(i) = p^-1(p(i) xor 1), which is an involution for any number of samples. Where that is odd, the sample at the
last place stays alone: it is its own partner, and its pair has number total // 2.

p is a Feistel network on numbers x = a * right + left, left below a and right below b, with a * b just above the total
(Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): its rounds add a random function of the one half
to the other. What leaves the range of the samples goes through it again until it is back ("cycle walking"). The random
functions are tables of about the root of the total, made of raw Philox words.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

VIEWS_A_PAIRING = 4  # views 0-3 share a pairing, 4-7 the next one, and so on
_STREAM = 13  # the second word of the Philox key, which nothing else draws from
_ROUNDS = 8  # even; fixed for ever, as all of this is: caches depend on it
_PIECE = 1 << 15  # samples at once, so that what is computed with stays in the processor's cache

Samples = NDArray[np.int64] | range


def partners(seed: int, view: int, samples: Samples, total: int) -> NDArray[np.int64]:
    """The partners [n] of n samples in a view of `total` samples; ValueError for samples out of range."""
    network = _network(seed, view // VIEWS_A_PAIRING, total)
    found = np.empty(len(samples), np.int64)
    for part, piece in _pieces(samples, total):
        places = network.places(piece) ^ 1
        lone = places >= total
        places[lone] ^= 1
        found[part] = network.samples(places)
    return found


def pair_numbers(seed: int, view: int, samples: Samples, total: int) -> NDArray[np.int64]:
    """The numbers [n] of the pairs of n samples: the same for both of a pair, from 0 to (total - 1) // 2."""
    network = _network(seed, view // VIEWS_A_PAIRING, total)
    found = np.empty(len(samples), np.int64)
    for part, piece in _pieces(samples, total):
        found[part] = network.places(piece) >> 1
    return found


def pairs(seed: int, view: int, total: int) -> NDArray[np.int64]:
    """All pairs [total // 2, 2] of a view in the order of their numbers; `lone` has the sample that is in none."""
    network = _network(seed, view // VIEWS_A_PAIRING, total)
    places = range(total - total % 2)
    found = np.empty(len(places), np.int64)
    for part, piece in _pieces(places, total):
        found[part] = network.samples(piece)
    return found.reshape(-1, 2)


def lone(seed: int, view: int, total: int) -> int | None:
    """The sample that stays alone in a view, None where the total is even."""
    if total % 2 == 0:
        return None
    return int(_network(seed, view // VIEWS_A_PAIRING, total).samples(np.array([total - 1]))[0])


class _Network(NamedTuple):
    """The permutation. A round's table holds what it adds to the one half, by the other half."""

    total: int
    sizes: tuple[int, int]  # a and b
    forward: list[NDArray[np.int64]]
    backward: list[NDArray[np.int64]]  # the inverses of the rounds, the last one first

    def places(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._walk(samples, self.forward, 0)

    def samples(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._walk(places, self.backward, 1)

    def _walk(self, numbers: NDArray[np.int64], tables: list[NDArray[np.int64]], first: int) -> NDArray[np.int64]:
        """Go through the rounds until all numbers are below the total; `first` is the half that is changed first."""
        result = self._once(numbers, tables, first)
        while len(outside := np.flatnonzero(result >= self.total)):
            result[outside] = self._once(result[outside], tables, first)
        return result

    def _once(self, numbers: NDArray[np.int64], tables: list[NDArray[np.int64]], first: int) -> NDArray[np.int64]:
        right, left = np.divmod(numbers, self.sizes[0])
        halves = [left, right]
        for number, table in enumerate(tables):
            half = (number + first) % 2
            changed, size = halves[half], self.sizes[half]
            changed += table[halves[1 - half]]
            changed -= size
            changed += changed >> 63 & size  # the remainder of a sum that is less than twice the size
        halves[1] *= self.sizes[0]
        halves[1] += halves[0]
        return halves[1]


@lru_cache(maxsize=8)
def _network(seed: int, pairing: int, total: int) -> _Network:
    """Draw the tables. The random words of a round follow those of the round before it."""
    a = isqrt(max(total - 1, 0)) + 1
    b = max(1, -(-total // a))
    philox = np.random.Philox(key=np.array([seed, _STREAM], np.uint64), counter=np.array([0, pairing, 0, 0], np.uint64))
    forward, backward = [], []
    for number in range(_ROUNDS):
        size, other = (a, b) if number % 2 == 0 else (b, a)
        words = philox.random_raw(other)
        table = ((words >> np.uint64(32)) * np.uint64(size) >> np.uint64(32)).astype(np.int64)
        forward.append(table)
        backward.append(-table % size)
    return _Network(total, (a, b), forward, backward[::-1])


def _pieces(samples: Samples, total: int) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """The samples in pieces, each with its place among them."""
    for start in range(0, len(samples), _PIECE):
        piece = samples[start : start + _PIECE]
        if isinstance(piece, range):
            piece = np.arange(piece.start, piece.stop, piece.step, dtype=np.int64)
        if piece.min() < 0 or piece.max() >= total:
            raise ValueError(f"samples from {piece.min()} to {piece.max()} are not all among the {total}")
        yield slice(start, start + len(piece)), piece
