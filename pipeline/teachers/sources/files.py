"""Weights in a file: one that the user gives, or the one that `kdcache teach` filed for the data.

Images are prepared as the file, or whoever publishes it, says. Where neither does the data decide, and the line that
a build prints says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.models import WeightsEnum

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.process.functions import names_code
from kdcache.pipeline.teachers.checkpoints import Checkpoint, Part, State, open_checkpoint
from kdcache.pipeline.teachers.networks import (
    SMALL_STEM_UP_TO,
    build_network,
    built_for,
    head_of,
    is_torchvision,
    load_fitting,
    outline,
)
from kdcache.pipeline.teachers.pixels import FLAGS, IMAGENET_SIZE, Asked, Found, Pixels, Wanted, pixels_of_data
from kdcache.pipeline.teachers.sources import timm
from kdcache.pipeline.teachers.sources.torchvision import (
    built_size,
    categories,
    pixels_of,
    published_as,
    translated,
    usual_weights,
)
from kdcache.pipeline.teachers.weights import notes_of, taught_file
from kdcache.pipeline.teachers.zoos import here

_IMAGENET_CLASSES = 1000


def given(asked: Asked) -> Found | None:
    """The network with the weights in the file that is asked for."""
    if asked.weights is None or asked.names_weights:
        return None
    return _read(asked, asked.weights)


def taught(asked: Asked) -> Found | None:
    """The network that `kdcache teach` taught on the data."""
    if asked.weights is not None:
        return None
    path = taught_file(asked.name, asked.data)
    return _read(asked, path) if path.exists() else None


def _read(asked: Asked, file: str | Path) -> Found:
    checkpoint = open_checkpoint(file)
    notes, part = notes_of(checkpoint), _part_of(checkpoint, asked.name)
    place = f"#{part.place}" if part.place else ""
    found = from_file(asked.name, checkpoint.path, part.state, notes, asked.data, asked.wanted, place)
    return replace(found, label=f"{found.label}{part}")


def _part_of(checkpoint: Checkpoint, name: str, optional: Collection[str] = ()) -> Part:
    """The network's tensors in a checkpoint; where its names are not known, those of the dictionary that is likely."""
    # All networks can be built for this size, on which no name depends.
    own = outline(name, 2, built_for(name) or IMAGENET_SIZE).state_dict().keys()

    def renamed(state: State) -> State:
        return here(name, own, translated(name, state) if is_torchvision(name) else state)

    if (part := checkpoint.find(own, renamed, optional)) is not None:
        return part
    likely = checkpoint.unwrapped()
    return replace(likely, state=renamed(likely.state))  # so that what does not fit has the network's own names


def start_from(network: nn.Module, name: str, file: str, size: int) -> str:
    """Load into a student, built for images of `size` pixels, the weights in a file, and return what to say of it.

    Where the file's classes are others in number, or it has none, the head stays as it is. InputError where the rest
    does not fit.
    """
    checkpoint = open_checkpoint(file)
    own, head = network.state_dict(), head_of(name, size)
    part = _part_of(checkpoint, name, head)
    state, what = dict(part.state), f"{checkpoint.path}{part}"
    theirs = {key: len(state[key]) for key in head if key in state and state[key].ndim}
    said = f"{name} starts from {what}"
    if any(theirs.get(key) != len(own[key]) for key in head):
        state |= {key: own[key] for key in head}
        answers = f"{next(iter(theirs.values()))} classes there" if theirs else "none there"
        said += f", with a new head ({', '.join(head)}): {answers}, {len(own[head[0]])} here"
    load_fitting(network, state, f"the weights in {what} and {name}")
    return said


def from_file(
    name: str,
    path: Path,
    state: dict[str, Tensor],
    notes: Mapping[str, Any],
    data: Dataset,
    wanted: Wanted,
    place: str = "",
) -> Found:
    """The network with the tensors in a weights file, given what was read there, and the place for messages.

    InputError where they do not fit, and where the file speaks against the size that it would be shown.
    """
    if not state:
        raise InputError(f"{path} holds no tensors")
    if is_torchvision(name):
        state = translated(name, state)
    classes = _count_classes(name, state, len(data.class_names))
    what = f"the weights in {path}{place} and {name}"
    if notes:
        pixels = Pixels(notes["input_size"], notes["mean"], notes["std"], notes["interpolation"])
        names, origin = notes["class_names"], "from its notes"
    elif name.startswith("timm/"):
        cfg, names, origin = timm.config_of(name, path)
        pixels = timm.pixels_of(cfg, name)
    elif is_torchvision(name):
        pixels, names, origin = _torchvision_pixels(name, path, state, classes, data, wanted)
    else:
        pixels, names, origin = pixels_of_data(data), None, f"from the data; {FLAGS} say otherwise"
    if name.startswith("timm/"):
        network = timm.from_state(name, classes, state, wanted.size or pixels.size, what)
    else:
        network = build_network(name, classes, built_size(name, state, pixels.size))
        load_fitting(network, state, what)
        if names_code(name) and not notes and (said := timm.said_by(network, name)) is not None:
            pixels, origin = said
    known = names if names is not None and len(names) == classes else None
    return Found(network, pixels, known, path.name, origin)


def _torchvision_pixels(
    name: str, path: Path, state: Mapping[str, Tensor], classes: int, data: Dataset, wanted: Wanted
) -> tuple[Pixels, tuple[str, ...] | None, str]:
    """How a torchvision network with the weights in a file wants its images, its classes' names, and what says so.

    A file that has the name of one that torchvision publishes is taken for it. Others with ImageNet's number of
    classes, or for image files, are taken to have been trained like torchvision's own; the rest on the data as it is.
    """
    entry: WeightsEnum | None = published_as(name, path.name)
    names = None
    if entry is not None:
        pixels, names = pixels_of(entry), categories(entry)
        origin = f"from torchvision's {entry.name}, which is published in a file of this name"
    elif classes == _IMAGENET_CLASSES or not data.in_memory:
        entry = usual_weights(name)
        pixels = pixels_of(entry)
        origin = f"as torchvision's {entry.name} wants it; {FLAGS} say otherwise"
    else:
        pixels, origin = pixels_of_data(data), f"from the data; {FLAGS} say otherwise"
    size = built_size(name, state, pixels.size)
    if "encoder.pos_embedding" in state:
        pixels = replace(pixels, size=size)
    elif size != pixels.size and wanted.size is None:
        kind = "3x3 stem for images of up to" if size < pixels.size else "7x7 stem for images above"
        raise InputError(
            f"{path} holds {name} with the {kind} {SMALL_STEM_UP_TO} pixels, but its images would have {pixels.size}: "
            f"give {FLAGS} as it was trained"
        )
    return pixels, names, origin


def _count_classes(name: str, state: Mapping[str, Tensor], default: int) -> int:
    """How many classes the weights answer for: the length of the tensors that change with the number of classes."""
    size = built_size(name, state, IMAGENET_SIZE)  # all of them can be built for this size
    return next((int(state[key].shape[0]) for key in head_of(name, size) if key in state), default)
