"""The small networks of the distillation literature.

Most are for CIFAR, from the model zoo of Tian et al. 2020, "Contrastive Representation Distillation", which later
papers share. They take images of any height and width from 8 pixels on, because all of them end in a global average
pool.

* resnetD, D = 6n + 2: He et al. 2016, "Deep Residual Learning", section 4.2: a 3x3 stem and three stages of n basic
  blocks. Where the shape changes the zoo's shortcut is a 1x1 convolution with batch norm (option B). In resnetD_a it is
  the paper's: every other pixel, and channels of zeros on both sides (option A). resnet8x4 and resnet32x4 have widths
  32, 64, 128, 256 in place of 16, 16, 32, 64.
* wrn_D_K, D = 6n + 4: Zagoruyko & Komodakis 2016, "Wide Residual Networks": pre-activation blocks, widths 16K, 32K,
  64K, no dropout.
* vgg8, vgg11_cifar, vgg13, vgg16_cifar, vgg19_cifar: Simonyan & Zisserman 2015, with batch norm, and one linear layer
  in place of three. vgg11, vgg16 and vgg19 alone are torchvision's.
* mobilenet_v2_cifar: Sandler et al. 2018, width 0.5, an image reduced 16-fold rather than 32-fold; with width 1 it is
  mobilenet_v2_cifar_full. mobilenet_v2_tinyimagenet, of Zhao et al. 2023, "DOT: A Distillation-Oriented Trainer",
  reduces an image 8-fold: it has width 1, a 1x1 stem, biases and ReLU6.
* mobilenet_v1: Howard et al. 2017, the usual student on ImageNet.
* shufflenet_v1_cifar (3 groups) and shufflenet_v2_cifar (1x): Zhang et al. 2018, Ma et al. 2018, with a 1x1 stem of
  stride 1.

Weights are drawn from torch's global generator, so the caller seeds.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

SMALLEST_IMAGE = 8  # three halvings of a vgg leave one pixel


# ---- building blocks: [B, cin, H, W] -> [B, cout, H / stride, W / stride], rounded up ----


def _conv_bn(
    cin: int,
    cout: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    relu: bool = True,
    bias: bool = False,
    six: bool = False,
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, groups=groups, bias=bias),
        nn.BatchNorm2d(cout),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6() if six else nn.ReLU()] if relu else []))


class _Residual(nn.Module):
    """Computes body(x) + shortcut(x), or puts the two side by side (shortcut's channels last); then perhaps a ReLU."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, concat: bool = False, relu: bool = True) -> None:
        super().__init__()
        self.body, self.shortcut, self.concat = body, shortcut, concat
        self.last = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.body(x), self.shortcut(x)
        out: Tensor = self.last(torch.cat([a, b], 1) if self.concat else a + b)
        return out


class _PaddedShortcut(nn.Module):
    """Takes every other pixel of both sides, and puts channels of zeros before and behind its own."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.before, self.behind = (cout - cin) // 2, (cout - cin + 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.behind))


class _PreActivation(nn.Module):
    """A wide residual block: norm and ReLU come before each convolution, and before a 1x1 shortcut."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(cin), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(cin, cout, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(),
            nn.Conv2d(cout, cout, 3, padding=1, bias=False),
        )
        self.shortcut = None if cin == cout else nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        out: Tensor = self.body(a) + (x if self.shortcut is None else self.shortcut(a))
        return out


class _Shuffle(nn.Module):
    """Interleaves the channels of the groups: [g0c0, g0c1, g1c0, g1c1] -> [g0c0, g1c0, g0c1, g1c1]."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.reshape(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class _SplitUnit(nn.Module):
    """ShuffleNetV2's unit: half of the channels pass, half are convolved; at stride 2 both are."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        half = cout // 2
        self.left = None
        if stride > 1:
            self.left = nn.Sequential(_conv_bn(cin, cin, 3, stride, cin, relu=False), _conv_bn(cin, half))
        self.right = nn.Sequential(
            _conv_bn(cin if stride > 1 else half, half),
            _conv_bn(half, half, 3, stride, half, relu=False),
            _conv_bn(half, half),
        )
        self.shuffle = _Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.left is None else (self.left(x), x)
        out: Tensor = self.shuffle(torch.cat([left, self.right(right)], 1))
        return out


class _ConvHead(nn.Linear):
    """A linear layer whose weights [classes, width, 1, 1] are stored as those of a convolution."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.weight = nn.Parameter(self.weight.detach()[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:  # [B, width] -> [B, classes]
        return nn.functional.linear(x, self.weight.flatten(1), self.bias)


class _PoolLargeMaps(nn.Module):
    """Halves maps of 8x8 and more: vgg's fourth pool, which images of 32 pixels (4x4 by then) do without."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(x, 2) if min(x.shape[2:]) >= 8 else x


def _basic(cin: int, cout: int, stride: int, padded: bool = False) -> nn.Module:
    shortcut: nn.Module = nn.Identity()
    if stride > 1 or cin != cout:
        shortcut = _PaddedShortcut(cin, cout) if padded else _conv_bn(cin, cout, 1, stride, relu=False)
    body = nn.Sequential(_conv_bn(cin, cout, 3, stride), _conv_bn(cout, cout, 3, relu=False))
    return _Residual(body, shortcut)


def _inverted(cin: int, cout: int, stride: int, expand: int, bias: bool = False, six: bool = False) -> nn.Module:
    mid = cin * expand
    body = nn.Sequential(
        _conv_bn(cin, mid, bias=bias, six=six),
        _conv_bn(mid, mid, 3, stride, groups=mid, bias=bias, six=six),
        _conv_bn(mid, cout, relu=False, bias=bias),
    )
    return _Residual(body, nn.Identity(), relu=False) if stride == 1 and cin == cout else body


def _separable(cin: int, cout: int, stride: int) -> nn.Module:
    return nn.Sequential(_conv_bn(cin, cin, 3, stride, groups=cin), _conv_bn(cin, cout))


def _grouped(cin: int, cout: int, stride: int, groups: int, stem: int) -> nn.Module:
    new = cout - cin if stride > 1 else cout  # at stride 2 the pooled input supplies the other channels
    mid, first = new // 4, 1 if cin == stem else groups  # the stem has too few channels to be grouped
    body = nn.Sequential(
        _conv_bn(cin, mid, groups=first),
        _Shuffle(first),
        _conv_bn(mid, mid, 3, stride, groups=mid),
        _conv_bn(mid, new, groups=groups, relu=False),
    )
    if stride == 1:
        return _Residual(body, nn.Identity())
    return _Residual(body, nn.AvgPool2d(3, stride, padding=1), concat=True)


# ---- the networks ----


class _Network(nn.Module):
    """A network of stem, stages and tail, then the mean over the map and one linear layer."""

    def __init__(
        self,
        stem: nn.Module,
        stages: Iterable[nn.Module],
        tail: nn.Module,
        width: int,
        classes: int,
        head: type[nn.Linear] = nn.Linear,
    ) -> None:
        super().__init__()
        self.stem, self.stages, self.tail = stem, nn.Sequential(*stages), tail
        self.fc = head(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.tail(self.stages(self.stem(x))).mean((2, 3)))
        return out


def _stages(
    channels: int, plan: Iterable[tuple[int, int, int]], block: Callable[[int, int, int], nn.Module]
) -> list[nn.Sequential]:
    """One stage for each (width, blocks, stride of its first block)."""
    stages = []
    for width, count, stride in plan:
        layers = [block(channels, width, stride), *(block(width, width, 1) for _ in range(count - 1))]
        stages.append(nn.Sequential(*layers))
        channels = width
    return stages


def _initialise(network: _Network, fc_std: float | None = None) -> _Network:
    """Draw convolutions as He et al. 2015 (fan out) and set norms to 1 and 0. Without fc_std, `fc` stays as it is."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    if fc_std is not None:
        nn.init.normal_(network.fc.weight, 0.0, fc_std)
        nn.init.zeros_(network.fc.bias)
    return network


def _resnet(depth: int, widths: Sequence[int], classes: int, padded: bool = False) -> nn.Module:
    n, (stem, first, second, third) = (depth - 2) // 6, widths
    stages = _stages(stem, [(first, n, 1), (second, n, 2), (third, n, 2)], partial(_basic, padded=padded))
    return _initialise(_Network(_conv_bn(3, stem, 3), stages, nn.Identity(), third, classes))


def _wrn(depth: int, widen: int, classes: int) -> nn.Module:
    n, width = (depth - 4) // 6, 64 * widen
    stages = _stages(16, [(width // 4, n, 1), (width // 2, n, 2), (width, n, 2)], _PreActivation)
    tail = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
    network = _initialise(_Network(nn.Conv2d(3, 16, 3, padding=1, bias=False), stages, tail, width, classes))
    nn.init.zeros_(network.fc.bias)
    return network


def _vgg(repeats: Sequence[int], classes: int) -> nn.Module:
    plan = [(width, repeat, 1) for width, repeat in zip((64, 128, 256, 512, 512), repeats, strict=True)]
    stages = _stages(3, plan, lambda cin, cout, stride: _conv_bn(cin, cout, 3, stride, bias=True))
    pools = [*(nn.MaxPool2d(2) for _ in range(3)), _PoolLargeMaps(), nn.Identity()]
    pooled = [nn.Sequential(stage, pool) for stage, pool in zip(stages, pools, strict=True)]
    return _initialise(_Network(nn.Identity(), pooled, nn.Identity(), 512, classes), fc_std=0.01)


def _mobilenet_v2(half: bool, classes: int) -> nn.Module:
    stem, first, *widths, last = (w // (2 if half else 1) for w in (32, 16, 24, 32, 64, 96, 160, 320))
    plan = list(zip(widths, (2, 3, 4, 3, 3), (1, 2, 2, 1, 2), strict=True))
    stages = _stages(stem, [(first, 1, 1)], partial(_inverted, expand=1))
    stages += _stages(first, [*plan, (last, 1, 1)], partial(_inverted, expand=6))
    network = _Network(_conv_bn(3, stem, 3, 2), stages, _conv_bn(last, 1280), 1280, classes)
    return _initialise(network, fc_std=0.01)


def _mobilenet_v2_tinyimagenet(classes: int) -> nn.Module:  # torch's own initialisation, as there
    plan = [(24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 1), (320, 1, 1)]
    stem = nn.Sequential(nn.Conv2d(3, 32, 1, padding=1), nn.BatchNorm2d(32), nn.ReLU6())  # the map grows by a rim
    stages = _stages(32, [(16, 1, 1)], partial(_inverted, expand=1, bias=True, six=True))
    stages += _stages(16, plan, partial(_inverted, expand=6, bias=True, six=True))
    return _Network(stem, stages, _conv_bn(320, 1280, bias=True, six=True), 1280, classes, _ConvHead)


def _mobilenet_v1(classes: int) -> nn.Module:  # torch's own initialisation, as in mdistiller
    stages = _stages(32, [(64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2)], _separable)
    return _Network(_conv_bn(3, 32, 3, 2), stages, nn.Identity(), 1024, classes)


def _shufflenet_v1(classes: int) -> nn.Module:  # torch's own initialisation, as in the zoo
    stages = _stages(24, [(240, 4, 2), (480, 8, 2), (960, 4, 2)], partial(_grouped, groups=3, stem=24))
    return _Network(_conv_bn(3, 24), stages, nn.Identity(), 960, classes)


def _shufflenet_v2(classes: int) -> nn.Module:
    stages = _stages(24, [(116, 4, 2), (232, 8, 2), (464, 4, 2)], _SplitUnit)
    return _Network(_conv_bn(3, 24), stages, _conv_bn(464, 1024), 1024, classes)


CIFAR: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{d}": partial(_resnet, d, (16, 16, 32, 64)) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{d}_a": partial(_resnet, d, (16, 16, 32, 64), padded=True) for d in (20, 32, 44, 56, 110)},
    **{f"resnet{d}x4": partial(_resnet, d, (32, 64, 128, 256)) for d in (8, 32)},
    **{f"wrn_{d}_{k}": partial(_wrn, d, k) for d in (16, 40) for k in (1, 2)},
    "vgg8": partial(_vgg, (1, 1, 1, 1, 1)),
    "vgg11_cifar": partial(_vgg, (1, 1, 2, 2, 2)),
    "vgg13": partial(_vgg, (2, 2, 2, 2, 2)),
    "vgg16_cifar": partial(_vgg, (2, 2, 3, 3, 3)),
    "vgg19_cifar": partial(_vgg, (2, 2, 4, 4, 4)),
    "mobilenet_v1": _mobilenet_v1,
    "mobilenet_v2_cifar": partial(_mobilenet_v2, True),
    "mobilenet_v2_cifar_full": partial(_mobilenet_v2, False),
    "mobilenet_v2_tinyimagenet": _mobilenet_v2_tinyimagenet,
    "shufflenet_v1_cifar": _shufflenet_v1,
    "shufflenet_v2_cifar": _shufflenet_v2,
}
