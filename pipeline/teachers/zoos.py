"""The names that tensors have in the checkpoints of other projects with the same networks.

The zoos of CRD (HobbitLong/RepDistiller) and mdistiller (megvii-research/mdistiller) share theirs. Their ResNet18 and
ResNet50, and those of kuangliu/pytorch-cifar, are torchvision's with the stem for small images. The ResNets of
chenyaofo/pytorch-cifar-models are CRD's, those of akamaster/pytorch_resnet_cifar10 have shortcuts without weights
(resnet20_a), and the MobileNetV2 of weiaicunzai/pytorch-cifar100 is mdistiller's for Tiny-ImageNet.
"""

from __future__ import annotations

from collections.abc import Collection

from kdcache.pipeline.teachers.checkpoints import State

# By family: (the name of a module here, its name there). {s} is a stage and {b} a block in it, both from 0 on;
# {t} is s + 1, {c} is 3b and {d} is 3b + 1. The first row that gives a module counts.
_Rows = tuple[tuple[str, str], ...]
_STEM: _Rows = (("stem.0", "conv1"), ("stem.1", "bn1"))
_SEPARABLE = (1, 2, 2, 6, 2)  # blocks a stage of mobilenet_v1, whose zoo counts them all through
_INVERTED = (("0.0", "0"), ("0.1", "1"), ("1.0", "3"), ("1.1", "4"), ("2.0", "6"), ("2.1", "7"))
_ROWS: dict[str, _Rows] = {
    "resnet": (
        *_STEM,
        ("stages.{s}.{b}.body.0.0", "layer{t}.{b}.conv1"), ("stages.{s}.{b}.body.0.1", "layer{t}.{b}.bn1"),
        ("stages.{s}.{b}.body.1.0", "layer{t}.{b}.conv2"), ("stages.{s}.{b}.body.1.1", "layer{t}.{b}.bn2"),
        ("stages.{s}.{b}.shortcut.0", "layer{t}.{b}.downsample.0"),
        ("stages.{s}.{b}.shortcut.1", "layer{t}.{b}.downsample.1"),
        # torchvision's:
        ("layer{t}.{b}.downsample.0", "layer{t}.{b}.shortcut.0"),
        ("layer{t}.{b}.downsample.1", "layer{t}.{b}.shortcut.1"),
    ),
    "wrn": (
        ("stem", "conv1"), ("tail.0", "bn1"),
        ("stages.{s}.{b}.first.0", "block{t}.layer.{b}.bn1"), ("stages.{s}.{b}.body.0", "block{t}.layer.{b}.conv1"),
        ("stages.{s}.{b}.body.1", "block{t}.layer.{b}.bn2"), ("stages.{s}.{b}.body.3", "block{t}.layer.{b}.conv2"),
        ("stages.{s}.{b}.shortcut", "block{t}.layer.{b}.convShortcut"),
    ),
    "vgg": (
        ("fc", "classifier"),
        ("stages.{s}.0.{b}.0", "block{s}.{c}"), ("stages.{s}.0.{b}.1", "block{s}.{d}"),
    ),
    "mobilenet_v1": (
        ("stem.0", "model.0.0"), ("stem.1", "model.0.1"),
        *((f"stages.{s}.{b}.{here}", f"model.{1 + sum(_SEPARABLE[:s]) + b}.{there}")
          for s, blocks in enumerate(_SEPARABLE) for b in range(blocks)
          for here, there in (("0.0", "0"), ("0.1", "1"), ("1.0", "3"), ("1.1", "4"))),
    ),
    "mobilenet_v2_tinyimagenet": (
        ("stem.0", "pre.0"), ("stem.1", "pre.1"), ("tail.0", "conv1.0"), ("tail.1", "conv1.1"), ("fc", "conv2"),
        *((f"stages.{s}.0.{here}", f"stage{s + 1}.residual.{there}") for s in (0, 6) for here, there in _INVERTED),
        *((f"stages.{{s}}.{{b}}.body.{here}", f"stage{{t}}.{{b}}.residual.{there}") for here, there in _INVERTED),
        *((f"stages.{{s}}.{{b}}.{here}", f"stage{{t}}.{{b}}.residual.{there}") for here, there in _INVERTED),
    ),
    "mobilenet": (
        ("stem.0", "conv1.0"), ("stem.1", "conv1.1"), ("tail.0", "conv2.0"), ("tail.1", "conv2.1"),
        ("fc", "classifier.0"),
        *((f"stages.{{s}}.{{b}}.body.{here}", f"blocks.{{s}}.{{b}}.conv.{there}") for here, there in _INVERTED),
        *((f"stages.{{s}}.{{b}}.{here}", f"blocks.{{s}}.{{b}}.conv.{there}") for here, there in _INVERTED),
    ),
    "shufflenet_v1": (
        *_STEM, ("fc", "linear"),
        ("stages.{s}.{b}.body.0.0", "layer{t}.{b}.conv1"), ("stages.{s}.{b}.body.0.1", "layer{t}.{b}.bn1"),
        ("stages.{s}.{b}.body.2.0", "layer{t}.{b}.conv2"), ("stages.{s}.{b}.body.2.1", "layer{t}.{b}.bn2"),
        ("stages.{s}.{b}.body.3.0", "layer{t}.{b}.conv3"), ("stages.{s}.{b}.body.3.1", "layer{t}.{b}.bn3"),
    ),
    "shufflenet_v2": (
        *_STEM, ("tail.0", "conv2"), ("tail.1", "bn2"), ("fc", "linear"),
        ("stages.{s}.0.left.0.0", "layer{t}.0.conv1"), ("stages.{s}.0.left.0.1", "layer{t}.0.bn1"),
        ("stages.{s}.0.left.1.0", "layer{t}.0.conv2"), ("stages.{s}.0.left.1.1", "layer{t}.0.bn2"),
        ("stages.{s}.0.right.0.0", "layer{t}.0.conv3"), ("stages.{s}.0.right.0.1", "layer{t}.0.bn3"),
        ("stages.{s}.0.right.1.0", "layer{t}.0.conv4"), ("stages.{s}.0.right.1.1", "layer{t}.0.bn4"),
        ("stages.{s}.0.right.2.0", "layer{t}.0.conv5"), ("stages.{s}.0.right.2.1", "layer{t}.0.bn5"),
        ("stages.{s}.{b}.right.0.0", "layer{t}.{b}.conv1"), ("stages.{s}.{b}.right.0.1", "layer{t}.{b}.bn1"),
        ("stages.{s}.{b}.right.1.0", "layer{t}.{b}.conv2"), ("stages.{s}.{b}.right.1.1", "layer{t}.{b}.bn2"),
        ("stages.{s}.{b}.right.2.0", "layer{t}.{b}.conv3"), ("stages.{s}.{b}.right.2.1", "layer{t}.{b}.bn3"),
    ),
}  # fmt: skip
_MOST_STAGES, _MOST_BLOCKS = 7, 36  # mobilenet_v2_cifar's, resnet152's

# The zoos' names of networks that have others here.
ALIASES = {
    "MobileNetV1": "mobilenet_v1", "MobileNetV2": "mobilenet_v2_cifar", "mobile_half": "mobilenet_v2_cifar",
    "mobile_full": "mobilenet_v2_cifar_full", "mobilenetv2_tinyimagenet": "mobilenet_v2_tinyimagenet",
    "ShuffleV1": "shufflenet_v1_cifar", "ShuffleV2": "shufflenet_v2_cifar", "vgg8_bn": "vgg8",
    **{f"ResNet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
}  # fmt: skip


def here(network: str, own: Collection[str], state: State) -> State:
    """Translate a state dict from a zoo's names to those of a network here, which has the names `own`.

    Names that no zoo has stay as they are, as do all where they are the network's already.
    """
    plain = network.removeprefix("torchvision/")
    family = next((family for family in _ROWS if plain.startswith(family)), None)
    if family is None or set(own) <= state.keys():
        return state
    modules = {name.rpartition(".")[0] for name in own}
    theirs: dict[str, str] = {}
    for ours, other in _ROWS[family]:
        for s in range(_MOST_STAGES):
            for b in range(_MOST_BLOCKS):
                fields = {"s": s, "t": s + 1, "b": b, "c": 3 * b, "d": 3 * b + 1}
                module = ours.format(**fields)
                if module in modules:
                    theirs.setdefault(module, other.format(**fields))
    if family == "resnet" and any(name.startswith("linear.") for name in state):
        theirs["fc"] = "linear"
    back = {other: module for module, other in theirs.items()}
    out: State = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        out[f"{back.get(module, module)}.{leaf}" if module else name] = tensor
    return out
