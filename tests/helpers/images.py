"""Image files and datasets of noise."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kdcache.pipeline.data.kinds.arrays import ArrayDataset
from kdcache.pipeline.data.kinds.files import FileDataset


def photograph(name: str) -> np.ndarray:
    """One of scikit-learn's two photographs, "china" or "flower", without an import of scikit-learn; 427 x 640 RGB."""
    folder = Path(find_spec("sklearn").origin).parent / "datasets" / "images"
    with Image.open(folder / f"{name}.jpg") as image:
        return np.asarray(image)


def draw(path: Path, h: int = 8, w: int = 8) -> Path:
    """An image whose pixels depend on its name only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = list(path.name.encode())
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path)
    return path


def toy_data(cache, place):
    """Image files of random pixels that pass for the cache's own train split."""
    has, rng = cache.identity.data, np.random.default_rng(0)
    paths = tuple(f"{i:03d}.png" for i in range(has.samples))
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (5, 8, 3), np.uint8)).save(place / path)
    sizes = np.tile(np.array([[5, 8]], np.int32), (has.samples, 1))
    unlabelled = np.zeros((has.samples, 0), np.int64)
    data = FileDataset(has.name, "train", unlabelled, (), sizes, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), place, paths)
    data._fingerprints[has.full_contents] = has.fingerprint
    vars(cache.train)["sizes"] = sizes
    return data


def arrays_data(n, height, width, labelled=True):
    rng = np.random.default_rng(n)
    return ArrayDataset(
        name="toy",
        split="train",
        labels=rng.integers(0, 12, (n, int(labelled))),
        class_names=tuple("abcdefghijkl"),
        sizes=np.tile(np.array([[height, width]], np.int32), (n, 1)),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25),
        pixels=torch.from_numpy(rng.integers(0, 256, (n, height, width, 3), np.uint8)),
    )
