"""Image classification networks by name, for teachers and students.

Every network takes images [B, 3, H, W] and gives logits [B, classes]. A name is one of

- a CIFAR network of the distillation literature (cifar.py)
- a torchvision model; where the CIFAR network has the name (vgg13), torchvision's is `torchvision/NAME`
- `timm/NAME`, perhaps with the tag of its pretrained weights: `timm/NAME.TAG`
- `module:function`, the module found on the Python path or in the current directory

Weights are drawn from torch's global generator, so the caller seeds.
"""

import importlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from kdcache.cache.errors import InputError, kind_and_message
from kdcache.pipeline.process.functions import call_function, did_you_mean, import_function
from kdcache.pipeline.teachers.cifar import CIFAR, SMALLEST_IMAGE

SMALL_STEM_UP_TO = 64  # torchvision's ResNets reduce 32-fold: 64 px would end as 2x2


def build_network(name: str, classes: int, image_size: int) -> nn.Module:
    """A freshly initialised network: [B, 3, image_size, image_size] -> [B, classes].

    image_size chooses the stem of torchvision's ResNets (see small_stem) and sizes the position tables
    of vit_* and maxvit_t; nothing else depends on it. What `module:function` returns is not resized: a
    function without parameters decides its own number of classes.
    """
    if name.startswith("timm/"):
        return _from_timm(name, classes)
    if ":" in name:
        return _from_function(name, classes)
    if name in CIFAR:
        if image_size < SMALLEST_IMAGE:
            raise InputError(f"network {name!r} needs images of {SMALLEST_IMAGE} px or more")
        return CIFAR[name](classes)
    plain = name.removeprefix("torchvision/")
    if plain in _torchvision_names():
        return _from_torchvision(plain, classes, image_size)
    raise InputError(
        f"unknown network {name!r}{did_you_mean(plain, {*CIFAR, *_torchvision_names()})} "
        "(kdcache knows torchvision's names, the CIFAR networks, timm/NAME and module:function)"
    )


def outline(name: str, classes: int, image_size: int) -> nn.Module:
    """Build a network for the names and shapes of its tensors alone, on the meta device where that is possible."""
    try:
        with torch.device("meta"):
            return build_network(name, classes, image_size)
    except Exception:  # some need the values of tensors, which meta has not; a real error comes again
        return build_network(name, classes, image_size)


def load_fitting(network: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load every tensor. InputError, which calls them `what`, names the layers that do not fit.

    The count of batches that a batch norm has seen may be missing, as in files from before torch 0.4.1.
    """
    own = network.state_dict()
    problems = [
        f"{k} is {tuple(state[k].shape)}, the network has {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    if not problems:
        versioned = OrderedDict(state)
        # Without a version some classes refuse, and others translate the names of their first one.
        versioned._metadata = {"": own._metadata[""]}  # type: ignore[attr-defined]
        try:
            found = network.load_state_dict(versioned, strict=False)
        except RuntimeError as error:
            raise InputError(f"{what} do not fit: {kind_and_message(error)}") from error
        missing, unexpected = set(found.missing_keys), set(found.unexpected_keys)
    missing = {name for name in missing if not name.endswith("num_batches_tracked")}
    for title, names in (("missing", missing), ("not in the network", unexpected)):
        if names:
            problems.append(f"{len(names)} {title} ({', '.join(sorted(names)[:3])}{', ...' * (len(names) > 3)})")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"{what} do not fit: {'; '.join(problems[:5])}{more}")


def names() -> list[str]:
    """The CIFAR networks, then torchvision's. timm/NAME and module:function are further names."""
    return [*CIFAR, *(f"torchvision/{n}" if n in CIFAR else n for n in _torchvision_names())]


def is_torchvision(name: str) -> bool:
    """Whether build_network makes one of torchvision's classifiers of it."""
    return name not in CIFAR and name.removeprefix("torchvision/") in _torchvision_names()


def small_stem(name: str, image_size: int) -> bool:
    """Whether this is a torchvision ResNet built with a 3x3 stride 1 stem and without the max-pool."""
    plain = name.removeprefix("torchvision/")
    resnet = plain.startswith(("resnet", "resnext", "wide_resnet")) and plain in _torchvision_names()
    return resnet and image_size <= SMALL_STEM_UP_TO


@cache
def _torchvision_names() -> tuple[str, ...]:
    return tuple(models.list_models(module=models))


def _from_torchvision(name: str, classes: int, image_size: int) -> nn.Module:
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # True is the default, but torchvision warns unless it is given.
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    elif name.startswith("maxvit_"):
        options = {"input_size": (image_size, image_size)}
    try:
        network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
    except (AssertionError, ValueError) as error:
        problem = f"cannot be built for {image_size} px images: {kind_and_message(error)}"
        raise InputError(f"network {name!r} {problem}") from error
    if small_stem(name, image_size):
        stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        network.conv1, network.maxpool = stem, nn.Identity()
    return network


def _from_timm(name: str, classes: int) -> nn.Module:
    timm, plain = import_timm(name)
    network: nn.Module = timm.create_model(plain, pretrained=False, num_classes=classes)
    return network


def import_timm(name: str) -> tuple[Any, str]:
    """Import timm; also its own name for `timm/NAME`, perhaps with .TAG. InputError where either is missing."""
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "timm":
            raise InputError(f"network {name!r} needs timm: pip install timm") from error
        raise InputError(f"network {name!r}: timm cannot be imported: {kind_and_message(error)}") from error
    plain = name.removeprefix("timm/")
    if not timm.is_model(plain):  # also keeps out hf-hub: names, which would go to the network
        hint = did_you_mean(plain, timm.list_models(), prefix="timm/")
        raise InputError(f"unknown network {name!r}{hint} (timm has no such model)")
    network, _, tag = plain.partition(".")
    if tag and plain not in (known := timm.list_models(f"{network}.*", pretrained=True)):
        hint = did_you_mean(plain, known, prefix="timm/")
        raise InputError(f"unknown network {name!r}{hint} (timm has no weights {tag!r} of {network})")
    return timm, plain


def _from_function(name: str, classes: int) -> nn.Module:
    function = import_function(name, "network")
    network = call_function(function, _arguments(name, function, classes), name, "network")
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise InputError(f"network {name!r}: {name.partition(':')[2]} returned {kind}, not a torch.nn.Module")
    return network


def _arguments(name: str, function: Callable[..., Any], classes: int) -> tuple[int, ...]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code may have no signature
        return (classes,)
    if not parameters:
        return ()
    if all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters):
        raise InputError(f"network {name!r}: the function must take the number of classes first, or nothing")
    return (classes,)
