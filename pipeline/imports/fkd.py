"""Soft labels that FKD has stored (szq0214/FKD, FKD_SLG).

For each image there is CLASS/NAME.tar, a file of torch.save: [crops [V, 4], flips [V], output [V, 2, K]]. crops are
top, left, height and width, divided by the image's height or width. output is class ids and softmax probabilities,
largest first, all in float32 or (--use_fp16) float16. An output [V, 2] means K = 1.
"""

from __future__ import annotations

import codecs
import io
import os
import pickle
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache import files
from kdcache.cache.errors import InputError
from kdcache.cache.sealed import inflates
from kdcache.pipeline.build.config import PART
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.imports.stored import Answers, by_name, require_all, stem
from kdcache.pipeline.process.progress import size

_TAR_BYTES = 1 << 26  # the most for a file, and for the arrays in it; 500 crops take 30 kB
_PART_BYTES = 1 << 31  # the most for the answers in memory, which are all crops of a part
_WHOLE = 0.01  # pixels that a crop may miss the grid by, beside its rounding

_RECONSTRUCT = np.empty(0).__reduce__()[0]
# What NumPy arrays are made of when they are unpickled, by the names that NumPy 1 and 2 give it. None runs code.
_ARRAYS: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    (codecs.encode, "_codecs.encode"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ("f2", "f4", "f8", "?", "u1", "i4", "i8")),
]


class FKD:
    """FKD's files, one for each image. View v is the v-th crop of every image."""

    policy: Literal["stored", "foreign"] = "stored"

    def __init__(self, path: Path, data: Dataset) -> None:
        samples = by_name(data.paths, lambda p: stem(p, last=False), data.name)
        # FKD keeps the last three folders of an image's path: dataset, split and class.
        self._files: list[Path | None] = [None] * len(data)
        foreign: list[str] = []
        doubled: list[str] = []
        tars = (Path(folder, name) for folder, _, names in os.walk(path) for name in names if name.endswith(".tar"))
        first = next(tars, None)
        if first is None:
            raise InputError(f"{path} holds no CLASS/NAME.tar, as FKD's generate_soft_label.py writes them")
        for tar in chain([first], tars):
            parts = tar.relative_to(path).with_suffix("").parts
            ends = ("/".join(parts[i:]) for i in range(len(parts)))
            sample = next((samples[end] for end in ends if end in samples), None)
            if sample is None:
                foreign.append(str(tar))
            elif self._files[sample] is not None:
                doubled.append(str(tar))
            else:
                self._files[sample] = tar
        found = np.array([file is not None for file in self._files])
        require_all(found, foreign, doubled, lambda i: data.paths[i], str(path))
        self._sizes = data.sizes
        _, _, p = self._load(0)
        self.views, self.k, self.dtype = len(p), p.shape[2], p.dtype
        most = _PART_BYTES // (self.views * (8 * self.k + 17))
        self.part = min(PART, 1 << max(0, most.bit_length() - 1))

    def units(self) -> Iterator[range]:
        yield range(self.views)

    def where(self, view: int, sample: int) -> str:
        return f"{self._files[sample]}: crop {view}"

    def read(self, views: range, rows: range, advance: Callable[[int], object]) -> Answers:
        shape = self.views, len(rows)
        ids, p = np.empty((*shape, self.k), np.uint32), np.empty((*shape, self.k), self.dtype)
        boxes, flips = np.empty((*shape, 4), np.int32), np.empty(shape, np.uint8)
        for n, sample in enumerate(rows):
            file = self._files[sample]
            crops, flipped, output = self._load(sample)
            if (output.shape, output.dtype) != ((self.views, 2, self.k), self.dtype):
                raise InputError(
                    f"{file} holds {list(output.shape)} of {output.dtype}, and {self._files[0]} "
                    f"[{self.views}, 2, {self.k}] of {self.dtype}: import only those that are alike"
                )
            named = output[:, 0].astype(np.float64)
            if not ((named >= 0) & (named < 2**32) & (named == np.rint(named))).all():
                raise InputError(f"{file} has class ids that are no whole numbers")
            if self.dtype == np.float16 and named.max() > 2048:
                raise InputError(f"{file} has class ids above 2,048 in float16, which does not hold them")
            ids[:, n], p[:, n] = named, output[:, 1]
            boxes[:, n] = _boxes(crops, self._sizes[sample], f"{file}")
            flips[:, n] = flipped
            advance(self.views)
        return Answers(ids, p, {"boxes": boxes, "flips": flips})

    def _load(self, sample: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """crops [V, 4], flips [V] and output [V, 2, K] of a sample."""
        path = self._files[sample]
        assert path is not None
        found = _torch_load(path)
        if not isinstance(found, (list, tuple)) or len(found) != 3:
            raise InputError(f"{path} does not hold crops, flips and soft labels, as FKD's files do")
        crops, flips, output = (_array(one, path) for one in found)
        if output.ndim == 2 and output.shape[1:] == (2,):  # the label type `smoothing`
            output = output[:, :, None]
        sound = output.ndim == 3 and output.shape[1] == 2 and output.dtype in (np.float16, np.float32) and output.size
        if not sound:
            raise InputError(
                f"{path} holds soft labels {list(output.shape)} of {output.dtype}: known are smoothing, "
                "marginal_smoothing_k5, _k10 and marginal_renorm_k5 ([crops, 2, K], float32 or float16)"
            )
        if crops.shape != (len(output), 4) or flips.shape != (len(output),) or crops.dtype.kind != "f":
            raise InputError(f"{path} holds {len(output)} soft labels, and crops {list(crops.shape)} of {crops.dtype}")
        if flips.dtype.kind not in "biu" or not np.isin(flips, (0, 1)).all():
            raise InputError(f"{path} holds flips that are neither 0 nor 1")
        return crops, flips, output


def _torch_load(path: Path) -> Any:
    """Load what torch.save wrote, without running code and with memory in proportion to the file."""
    content = files.read_range(path, 0, _TAR_BYTES + 1, short=True)
    advice = f"{path} is no file of torch.save (1.6 or later), or a damaged one"
    if not content.startswith(b"PK"):
        raise InputError(advice)
    try:
        too_large = len(content) > _TAR_BYTES or inflates(content)
    except ValueError as e:
        raise InputError(f"{advice}: {e}") from e
    if too_large:
        raise InputError(f"{path} holds more than {size(_TAR_BYTES)}, or is compressed, as no file of FKD's is")
    try:
        with torch.serialization.safe_globals(_ARRAYS):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise InputError(f"{path} is refused: it holds more than numbers, or is damaged") from e
    except Exception as e:  # torch and NumPy may raise anything for damaged bytes
        raise InputError(f"{advice} ({type(e).__name__})") from e


def _array(found: Any, path: Path) -> NDArray[Any]:
    if isinstance(found, torch.Tensor) and found.device.type == "cpu" and found.layout is torch.strided:
        known = found.dtype in (torch.float16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int64)
        found = found.detach().resolve_neg().numpy() if known else found
    if not isinstance(found, np.ndarray) or found.nbytes > _TAR_BYTES:
        raise InputError(f"{path} holds no arrays, or such of more than {size(_TAR_BYTES)}")
    return found


def _boxes(crops: NDArray[Any], sizes: NDArray[np.int32], where: str) -> NDArray[np.float64]:
    """Boxes [V, 4] (top, left, height, width) in pixels, from those divided by the image's height and width."""
    side = np.tile(sizes.astype(np.float64), 2)
    exact = crops.astype(np.float64) * side
    boxes = np.rint(exact)
    off = side * float(np.finfo(crops.dtype).eps) / 4  # what the rounding of numbers below 1 may do
    if not np.isfinite(exact).all() or (np.abs(exact - boxes) > off + _WHOLE).any():
        raise InputError(
            f"{where}: crops that do not fall on whole pixels of {sizes[0]} x {sizes[1]}: give the images that the "
            "soft labels are of, in their sizes"
        )
    end = boxes[:, :2] + boxes[:, 2:]
    # Rounded to whole pixels they are exact, except in float16 with sides of 2,048 pixels or more.
    if (boxes[:, :2] < 0).any() or (boxes[:, 2:] < 1).any() or (end > side[:2] + np.floor(2 * off[:2])).any():
        raise InputError(f"{where}: crops that leave the image of {sizes[0]} x {sizes[1]}")
    boxes[:, 2:] = np.minimum(end, side[:2]) - boxes[:, :2]
    return boxes
