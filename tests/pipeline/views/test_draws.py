"""Random words are NumPy's Philox for any samples, and those of the spread sequence are spread."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.pipeline.views.draws import below, chance, fraction, step, words

# The places that operations mostly draw from, by stream.
MAIN = {0: range(6)} | {stream: range(4) for stream in range(2, 14)}


def of_numpy(seed, stream, view, sample, count):
    blocks = -(-count // 4)
    counter = np.array([sample * blocks, view, 0, 0], np.uint64)
    return np.random.Philox(key=np.array([seed, stream], np.uint64), counter=counter).random_raw(4 * blocks)[:count]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 2**58), max_size=5),
    st.integers(1, 30),
)
def test_words_of_any_samples_are_numpys(seed, stream, view, samples, count):
    got = words(seed, stream, view, np.array(samples, np.int64), count)
    assert got.shape == (len(samples), count) and got.dtype == np.uint64
    for row, sample in zip(got, samples, strict=True):
        assert np.array_equal(row, of_numpy(seed, stream, view, sample, count))


@pytest.mark.parametrize("count", [1, 4, 6, 24])
@pytest.mark.parametrize("sequence", ["random", "spread"])
def test_a_sample_has_the_same_words_in_a_range_and_among_others(count, sequence):
    """5,000 samples of up to 24 words: more than one piece."""
    whole = words(3, 5, 9, range(70_000, 75_000), count, sequence)
    order = np.random.default_rng(0).permutation(5000)
    assert np.array_equal(words(3, 5, 9, 70_000 + order, count, sequence), whole[order])
    assert np.array_equal(words(3, 5, 9, range(70_000, 75_000, 7), count, sequence), whole[::7])
    assert words(3, 5, 9, range(8, 8), count, sequence).shape == (0, count)
    assert words(3, 5, 9, np.array([], np.int64), count, sequence).shape == (0, count)


def test_words_become_numbers():
    drawn = words(0, 2, 0, range(20_000), 2)
    assert (abs(np.bincount(below(drawn[:, 0], 9), minlength=9) / 20_000 - 1 / 9) < 0.01).all()
    ends = np.array([0, 2**64 - 1], np.uint64)
    assert below(ends, 2**31).tolist() == [0, 2**31 - 1] and below(ends, 1).tolist() == [0, 0]
    assert abs(chance(drawn[:, 1], 0.3).mean() - 0.3) < 0.01
    assert chance(ends, 0).tolist() == [False, False] and chance(ends, 1).tolist() == [True, True]
    assert fraction(ends).tolist() == [0, 1 - 2**-53]


# The spread sequence.


def test_words_of_the_spread_sequence_grow_by_a_fixed_step():
    first = words(7, 4, 0, range(50), 6)
    assert np.array_equal(words(7, 4, 0, range(50), 6, "spread"), first)
    for view in (1, 2, 99, 2**40):
        expected = [[(int(word) + view * step(4, place)) % 2**64 for place, word in enumerate(row)] for row in first]
        assert words(7, 4, view, range(50), 6, "spread").tolist() == expected


def test_a_place_may_have_a_step_of_its_own():
    usual, own = (words(7, 0, 3, range(50), 6, "spread", steps) for steps in (None, {4: 2**63}))
    assert np.array_equal(np.delete(own, 4, 1), np.delete(usual, 4, 1))
    assert np.array_equal(own[:, 4], words(7, 0, 0, range(50), 6)[:, 4] + np.uint64(2**63))


def test_steps_never_change():
    """Caches of spread views depend on them."""
    every = [step(stream, place) for stream in (0, *range(2, 14), 2**32) for place in range(8 if stream else 24)]
    assert all(number % 2 for number in every) and len(set(every)) == len(every)
    assert every[:2] == [14093002817396579023, 6522499828964325027]
    digest = hashlib.sha256(np.array(every, "<u8").tobytes()).hexdigest()
    assert digest.startswith("170683207672fb8c")


def star(x):
    """The star discrepancies [..., n] of each prefix of points [..., n] in [0, 1)."""
    found = []
    for n in range(1, x.shape[-1] + 1):
        ordered, i = np.sort(x[..., :n]), np.arange(1, n + 1)
        found.append(np.maximum(i / n - ordered, ordered - (i - 1) / n).max(-1))
    return np.stack(found, -1)


def star_of_pairs(x, y):
    """The star discrepancy of n points in the unit square: of all boxes at its corner, open and closed."""
    n = len(x)
    counts = np.zeros((n + 1, n + 1))
    counts[x.argsort().argsort() + 1, y.argsort().argsort() + 1] = 1
    counts = counts.cumsum(0).cumsum(1) / n
    area = np.outer(np.append(np.sort(x), 1), np.append(np.sort(y), 1))
    closed = np.pad(counts[1:, 1:], ((0, 1), (0, 1)), mode="edge")
    return max(abs(counts - area).max(), abs(closed - area).max())


def views_of(growth, count, starts):
    """The numbers [starts, count] of a place in the first views, from random starts."""
    start = np.random.default_rng(growth % 2**32).integers(0, 2**64, (starts, 1), np.uint64)
    return fraction(start + np.arange(count, dtype=np.uint64) * np.uint64(growth % 2**64))


PLACES = [(stream, place) for stream in MAIN for place in MAIN[stream]]
GOLDEN = int((5**0.5 - 1) / 2 * 2**64)


def test_every_prefix_of_views_is_spread_nearly_as_evenly_as_by_the_golden_ratio():
    independent = star(np.random.default_rng(0).random((300, 128))).mean(0)
    golden = star(views_of(GOLDEN, 128, 100)).mean(0)
    ours = np.stack([star(views_of(step(*place), 128, 20)).mean(0) for place in PLACES])
    assert (ours[:, 3:] < independent[3:]).all()
    assert (ours[:, 31:] < 0.6 * independent[31:]).all() and (ours[:, 127] < 0.3 * independent[127]).all()
    for n in (8, 16, 32, 64):  # octaves, since the golden ratio is best at Fibonacci's numbers
        assert ours[:, n : 2 * n].mean() < 1.25 * golden[n : 2 * n].mean()


def test_the_mirrored_views_are_spread_as_well():
    """Every second view is mirrored: from one to the next, words grow by twice the step."""
    independent = star(np.random.default_rng(0).random((300, 64))).mean(0)
    ours = np.stack([star(views_of(2 * step(*place), 64, 20)).mean(0) for place in PLACES])
    assert (ours.mean(0)[3:] < independent[3:]).all()
    assert (ours[:, 15:] < independent[15:]).all() and (ours[:, 63] < 0.5 * independent[63]).all()


def test_pairs_of_numbers_are_spread_too():
    """The two-dimensional star discrepancy as a part of that of independent draws, within and across streams."""
    prefixes, rng = (8, 16, 32, 64, 128), np.random.default_rng(0)
    independent = [np.mean([star_of_pairs(*rng.random((2, n))) for _ in range(100)]) for n in prefixes]

    def ratios(belongs):
        pairs = [pair for pair in itertools.combinations(PLACES, 2) if belongs(*(stream for stream, _ in pair))]
        found = []
        for i in np.random.default_rng(1).permutation(len(pairs))[:80]:
            x, y = (views_of(step(*place), 128, 2) for place in pairs[i])
            found.append([np.mean([star_of_pairs(x[j, :n], y[j, :n]) for j in range(2)]) for n in prefixes])
        return np.array(found) / independent

    geometry = ratios(lambda a, b: a == b == 0)
    assert (geometry < 1).all() and geometry[:, -1].mean() < 0.5
    for others in (ratios(lambda a, b: a == b > 0), ratios(lambda a, b: a != b)):
        assert (others.mean(0) < (0.75, 0.7, 0.65, 0.6, 0.55)).all()
        assert (others < 1).mean() > 0.95 and others.max() < 2
