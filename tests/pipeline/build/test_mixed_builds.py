"""Builds of mixed views: partners anywhere, few decodes, and the same bytes however the work is divided."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdcache.cache import Cache
from kdcache.cache import errors as e
from kdcache.cache.records.pairs import partners
from kdcache.pipeline.build import build as build_module
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.source import open_source
from kdcache.pipeline.data.kinds.files import FileDataset
from kdcache.pipeline.verify import verify
from kdcache.pipeline.views.operations.boxes import edges
from kdcache.pipeline.views.parameters import draw
from kdcache.pipeline.views.render import Renderer
from kdcache.tests.helpers.building import MIXED, MIXED_FILES, content, of_files, quiet, settings, spooled
from kdcache.train.loaders.cached import CachedLoader

pytestmark = pytest.mark.usefixtures("home", "no_fsync")

SINGLE = "crop,flip,gray(0.2),erase(0.25)"  # MIXED without what mixes


@pytest.fixture(autouse=True)
def _no_probe(monkeypatch):
    monkeypatch.setattr(build_module, "probe", lambda *a: (1.0, 1.0))


def mixed_by_hand(source, view):
    """The pixels [N, 3, H, W] of a mixed view, from the images of an unmixed one: one image at a time."""
    data, cpu = source.train, torch.device("cpu")
    n, sizes = len(data), data.sizes
    single = draw(SINGLE, 0, view, range(n), sizes, sequence="spread")
    (images,) = Renderer(data, None, cpu, SINGLE).batches(single, [np.arange(n)])
    images = images.numpy().astype(int)
    drawn = draw(MIXED["augment"], 0, view, range(n), sizes, sequence="spread").mixing.drawn
    partner, found = partners(0, view, range(n), n), []
    for i, (w, box) in enumerate(zip(drawn["weight"].tolist(), edges(drawn["box"], 10, 10).tolist(), strict=True)):
        other = images[partner[i]]
        image = (images[i] * w + other * (256 - w) + 128) >> 8
        top, left, bottom, right = box
        image[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        found.append(image)
    return torch.from_numpy(np.stack(found).astype(np.uint8)), partner


@pytest.mark.parametrize(("name", "samples", "part"), [("one", 1, 4), ("pair", 2, 1), ("three", 3, 2), ("seven", 7, 3)])
def test_partners_are_found_in_any_number_of_samples_and_beyond_the_part(tmp_path, name, samples, part):
    """Of an odd number one stays alone; parts are smaller than the data, and do not divide them."""
    config = settings(
        data=f"kd_toy:{name}", views=5, topk=12, precision="float32", batch_size=min(samples, 4), part=part,
        out=str(tmp_path / "c"), **MIXED,
    )  # fmt: skip
    source = open_source(config, quiet)
    build(config, quiet, source)
    cache = Cache(tmp_path / "c")
    labels = cache.train.labels[:, 0]
    assert cache.train.parts == -(-samples // part) and labels.shape == (samples,)
    for view in range(5):
        images, partner = mixed_by_hand(source, view)
        assert (partner == np.arange(samples)).sum() == samples % 2
        z = source.teacher.logits(torch.cat([images, images.new_zeros(8 - samples, 3, 10, 10)]))[:samples]
        records = cache.read(view)
        assert np.array_equal(records.labels.numpy(), np.stack([labels, labels[partner]], 1))
        want = z.max(1, keepdim=True).values - z
        torch.testing.assert_close(records.gaps, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            records.target_gap, want.gather(1, records.labels.long()).half(), rtol=2e-3, atol=1e-3
        )
    assert verify(cache, source).passed


def test_at_most_two_decodes_for_four_records_and_the_same_bytes_however_views_are_cut(
    toy, photos, tmp_path, monkeypatch
):
    """Six views are of two pairings: four views are cut together, then two."""
    config = of_files(photos, "", views=6, batch_size=8, **MIXED_FILES)
    source = open_source(config, quiet)
    decoded, decode = [], FileDataset.decode
    monkeypatch.setattr(FileDataset, "decode", lambda self, i: decoded.append(i) or decode(self, i))
    counts = {}
    for together in (1, 3, 4):
        decoded.clear()
        build(replace(config, views_per_decode=together, out=str(tmp_path / str(together))), quiet, source)
        counts[together] = len(decoded) - 8  # without the evaluation split
    first = counts[3] - counts[4]  # the first pairing, whose views are cut as three and one
    second = counts[4] - first
    assert counts[1] == 4 * first + 2 * second
    assert 24 < first <= 2 / 4 * (4 * 24) and 24 < second <= 2 * 24
    in_workers = replace(config, workers=2, views_per_decode=8, out=str(tmp_path / "8"))
    assert build(in_workers, quiet, source).teacher_images == 8 + 6 * 24
    extended = replace(config, out=str(tmp_path / "extended"))
    for views in (3, 4, 6):
        build(replace(extended, views=views), quiet, source)
    want = content(tmp_path / "1")
    assert all(content(tmp_path / name) == want for name in ("3", "4", "8", "extended"))
    assert verify(Cache(tmp_path / "4"), source).passed and spooled(tmp_path) == []


def test_views_that_are_added_later_are_those_of_one_build_and_batches_do_not_matter(tmp_path):
    config = settings(views=6, **MIXED)
    source = open_source(config, quiet)
    for name, changes in (
        ("later", {"views": 4}), ("later", {}), ("once", {}), ("batches of 7", {"views": 1, "batch_size": 7})
    ):  # fmt: skip
        build(replace(config, out=str(tmp_path / name), **changes), quiet, source)
    assert content(tmp_path / "later") == content(tmp_path / "once")
    later, other = (Cache(tmp_path / name) for name in ("later", "batches of 7"))
    for name in ("v00000-p0000", "v00000-p0001", "v00000-p0002"):
        assert other.train.commit(name).parameters == later.train.commit(name).parameters
    assert all(verify(cache, source).passed for cache in (later, other))


@pytest.mark.parametrize("tail_std", [False, True])
def test_top_k_records_leave_both_labels_out_of_the_tail(tmp_path, tail_std):
    """By formula, from the dense records of the same views."""
    config = settings(views=1, topk=4, precision="float16", tail_std=tail_std, **MIXED)
    exact = replace(config, topk=12, precision="float32", tail_std=False)
    for name, one in (("top", config), ("dense", exact)):
        build(replace(one, out=str(tmp_path / name)), quiet)
    top, dense = (Cache(tmp_path / name).read(0) for name in ("top", "dense"))
    assert top.labels.equal(dense.labels) and top.labels.shape == (150, 2)
    gaps = dense.gaps.double()
    gone = torch.zeros(150, 12, dtype=torch.bool).scatter_(1, top.classes.long(), True)
    gone.scatter_(1, top.labels.long(), True)
    assert (gone.sum(1) == 6).any() and (gone.sum(1) == 4).any()
    for at, t in enumerate((1.0, 4.0)):
        want = (-gaps / t).masked_fill(gone, -torch.inf).logsumexp(1)
        torch.testing.assert_close(top.tail[:, at].double(), want, rtol=2e-3, atol=2e-3)
    assert top.prior.shape == (2 + tail_std, 12)
    torch.testing.assert_close(top.prior.sum(1), torch.ones(2 + tail_std))
    assert (top.tail_std is not None) == tail_std
    assert verify(Cache(tmp_path / "top"), open_source(config, quiet)).passed


def test_mixed_views_of_images_without_labels(tmp_path):
    config = settings(teacher="kd_toy:twelve", unlabelled=True, out=str(tmp_path / "c"), **MIXED)
    source = open_source(config, quiet)
    build(config, quiet, source)
    cache = Cache(tmp_path / "c")
    assert (cache.identity.format, cache.identity.record.labels) == (2, 0)
    assert cache.read(1).labels.shape == cache.read(1).target_gap.shape == (150, 0)
    assert verify(cache, source).passed
    images, labels, records = next(iter(CachedLoader(cache, source.train, 16)))
    assert len(images) == 16 and labels.shape == (16, 0) and records.label_weights is None


def test_records_of_another_pairing_are_refused(tmp_path):
    """A commit may name the parameters of the same view as the next four views are paired."""
    config = settings(views=5, out=str(tmp_path / "c"), **MIXED)
    source = open_source(config, quiet)
    build(config, quiet, source)
    commits = tmp_path / "c" / "commits"
    own, other = (Cache(tmp_path / "c").train.commit(f"v0000{view}-p0001").parameters for view in (0, 4))
    file = commits / "v00000-p0001.json"
    file.write_text(file.read_text().replace(own, other))
    for known in (None, source):
        (problem,) = verify(Cache(tmp_path / "c"), known).problems
        assert "view 0, part 1 was built with other view parameters" in problem
    with pytest.raises(e.MismatchError, match=r"view 0, part 1 of .*other view parameters than this kdcache draws"):
        next(iter(CachedLoader(Cache(tmp_path / "c"), source.train, 16)))
