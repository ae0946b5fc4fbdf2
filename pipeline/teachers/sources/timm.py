"""timm's networks: a pretrained_cfg tells where weights are, how they want images, and how many classes they have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from kdcache.cache.errors import InputError, first_sentence
from kdcache.pipeline.data.imagefiles import IMAGENET_MEAN, IMAGENET_STD
from kdcache.pipeline.teachers.networks import build_timm, built_for, import_timm, load_fitting, split_arguments
from kdcache.pipeline.teachers.pixels import (
    FLAGS,
    IMAGENET_SIZE,
    Asked,
    Found,
    Pixels,
    Wanted,
    fetching,
    interpolation_of,
)

_CONFIG = "config.json"


def find(asked: Asked) -> Found | None:
    """The network with its own pretrained weights: those that its name tells, or for imagenet timm's first."""
    if not asked.name.startswith("timm/"):
        return None
    if asked.weights is not None:
        tags = weights_of(asked.name)
        raise InputError(
            f"{asked.weights} are torchvision's weights, and timm's are part of the teacher's name: {tags}"
        )
    if "." not in split_arguments(asked.name)[0] and asked.data.name != "imagenet":
        return None
    return from_timm(asked.name, asked.wanted)


def weights_of(name: str) -> str:
    """The names of a network's pretrained weights with a classifier, for an error; '' where there are none."""
    timm, plain = import_timm(split_arguments(name)[0].split(".")[0])
    tagged = timm.list_models(f"{plain}.*", pretrained=True)
    return ", ".join(f"timm/{one}" for one in tagged if timm.get_pretrained_cfg(one).num_classes)


def from_timm(name: str, wanted: Wanted) -> Found:
    """The network with its own pretrained weights, fetched where they are not there yet.

    InputError where there are none, they have no classifier, or they cannot be fetched or read.
    """
    timm, plain = import_timm(name)
    cfg = timm.get_pretrained_cfg(plain)
    if cfg is None or not (cfg.hf_hub_id or cfg.url) or not cfg.num_classes:
        lacks = "are features without a classifier" if cfg is not None and cfg.num_classes == 0 else "are not published"
        raise InputError(f"the weights of {name} {lacks}: take {weights_of(name) or '--weights FILE'}")
    place = f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
    size = wanted.size or pixels_of(cfg.to_dict(), name).size
    try:
        with fetching():
            network = build_timm(name, pretrained=True, **_resized(cfg, size))
    except OSError as e:
        file = f"{cfg.hf_hub_filename or 'model.safetensors'} from {place}" if cfg.hf_hub_id else place
        raise InputError(
            f"cannot fetch the weights of {name} ({first_sentence(e)}): fetch {file} yourself and give --weights FILE"
        ) from e
    except Exception as e:  # whatever a damaged file makes timm raise
        raise InputError(f"the weights of {name} from {place} cannot be used: {first_sentence(e)}") from e
    return Found(network, pixels_of(cfg.to_dict(), name), _class_names(cfg.to_dict()), cfg.tag, "from timm's weights")


def pixels_of(cfg: Mapping[str, Any], name: str) -> Pixels:
    """How timm's own evaluation prepares images for a network, as in timm.data.resolve_data_config.

    InputError for images that kdcache cannot make.
    """
    size = cfg.get("input_size") or (3, IMAGENET_SIZE, IMAGENET_SIZE)
    try:
        channels, height, width = (int(v) for v in size)
        r, g, b = (float(v) for v in cfg.get("mean") or IMAGENET_MEAN)
        red, green, blue = (float(v) for v in cfg.get("std") or IMAGENET_STD)
    except (OverflowError, TypeError, ValueError) as e:
        raise InputError(f"the pretrained_cfg of {name} cannot be read: {first_sentence(e)}") from e
    if channels != 3 or height != width or height < 1:
        raise InputError(
            f"{name} takes images [{channels}, {height}, {width}], and only square images in colour can be shown"
        )
    interpolation = interpolation_of(str(cfg.get("interpolation") or "bicubic"))
    return Pixels(built_for(name) or height, (r, g, b), (red, green, blue), interpolation)


def said_by(network: nn.Module, name: str) -> tuple[Pixels, str] | None:
    """How a network of one's own wants its images, and what says so; None unless it has a pretrained_cfg as timm's."""
    cfg = getattr(network, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or not cfg.get("input_size"):
        return None
    return pixels_of(cfg, name), "from its pretrained_cfg"


def config_of(name: str, path: Path) -> tuple[dict[str, Any], tuple[str, ...] | None, str]:
    """The pretrained_cfg for a weights file, the names of its classes where they are known, and what says so.

    The pretrained_cfg is in the config.json that timm saves beside it (timm.models.save_for_hf), else
    it is timm's own for the name.
    """
    timm, plain = import_timm(name)
    beside = path.with_name(_CONFIG)
    if beside.is_file():
        try:
            content = json.loads(beside.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as e:
            raise InputError(f"{beside} cannot be read: {first_sentence(e)}") from e
        if isinstance(content, dict) and isinstance(cfg := content.get("pretrained_cfg"), dict):
            if (made_for := content.get("architecture")) != plain.split(".")[0]:
                raise InputError(f"{beside} is of {made_for}, not of {name}: give its --teacher, or move it away")
            return cfg, _listed_names(content) or _listed_names(cfg), f"from {_CONFIG} beside it"
    known = timm.get_pretrained_cfg(plain)
    return (
        {} if known is None else known.to_dict(),
        None,
        f"from timm's pretrained_cfg of {plain}; {FLAGS} say otherwise",
    )


def from_state(name: str, classes: int, state: dict[str, Tensor], size: int, what: str) -> nn.Module:
    """Build the network for images of that size with the tensors in `state`, whose names timm may translate.

    InputError, which calls them `what`, where they do not fit.
    """
    timm, plain = import_timm(name)
    options = {"num_classes": classes, **_resized(timm.get_pretrained_cfg(plain), size)}
    network = build_timm(name, pretrained=False, **options)
    try:
        load_fitting(network, state, what)
    except InputError:
        found = _translated(name, network, state, options)
        if found is None:
            raise
        return found
    return network


def _translated(
    name: str, network: nn.Module, state: dict[str, Tensor], options: Mapping[str, Any]
) -> nn.Module | None:
    """The network with a state dict by its authors' or an earlier release's names; None if timm cannot translate it."""
    own = network.state_dict()
    if any(own[key].shape != state[key].shape for key in own.keys() & state.keys()):
        return None  # timm would resize position tables without a word
    overlay = {"state_dict": state, "num_classes": options["num_classes"], "custom_load": False, "source": None}
    try:
        found = build_timm(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception:  # anything may come for another kind of file; the caller tells what does not fit
        return None
    found.pretrained_cfg.pop("state_dict", None)  # type: ignore[operator, union-attr]
    return found


def _resized(cfg: Any, size: int) -> dict[str, int]:
    """Options that make timm build a network for another image size, where its tables depend on the size."""
    fixed = cfg is not None and cfg.fixed_input_size and cfg.input_size[-1] != size
    return {"img_size": size} if fixed else {}


def _class_names(cfg: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The class names in timm's metadata: WordNet's ids, or torchvision's short names for ImageNet's 1,000 classes."""
    timm, _ = import_timm("timm/resnet18")
    if found := _listed_names(cfg):
        return found
    subset = timm.data.infer_imagenet_subset(dict(cfg))
    if subset == "imagenet-1k":
        return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    return None if subset is None else tuple(timm.data.ImageNetInfo(subset).label_names())


def _listed_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = config.get("label_names")
    return tuple(str(name) for name in names) if isinstance(names, list | tuple) and names else None
