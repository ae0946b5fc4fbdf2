"""Memory of batches that is used over and over: nobody's pixels change under them, and nothing is lost without room."""

import gc
import os

import numpy as np
import pytest
import torch

from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.views import workers
from kdcache.pipeline.views.parameters import draw
from kdcache.pipeline.views.pool import Pool
from kdcache.pipeline.views.render import Renderer
from kdcache.tests.helpers import images

SIZE = 24


def test_memory_is_free_again_when_the_last_view_of_a_tensor_is_gone():
    pool = Pool(2, 100)
    first, second = pool.take(100), pool.take(7)
    assert {first, second} == {0, 100} and pool.take(1) is None and pool.take(101) is None
    pool.array(second, (7,))[:] = 9
    pixels = pool.tensor(second, (7,))
    part = pixels.view(7, 1)[3:].permute(1, 0)
    del pixels
    gc.collect()
    assert pool.take(1) is None and part.tolist() == [[9] * 4]
    del part
    assert pool.take(50) == second and pool.take(50) is None


def test_a_process_forked_later_writes_to_it():
    pool = Pool(1, 8)
    if not (pid := os.fork()):
        pool.array(0, (2, 4))[1] = 5
        os._exit(0)
    os.waitpid(pid, 0)
    assert pool.tensor(0, (2, 4)).tolist() == [[0] * 4, [5] * 4]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    for i in range(30):
        images.draw(folder / "train" / "ab"[i % 2] / f"{i}.png", 20 + i, 40 - i)
    images.draw(folder / "val" / "a" / "0.png")
    return open_data(f"imagefolder:{folder}", "train")


@pytest.mark.parametrize(("batch", "kept"), [(4, 1), (4, 100), (40, 100)])  # 40 are two tasks
def test_batches_that_are_kept_stay_as_they_were(data, batch, kept, monkeypatch):
    """Also of more batches than there is room for, and when the same workers run again."""
    found = []
    monkeypatch.setattr(workers, "Pool", lambda *a: found.append(Pool(*a)) or found[-1])
    views = [draw("rrc,flip,erase(0.5)", 0, view, range(len(data)), data.sizes) for view in range(2)]
    order = [np.arange(len(data)).repeat(2)[i : i + batch] for i in range(0, 2 * len(data), batch)]
    alone = Renderer(data, SIZE, torch.device("cpu"), "rrc,flip,erase(0.5)", workers=0)
    expected = list(alone.crops(views, order))
    renderer = Renderer(data, SIZE, torch.device("cpu"), "rrc,flip,erase(0.5)", workers=2)
    for _ in range(2):
        held = []
        for i, pixels in enumerate(renderer.crops(views, order)):
            held = [*held, (i, pixels)][-kept:]
            assert all(torch.equal(one, expected[j]) for j, one in held)
    (pool,) = found
    del held, pixels
    gc.collect()
    assert sorted(pool._free) == [i * pool.size for i in range(len(pool._free))]  # all of it
    assert len(pool._free) > 3
