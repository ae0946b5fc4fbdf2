"""Small well-known datasets that fit into memory: digits, CIFAR and Fashion-MNIST."""

import gzip
import math
import zlib
from collections.abc import Callable
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchvision import datasets

from kdcache.cache.errors import InputError, kind_and_message
from kdcache.cache.files import is_there
from kdcache.pipeline.data.kinds.arrays import Arrays
from kdcache.pipeline.data.kinds.base import Asked
from kdcache.pipeline.data.kinds.folders import held_out

# What torchvision raises where files are missing or incomplete, or cannot be downloaded.
_BROKEN = (OSError, RuntimeError, ValueError, TypeError, AssertionError, HTTPException)
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def digits(train: bool) -> Arrays:
    """scikit-learn's 1,797 images of 8x8 pixels; every fifth image of each class is held out for the eval split."""
    table = _digits_table()
    grey = (table[:, :-1].reshape(-1, 8, 8) * 255 + 8) // 16  # 0..16 to 0..255, rounded
    labels = table[:, -1].copy()
    chosen = held_out(labels, 5) != train
    return _three_channels(grey[chosen].astype(np.uint8)), labels[chosen], tuple("0123456789")


def _digits_table() -> NDArray[np.int64]:
    """Rows of 64 pixels from 0 to 16, and the digit: the file that sklearn.datasets.load_digits reads.

    It is read without scikit-learn, whose import takes longer than all else that is done with so few images.
    """
    spec = find_spec("sklearn")
    places = spec.submodule_search_locations if spec else None
    file = Path(places[0] if places else "", "datasets/data/digits.csv.gz")
    if not file.is_file():  # another version may keep it elsewhere
        from sklearn.datasets import load_digits

        data = load_digits()
        return np.column_stack([data.data, data.target]).astype(np.int64)
    return np.loadtxt(file, np.int64, delimiter=",")


def cifar(name: str, asked: Asked, train: bool) -> Arrays:
    """Read cifar10 or cifar100 from torchvision's files, which are downloaded where they are missing."""
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    data = _present_or_downloaded(kind, asked.downloads, train, f"{name} (a folder {kind.base_folder})")
    return data.data, np.array(data.targets, dtype=np.int64), tuple(data.classes)


def fashion_mnist(asked: Asked, train: bool) -> Arrays:
    """Read the four .gz files in the PATH or in Debian's package, else torchvision's files, else download these."""
    names = tuple(datasets.FashionMNIST.classes)
    part = "train" if train else "t10k"
    packed = asked.path or DEBIAN_FASHION_MNIST
    if is_there(packed / f"{part}-images-idx3-ubyte.gz"):
        grey = _read_idx(packed / f"{part}-images-idx3-ubyte.gz", 3)
        labels = _read_idx(packed / f"{part}-labels-idx1-ubyte.gz", 1).astype(np.int64)
        if len(grey) != len(labels) or (labels >= len(names)).any():
            raise InputError(f"{packed}: the {part} labels do not fit the images: fetch the files again")
        return _three_channels(grey), labels, names
    what = "fashion-mnist (Debian's package dataset-fashion-mnist, or a folder FashionMNIST/raw)"
    data = _present_or_downloaded(datasets.FashionMNIST, asked.downloads, train, what)
    return _three_channels(data.data.numpy()), data.targets.numpy(), names


def _present_or_downloaded(kind: Callable[..., Any], root: Path, train: bool, what: str) -> Any:
    try:
        return kind(root, train=train)
    except _BROKEN:
        try:
            return kind(root, train=train, download=True)
        except _BROKEN as e:
            raise InputError(
                f"{root}: has no {what}, and the download failed ({kind_and_message(e)[:200]}): "
                "put the files there, or use imagefolder:PATH"
            ) from e


def _three_channels(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=3)


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """Read bytes (uint8, `dims` dimensions) from a gzipped idx file.

    Its header is 0, 0, the type (8), the number of dimensions, and each size as a big-endian 32-bit number.
    """
    if is_there(path) and not path.is_file():
        raise InputError(f"{path}: is no plain file")
    try:
        with gzip.open(path) as f:
            data = f.read()
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(f"{path}: cannot be read: {e}") from e
    start = 4 + 4 * dims
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if data[:4] != bytes((0, 0, 8, dims)) or len(data) != start + math.prod(shape) or not shape[0]:
        raise InputError(f"{path}: is not a whole idx file of bytes in {dims} dimensions: fetch it again")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
