"""Draws random words for each sample and view, and maps them to numbers.

The words are those of Philox 4x64-10 (philox.py), mapped by our own formulas, since NumPy keeps its raw stream stable
between versions but not its distributions. The key is (seed, stream) and the counter is (the sample's first block,
view), so any samples are drawn without the others.

There are two sequences of views. In the random one, each view has words of its own. In the spread one, a sample's word
grows by the same step from view to view, so that its views are spread more evenly than independent ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.records.choices import SequenceName
from kdcache.pipeline.views import philox

Samples = range | NDArray[np.int64]
# What the steps of the spread sequence are chosen by. All of it is fixed for ever, since caches depend on the steps.
_CANDIDATES = 64
_RELATIONS = [(i, sign * j) for i in (1, 2, 3) for j in (1, 2, 3) if i * j <= 4 for sign in (1, -1)]
_STREAMS = (0, *range(2, 14))  # of the operations
# How many places of a stream those after it have to suit: the ones that its operation mostly draws from.
_MAIN, _MAIN_OF_OTHERS = {0: 6}, 4


def below(words: NDArray[np.uint64], bound: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """Make each word a number from 0 to bound - 1, all as probable; bound, one or one a word, is at most 2^31."""
    return ((words >> np.uint64(32)) * np.asarray(bound, np.uint64) >> np.uint64(32)).astype(np.int64)


def chance(words: NDArray[np.uint64], p: float) -> NDArray[np.bool_]:
    """Whether each word says yes, which it does with probability p from 0 to 1 (in steps of 2^-53)."""
    return (words >> np.uint64(11)) < np.uint64(round(p * 2**53))


def fraction(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Make each word a number in [0, 1), a multiple of 2^-53."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def words(
    seed: int,
    stream: int,
    view: int,
    samples: Samples,
    count: int,
    sequence: SequenceName = "random",
    steps: Mapping[int, int] | None = None,
) -> NDArray[np.uint64]:
    """Draw `count` random words [n, count] for each of n samples, which may be a range or any samples in any order.

    A sample's words depend on (seed, stream, view, sample), and on count only by its quotient by four, rounded up.
    steps: of the spread sequence, for places that do not take the usual `step`.
    """
    first = 0 if sequence == "spread" else view
    drawn = _independent(seed, stream, first, samples, -(-count // philox.WORDS))[:, :count]
    if sequence == "spread":
        own = steps or {}
        moves = [view * own.get(place, step(stream, place)) % 2**64 for place in range(count)]
        drawn += np.array(moves, np.uint64)
    return drawn


def _independent(seed: int, stream: int, view: int, samples: Samples, blocks: int) -> NDArray[np.uint64]:
    """The words [n, 4 * blocks] of n samples. Sample i has the blocks from i * blocks on."""
    if isinstance(samples, range) and samples.step == 1:
        drawn = philox.following(seed, stream, view, samples.start * blocks, len(samples) * blocks)
        return drawn.reshape(len(samples), blocks * philox.WORDS)
    firsts = np.asarray(samples, np.int64).astype(np.uint64) * np.uint64(blocks)
    return philox.scattered(seed, stream, view, firsts, blocks)


@cache
def step(stream: int, place: int) -> int:
    """By how much a sample's word at this place grows from view to view in the spread sequence, modulo 2^64.

    Like the golden ratio, step / 2^64 is a number that fractions approximate badly, so that its multiples are spread
    evenly from the first to the last. It is the candidate that stays farthest from moving in step with the places
    before it, and with the main places of the streams before it.
    """
    others = [step(stream, before) for before in range(place)]
    others += [step(s, p) for s in _STREAMS if s < stream for p in range(_MAIN.get(s, _MAIN_OF_OTHERS))]
    candidates = np.array([_candidate(stream, place, i) for i in range(_CANDIDATES)], np.uint64)
    return int(candidates[_distance(candidates, others).argmax()])


def _candidate(stream: int, place: int, number: int) -> int:
    """2^64 times a continued fraction, whose 64 partial quotients from 1 to 4 are the bits of a hash; made odd.

    Quotients of 1 and 2 alone would spread single numbers a little better, but lie so close together that more pairs
    of places would move in step.
    """
    bits = int.from_bytes(hashlib.sha256(f"kdcache spread {stream} {place} {number}".encode()).digest(), "little")
    numerator, denominator = 0, 1
    for i in range(64):
        quotient = 1 + (bits >> 2 * i) % 4
        numerator, denominator = denominator, quotient * denominator + numerator
    return (numerator << 64) // denominator | 1


def _distance(candidates: NDArray[np.uint64], others: list[int]) -> NDArray[np.uint64]:
    """How far each candidate is from a relation i * candidate + j * other = 0 with small i and j, modulo 2^64.

    Where there is such a relation, pairs of the two places' words lie on few lines. A distance counts i * j times,
    since larger i and j give more lines.
    """
    least = np.full(len(candidates), 2**63, np.uint64)
    for other in others:
        for i, j in _RELATIONS:
            away = candidates * np.uint64(i) + np.uint64(j * other % 2**64)
            away = np.minimum(np.minimum(away, np.negative(away)), np.uint64(2**61))  # as a distance from 0, up to 1/8
            least = np.minimum(least, away * np.uint64(i * abs(j)))
    return least
