"""What builds of a toy dataset share: sources, finished caches and image files, made once a session."""

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.source import open_source
from kdcache.tests.helpers.building import TOY, quiet, settings


@contextlib.contextmanager
def _in(toy):
    """With the module kd_toy at hand, in a home of kdcache's that is not yet there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(toy))
        patch.setenv("KDCACHE_HOME", str(toy / "home"))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for networks this small, more only wait for each other
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with the module kd_toy."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "kd_toy.py").write_text(TOY)
    return folder


@pytest.fixture(scope="module")
def toy_at_hand(toy, no_fsync):
    with _in(toy):
        yield


@pytest.fixture
def home(toy_at_hand, tmp_path, monkeypatch):
    """An empty home of kdcache's, with the module kd_toy at hand."""
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def source(toy):
    with _in(toy):
        return open_source(settings(), quiet)


@pytest.fixture(scope="session")
def reference(toy, source):
    """The cache of `settings()`, built without a disturbance."""
    with _in(toy):
        build(settings(out=str(toy / "reference")), quiet, source)
    return toy / "reference"


@pytest.fixture(scope="session")
def taught(toy):
    """Sources of two neighbouring checkpoints of a teacher that has learnt, and a cache of the first."""
    with _in(toy):
        import kd_toy

        images, labels, _ = kd_toy.images("train")
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.3)
        y = torch.from_numpy(labels)
        network, order = kd_toy.net(12), torch.Generator().manual_seed(0)
        optimiser = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
        sources = []
        for epoch in range(6):
            for batch in torch.randperm(150, generator=order).split(32):
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(network.train()(x[batch]), y[batch]).backward()
                optimiser.step()
            if epoch >= 4:
                torch.save(network.state_dict(), toy / f"{epoch}.pt")
                sources.append(open_source(settings(weights=str(toy / f"{epoch}.pt")), quiet))
        build(settings(out=str(toy / "taught")), quiet, sources[0])
        return *sources, toy / "taught"


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """24 and 8 smooth images of many sizes, PNG and JPEG, in four classes, and a map to classes of a thousand."""
    top = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, each in (("train", 6), ("val", 2)):
        for name in "abcd":
            (top / split / name).mkdir(parents=True)
            for i in range(each):
                small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
                image = Image.fromarray(small).resize(
                    tuple(map(int, rng.integers(40, 90, 2))), Image.Resampling.BICUBIC
                )
                image.save(top / split / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    (top / "map.csv").write_text("a,17\nb,999\nc,0\nd,512\n")
    return top
