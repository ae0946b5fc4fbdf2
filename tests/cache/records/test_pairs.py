"""Who is mixed with whom: an involution for any number of samples, drawn in any pieces."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache.records import pairs as module
from kdcache.cache.records.pairs import VIEWS_A_PAIRING, lone, pair_numbers, pairs, partners
from kdcache.tests.helpers.lazily import Lazily

stats = Lazily("scipy.stats")
SEEDS = st.integers(0, 2**64 - 1)
VIEWS = st.integers(0, 2**40)
EDGES = sorted({max(0, 2**k + d) for k in range(17) for d in (-1, 0, 1)})
TOTALS = st.one_of(st.sampled_from(EDGES), st.integers(0, 3000))


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array, "<i8").tobytes()).hexdigest()[:16]


@given(SEEDS, VIEWS, TOTALS)
def test_everyone_has_a_partner_whose_partner_he_is(seed, view, total):
    everyone = np.arange(total)
    found = partners(seed, view, range(total), total)
    assert found.dtype == np.int64 and np.array_equal(found[found], everyone)
    alone = np.flatnonzero(found == everyone).tolist()
    assert alone == ([] if total % 2 == 0 else [lone(seed, view, total)])


@given(SEEDS, VIEWS, TOTALS)
def test_a_pair_has_a_number_of_its_own(seed, view, total):
    numbers = pair_numbers(seed, view, range(total), total)
    both = pairs(seed, view, total)
    assert both.shape == (total // 2, 2) and both.dtype == numbers.dtype == np.int64
    assert np.array_equal(numbers[both], np.repeat(np.arange(total // 2), 2).reshape(-1, 2))
    assert np.array_equal(partners(seed, view, both[:, 0], total), both[:, 1])
    alone = lone(seed, view, total)
    assert (alone is None) == (total % 2 == 0) and (alone is None or numbers[alone] == total // 2)


@given(SEEDS, st.integers(1, 3000), st.data())
def test_any_samples_are_drawn_without_the_others(seed, total, data):
    start = data.draw(st.integers(0, total - 1))
    stop, step = data.draw(st.integers(start, total)), data.draw(st.integers(1, 9))
    any_order = np.array(data.draw(st.lists(st.integers(0, total - 1), max_size=20)), np.int64)
    for draw in (partners, pair_numbers):
        whole = draw(seed, 0, range(total), total)
        assert np.array_equal(draw(seed, 0, range(start, stop, step), total), whole[start:stop:step])
        assert np.array_equal(draw(seed, 0, any_order, total), whole[any_order])


@pytest.mark.parametrize("total", [1000, 1001])
def test_the_size_of_the_pieces_changes_nothing(total, monkeypatch):
    whole = [f(7, 5, range(total), total) for f in (partners, pair_numbers)] + [pairs(7, 5, total)]
    monkeypatch.setattr(module, "_PIECE", 64)
    pieces = [f(7, 5, range(total), total) for f in (partners, pair_numbers)] + [pairs(7, 5, total)]
    assert all(np.array_equal(a, b) for a, b in zip(whole, pieces, strict=True))


@given(SEEDS, st.integers(0, 2**40))
def test_four_views_share_a_pairing_and_the_next_have_another(seed, group):
    views = range(group * VIEWS_A_PAIRING, (group + 1) * VIEWS_A_PAIRING)
    first, *others = (partners(seed, view, range(200), 200) for view in views)
    assert VIEWS_A_PAIRING == 4 and all(np.array_equal(first, other) for other in others)
    for neighbour in (partners(seed, views.stop, range(200), 200), partners(seed ^ 1, views.start, range(200), 200)):
        assert (first == neighbour).mean() < 0.1


@pytest.mark.parametrize("total", [4, 5, 8, 31, 64])
def test_all_partners_are_as_probable(total):
    """Of a sample in the middle, over seeds; with an odd total being alone is one of the cases."""
    sample, draws = total // 2, 4000
    found = np.concatenate([partners(seed, 0, range(sample, sample + 1), total) for seed in range(draws)])
    counts = np.bincount(found, minlength=total)
    if total % 2 == 0:
        counts = np.delete(counts, sample)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_neighbours_have_partners_anywhere():
    """In one pairing: distances between partners are those of a uniform choice, also of samples in a row."""
    total = 2**16
    found = partners(3, 0, range(total), total)
    distances = (found - np.arange(total)) % total
    assert stats.chisquare(np.bincount(distances * 64 // total)).pvalue > 1e-3
    assert stats.chisquare(np.bincount((np.diff(found) % total) * 64 // total)).pvalue > 1e-3


def test_pairings_are_the_same_for_ever():
    assert digest(partners(0, 0, range(1000), 50_000)) == "50ff5dd23974432b"
    assert digest(partners(2**64 - 1, 7, np.arange(9_999, -1, -3), 10_001)) == "33c559e2cc05de6b"
    assert digest(partners(5, 2**33, range(14_199_000, 14_200_000), 14_200_000)) == "ef1a20235b337bd9"
    assert digest(pair_numbers(5, 4, range(13), 13)) == "52e1d512cc89770f"
    assert digest(pairs(5, 4, 13)) == "7cd3cc80ed7a9eb4" and lone(5, 4, 13) == 3


def test_samples_that_are_not_there_are_refused():
    for samples in (range(5, 11), np.array([-1, 3])):
        with pytest.raises(ValueError, match="are not all among the 10"):
            partners(0, 0, samples, 10)
