"""What a shell is offered for a value on the command line, by the name of its parameter.

The tables of losses, networks and kinds of data import torch, which a shell cannot wait for. So their names stand here
once more; a test compares them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

Completer = Callable[["click.Context", "click.Parameter", str], list["CompletionItem"]]

LOSSES = "ce kd nkd tf-nkd uskd dkd ikl dist cmkd logit-std mse wsld gkd skew-kl skew-rkl bdkd"
NETWORKS = """
    resnet8 resnet14 resnet20 resnet32 resnet44 resnet56 resnet110 resnet8x4 resnet32x4 wrn_16_1 wrn_16_2 wrn_40_1
    wrn_40_2 vgg8 vgg11_cifar vgg13 vgg16_cifar vgg19_cifar mobilenet_v2_cifar shufflenet_v1_cifar
    shufflenet_v2_cifar resnet20_a resnet32_a resnet44_a resnet56_a resnet110_a mobilenet_v1 mobilenet_v2_cifar_full
    mobilenet_v2_tinyimagenet alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161
    densenet169 densenet201 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4
    efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet
    inception_v3 maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large
    mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf
    regnet_x_8gf regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf
    regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet18 resnet34 resnet50 resnext101_32x8d resnext101_64x4d
    resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0
    squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11 vgg11_bn torchvision/vgg13 vgg13_bn vgg16
    vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2 wide_resnet50_2
"""
DATA = ("digits", "cifar10", "cifar100", "fashion-mnist", "imagenet", "imagefolder", "files", "hf", "wds")
LOGS = ("tensorboard", "csv", "wandb", "mlflow", "none")
AUGMENT = ("crop", "crop,flip", "rrc,flip", "three-augment", "tinyvit", "ml-dr", "funmatch")
_DIGITS = 12  # of a key, as kdcache ls shows it


def _caches() -> Iterable[str]:
    """The keys under KDCACHE_HOME; whatever else can stand for a cache begins with a path."""
    home = os.environ.get("KDCACHE_HOME")
    folder = (Path(home) if home else Path.home() / ".cache" / "kdcache") / "caches"
    try:
        return sorted({path.name[:_DIGITS] for path in folder.iterdir() if len(path.stem) == 64})
    except OSError:
        return ()


_WORDS: dict[str, Callable[[], Iterable[str]]] = {
    "augment": lambda: AUGMENT,
    "cache": _caches,
    "caches": _caches,
    "data": lambda: DATA,
    "log": lambda: LOGS,
    "loss": LOSSES.split,
    "policy": lambda: AUGMENT,
    "student": NETWORKS.split,
    "teacher": NETWORKS.split,
}
_FILES, _FOLDERS = ("file", "key", "path", "run", "sign", "student_weights", "trust", "weights"), ("out", "registry")
_LISTS = ("log", "loss")  # with commas between the values


def completer_of(parameter: str) -> Completer | None:
    """What completes the values of a parameter: words, and files where a path may stand for them; None for nothing."""
    if parameter in _FILES + _FOLDERS:
        return lambda ctx, param, begun: [_place(begun, "dir" if parameter in _FOLDERS else "file")]
    if (words := _WORDS.get(parameter)) is None:
        return None

    def complete(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        before, comma, last = begun.rpartition(",") if parameter in _LISTS else ("", "", begun)
        found = [CompletionItem(f"{before}{comma}{word}") for word in words() if word.startswith(last)]
        return found or ([_place(begun, "file")] if parameter in ("cache", "caches") else [])

    return complete


def _place(begun: str, kind: str) -> CompletionItem:
    from click.shell_completion import CompletionItem

    return CompletionItem(begun, type=kind)
