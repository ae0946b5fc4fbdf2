"""Image classification networks by name, for teachers and students.

Every network takes images [B, 3, H, W] and gives logits [B, classes]. A name is one of

- a small network of the distillation literature, for CIFAR most of them (cifar.py)
- a torchvision model; where the CIFAR network has the name (vgg13), torchvision's is `torchvision/NAME`
- `timm/NAME`, perhaps with the tag of its pretrained weights and with arguments of its builder:
  `timm/NAME.TAG:KEY=VALUE,...`, as in `timm/vit_tiny_patch16_224:img_size=96`
- `module:function`, the module found on the Python path or in the current directory

Weights are drawn from torch's global generator, so the caller seeds.
"""

import importlib
import inspect
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from kdcache.cache.errors import InputError, kind_and_message
from kdcache.pipeline.process.functions import call_function, did_you_mean, import_function, names_code
from kdcache.pipeline.teachers.cifar import CIFAR, SMALLEST_IMAGE
from kdcache.pipeline.teachers.zoos import ALIASES

SMALL_STEM_UP_TO = 64  # torchvision's ResNets reduce 32-fold: 64 px would end as 2x2
_LARGEST_IMAGE = 4096
_HUBS = ("timm/hf-hub", "timm/hf_hub", "timm/local-dir")  # what follows their colon are places, where timm would look
# Arguments of timm's builder that kdcache gives itself, or by which it would read other files or be no classifier.
_OURS = re.compile(
    r"num_classes|in_chans|features_only|out_indices|cache_dir|checkpoint_path|model_\w+|(pretrained|feature)\w*"
)


def build_network(name: str, classes: int, image_size: int) -> nn.Module:
    """A freshly initialised network: [B, 3, image_size, image_size] -> [B, classes].

    image_size chooses the stem of torchvision's ResNets (see small_stem) and sizes the position tables
    of vit_* and maxvit_t; nothing else depends on it. What `module:function` returns is not resized: a
    function without parameters decides its own number of classes.
    """
    if name.startswith("timm/"):
        return build_timm(name, num_classes=classes)
    if names_code(name):
        return _from_function(name, classes)
    if name in CIFAR:
        if image_size < SMALLEST_IMAGE:
            raise InputError(f"network {name!r} needs images of {SMALLEST_IMAGE} px or more")
        return CIFAR[name](classes)
    plain = name.removeprefix("torchvision/")
    if plain in _torchvision_names():
        return _from_torchvision(plain, classes, image_size)
    hint = f": here it is {ALIASES[name]}" if name in ALIASES else did_you_mean(plain, {*CIFAR, *_torchvision_names()})
    raise InputError(
        f"unknown network {name!r}{hint} "
        "(kdcache knows torchvision's names, the CIFAR networks, timm/NAME and module:function)"
    )


def outline(name: str, classes: int, image_size: int) -> nn.Module:
    """Build a network for the names and shapes of its tensors alone, on the meta device where that is possible."""
    try:
        with torch.device("meta"):
            return build_network(name, classes, image_size)
    except Exception:  # some need the values of tensors, which meta has not; a real error comes again
        return build_network(name, classes, image_size)


def head_of(name: str, size: int) -> list[str]:
    """The names of the tensors whose shapes change with the number of classes."""
    two, three = (outline(name, classes, size).state_dict() for classes in (2, 3))
    return [key for key in two if two[key].shape != three[key].shape]


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
    if missing and not unexpected and len(problems) == 1 and all(".shortcut." in name for name in missing):
        problems.append("where shortcuts have no weights, give the network that ends in _a, such as resnet20_a")
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


def canonical_name(name: str) -> str:
    """The one spelling of a network's name, as identities have it: timm's arguments sorted, each value in one form."""
    plain, arguments = split_arguments(name)
    said = (f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in sorted(arguments.items()))
    return f"{plain}:{','.join(said)}" if arguments else plain


def built_for(name: str) -> int | None:
    """The image size that a network's name asks for: img_size of timm's arguments, or None."""
    size = split_arguments(name)[1].get("img_size")
    return None if size is None else int(size)


def split_arguments(name: str) -> tuple[str, dict[str, Any]]:
    """Split the arguments from timm/NAME:KEY=VALUE,...; other names have none.

    Values are numbers, true, false and words. InputError for what is none of them, and for arguments that kdcache
    gives itself.
    """
    plain, colon, text = name.partition(":")
    if not colon or names_code(name) or plain in _HUBS:
        return name, {}
    arguments: dict[str, Any] = {}
    for item in text.split(","):
        key, _, value = item.partition("=")
        if not key.isidentifier() or not re.fullmatch(r"[\w.+-]+", value):
            raise InputError(f"network {name!r}: {item!r} is no argument such as img_size=96")
        if _OURS.fullmatch(key):
            raise InputError(f"network {name!r}: {key} is not for a name to say: kdcache gives it, or cannot use it")
        if key in arguments:
            raise InputError(f"network {name!r}: {key} is given twice")
        arguments[key] = _value_of(value)
    size = arguments.get("img_size", 1)
    if type(size) is not int or not 1 <= size <= _LARGEST_IMAGE:
        raise InputError(
            f"network {name!r}: img_size is a number of pixels from 1 to {_LARGEST_IMAGE}, as in img_size=96"
        )
    return plain, arguments


def _value_of(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?\d{1,20}", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text


def build_timm(name: str, **options: Any) -> nn.Module:
    """Build timm/NAME with these options and those in its name. InputError for arguments that it does not take."""
    timm, plain = import_timm(name)
    arguments = split_arguments(name)[1]
    try:
        network: nn.Module = timm.create_model(plain, **{**options, **arguments})
    except Exception as e:  # timm's networks raise whatever they come upon
        if arguments and not options.get("pretrained"):
            raise InputError(f"network {name!r} cannot be built: {kind_and_message(e)}") from e
        raise
    return network


def import_timm(name: str) -> tuple[Any, str]:
    """Import timm; also its own name for `timm/NAME`, perhaps with .TAG, without arguments. InputError for neither."""
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "timm":
            raise InputError(f"network {name!r} needs timm: pip install timm") from error
        raise InputError(f"network {name!r}: timm cannot be imported: {kind_and_message(error)}") from error
    plain = split_arguments(name)[0].removeprefix("timm/")
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
