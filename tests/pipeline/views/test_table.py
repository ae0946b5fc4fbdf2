"""A view of image files that is drawn anew for each batch is the view that is drawn at once, and takes no memory."""

import tracemalloc

import numpy as np
import pytest
import torch

from kdcache.cache.identity import ViewsIdentity
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.views import render
from kdcache.pipeline.views.parameters import DrawnView, ViewParameters, draw
from kdcache.pipeline.views.policy import check_policy
from kdcache.pipeline.views.render import RENDERER, Renderer
from kdcache.pipeline.views.table import Table
from kdcache.pipeline.views.workers import Workers
from kdcache.tests.helpers.images import draw as draw_image

POLICIES = ["rrc,flip", "crop", "rrc(0.3,0.9),flip(0.25),three,trivial,erase(0.5)"]
CPU = torch.device("cpu")


def drawn_view(policy, sizes, sequence="random"):
    identity = ViewsIdentity(policy=check_policy(policy), seed=7, renderer=RENDERER, sequence=sequence, mixed=False)
    return DrawnView(identity, 3, sizes)


def folder(tmp_path):
    """Twelve image files of several sizes."""
    for i in range(14):
        path = tmp_path / "images" / ("train" if i < 12 else "val") / "c" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_image(path, 70 + i, 90 - i)
    return open_data(f"imagefolder:{tmp_path / 'images'}", "train", home=tmp_path)


def rows_of(view):
    yield "boxes", view.boxes
    yield "flips", view.flips
    yield from ((f"{name}.{what}", rows) for name, of in view.drawn.items() for what, rows in of.items())


@pytest.mark.parametrize("sequence", ["random", "spread"])
@pytest.mark.parametrize("policy", POLICIES)
def test_any_rows_are_those_of_the_whole_view(policy, sequence):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 900, (5000, 2)).astype(np.int32)
    view, whole = drawn_view(policy, sizes, sequence), draw(policy, 7, 3, range(5000), sizes, sequence=sequence)
    assert len(view) == 5000 and view[:].digest() == whole.digest()
    assert view[4096:].digest() == whole[4096:].digest()
    for rows in (rng.permutation(5000), rng.integers(0, 5000, 33), np.arange(0), np.array([4999])):
        table = Table(view, 0)
        assert np.array_equal(table.samples_of(table.batch(rows).rows), rows)
        for (name, some), (_, every) in zip(rows_of(table.of(rows)), rows_of(whole), strict=True):
            assert np.array_equal(some, every[rows]) and some.dtype == every.dtype, name


def test_digests_and_batches_of_a_large_view_take_the_memory_of_a_part():
    sizes = np.full((600_000, 2), (375, 500), np.int32)
    tracemalloc.start()
    view = drawn_view("rrc,flip", sizes)
    table = Table(view, 0)
    digests = {view[start : start + 50_000].digest() for start in range(0, 600_000, 50_000)}
    for batch in np.random.default_rng(0).permutation(600_000)[:4096].reshape(16, 256):
        assert len(table.of(table.batch(batch).rows)) == 256
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All parameters would take 10 MB. The permutation takes 4.8 MB, a part of 50,000 with what it is drawn from 2.5 MB.
    assert len(digests) == 12 and peak < 8_000_000


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("policy", ["rrc,flip", "rrc,flip,trivial,erase(0.5)"])
def test_pixels_are_those_of_the_view_that_is_held(policy, workers, tmp_path):
    data = folder(tmp_path)
    view = drawn_view(policy, data.sizes)
    batches = [np.array([3, 1, 4]), np.arange(len(data)), np.array([0])]
    renderer = Renderer(data, 24, CPU, policy, workers)
    for once, anew in zip(renderer.batches(view[:], batches), renderer.batches(view, batches), strict=True):
        assert torch.equal(once, anew)


def test_tasks_are_made_only_when_workers_have_room_for_them(tmp_path, monkeypatch):
    """An epoch of millions of images has hundreds of thousands of tasks."""
    data = folder(tmp_path)
    view, asked = drawn_view("rrc,flip", data.sizes), []
    monkeypatch.setattr(DrawnView, "__getitem__", lambda self, rows: asked.append(len(rows)) or drawn(self, rows))
    drawn = lambda self, rows: ViewParameters(np.full((len(rows), 4), 8, np.int32), np.zeros(len(rows), np.bool_))  # noqa: E731
    monkeypatch.setattr(render, "_DRAWN", 4)
    batches = [np.array([i % len(data)]) for i in range(200)]
    rendered = Renderer(data, 24, CPU, "rrc,flip", 1).batches(view, batches)
    next(rendered)
    assert sum(asked) < 20
    assert sum(1 for _ in rendered) == 199
    assert asked == [0] + [4] * 50  # first for no images, to compile loops; then for the batches of four at once


def test_a_run_that_is_left_leaves_its_tasks_to_nobody(tmp_path):
    data = folder(tmp_path)
    renderer = Renderer(data, 24, CPU, "rrc,flip", 1)
    view = drawn_view("rrc,flip", data.sizes)
    batches = [np.array([i]) for i in range(len(data))]
    first = renderer.batches(view, batches)
    held = next(first)
    again = list(renderer.batches(view, batches))
    assert torch.equal(held, again[0]) and len(list(first)) == len(batches) - 1
    assert isinstance(renderer._idle, Workers)
