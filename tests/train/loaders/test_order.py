"""An epoch's batches hold every sample once; where views are mixed, they hold whole pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache.errors import InputError
from kdcache.cache.records.pairs import partners
from kdcache.train.loaders.order import EpochOrder, epoch_batches, usual_batch


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(1, 20), st.integers(1, 3), st.integers(0, 9), st.integers(0, 5))
def test_a_mixed_epoch_holds_every_sample_once_and_each_pair_in_one_batch(samples, pairs_a_rank, world, seed, epoch):
    batch = 2 * pairs_a_rank * world
    if batch > samples:
        return
    partner = partners(seed, 4 * epoch, range(samples), samples)
    ranks = [epoch_batches(samples, batch, seed, epoch, rank, world, partner) for rank in range(world)]
    taken = np.concatenate([np.concatenate(of_rank) for of_rank in ranks])
    assert len(taken) == samples // batch * batch and len(set(taken.tolist())) == len(taken)
    for of_rank in ranks:
        for part in of_rank:
            assert len(part) == 2 * pairs_a_rank and set(partner[part].tolist()) == set(part.tolist())


def test_whole_mixed_epochs_are_permutations_of_all_samples_and_differ():
    partner = partners(0, 0, range(64), 64)
    epochs = [np.concatenate(epoch_batches(64, 8, 3, epoch, partners=partner)) for epoch in range(4)]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(64))
    assert len({tuple(order.tolist()) for order in epochs}) == 4


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.booleans(), st.integers(0, 400), st.integers(0, 3))
def test_so_many_epochs_as_there_are_crops_hold_every_sample_once(crops, each, world, mixed, more, turn):
    """Each rank's part of a batch has an equal share of its samples, and both of every pair."""
    batch = (2 if mixed else 1) * each * world * crops
    samples = batch + more
    partner = partners(3, 0, range(samples), samples) if mixed else None
    orders = [EpochOrder(samples, batch, rank, world, 5, mixed, crops) for rank in range(world)]
    taken = []
    for epoch in range(turn * crops, (turn + 1) * crops):
        of_ranks = [order.batches(epoch, partner) for order in orders]
        assert {len(batches) for batches in of_ranks} == {len(orders[0])} == {samples // batch}
        assert {len(part) for batches in of_ranks for part in batches} == {batch // crops // world}
        assert not mixed or all(set(partner[part]) == set(part) for batches in of_ranks for part in batches)
        taken += [part for batches in of_ranks for part in batches]
    found = np.concatenate(taken)
    assert len(np.unique(found)) == len(found) == samples // batch * batch


def test_batches_that_cannot_be_of_crops_are_refused():
    for batch, world, mixed, told in (
        (
            10,
            1,
            False,
            "a batch of 10 cannot hold 4 crops of each of its images: take a multiple of 4 for --batch-size",
        ),
        (8, 3, False, "a batch of 2 images of 4 crops each cannot be split over 3 ranks"),
        (20, 1, True, "take a multiple of 8 for --batch-size"),
        (24, 2, True, "take a multiple of 16 for --batch-size"),
    ):
        with pytest.raises(InputError, match=told):
            EpochOrder(100, batch, 0, world, 0, mixed, crops=4)


def test_what_would_part_pairs_is_refused():
    for batch, world in ((5, 1), (6, 2)):
        with pytest.raises(InputError, match=f"take a multiple of {2 * world} for --batch-size"):
            EpochOrder(100, batch, 0, world, 0, mixed=True)
    with pytest.raises(InputError, match=r"held out .* leave --validation out"):
        EpochOrder(np.arange(50), 10, 0, 1, 0, mixed=True)


def test_the_usual_batch_holds_whole_pairs_for_each_rank():
    assert [usual_batch(256, n, mixed=False, world=3) for n in (1000, 101)] == [256, 101]
    assert [usual_batch(256, n, mixed=True, world=3) for n in (1000, 101, 4)] == [252, 96, 6]
    assert [usual_batch(256, n, mixed=False, world=1, crops=3) for n in (1000, 101, 2)] == [255, 99, 3]
    assert usual_batch(256, 1000, mixed=True, world=3, crops=4) == 240


@pytest.mark.parametrize("samples", [1, 100, 65_535, 65_536, 70_001])
def test_an_order_made_in_place_is_the_one_of_every_release(samples):
    words = np.random.Philox(key=np.array([5, 1], np.uint64), counter=np.array([0, 2, 0, 0], np.uint64))
    low = np.uint64((1 << samples.bit_length()) - 1)
    numbers = np.sort(words.random_raw(samples) & ~low | np.arange(samples, dtype=np.uint64))
    got = np.concatenate(epoch_batches(samples, 1, 5, 2)) if samples < 200 else epoch_batches(samples, samples, 5, 2)[0]
    assert np.array_equal(got, (numbers & low).astype(np.int64)) and got.dtype == np.int64
