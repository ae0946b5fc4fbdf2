"""Slabs: which are read, kept, used again and forgotten; and what each of several ranks holds."""

import threading
from dataclasses import fields

import numpy as np
import pytest
import torch

from kdcache.cache import Cache
from kdcache.cache.errors import InputError, KdcacheError
from kdcache.cache.packing import pack_hdf5
from kdcache.cache.records.records import Records
from kdcache.pipeline.views.parameters import evaluation_view
from kdcache.tests.helpers.ffcv import Drawn
from kdcache.tests.helpers.images import arrays_data
from kdcache.train.loaders import cached
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.slabs import Held, Slabs, Wanted


class Reader:
    """Reads small slabs, in which every gap is the view's number. A view that is `bad` cannot be read.

    may_compare: parameters are compared once this is set. may_read: whole slabs are read once it is.
    """

    def __init__(self):
        self.seen, self.spares, self.bad, self.may_compare = [], [], set(), threading.Event()
        self.may_compare.set()
        self.may_read = threading.Event()
        self.may_read.set()

    def draw(self, view):
        return evaluation_view(np.full((4, 2), 8, np.int32), whole=True)

    def compare(self, view, drawn, hurry):
        assert self.may_compare.wait(20)

    def read(self, wanted, drawn, spare, hurry, samples=None):
        self.seen.append(wanted.view if samples is None else samples.tolist())
        assert samples is not None or self.may_read.wait(20)
        self.spares.append(None if spare is None else int(spare.gaps[0, 0]))
        if wanted.view in self.bad:
            raise InputError(f"no view {wanted.view}")
        gaps = torch.full((4, 2), float(wanted.view)) if spare is None else spare.gaps.fill_(wanted.view)
        gaps = gaps if samples is None else gaps[: len(samples)]
        return Held(Records(None, gaps, gaps[:, :1], gaps[:, :0], gaps[:, :1], 2, ()), samples)


def wanted(*views):
    return [Wanted(view) for view in views]


def taken(slabs, now, after=(), batches=()):
    return slabs.taken(now, after, lambda drawn: batches)


def values(slabs):
    return [int(slab.held.records.gaps[0, 0]) for slab in slabs]


def test_several_views_are_held_at_once_and_those_that_follow_are_read_ahead():
    reader = Reader()
    slabs = Slabs(reader, reuse=False)
    with taken(slabs, wanted(3, 1), wanted(1, 2)) as now:
        assert values(now.slabs) == [3, 1] and sorted(values(slabs._slabs.values())) == [1, 2, 3]
    with taken(slabs, wanted(1, 2)) as now:
        assert values(now.slabs) == [1, 2] and values(slabs._slabs.values()) == [1, 2]
    assert sorted(reader.seen) == [1, 2, 3]


def test_memory_is_used_again_once_nobody_takes_batches_from_it():
    reader = Reader()
    slabs = Slabs(reader, reuse=True)
    with taken(slabs, wanted(0)) as first:
        for view in (1, 2):  # by iterators that have overtaken the first one
            with taken(slabs, wanted(view)) as other:
                assert values([*other.slabs, *first.slabs]) == [view, 0]
    assert reader.spares == [None, None, 1]
    with taken(slabs, wanted(5, 6)) as both:
        assert values(both.slabs) == [5, 6]
    assert reader.spares[3:] == [2, None]


def test_what_could_not_be_read_is_in_nobodys_use_and_read_again():
    reader = Reader()
    reader.bad = {1}
    slabs = Slabs(reader, reuse=True)
    with pytest.raises(InputError, match="no view 1"), taken(slabs, wanted(0, 1)) as both:
        values(both.slabs)
    reader.bad = set()
    with taken(slabs, wanted(0, 1)) as both:
        assert values(both.slabs) == [0, 1]
    assert reader.seen == [0, 1, 1]
    with taken(slabs, wanted(2, 3)) as both:
        assert values(both.slabs) == [2, 3]
    assert sorted(reader.spares[3:]) == [0, 1]


def test_pixels_can_be_rendered_before_the_records_are_there_and_records_come_with_what_they_belong_to():
    reader = Reader()
    reader.may_compare.clear()
    slabs = Slabs(reader, reuse=False)
    with taken(slabs, wanted(0), wanted(1), [np.array([2, 0])]) as now:
        (slab,) = now.slabs
        assert len(slab.parameters) == 4 and not slab.done
        batches = now.gathered()  # asks for nothing yet
        threading.Timer(0.05, reader.may_compare.set).start()
        (_, records), *rest = batches
        assert slab.done and not rest and records.gaps.tolist() == [[0, 0], [0, 0]]


def test_of_large_views_the_first_batch_is_there_before_they_are():
    reader, batches = Reader(), [np.array([3, 1]), np.array([0, 2])]
    reader.may_read.clear()
    slabs = Slabs(reader, reuse=False, large=True)
    with taken(slabs, wanted(0, 1), wanted(2), batches) as now:
        answers = now.gathered()
        assert next(answers)[1].gaps.tolist() == [[0, 0], [1, 1]] * 2
        assert not any(slab.done for slab in now.slabs)
        reader.may_read.set()
        assert next(answers)[1].gaps.tolist() == [[0, 0], [1, 1]] * 2 and all(slab.done for slab in now.slabs)
    with taken(slabs, wanted(2), batches=batches) as now:  # which were read ahead
        assert len(list(now.gathered())) == 2
    assert reader.seen == [[1, 3], [1, 3], 0, 1, 2]


def test_a_first_batch_that_cannot_be_read_leaves_nothing_that_failed():
    reader, batches = Reader(), [np.array([3, 1]), np.array([0, 2])]
    reader.bad = {1}
    slabs = Slabs(reader, reuse=False, large=True)
    with pytest.raises(InputError, match="no view 1"), taken(slabs, wanted(0, 1), batches=batches) as now:
        next(now.gathered())
    reader.bad = set()
    with taken(slabs, wanted(0, 1), batches=batches) as now:
        assert len(list(now.gathered())) == 2
    assert reader.seen == [[1, 3], [1, 3], 0, 1, 1]


POLICIES = {"crop,flip": {"precision": "uint8"}, "flip,mixup(0.2),cutmix(1)": {"mixed": True, "k": None}}


def everything(images, labels, records):
    """All tensors of a batch by name."""
    of_records = {f.name: getattr(records, f.name) for f in fields(records)}
    found = {"images": images, "own labels": labels, **of_records}
    return {name: of for name, of in found.items() if isinstance(of, torch.Tensor) and name != "prior"}


@pytest.mark.parametrize("policy", POLICIES)
def test_ranks_hold_a_view_once_and_give_the_batches_of_one_process(policy, tmp_path):
    """Also of epochs that follow in no order, and of one that is begun in its middle; from caches of several parts."""
    data, ranks, batch = arrays_data(250, 6, 9), 3, 36
    cache = Drawn(tmp_path / "c", data, policy, views=3, part=64, **POLICIES[policy]).cache
    alone = CachedLoader(cache, data, batch)
    parts = [CachedLoader(cache, data, batch, rank, ranks) for rank in range(ranks)]
    for epoch, start in ((0, 0), (1, 0), (8, 3), (4, 0)):
        for loader in (alone, *parts):
            loader.set_epoch(epoch)
        steps = zip(alone.steps(start), *(part.steps(start) for part in parts), strict=True)
        for whole, *theirs in steps:
            own = [everything(*one) for one in theirs]
            for name, of in everything(*whole).items():
                assert torch.equal(torch.cat([one[name] for one in own]), of), name
        held = [slabs_of(part, epoch)[0] for part in parts]
        used = np.concatenate([samples for _, samples in held])
        assert len(used) == len(set(used.tolist())) == len(alone) * batch < len(data)
        whole = slabs_of(alone, epoch)[0].records
        assert sum(records.nbytes for records, _ in held) == whole.nbytes // len(data) * len(used)
        assert len(slabs_of(parts[0])) == 2


def slabs_of(loader, epoch=None):
    """What a loader holds, of an epoch if one is given."""
    if epoch is None:
        return [slab.held for slab in loader._slabs._slabs.values()]
    with taken(loader._slabs, loader._reader.wanted(epoch), loader._reader.wanted(epoch + 1)) as now:
        return [slab.held for slab in now.slabs]


@pytest.mark.parametrize(("policy", "crops"), [(policy, 1) for policy in POLICIES] + [("crop,flip", 3)])
def test_the_first_batch_of_large_views_is_what_it_always_is(policy, crops, tmp_path, monkeypatch):
    """In one process and on several ranks, from a folder and from an HDF5 file, which is decompressed as a whole."""
    data, batch, read = arrays_data(250, 6, 9), 36, []
    cache = Drawn(tmp_path / "c", data, policy, views=3, part=64, **POLICIES[policy]).cache
    want = [list(CachedLoader(cache, data, batch, rank, 2, crops_per_decode=crops).steps()) for rank in range(2)]
    alone = list(CachedLoader(cache, data, batch, crops_per_decode=crops).steps())
    monkeypatch.setattr(cached, "_LARGE", 0)
    inner = cached._Reader.read

    def seen(reader, wanted, drawn, spare, hurry, samples=None):
        read.append(samples)
        return inner(reader, wanted, drawn, spare, hurry, samples)

    monkeypatch.setattr(cached._Reader, "read", seen)
    pack_hdf5(cache, tmp_path / "c.h5", cache.views)
    for place in (cache, Cache(tmp_path / "c.h5")):
        for expected, of in ((want[0], (0, 2)), (want[1], (1, 2)), (alone, (0, 1))):
            read.clear()
            found = list(CachedLoader(place, data, batch, *of, crops_per_decode=crops).steps())
            first = [len(samples) for samples in read if samples is not None]
            assert first == [len(expected[0][1]) // crops] * crops
            for one, other in zip(found, expected, strict=True):
                one, other = everything(*one), everything(*other)
                assert one.keys() == other.keys() and all(torch.equal(of, other[name]) for name, of in one.items())


def test_a_ranks_memory_is_used_again(tmp_path):
    data = arrays_data(250, 6, 9)
    cache = Drawn(tmp_path / "c", data, "crop,flip", views=3, part=64).cache
    loader, memory = CachedLoader(cache, data, 36, 1, 2), set()
    for _ in range(6):
        assert len(list(loader.steps())) == 6
        memory |= {held.records.gaps.data_ptr() for held in slabs_of(loader)}
    assert len(memory) == 2


def test_what_a_rank_lacks_is_said_as_in_one_process(tmp_path, monkeypatch):
    """No rank waits for another one here, so none can wait in vain."""
    data = arrays_data(250, 6, 9)
    cache = Drawn(tmp_path / "c", data, "crop,flip", part=64).cache
    rank = CachedLoader(cache, data, 36, 1, 2)
    (file,) = (tmp_path / "c/views/v00000/gaps/c/3").glob("*")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(KdcacheError, match=r"gaps/c/3/0 is not what was committed .*remove .*p0003"):
        list(rank.steps())
    file.write_bytes(whole)
    assert len(list(rank.steps())) == 6 and rank.epoch == 0
    drawn = cached.view_of_all
    monkeypatch.setattr(cached, "view_of_all", lambda views, view, *rest: drawn(views, view + 1, *rest))
    with pytest.raises(KdcacheError, match=r"view 0, part 0 .* other view parameters"):
        list(CachedLoader(cache, data, 36, 0, 2).steps())
