"""A folder of images, and what a teacher said of them as TinyViT and FKD store it."""

import os

import numpy as np
import pytest
from PIL import Image

from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.imports import fkd as fkd_format
from kdcache.pipeline.imports import tinyvit as tinyvit_format
from kdcache.pipeline.imports.config import ImportConfig
from kdcache.pipeline.imports.imports import import_logits
from kdcache.tests.helpers.storedlogits import CLASSES, RNG, VIEWS, quiet, softmax64, write_fkd, write_tinyvit


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of images, and what a teacher said of them in both formats."""
    top_folder, rng = tmp_path_factory.mktemp("imports"), RNG(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in CLASSES:
            (top_folder / f"images/{split}/{name}").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (*rng.integers(66, 120, 2), 3), np.uint8)
                Image.fromarray(pixels).save(top_folder / f"images/{split}/{name}/{name}_{i}.x.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCACHE_HOME", str(top_folder / "home"))
        patch.chdir(top_folder)
        patch.setattr(fkd_format, "PART", 8)
        patch.setattr(tinyvit_format, "PART", 8)
        patch.setattr(os, "fsync", lambda fd: None)
        yield top_folder


@pytest.fixture(scope="module")
def data(place):
    return open_data(f"imagenet:{place}/images", "train")


@pytest.fixture(scope="module")
def truth(data):
    """p [V, N, C], boxes [V, N, 4], flips [V, N], seeds [V, N]; the label is often the likeliest class."""
    rng, n = RNG(1), len(data)
    z = rng.normal(0, 2, (VIEWS, n, len(CLASSES)))
    z[:, np.arange(n), data.labels[:, 0]] += 4
    z[0, 0] = [50, 0.4, 0.3, 0.2, 0.1]  # no more of the tail than rounding may have made, and p that underflows float16
    z[1, 0, data.labels[0, 0]] = -9
    z[2, 1] = [1, 2, 2, 2, 0]  # ties
    size = data.sizes.astype(np.int64)
    extent = (1 + rng.random((VIEWS, n, 2)) * size).astype(np.int64).clip(1, size)
    corner = np.floor(rng.random((VIEWS, n, 2)) * (size - extent + 1)).astype(np.int64)
    boxes = np.concatenate([corner, extent], -1)
    return {
        "p": softmax64(z),
        "boxes": boxes.astype(np.int32),
        "flips": rng.random((VIEWS, n)) < 0.5,
        "seeds": rng.integers(0, 2**31, (VIEWS, n)),
    }


@pytest.fixture(scope="module")
def fkd(place, data, truth):
    """FKD's files, and the cache of them."""
    write_fkd(place / "fkd", data, truth["p"], truth["boxes"], truth["flips"])
    config = ImportConfig("fkd", f"{place}/fkd", f"imagenet:{place}/images", teacher="effL2", image_size=32)
    return import_logits(config, quiet), config


@pytest.fixture(scope="module")
def tinyvit(place, data, truth):
    """The same of TinyViT's, by the samples' places in the dataset."""
    write_tinyvit(place / "tinyvit", [str(i) for i in range(len(data))], truth["p"], truth["seeds"])
    config = ImportConfig("tinyvit", f"{place}/tinyvit", f"imagenet:{place}/images")
    return import_logits(config, quiet), config


# What is imported
