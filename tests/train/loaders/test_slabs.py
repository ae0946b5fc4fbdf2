"""Slabs: which views are read, kept, used again and forgotten."""

import pytest
import torch

from kdcache.cache.errors import InputError
from kdcache.cache.records.records import Records
from kdcache.pipeline.views.parameters import evaluation_view
from kdcache.train.loaders.slabs import Slab, Slabs


class Reader:
    """Reads small slabs, in which every gap is the view's number. A view that is `bad` cannot be read."""

    def __init__(self):
        self.read, self.spares, self.bad = [], [], set()

    def __call__(self, view, spare):
        self.read.append(view)
        self.spares.append(None if spare is None else int(spare.gaps[0, 0]))
        if view in self.bad:
            raise InputError(f"no view {view}")
        gaps = torch.full((4, 2), float(view)) if spare is None else spare.gaps.fill_(view)
        records = Records(None, gaps, gaps[:, :1], gaps[:, :0], gaps[:, :0], 2, ())
        return Slab(records, evaluation_view(torch.full((4, 2), 8).numpy(), whole=True))


def values(slabs):
    return [int(slab.records.gaps[0, 0]) for slab in slabs]


def test_several_views_are_held_at_once_and_those_that_follow_are_read_ahead():
    reader = Reader()
    slabs = Slabs(reader, reuse=False)
    with slabs.taken([3, 1], [1, 2]) as now:
        assert values(now) == [3, 1] and sorted(values(slabs.held())) == [1, 2, 3]
    with slabs.taken([1, 2], []) as now:
        assert values(now) == [1, 2] and values(slabs.held()) == [1, 2]
    assert sorted(reader.read) == [1, 2, 3]


def test_memory_is_used_again_once_nobody_takes_batches_from_it():
    reader = Reader()
    slabs = Slabs(reader, reuse=True)
    with slabs.taken([0], []) as (first,):
        with slabs.taken([1], []):  # by an iterator that has overtaken the first one
            assert values([first]) == [0]
        with slabs.taken([2], []) as two:
            assert values([*two, first]) == [2, 0]
    assert reader.spares == [None, None, 1]
    with slabs.taken([5, 6], []) as both:
        assert values(both) == [5, 6]
    assert reader.spares[3:] == [2, None]


def test_what_could_not_be_read_is_in_nobodys_use_and_read_again():
    reader = Reader()
    reader.bad = {1}
    slabs = Slabs(reader, reuse=True)
    with pytest.raises(InputError, match="no view 1"), slabs.taken([0, 1], []):
        raise AssertionError
    reader.bad = set()
    with slabs.taken([0, 1], []) as both:
        assert values(both) == [0, 1]
    assert reader.read == [0, 1, 1]
    with slabs.taken([2, 3], []) as both:
        assert values(both) == [2, 3]
    assert sorted(reader.spares[3:]) == [0, 1]
