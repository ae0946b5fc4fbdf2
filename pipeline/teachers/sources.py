"""Where a teacher comes from: by name with its own weights, from a weights file, or from the user's own function.

The source says what the network wants to see. Where it says nothing, the data does, and the line that a build prints
tells so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.models import WeightsEnum

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.teachers import timm_source
from kdcache.pipeline.teachers.networks import SMALL_STEM_UP_TO, build_network, is_torchvision, load_fitting, outline
from kdcache.pipeline.teachers.pixels import FLAGS, IMAGENET_SIZE, Found, Pixels, Wanted, pixels_of_data
from kdcache.pipeline.teachers.torchvision_source import (
    built_size,
    categories,
    from_torchvision,
    pixels_of,
    published_as,
    translated,
    usual_weights,
)

_IMAGENET_CLASSES = 1000


def names_weights(weights: str) -> bool:
    """Whether it is written as torchvision writes the names of weights, and no file is called so."""
    return weights.isidentifier() and weights.upper() == weights and not Path(weights).exists()


def from_name(name: str, weights: str | None, wanted: Wanted) -> Found:
    """A network with its own pretrained weights: torchvision's of that name, or those in a name of timm's."""
    if not name.startswith("timm/"):
        return from_torchvision(name, weights or "IMAGENET1K_V1")
    if weights is not None:
        tags = timm_source.weights_of(name)
        raise InputError(f"{weights} are torchvision's weights, and timm's are part of the teacher's name: {tags}")
    return timm_source.from_timm(name, wanted)


def from_function(name: str, data: Dataset, wanted: Wanted) -> Found:
    """What the user's function gives, with the weights that it comes with. Nobody knows the names of its classes."""
    pixels, origin = pixels_of_data(data), f"from the data; {FLAGS} say otherwise"
    network = build_network(name, len(data.class_names), wanted.size or pixels.size)
    cfg = getattr(network, "pretrained_cfg", None)
    if isinstance(cfg, dict) and cfg.get("input_size"):  # a network of timm's
        pixels, origin = timm_source.pixels_of(cfg, name), "from its pretrained_cfg"
    return Found(network, pixels, None, "", origin)


def from_file(
    name: str, path: Path, state: dict[str, Tensor], notes: Mapping[str, Any], data: Dataset, wanted: Wanted
) -> Found:
    """The network with the tensors in a weights file, given what was read there.

    InputError where they do not fit, and where the file speaks against the size that it would be shown.
    """
    if not state:
        raise InputError(f"{path} holds no tensors")
    if is_torchvision(name):
        state = translated(name, state)
    classes = _count_classes(name, state, len(data.class_names))
    what = f"the weights in {path} and {name}"
    if notes:
        pixels = Pixels(notes["input_size"], notes["mean"], notes["std"], notes["interpolation"])
        names, origin = notes["class_names"], "from its notes"
    elif name.startswith("timm/"):
        cfg, names, origin = timm_source.config_of(name, path)
        pixels = timm_source.pixels_of(cfg, name)
    elif is_torchvision(name):
        pixels, names, origin = _torchvision_pixels(name, path, state, classes, data, wanted)
    else:
        pixels, names, origin = pixels_of_data(data), None, f"from the data; {FLAGS} say otherwise"
    if name.startswith("timm/"):
        network = timm_source.from_state(name, classes, state, wanted.size or pixels.size, what)
    else:
        network = build_network(name, classes, built_size(name, state, pixels.size))
        load_fitting(network, state, what)
    known = names if names is not None and len(names) == classes else None
    return Found(network, pixels, known, path.name, origin)


def _torchvision_pixels(
    name: str, path: Path, state: Mapping[str, Tensor], classes: int, data: Dataset, wanted: Wanted
) -> tuple[Pixels, tuple[str, ...] | None, str]:
    """What a network of torchvision's with weights of unknown origin wants to see, its classes' names, and why.

    A file that is named as torchvision publishes it is that one. Others with ImageNet's number of classes, or for image
    files, are taken to have been trained like torchvision's own; the rest on the data as it is.
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
    size = built_size(name, state, IMAGENET_SIZE)  # which all of them can be built for
    two, three = (outline(name, classes, size).state_dict() for classes in (2, 3))
    for layer in two:
        if two[layer].shape != three[layer].shape and layer in state:
            return int(state[layer].shape[0])
    return default
