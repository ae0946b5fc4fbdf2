import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdcache.cache.errors import InputError
from kdcache.pipeline.teachers.networks import build_network, names, small_stem

# Parameters at 100 classes, as the literature's tables have them.
COUNTS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet20_a": 275_572,
    "resnet110_a": 1_733_812,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg11_cifar": 9_277_284,
    "vgg13": 9_462_180,
    "vgg16_cifar": 14_774_436,
    "vgg19_cifar": 20_086_692,
    "mobilenet_v1": 3_309_476,
    "mobilenet_v2_cifar": 812_836,
    "mobilenet_v2_cifar_full": 2_353_060,
    "mobilenet_v2_tinyimagenet": 2_369_380,
    "shufflenet_v1_cifar": 949_258,
    "shufflenet_v2_cifar": 1_355_528,
}


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def conv(cin: int, cout: int, kernel: int = 3, groups: int = 1) -> int:
    return cin // groups * cout * kernel**2


def resnet(depth: int, widths: tuple[int, ...], classes: int, padded: bool = False) -> int:
    n, cin = (depth - 2) // 6, widths[0]
    total = conv(3, cin) + 2 * cin
    for i, w in enumerate(widths[1:]):
        total += conv(cin, w) + (2 * n - 1) * conv(w, w) + 2 * n * 2 * w
        total += conv(cin, w, 1) + 2 * w if not padded and (i > 0 or cin != w) else 0
        cin = w
    return total + (cin + 1) * classes


def wrn(depth: int, widen: int, classes: int) -> int:
    n, cin = (depth - 4) // 6, 16
    total = conv(3, cin)
    for w in (16 * widen, 32 * widen, 64 * widen):
        total += conv(cin, w) + (2 * n - 1) * conv(w, w)
        total += 2 * cin + (2 * n - 1) * 2 * w  # one norm before each convolution
        total += conv(cin, w, 1) if cin != w else 0
        cin = w
    return total + 2 * cin + (cin + 1) * classes


def vgg(repeats: tuple[int, ...], classes: int) -> int:
    total, cin = 0, 3
    for w, repeat in zip((64, 128, 256, 512, 512), repeats, strict=True):
        total += conv(cin, w) + (repeat - 1) * conv(w, w) + repeat * 3 * w  # bias, norm
        cin = w
    return total + (cin + 1) * classes


def mobilenet_v1(classes: int) -> int:
    total, cin = conv(3, 32) + 2 * 32, 32
    for w in (64, 128, 128, 256, 256, *[512] * 6, 1024, 1024):  # Howard et al. 2017, table 1
        total += conv(cin, cin, 3, cin) + conv(cin, w, 1) + 2 * cin + 2 * w
        cin = w
    return total + (cin + 1) * classes


def mobilenet_v2(part: int, classes: int, stem: int = 3, bias: int = 0) -> int:
    """Width 1 / part. bias: 1 where the convolutions have one."""
    cin = 32 // part
    total = conv(3, cin, stem) + (2 + bias) * cin
    table = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    for t, c, n in table:  # Sandler et al. 2018, table 2
        for _ in range(n):
            mid, cout = t * cin, c // part
            total += conv(cin, mid, 1) + conv(mid, mid, 3, mid) + conv(mid, cout, 1) + (2 + bias) * (2 * mid + cout)
            cin = cout
    return total + conv(cin, 1280, 1) + (2 + bias) * 1280 + 1281 * classes


def shufflenet_v1(classes: int) -> int:
    total, cin = conv(3, 24, 1) + 2 * 24, 24
    for w, n in ((240, 4), (480, 8), (960, 4)):
        for i in range(n):
            cout = w - cin if i == 0 else w
            mid = cout // 4
            total += conv(cin, mid, 1, 1 if cin == 24 else 3) + conv(mid, mid, 3, mid) + conv(mid, cout, 1, 3)
            total += 4 * mid + 2 * cout
            cin = w
    return total + (cin + 1) * classes


def shufflenet_v2(classes: int) -> int:
    total, cin = conv(3, 24, 1) + 2 * 24, 24
    for w, n in ((116, 4), (232, 8), (464, 4)):
        h = w // 2
        total += conv(cin, cin, 3, cin) + conv(cin, h, 1) + 2 * cin + 2 * h  # the left branch at stride 2
        total += conv(cin, h, 1) + (n - 1) * conv(h, h, 1)
        total += n * (conv(h, h, 3, h) + conv(h, h, 1) + 3 * 2 * h)
        cin = w
    return total + conv(cin, 1024, 1) + 2 * 1024 + 1025 * classes


NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
ARITHMETIC: dict[str, Callable[[int], int]] = {
    **{f"resnet{d}": partial(resnet, d, NARROW) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{d}_a": partial(resnet, d, NARROW, padded=True) for d in (20, 110)},
    **{f"resnet{d}x4": partial(resnet, d, WIDE) for d in (8, 32)},
    **{f"wrn_{d}_{k}": partial(wrn, d, k) for d in (16, 40) for k in (1, 2)},
    "vgg8": partial(vgg, (1, 1, 1, 1, 1)),
    "vgg11_cifar": partial(vgg, (1, 1, 2, 2, 2)),
    "vgg13": partial(vgg, (2, 2, 2, 2, 2)),
    "vgg16_cifar": partial(vgg, (2, 2, 3, 3, 3)),
    "vgg19_cifar": partial(vgg, (2, 2, 4, 4, 4)),
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2_cifar": partial(mobilenet_v2, 2),
    "mobilenet_v2_cifar_full": partial(mobilenet_v2, 1),
    "mobilenet_v2_tinyimagenet": partial(mobilenet_v2, 1, stem=1, bias=1),
    "shufflenet_v1_cifar": shufflenet_v1,
    "shufflenet_v2_cifar": shufflenet_v2,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_literatures(name: str) -> None:
    assert ARITHMETIC[name](100) == COUNTS[name]  # by hand from the papers, then what was built
    with torch.device("meta"):
        assert parameters(build_network(name, 100, 32)) == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_logits_are_finite_at_any_size(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name, 7, 32)
    for size in (8, 28, 32):
        with torch.no_grad():
            logits = network(torch.randn(2, 3, size, size))
        assert logits.shape == (2, 7) and logits.isfinite().all()


def test_every_parameter_learns() -> None:
    for name in (
        "resnet8x4",
        "resnet20_a",
        "wrn_16_2",
        "vgg8",
        "mobilenet_v1",
        "mobilenet_v2_cifar",
        "mobilenet_v2_tinyimagenet",
        "shufflenet_v1_cifar",
        "shufflenet_v2_cifar",
    ):
        torch.manual_seed(0)
        network = build_network(name, 5, 16)
        loss = nn.functional.cross_entropy(network(torch.randn(4, 3, 16, 16)), torch.arange(4))
        for gradient in torch.autograd.grad(loss, list(network.parameters())):  # raises for an unused one
            assert gradient.isfinite().all(), name


def test_stages_halve_the_map_where_the_literature_does() -> None:
    def maps(name: str, size: int) -> list[int]:
        network = build_network(name, 10, size)
        stages = network.get_submodule("stages")
        assert isinstance(stages, nn.Sequential)
        seen: list[int] = []

        def note(_module: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor) -> None:
            seen.append(out.shape[-1])

        for stage in stages:
            stage.register_forward_hook(note)
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, size, size))
        return seen

    assert maps("resnet8", 32) == [32, 16, 8]
    assert maps("wrn_16_1", 32) == [32, 16, 8]
    assert maps("vgg8", 32) == [16, 8, 4, 4, 4]
    assert maps("vgg8", 64) == [32, 16, 8, 4, 4]
    assert maps("mobilenet_v2_cifar", 32) == [16, 16, 8, 4, 4, 2, 2]
    assert maps("mobilenet_v2_tinyimagenet", 64) == [66, 33, 17, 9, 9, 9, 9]
    assert maps("mobilenet_v1", 224) == [112, 56, 28, 14, 7]
    assert maps("shufflenet_v1_cifar", 32) == maps("shufflenet_v2_cifar", 32) == [16, 8, 4]


def test_initial_weights() -> None:
    torch.manual_seed(0)
    network = build_network("resnet20", 10, 32)
    last = [m for m in network.modules() if isinstance(m, nn.Conv2d)][-1]
    assert last.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "shufflenet_v2_cifar", "resnet18"])
def test_the_seed_decides_the_weights(name: str) -> None:
    def state(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return build_network(name, 10, 32).state_dict()

    first, again, other = state(1), state(1), state(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_torchvision_resnets_get_the_small_stem_up_to_64_pixels() -> None:
    torch.manual_seed(0)
    small, large = build_network("resnet18", 10, 64), build_network("resnet18", 10, 65)
    assert parameters(small) == 11_173_962  # the usual count for CIFAR-10
    assert parameters(large) - parameters(small) == (49 - 9) * 3 * 64
    stem = small.get_submodule("conv1")
    assert isinstance(stem, nn.Conv2d) and stem.stride == (1, 1) and stem.bias is None
    assert stem.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert isinstance(small.get_submodule("maxpool"), nn.Identity)
    assert isinstance(large.get_submodule("maxpool"), nn.MaxPool2d)
    with torch.no_grad():
        assert small.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_small_stem_tells_which_variant_is_built() -> None:
    for name in ("resnet18", "resnext50_32x4d", "wide_resnet50_2", "torchvision/resnet34"):
        assert small_stem(name, 32) and small_stem(name, 64) and not small_stem(name, 224)
    for name in (
        "resnet20",
        "resnet8x4",
        "vgg13",
        "densenet121",
        "timm/resnet18",
        "nets:resnet18",
        "resnet33",
    ):
        assert not small_stem(name, 32)


def test_torchvision_models() -> None:
    with torch.device("meta"), torch.no_grad():
        for name, size in (
            ("googlenet", 64),
            ("inception_v3", 96),
            ("vit_b_16", 32),
            ("mobilenet_v3_small", 32),
        ):
            assert build_network(name, 6, size)(torch.empty(2, 3, size, size)).shape == (2, 6), name
        cifar, torchvision = build_network("vgg13", 10, 32), build_network("torchvision/vgg13", 10, 32)
    assert parameters(torchvision) > 10 * parameters(cifar)


def test_sizes_a_network_cannot_take() -> None:
    with pytest.raises(InputError, match="'vgg8' needs images of 8 px or more"):
        build_network("vgg8", 10, 7)
    with pytest.raises(InputError, match=r"'vit_b_16' cannot be built for 30 px images: .*patch size"):
        build_network("vit_b_16", 10, 30)


def test_names_can_be_asked_for() -> None:
    known = names()
    assert set(COUNTS) <= set(known) and {"resnet18", "convnext_tiny", "torchvision/vgg13"} <= set(known)
    assert len(known) == len(set(known))


def test_unknown_names_get_the_nearest_ones() -> None:
    with pytest.raises(InputError) as caught:
        build_network("resnet33", 10, 32)
    message = str(caught.value)
    assert message.startswith("unknown network 'resnet33': did you mean ")
    assert "resnet32" in message and "resnet34" in message and "\n" not in message
    assert message.endswith("(kdcache knows torchvision's names, the CIFAR networks, timm/NAME and module:function)")
    with pytest.raises(InputError, match="did you mean wrn_40_2"):
        build_network("WRN-40-2", 10, 32)
    with pytest.raises(InputError, match=r"^unknown network 'qqq' \(kdcache knows"):
        build_network("qqq", 10, 32)


def test_timm_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError) as caught:
        build_network("timm/resnet18", 10, 32)
    assert str(caught.value) == "network 'timm/resnet18' needs timm: pip install timm"


def test_timm() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"), torch.no_grad():
        assert build_network("timm/resnet10t", 6, 32)(torch.empty(2, 3, 32, 32)).shape == (2, 6)
    with pytest.raises(InputError, match=r"^unknown network 'timm/resnet10q': did you mean .*timm/resnet10t"):
        build_network("timm/resnet10q", 6, 32)
    with pytest.raises(InputError, match="timm has no such model"):
        build_network("timm/hf-hub:nobody/nothing", 6, 32)


MY_NETS = """
from torch import nn

def student(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))

def fixed():
    return student(4)

def keyword(*, classes=3):
    return student(classes)

def wrong(classes):
    return classes

def fails(classes):
    raise ValueError("no such\\nlayer")
"""


def test_module_function_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_kdcache_nets.py").write_text(MY_NETS)
    (tmp_path / "my_broken_nets.py").write_text("import surely_not_installed")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    monkeypatch.setattr(sys, "path", list(before))
    x = torch.zeros(2, 3, 2, 2)
    try:
        assert build_network("my_kdcache_nets:student", 9, 2)(x).shape == (2, 9)
        assert build_network("my_kdcache_nets:fixed", 9, 2)(x).shape == (2, 4)
        for function, problem in {
            "studnet": "'my_kdcache_nets' has no function 'studnet': did you mean student?",
            "keyword": "the function must take the number of classes first, or nothing",
            "wrong": "wrong returned int, not a torch.nn.Module",
            "fails": "fails(9) failed: ValueError: no such layer",
        }.items():
            with pytest.raises(InputError) as caught:
                build_network(f"my_kdcache_nets:{function}", 9, 2)
            assert str(caught.value) == f"network 'my_kdcache_nets:{function}': {problem}"
        with pytest.raises(InputError, match=r"cannot import 'my_broken_nets': .*surely_not_installed"):
            build_network("my_broken_nets:student", 9, 2)
    finally:
        sys.modules.pop("my_kdcache_nets", None)
    assert sys.path == [*before, str(tmp_path)]  # once, and for worker processes too
