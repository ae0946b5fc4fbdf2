"""CachedDataset: for any DataLoader and sampler, what CachedLoader gives for the same samples in the same view."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler, Subset, WeightedRandomSampler, random_split

from kdcache.cache import KdcacheError, open_cache
from kdcache.cache.records.pairs import partners
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.tests.helpers.images import draw
from kdcache.tests.helpers.training import BATCH, quiet
from kdcache.train import CachedDataset, CachedLoader
from kdcache.train.loaders import dataset as module

POLICY = "crop,flip,erase(0.25),mixup(0.2),cutmix(1)"
FIELDS = ("classes", "gaps", "target_gap", "tail", "labels", "tail_std", "prior", "label_weights")


@pytest.fixture(scope="module")
def mixed(home):
    build(BuildConfig("resnet8", augment=POLICY, views=2, topk=3, out=str(home / "mixed")), quiet)
    return home / "mixed"


@pytest.fixture(scope="module")
def files(home):
    """A cache of 40 image files of several sizes in four classes: its folder and the data."""
    for i in range(40):
        draw(home / "pics" / "train" / f"class{i % 4}" / f"{i:02d}.png", 12 + i % 3, 10 + i % 4)
    draw(home / "pics" / "val" / "class0" / "a.png")
    draw(home / "pics" / "val" / "class3" / "b.png")
    (home / "loops_teacher.py").write_text(
        "import torch\ndef net():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 4))\n"
    )
    data = f"imagefolder:{home / 'pics'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(home))
        build(
            BuildConfig(
                "loops_teacher:net", data=data, views=2, augment="rrc,flip", teacher_size=16, workers=0,
                allow_low_accuracy=True, out=str(home / "of-files"),
            ),
            quiet,
        )  # fmt: skip
    return home / "of-files", data


def equal(one, other):
    """Whether two batches are the same, bit for bit."""
    pairs = [(one[0], other[0]), (one[1], other[1])]
    pairs += [(getattr(one[2], name), getattr(other[2], name)) for name in FIELDS]
    return all(a is b or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


def loader_of(dataset, **options):
    return DataLoader(dataset, collate_fn=dataset.collate, **options)


class InTheOrderOf:
    """A batch sampler: the batches of a CachedLoader's epoch."""

    def __init__(self, loader, partners=None):
        self.loader, self.partners, self.epoch = loader, partners, 0

    def __iter__(self):
        return iter([batch.tolist() for batch in self.loader.sampler.batches(self.epoch, self.partners)])


def by_sample(batches, order):
    """What a CachedLoader gives of each sample: image, label and record."""
    found = {}
    for (images, labels, records), samples in zip(batches, order, strict=True):
        for at, sample in enumerate(samples.tolist()):
            found[sample] = images[at], labels[at], records[at : at + 1]
    return found


def partners_in(cache, view):
    return partners(cache.identity.views.seed, view, range(cache.train.samples), cache.train.samples)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2, "multiprocessing_context": "fork"},
        {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
        {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True},
    ],
    ids=lambda options: "-".join(str(v) for v in options.values()) or "none",
)
def test_batches_are_those_of_the_loader_in_every_epoch_and_any_worker(home, data, options):
    cache = open_cache(home / "top3")
    loader, dataset = CachedLoader(cache, data, BATCH), CachedDataset(cache, data)
    order = InTheOrderOf(loader)
    ours = loader_of(dataset, batch_sampler=order, **options)
    for epoch in (0, 1, 3):
        order.epoch = epoch
        loader.set_epoch(epoch)
        dataset.set_epoch(epoch)
        assert (dataset.epoch, dataset.view) == (epoch, epoch % 2)
        count = 0
        for a, b in zip(ours, loader, strict=True):
            assert equal(a, b)
            count += 1
        assert count == len(loader)


def test_mixed_views_in_any_order_beside_their_shares(mixed, data):
    """Neither order nor batches know of pairs: the partner's image is rendered for each."""
    cache = open_cache(mixed)
    loader, dataset = CachedLoader(cache, data, BATCH), CachedDataset(cache, data)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        dataset.set_epoch(epoch)
        want = by_sample(loader, loader.sampler.batches(epoch, partners_in(cache, epoch)))
        some = np.random.default_rng(epoch).permutation(list(want))[:301].tolist()
        got = list(loader_of(dataset, batch_size=100, sampler=some))
        assert [len(labels) for _, labels, _ in got] == [100, 100, 100, 1]
        flat = by_sample(got, np.split(np.array(some), [100, 200, 300]))
        assert all(equal(flat[sample], want[sample]) for sample in some)
        assert got[0][1].shape == got[0][2].label_weights.shape == (100, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_image_files(files, workers):
    cache, data = open_cache(files[0]), files[1]
    loader, dataset = CachedLoader(cache, data, 8, workers=0), CachedDataset(cache, data)
    order = InTheOrderOf(loader)
    ours = loader_of(
        dataset, batch_sampler=order, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    for epoch in (0, 1):
        order.epoch = epoch
        loader.set_epoch(epoch)
        dataset.set_epoch(epoch)
        assert all(equal(a, b) for a, b in zip(ours, loader, strict=True))
    assert CachedDataset(cache, data, image_size=10)[3][0].shape == (3, 10, 10)


def test_one_sample_and_samplers_of_torch(home, data):
    cache = open_cache(home / "default")
    dataset = CachedDataset(cache, data, epoch=1)
    image, label, record = dataset[5]
    assert image.shape == (3, 8, 8) and label.shape == () and len(record) == 1 and dataset.view == 1
    assert equal(dataset[-1], dataset[len(data) - 1])
    shares = [DistributedSampler(dataset, 2, rank, shuffle=True, seed=3) for rank in (0, 1)]
    seen = [labels for share in shares for _, labels, _ in loader_of(dataset, batch_size=100, sampler=share)]
    assert sum(map(len, seen)) == len(data) + len(data) % 2
    of_threes = torch.from_numpy(data.labels[:, 0] == 3).double()
    drawn = WeightedRandomSampler(of_threes, 200, generator=torch.Generator().manual_seed(0))
    assert all((labels == 3).all() for _, labels, _ in loader_of(dataset, batch_size=50, sampler=drawn))
    for images, labels, records in DataLoader(Subset(dataset, [7, 5]), 2, collate_fn=dataset.collate):
        assert torch.equal(images[1], image) and labels[1] == label and torch.equal(records.gaps[1:], record.gaps)
    parts = random_split(dataset, [0.9, 0.1])
    assert sum(len(labels) for _, labels, _ in DataLoader(parts[1], 64, collate_fn=dataset.collate)) == len(parts[1])
    assert sum(len(one[2]) for one in dataset) == len(data)
    plain = DataLoader(dataset, 3, collate_fn=lambda samples: [label.item() for _, label, _ in samples])
    assert next(iter(plain)) == data.labels[:3, 0].tolist()


def test_samples_of_two_caches_are_batched_where_their_records_fit(home, data):
    one, other, top3 = (CachedDataset(open_cache(home / name), data) for name in ("default", "exact", "top3"))
    twice = loader_of(one, batch_size=4)
    assert len(next(iter(twice))[2]) == 4
    both = DataLoader(ConcatDataset([one, one]), sampler=[0, 1 + len(one)], batch_size=2, collate_fn=one.collate)
    images, labels, records = next(iter(both))
    assert torch.equal(images[1], one[1][0]) and labels.tolist() == data.labels[:2, 0].tolist() and len(records) == 2
    with pytest.raises(KdcacheError, match="several caches, whose records do not fit together"):
        one.collate([one[0], top3[0]])
    assert len(other) == len(one)


def test_the_evaluation_split_beside_the_teachers_answers(home):
    cache = open_cache(home / "default")
    dataset = CachedDataset(cache, "digits", split="eval")
    want = cache.read_evaluation()
    images, labels, records = zip(*loader_of(dataset, batch_size=100), strict=True)
    assert torch.equal(torch.cat(labels), want.labels[:, 0].long())
    assert torch.equal(torch.cat([r.gaps for r in records]), want.gaps)
    pixels = CachedDataset(cache, "digits", split="eval", transform=torch.nn.Identity())[4][0]
    assert torch.equal(pixels, dataset.data.pixels[4].permute(2, 0, 1)) and pixels.dtype == torch.uint8
    dataset.set_epoch(7)
    assert dataset.view == 0 and torch.equal(dataset[0][0], images[0][0])


def test_a_transform_takes_the_place_of_normalising(home, data):
    cache = open_cache(home / "default")
    pixels = CachedDataset(cache, data, transform=torch.nn.Identity())
    loader = CachedLoader(cache, data, BATCH)
    order = InTheOrderOf(loader)
    for (a, *_), (b, *_) in zip(loader_of(pixels, batch_sampler=order), loader.steps(), strict=True):
        assert torch.equal(a, b) and a.dtype == torch.uint8
    with pytest.raises(KdcacheError, match="transform made 3 images of a batch of 1"):
        CachedDataset(cache, data, transform=lambda images: images[0])[0]


def test_a_batch_is_of_one_view_also_where_another_is_written_meanwhile(home, data):
    cache = open_cache(home / "exact")
    calls = []

    def late(pixels):
        calls.append(1)
        if len(calls) == 1:
            dataset.set_epoch(1)
        return pixels

    dataset = CachedDataset(cache, data, transform=late)
    batch = dataset.collate(dataset.__getitems__(range(50)))
    want = CachedDataset(cache, data, transform=torch.nn.Identity(), epoch=1)
    assert len(calls) == 2 and equal(batch, want.collate(want.__getitems__(range(50))))


def test_what_cannot_be_is_said_in_one_line(home, data, files, monkeypatch):
    cache = open_cache(home / "default")
    dataset = CachedDataset(cache, data)
    with pytest.raises(IndexError, match=f"there is no sample {len(data)} in digits: it has {len(data)}"):
        dataset[len(data)]
    with pytest.raises(KdcacheError, match="there is no epoch -1"):
        dataset.set_epoch(-1)
    with pytest.raises(KdcacheError, match="has 3 complete views, not 4: build more"):
        CachedDataset(cache, data, views=4)
    with pytest.raises(KdcacheError, match="was built from other data"):
        CachedDataset(cache, files[1])
    with pytest.raises(KdcacheError, match="the train split of digits was given, and the eval split is asked for"):
        CachedDataset(cache, data, split="eval")
    copy = pickle.loads(pickle.dumps(dataset))
    assert equal(copy[3], dataset[3])
    with pytest.raises(KdcacheError, match="call set_epoch in the process that made it"):
        copy.set_epoch(1)
    monkeypatch.setattr(module, "shared_memory_free", lambda: 1000)
    with pytest.raises(KdcacheError, match=r"a view takes 0 MB of shared memory and /dev/shm has 0 MB left: give"):
        CachedDataset(cache, data)


def test_a_view_that_cannot_be_read_leaves_the_one_before(home, data, tmp_path):
    shutil.copytree(home / "default", tmp_path / "cache")
    dataset = CachedDataset(open_cache(tmp_path / "cache"), data)
    want = dataset[3]
    (tmp_path / "cache" / "views").rename(tmp_path / "elsewhere")
    with pytest.raises(KdcacheError, match="missing"):
        dataset.set_epoch(1)
    assert dataset.epoch == 0 and equal(dataset[3], want)
    (tmp_path / "elsewhere").rename(tmp_path / "cache" / "views")
    dataset.set_epoch(1)
    assert dataset.view == 1 and not equal(dataset[3], want)
