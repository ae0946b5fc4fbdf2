"""Caches of random records for real pixels, and FFCV files of them."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.data.split import describe_data
from kdcache.pipeline.ffcv.pack import pack_ffcv
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.pipeline.views.parameters import draw_as
from kdcache.pipeline.views.render import RENDERER
from kdcache.tests.helpers.caches import Filled, identity, same
from kdcache.tests.helpers.images import arrays_data

# `make` installs FFCV where it can. There a missing one is a failure, elsewhere these tests are out of reach, as
# they are in the environment of `make oldest`, which goes without.
OLDEST = Path(sys.prefix).name == ".venv-oldest"
INSTALLABLE = os.geteuid() == 0 and shutil.which("apt-get") is not None and not OLDEST
needs_ffcv = pytest.mark.skipif(
    importlib.util.find_spec("ffcv") is None and not INSTALLABLE,
    reason="FFCV is not installed, and its system libraries can only be installed by root (make oldest goes without)",
)


def quiet(line):
    pass


class Drawn(Filled):
    """A cache of random logits for real pixels: its commits hold the digests of the views' parameters."""

    def __init__(self, path, data, policy, views=2, part=64, **record):
        about = identity(len(data), part=part, labels=data.labels.shape[1], **record)
        views_identity = about.views.model_copy(update={"policy": policy, "renderer": RENDERER})
        about = about.model_copy(update={"data": describe_data(data, False), "views": views_identity})
        self.data, self.views = data, about.views
        super().__init__(path, about, views)

    def sizes(self, store):
        return self.data.sizes if store.split == "train" else super().sizes(store)

    def digest(self, store, view, part):
        if store.split == "eval":
            return "of the evaluation split"
        return draw_as(self.views, view, store.rows(part), self.data.sizes).digest()


def everything(path):
    """All that a file holds, read and checked."""
    file = FFCVFile(path)
    file.check_pixels()
    images = [file.image(i) for i in range(len(file))]
    return images, file.labels, [file.read(v) for v in file.views], file.read_evaluation(), file.identity


def equal(a, b):
    return (
        all(x.equal(y) for x, y in zip(a[0], b[0], strict=True))
        and np.array_equal(a[1], b[1])
        and all(same(x, y) for x, y in zip([*a[2], a[3]], [*b[2], b[3]], strict=True))
        and a[4] == b[4]
    )


def packed_arrays(place, labelled=True):
    """A small cache, its images in memory, and the file packed from it in the folder `place`."""
    data = arrays_data(50, 6, 9, labelled)
    cache = Drawn(place / "c", data, "crop,flip", part=16).cache
    return cache, data, pack_ffcv(cache, data, place / "x.beton", None, quiet)


def packed_files(place):
    """A cache of image files of four kinds, its images, and the file packed from it in the folder `place`."""
    rng = np.random.default_rng(0)
    for i in range(24):
        height, width = (int(v) for v in rng.integers(30, 60, 2))
        pixels = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height), Image.BICUBIC)
        folder = place / "images" / ("train" if i < 16 else "val") / "abcd"[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        kind = i // 4 % 4
        image = pixels.convert(["RGB", "L", "CMYK", "RGB"][kind])
        image.save(folder / f"{i:02d}.{'png' if kind == 3 else 'jpg'}")
    data = open_data(f"imagefolder:{place / 'images'}", "train", home=place)
    assert data.pixels is None
    cache = Drawn(place / "c", data, "rrc,flip", k=3).cache
    return cache, data, pack_ffcv(cache, data, place / "x.beton", None, quiet)
