"""The CIFAR teachers of the literature open under the names that their zoos give to tensors.

KEYS is what their files hold, written from the zoos' own module names: HobbitLong/RepDistiller (models/*.py) and
megvii-research/mdistiller (mdistiller/models/cifar/*.py), which are the same, mdistiller's MobileNetV1 for ImageNet
(models/imagenet/mobilenetv1.py) and akamaster/pytorch_resnet_cifar10 (resnet.py). `forward` computes their logits from
such a file alone, in float64, as the papers say: names that were mixed up would give other logits.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from kdcache.cache.errors import InputError
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.sources.files import start_from
from kdcache.pipeline.teachers.teacher import load_teacher
from kdcache.pipeline.teachers.zoos import ALIASES
from kdcache.tests.helpers.images import arrays_data

CPU = torch.device("cpu")
CLASSES = 100


def conv(name, cout, cin, kernel, bias=False):
    return {f"{name}.weight": (cout, cin, kernel, kernel), **({f"{name}.bias": (cout,)} if bias else {})}


def norm(name, width):
    return {**{f"{name}.{leaf}": (width,) for leaf in ("weight", "bias", "running_mean", "running_var")},
            f"{name}.num_batches_tracked": ()}  # fmt: skip


def linear(name, width):
    return {f"{name}.weight": (CLASSES, width), f"{name}.bias": (CLASSES,)}


def resnet_keys(depth, widths, padded=False):
    cin, *stages = widths
    keys = {**conv("conv1", cin, 3, 3), **norm("bn1", cin)}
    for t, width in enumerate(stages, 1):
        for b in range((depth - 2) // 6):
            at = f"layer{t}.{b}"
            keys |= conv(f"{at}.conv1", width, cin, 3) | norm(f"{at}.bn1", width)
            keys |= conv(f"{at}.conv2", width, width, 3) | norm(f"{at}.bn2", width)
            if b == 0 and (t > 1 or cin != width) and not padded:
                keys |= conv(f"{at}.downsample.0", width, cin, 1) | norm(f"{at}.downsample.1", width)
            cin = width
    return keys | linear("linear" if padded else "fc", cin)


def wrn_keys(depth, widen):
    keys, cin = conv("conv1", 16, 3, 3), 16
    for t, width in enumerate((16 * widen, 32 * widen, 64 * widen), 1):
        for b in range((depth - 4) // 6):
            at = f"block{t}.layer.{b}"
            keys |= norm(f"{at}.bn1", cin) | conv(f"{at}.conv1", width, cin, 3)
            keys |= norm(f"{at}.bn2", width) | conv(f"{at}.conv2", width, width, 3)
            if cin != width:
                keys |= conv(f"{at}.convShortcut", width, cin, 1)
            cin = width
    return keys | norm("bn1", cin) | linear("fc", cin)


def vgg_keys(repeats):
    keys, cin = {}, 3
    for s, (width, repeat) in enumerate(zip((64, 128, 256, 512, 512), repeats, strict=True)):
        for b in range(repeat):
            keys |= conv(f"block{s}.{3 * b}", width, cin, 3, bias=True) | norm(f"block{s}.{3 * b + 1}", width)
            cin = width
    return keys | linear("classifier", cin)


INVERTED = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenet_keys(width=1):
    cin = 32 // width
    keys = conv("conv1.0", cin, 3, 3) | norm("conv1.1", cin)
    for s, (expand, channels, count, _) in enumerate(INVERTED):
        for b in range(count):
            at, mid, cout = f"blocks.{s}.{b}.conv", cin * expand, channels // width
            keys |= conv(f"{at}.0", mid, cin, 1) | norm(f"{at}.1", mid)
            keys |= conv(f"{at}.3", mid, 1, 3) | norm(f"{at}.4", mid)
            keys |= conv(f"{at}.6", cout, mid, 1) | norm(f"{at}.7", cout)
            cin = cout
    return keys | conv("conv2.0", 1280, cin, 1) | norm("conv2.1", 1280) | linear("classifier.0", 1280)


def places_of_tiny():
    """mv2_tinyimagenet.py: each block's place, expansion, width and stride; the first and the last stage are blocks."""
    strides = 1, 2, 2, 2, 1, 1, 1
    for s, ((expand, channels, count, _), stride) in enumerate(zip(INVERTED, strides, strict=True), 1):
        for b in range(count):
            yield f"stage{s}" + (f".{b}" if count > 1 else ""), expand, channels, stride if b == 0 else 1


def tiny_keys():
    keys, cin = conv("pre.0", 32, 3, 1, bias=True) | norm("pre.1", 32), 32
    for place, expand, cout, _ in places_of_tiny():
        at, mid = f"{place}.residual", cin * expand
        keys |= conv(f"{at}.0", mid, cin, 1, bias=True) | norm(f"{at}.1", mid)
        keys |= conv(f"{at}.3", mid, 1, 3, bias=True) | norm(f"{at}.4", mid)
        keys |= conv(f"{at}.6", cout, mid, 1, bias=True) | norm(f"{at}.7", cout)
        cin = cout
    keys |= conv("conv1.0", 1280, cin, 1, bias=True) | norm("conv1.1", 1280)
    return keys | conv("conv2", CLASSES, 1280, 1, bias=True)


SEPARABLE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


def mobilenet1_keys():
    keys, cin = conv("model.0.0", 32, 3, 3) | norm("model.0.1", 32), 32
    for i, (width, _) in enumerate(SEPARABLE, 1):
        keys |= conv(f"model.{i}.0", cin, 1, 3) | norm(f"model.{i}.1", cin)
        keys |= conv(f"model.{i}.3", width, cin, 1) | norm(f"model.{i}.4", width)
        cin = width
    return keys | linear("fc", cin)


def shuffle1_keys():
    keys, cin = conv("conv1", 24, 3, 1) | norm("bn1", 24), 24
    for t, (width, count) in enumerate(((240, 4), (480, 8), (960, 4)), 1):
        for b in range(count):
            at, new = f"layer{t}.{b}", width - cin if b == 0 else width
            mid = new // 4
            keys |= conv(f"{at}.conv1", mid, cin // (1 if cin == 24 else 3), 1) | norm(f"{at}.bn1", mid)
            keys |= conv(f"{at}.conv2", mid, 1, 3) | norm(f"{at}.bn2", mid)
            keys |= conv(f"{at}.conv3", new, mid // 3, 1) | norm(f"{at}.bn3", new)
            cin = width
    return keys | linear("linear", cin)


def shuffle2_keys():
    keys, cin = conv("conv1", 24, 3, 1) | norm("bn1", 24), 24
    for t, (width, count) in enumerate(((116, 4), (232, 8), (464, 4)), 1):
        half = width // 2
        shapes = [(cin, 1, 3), (half, cin, 1), (half, cin, 1), (half, 1, 3), (half, half, 1)]
        for b in range(count):
            for i, shape in enumerate(shapes, 1):
                keys |= conv(f"layer{t}.{b}.conv{i}", *shape) | norm(f"layer{t}.{b}.bn{i}", shape[0])
            shapes = [(half, half, 1), (half, 1, 3), (half, half, 1)]
        cin = width
    return keys | conv("conv2", 1024, cin, 1) | norm("bn2", 1024) | linear("linear", 1024)


def big_resnet_keys(counts, bottleneck):
    """resnetv2.py: ResNet18 and ResNet50 with the stem for small images."""
    keys, cin = conv("conv1", 64, 3, 3) | norm("bn1", 64), 64
    for t, (width, count) in enumerate(zip((64, 128, 256, 512), counts, strict=True), 1):
        cout = width * (4 if bottleneck else 1)
        for b in range(count):
            at = f"layer{t}.{b}"
            sizes = [(width, cin, 1), (width, width, 3), (cout, width, 1)]
            for i, shape in enumerate(sizes if bottleneck else [(width, cin, 3), (width, width, 3)], 1):
                keys |= conv(f"{at}.conv{i}", *shape) | norm(f"{at}.bn{i}", shape[0])
            if cin != cout or (b == 0 and t > 1):
                keys |= conv(f"{at}.shortcut.0", cout, cin, 1) | norm(f"{at}.shortcut.1", cout)
            cin = cout
    return keys | linear("linear", cin)


NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
KEYS = {
    **{f"resnet{d}": resnet_keys(d, NARROW) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{d}_a": resnet_keys(d, NARROW, padded=True) for d in (20, 32, 44, 56, 110)},
    **{f"resnet{d}x4": resnet_keys(d, WIDE) for d in (8, 32)},
    **{f"wrn_{d}_{k}": wrn_keys(d, k) for d in (16, 40) for k in (1, 2)},
    "vgg8": vgg_keys((1, 1, 1, 1, 1)),
    "vgg11_cifar": vgg_keys((1, 1, 2, 2, 2)),
    "vgg13": vgg_keys((2, 2, 2, 2, 2)),
    "vgg16_cifar": vgg_keys((2, 2, 3, 3, 3)),
    "vgg19_cifar": vgg_keys((2, 2, 4, 4, 4)),
    "mobilenet_v1": mobilenet1_keys(),
    "mobilenet_v2_cifar": mobilenet_keys(2),
    "mobilenet_v2_cifar_full": mobilenet_keys(),
    "mobilenet_v2_tinyimagenet": tiny_keys(),
    "shufflenet_v1_cifar": shuffle1_keys(),
    "shufflenet_v2_cifar": shuffle2_keys(),
    "resnet18": big_resnet_keys((2, 2, 2, 2), False),
    "resnet50": big_resnet_keys((3, 4, 6, 3), True),
}


class File:
    """Logits [B, C] of images [B, 3, H, W], of 32 pixels or fewer, from a zoo's tensors alone."""

    def __init__(self, state):
        self.state = {k: v.double() for k, v in state.items()}

    def __contains__(self, name):
        return f"{name}.weight" in self.state

    def conv(self, name, x, stride=1):
        weight = self.state[f"{name}.weight"]
        bias = self.state.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])

    def norm(self, name, x):
        leaves = (self.state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *leaves)

    def both(self, place, i, x, stride=1):
        return self.norm(f"{place}bn{i}", self.conv(f"{place}conv{i}", x, stride))

    def head(self, name, x):
        return F.linear(x.mean((2, 3)), self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def blocks(self, pattern):
        """Each (stage, block, stride of its first convolution where a stage halves the map)."""
        for t in range(1, 5):
            b = 0
            while any(key.startswith(f"{pattern.format(t=t, b=b)}.") for key in self.state):
                yield t, pattern.format(t=t, b=b), 2 if b == 0 else 1
                b += 1

    def resnet(self, x, shortcut, head):
        x = self.both("", 1, x).relu()
        for t, at, stride in self.blocks("layer{t}.{b}"):
            stride = 1 if t == 1 else stride
            if f"{at}.conv3" in self:
                y = self.both(f"{at}.", 2, self.both(f"{at}.", 1, x).relu(), stride)
                y = self.both(f"{at}.", 3, y.relu())
            else:
                y = self.both(f"{at}.", 2, self.both(f"{at}.", 1, x, stride).relu())
            if f"{at}.{shortcut}.0" in self:
                x = self.norm(f"{at}.{shortcut}.1", self.conv(f"{at}.{shortcut}.0", x, stride))
            elif x.shape != y.shape:  # a quarter of the new channels are zeros before, and a quarter behind
                zeros = torch.zeros(len(x), y.shape[1] // 4, *y.shape[2:], dtype=x.dtype)
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
            x = (x + y).relu()
        return self.head(head, x)

    def wrn(self, x):
        x = self.conv("conv1", x)
        for t, at, stride in self.blocks("block{t}.layer.{b}"):
            stride = 1 if t == 1 else stride
            first = self.norm(f"{at}.bn1", x).relu()
            y = self.norm(f"{at}.bn2", self.conv(f"{at}.conv1", first, stride)).relu()
            if f"{at}.convShortcut" in self:
                x = self.conv(f"{at}.convShortcut", first, stride)
            x = x + self.conv(f"{at}.conv2", y)
        return self.head("fc", self.norm("bn1", x).relu())

    def vgg(self, x):
        for s in range(5):
            for i in range(0, 12, 3):
                if f"block{s}.{i}" in self:
                    x = self.norm(f"block{s}.{i + 1}", self.conv(f"block{s}.{i}", x)).relu()
            x = F.max_pool2d(x, 2) if s < 3 else x
        return self.head("classifier", x)

    def mobilenet(self, x):
        x = self.norm("conv1.1", self.conv("conv1.0", x, 2)).relu()
        for s, (_, _, count, first) in enumerate(INVERTED):
            for b in range(count):
                at, stride = f"blocks.{s}.{b}.conv", first if b == 0 else 1
                y = self.norm(f"{at}.1", self.conv(f"{at}.0", x)).relu()
                y = self.norm(f"{at}.4", self.conv(f"{at}.3", y, stride)).relu()
                y = self.norm(f"{at}.7", self.conv(f"{at}.6", y))
                x = x + y if x.shape == y.shape else y
        return self.head("classifier.0", self.norm("conv2.1", self.conv("conv2.0", x)).relu())

    def tiny(self, x):
        bare = F.conv2d(x, self.state["pre.0.weight"], self.state["pre.0.bias"], padding=1)
        x = self.norm("pre.1", bare).clamp(0, 6)
        for place, _, _, stride in places_of_tiny():
            at = f"{place}.residual"
            y = self.norm(f"{at}.1", self.conv(f"{at}.0", x)).clamp(0, 6)
            y = self.norm(f"{at}.4", self.conv(f"{at}.3", y, stride)).clamp(0, 6)
            y = self.norm(f"{at}.7", self.conv(f"{at}.6", y))
            x = x + y if x.shape == y.shape else y
        x = self.norm("conv1.1", self.conv("conv1.0", x)).clamp(0, 6)
        return self.conv("conv2", x.mean((2, 3), keepdim=True)).flatten(1)

    def mobilenet1(self, x):
        x = self.norm("model.0.1", self.conv("model.0.0", x, 2)).relu()
        for i, (_, stride) in enumerate(SEPARABLE, 1):
            x = self.norm(f"model.{i}.1", self.conv(f"model.{i}.0", x, stride)).relu()
            x = self.norm(f"model.{i}.4", self.conv(f"model.{i}.3", x)).relu()
        return self.head("fc", x)

    @staticmethod
    def shuffled(x, groups):
        return torch.cat([x[:, i :: x.shape[1] // groups] for i in range(x.shape[1] // groups)], 1)

    def shuffle1(self, x):
        x = self.both("", 1, x).relu()
        for _, at, stride in self.blocks("layer{t}.{b}"):
            y = self.shuffled(self.both(f"{at}.", 1, x).relu(), 1 if x.shape[1] == 24 else 3)
            y = self.both(f"{at}.", 3, self.both(f"{at}.", 2, y, stride).relu())
            x = (torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1) if stride == 2 else x + y).relu()
        return self.head("linear", x)

    def shuffle2(self, x):
        x = self.both("", 1, x).relu()
        for _, at, stride in self.blocks("layer{t}.{b}"):
            left, right, i = (x, x, 3) if stride == 2 else (*x.chunk(2, 1), 1)
            if stride == 2:
                left = self.both(f"{at}.", 2, self.both(f"{at}.", 1, left, 2)).relu()
            right = self.both(f"{at}.", i + 1, self.both(f"{at}.", i, right).relu(), stride)
            x = self.shuffled(torch.cat([left, self.both(f"{at}.", i + 2, right).relu()], 1), 2)
        return self.head("linear", self.both("", 2, x).relu())


def forward(name, state, x):
    file = File(state)
    answers = {"wrn": file.wrn, "vgg": file.vgg, "mobilenet_v1": file.mobilenet1, "mobilenet_v2_tiny": file.tiny,
               "mobile": file.mobilenet}  # fmt: skip
    for family, answer in answers.items():
        if name.startswith(family):
            return answer(x)
    if name.startswith("shuffle"):
        return file.shuffle1(x) if "v1" in name else file.shuffle2(x)
    return file.resnet(x, "downsample", "fc") if "fc" in file else file.resnet(x, "shortcut", "linear")


def published(name):
    """A file of the zoo's keys with values such that logits are neither alike nor huge."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in KEYS[name].items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(9)
        elif len(shape) > 1:
            state[key] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
        else:
            state[key] = torch.rand(shape, generator=generator) * 0.5 + 0.75
    return state


@pytest.fixture(scope="module")
def data():
    return arrays_data(6, 32, 32)


@pytest.mark.parametrize("name", KEYS)
def test_a_teacher_as_the_zoos_publish_it_answers_as_theirs(name, data, tmp_path):
    state = published(name)
    torch.save({"epoch": 240, "model": state, "best_acc": torch.tensor(72.3), "accuracy": 72.3}, tmp_path / "c.pth")
    teacher = load_teacher(name, data, CPU, weights=str(tmp_path / "c.pth"))
    network = teacher.model.network
    assert teacher.classes == CLASSES and "c.pth#model, 32 px" in teacher.about
    assert sum(p.numel() for p in network.parameters()) == sum(
        v.numel() for k, v in state.items() if k.rpartition(".")[2] in ("weight", "bias")
    )
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.inference_mode():
        ours, theirs = network.double()(x), forward(name, state, x)
    spread = theirs.std()
    assert spread > 1e-3
    assert (ours - theirs).abs().max() < 1e-9 * (1 + theirs.abs().max())


# The names in CRD's model_dict and in mdistiller's cifar_model_dict, tiny_imagenet_model_dict and imagenet_model_dict.
DICTIONARIES = """
    resnet8 resnet14 resnet20 resnet32 resnet44 resnet56 resnet110 resnet8x4 resnet32x4 ResNet18 ResNet34 ResNet50
    ResNet101 wrn_16_1 wrn_16_2 wrn_40_1 wrn_40_2 vgg8 vgg11 vgg13 vgg16 vgg19 mobile_half mobile_full MobileNetV1
    MobileNetV2 mobilenetv2_tinyimagenet ShuffleV1 ShuffleV2
"""


@pytest.mark.parametrize("theirs", DICTIONARIES.split())
def test_every_network_of_the_zoos_is_here(theirs):
    ours = ALIASES.get(theirs, theirs)
    ours = f"{ours}_cifar" if f"{ours}_cifar" in KEYS else ours
    assert ours in KEYS or ours in ("resnet34", "resnet101")  # of which resnet18 and resnet50 are the samples
    with torch.device("meta"):
        build_network(ours, CLASSES, 32)


def test_the_shapes_come_in_the_zoos_order():
    """Two lists of the same networks, written down independently."""
    for name, keys in KEYS.items():
        with torch.device("meta"):
            ours = build_network(name, CLASSES, 32).state_dict()
        assert [tuple(v.shape) for v in ours.values()] == list(keys.values()), name


def test_a_wrapped_file_of_a_zoo(data, tmp_path):
    """mdistiller's `latest` holds the student and the teacher of a training."""
    student, teacher = published("resnet8x4"), published("resnet32x4")
    parts = {f"module.{part}.{k}": v for part, s in (("student", student), ("teacher", teacher)) for k, v in s.items()}
    torch.save({"model": parts, "optimizer": {}, "epoch": 3}, tmp_path / "latest")
    for name, part in (("resnet8x4", "student"), ("resnet32x4", "teacher")):
        assert f"latest#model.module.{part}, " in load_teacher(name, data, CPU, weights=str(tmp_path / "latest")).about
    network = build_network("resnet8x4", CLASSES, 32)
    assert start_from(network, "resnet8x4", str(tmp_path / "latest"), 32).endswith("latest#model.module.student")
    assert torch.equal(network.state_dict()["fc.weight"], student["fc.weight"])


def test_a_file_without_shortcuts_is_refused_with_the_name_of_its_network(data, tmp_path):
    """As akamaster's files are saved, of a parallel network."""
    state = {f"module.{key}": value for key, value in published("resnet20_a").items()}
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "r.th")
    assert "r.th#state_dict.module, 32 px" in load_teacher("resnet20_a", data, CPU, weights=f"{tmp_path}/r.th").about
    with pytest.raises(InputError, match=r"r\.th#state_dict\.module.*do not fit: .* resnet20_a$"):
        load_teacher("resnet20", data, CPU, weights=f"{tmp_path}/r.th")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("mobile_full", "mobilenet_v2_cifar_full"), ("ShuffleV1", "shufflenet_v1_cifar"), ("ResNet50", "resnet50")],
)
def test_the_zoos_names_of_networks_get_ours(theirs, ours):
    with pytest.raises(InputError, match=f"^unknown network '{theirs}': here it is {ours} "):
        build_network(theirs, 10, 32)
