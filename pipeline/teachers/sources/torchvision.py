"""torchvision's classifiers: its builders load its weights, and the weights' transforms tell how they want images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum

from kdcache.cache.errors import InputError, first_sentence
from kdcache.pipeline.teachers.networks import SMALL_STEM_UP_TO, is_torchvision, small_stem
from kdcache.pipeline.teachers.pixels import Asked, Found, Pixels, fetching, interpolation_of

# From torchvision.models.densenet._load_state_dict, which reads the published files.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$")
_AUXILIARY = ("AuxLogits", "aux1", "aux2")  # heads that answer in training only


def find(asked: Asked) -> Found | None:
    """The network with the weights of the name that is asked for, or for imagenet with IMAGENET1K_V1."""
    if asked.names_weights or (asked.data.name == "imagenet" and is_torchvision(asked.name)):
        return from_torchvision(asked.name, asked.weights or "IMAGENET1K_V1")
    return None


def from_torchvision(name: str, weights: str) -> Found:
    """The network with the weights of that name, fetched where they are not there yet.

    InputError for names that torchvision does not have, and for files that cannot be fetched or read.
    """
    if not is_torchvision(name):
        other = f"; torchvision's is torchvision/{name}" if is_torchvision(f"torchvision/{name}") else ""
        raise InputError(f"torchvision has no pretrained weights for {name!r}{other}: give --weights FILE")
    entries = models.get_model_weights(_plain(name))
    if weights not in entries.__members__:
        raise InputError(f"{name} has no weights {weights}: take one of {', '.join(entries.__members__)}")
    entry = entries[weights]
    names, file = _categories(name, entry), Path(torch.hub.get_dir()) / "checkpoints" / _file_name(entry)
    try:
        with fetching():
            network: nn.Module = models.get_model(_plain(name), weights=entry)
    except OSError as e:
        why = first_sentence(e)
        raise InputError(
            f"cannot fetch {weights} of {name} ({why}): fetch {entry.url} yourself and give --weights FILE"
        ) from e
    except Exception as e:  # bytes that are no pickle raise whatever comes first: KeyError, EOFError, ...
        raise InputError(
            f"{file} cannot be used as {weights} of {name} ({first_sentence(e)}): remove it and try again"
        ) from e
    return Found(_answering(network), pixels_of(entry), names, entry.name, "from torchvision's weights")


def pixels_of(entry: WeightsEnum) -> Pixels:
    """How the weights' transforms prepare images, with what the builder makes the network do to its input."""
    preset = entry.transforms()
    mean, std = tuple(preset.mean), tuple(preset.std)
    if isinstance(entry, models.Inception_V3_Weights | models.GoogLeNet_Weights):
        # The builder sets transform_input, which takes ImageNet's mean and std for granted and makes these of them.
        mean = std = (0.5, 0.5, 0.5)
    return Pixels(preset.crop_size[0], mean, std, interpolation_of(preset.interpolation.value))


def published_as(name: str, file: str) -> WeightsEnum | None:
    """The weights that torchvision publishes in a file of that name."""
    found = next((entry for entry in _entries(name) if _file_name(entry) == file), None)
    if found is not None:
        _categories(name, found)
    return found


def usual_weights(name: str) -> WeightsEnum:
    """The first weights of a network, as an example of what networks of that name are trained on."""
    return _entries(name)[0]


def categories(entry: WeightsEnum) -> tuple[str, ...]:
    """The names of the classes of these weights."""
    return tuple(entry.meta["categories"] or ())


def translated(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a state dict to torchvision's names of today, without the heads that answer in training only."""
    if _plain(name).startswith("densenet"):
        return {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
    if _plain(name) in ("inception_v3", "googlenet"):
        return {key: value for key, value in state.items() if key.split(".")[0] not in _AUXILIARY}
    return dict(state)


def built_size(name: str, state: Mapping[str, Tensor], size: int) -> int:
    """The image size to build a network for, so that its position table and stem are those of a state dict.

    That is `size` where the state dict has neither, or where they fit `size`.
    """
    table, patches = state.get("encoder.pos_embedding"), state.get("conv_proj.weight")
    if table is not None and patches is not None and table.ndim == 3 and patches.ndim == 4:
        return int((table.shape[1] - 1) ** 0.5) * patches.shape[-1]
    stem = state.get("conv1.weight")
    if stem is not None and small_stem(name, SMALL_STEM_UP_TO):
        return min(size, SMALL_STEM_UP_TO) if stem.shape[-1] == 3 else max(size, SMALL_STEM_UP_TO + 1)
    return size


def _answering(network: nn.Module) -> nn.Module:
    """The network without the heads that answer in training only, and without transform_input (see pixels_of)."""
    if isinstance(network, models.Inception3 | models.GoogLeNet):
        network.aux_logits = network.transform_input = False
        for head in _AUXILIARY:
            if hasattr(network, head):
                setattr(network, head, None)
    return network


def _entries(name: str) -> list[WeightsEnum]:
    return list(models.get_model_weights(_plain(name)))


def _categories(name: str, entry: WeightsEnum) -> tuple[str, ...]:
    """The class names of these weights. InputError for weights without a classifier."""
    if found := categories(entry):
        return found
    raise InputError(f"{entry.name} of {name} are features without a classifier: take another of its weights")


def _file_name(entry: WeightsEnum) -> str:
    return Path(urlparse(entry.url).path).name


def _plain(name: str) -> str:
    return name.removeprefix("torchvision/")
