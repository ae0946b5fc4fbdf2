"""How a network wants its images prepared, and where that is known from."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from kdcache.cache.errors import InputError
from kdcache.cache.files import is_there
from kdcache.cache.identity import TeacherIdentity
from kdcache.cache.records.choices import Interpolation
from kdcache.pipeline.data.dataset import Dataset

RGB = tuple[float, float, float]
IMAGENET_SIZE = 224
FLAGS = "--teacher-size, --teacher-mean and --teacher-std"


@dataclass(frozen=True)
class Pixels:
    """Images are resized to `size` pixels a side by `interpolation`; a channel becomes (value / 255 - mean) / std."""

    size: int
    mean: RGB
    std: RGB
    interpolation: Interpolation = "bilinear"

    def __str__(self) -> str:
        mean, std = (" ".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
        return f"{self.size} px, {self.interpolation}, mean {mean}, std {std}"


@dataclass(frozen=True)
class Wanted:
    """What the user asks for in place of what the source says; None leaves it to the source."""

    size: int | None = None
    mean: RGB | None = None
    std: RGB | None = None
    interpolation: Interpolation | None = None

    @classmethod
    def of(cls, identity: TeacherIdentity) -> Wanted:
        """Ask for what a cache's teacher was shown, so that a replay shows the same, whatever its source says today."""
        return cls(identity.input_size, identity.mean, identity.std, identity.interpolation)

    def over(self, pixels: Pixels) -> Pixels:
        """Replace in `pixels` what is asked for."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(pixels, **given)

    def __str__(self) -> str:
        return ", ".join(name for name, value in vars(self).items() if value is not None)


@dataclass(frozen=True, eq=False)
class Asked:
    """A teacher that someone asks for.

    name: as in --teacher. data: the train split that it is for. weights: a file, the name of torchvision's weights, or
    None. wanted: how its images are to be prepared, where that is not as the source of the weights says.
    """

    name: str
    data: Dataset
    weights: str | None
    wanted: Wanted

    @property
    def names_weights(self) -> bool:
        """Whether `weights` is written as torchvision writes the names of weights, and is not the name of a file."""
        w = self.weights
        return w is not None and w.isidentifier() and w.upper() == w and not is_there(Path(w))


@dataclass(frozen=True, eq=False)
class Found:
    """A network with its weights, and what its source says of it.

    class_names: by class id, or None where the source does not tell. label: its weights' name.
    origin: the words that tell where `pixels` is known from.
    """

    network: nn.Module
    pixels: Pixels
    class_names: tuple[str, ...] | None
    label: str
    origin: str


def pixels_of_data(data: Dataset) -> Pixels:
    """The pixels for a network that is built for the data: images in memory keep their size, files get 224 pixels."""
    return Pixels(data.image_size or IMAGENET_SIZE, data.mean, data.std)


def interpolation_of(name: str) -> Interpolation:
    """Check an interpolation's name. InputError for one that kdcache does not have."""
    if name == "bilinear":
        return "bilinear"
    if name == "bicubic":
        return "bicubic"
    raise InputError(f"the teacher's images are resized by {name}, and only bilinear and bicubic are known here")


@contextlib.contextmanager
def fetching() -> Iterator[None]:
    """Guard a library that fetches and loads weights: only tensors are read, and standard output stays free.

    Some libraries would have torch.load read whole pickles, which can run code.
    """
    setting, hub = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", logging.getLogger("huggingface_hub")
    before, level = os.environ.get(setting), hub.level
    os.environ[setting] = "1"
    hub.setLevel(logging.ERROR)  # it warns of every attempt
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch.hub prints there what it downloads
            yield
    finally:
        hub.setLevel(level)
        if before is None:
            del os.environ[setting]
        else:
            os.environ[setting] = before
