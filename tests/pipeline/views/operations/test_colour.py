"""The operations on colours: contracts, distributions, and the answers of Pillow, torchvision and colorsys."""

import colorsys
from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as reference
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import functional as tv

from kdcache.pipeline.views.operations.kinds import colour
from kdcache.pipeline.views.operations.kinds.colour import Blur, Color, Gray, Solarize, Three, deviation, kernel
from kdcache.pipeline.views.operations.pixels import ONE, SMOOTHED, blend, smooth
from kdcache.tests.contracts.operations import OperationContract, pictures, words_of
from kdcache.tests.helpers.lazily import Lazily

stats = Lazily("scipy.stats")


class TestColor(OperationContract):
    operation = Color(0.4, 0.5, 0.6, 0.1)
    drawn_digest, pixels_digest = "0f503fb962336bbd", "301b9c71c5777a3c"


class TestGray(OperationContract):
    operation = Gray(0.5)
    drawn_digest, pixels_digest = "6833b1d9801b6815", "50ff66303f562b0c"


class TestSolarize(OperationContract):
    operation = Solarize(0.5)
    drawn_digest, pixels_digest = "ada5fe1c7934d987", "9d802fbfbc8b06b6"


class TestBlur(OperationContract):
    operation, size = Blur(0.8), (72, 65)
    drawn_digest, pixels_digest = "0c76dc6cbf988fdd", "de0d4b48cb7a3365"


class TestThree(OperationContract):
    operation, size = Three(), (72, 65)
    drawn_digest, pixels_digest = "bd615ae573690909", "92dd9616a0ef5e25"


@pytest.fixture
def in_steps(monkeypatch):
    """Images on the CPU are changed as those on a GPU are."""
    monkeypatch.setattr(colour, "in_loops", lambda images: False)


@pytest.mark.usefixtures("in_steps")
class TestColorInSteps(TestColor):
    pass


@pytest.mark.usefixtures("in_steps")
class TestThreeInSteps(TestThree):
    pass


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (2, 3), (33, 34), (160, 97), (300, 224)])
@pytest.mark.parametrize("operation", [Color(0.9, 2, 10, 0.5), Gray(0.5), Blur(0.9)])
def test_loops_on_a_cpu_give_the_bits_of_steps(operation, size, monkeypatch):
    n = 400 if size[0] < 20 else 24
    images, drawn = pictures(n, *size), operation.draw(words_of(operation, n))
    images[n // 2] = 200
    in_loops = [
        operation.apply(images.clone(memory_format=layout), drawn)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    monkeypatch.setattr(colour, "in_loops", lambda images: False)
    expected = operation.apply(images.clone(), drawn)
    assert torch.equal(in_loops[0], expected) and torch.equal(in_loops[1], expected)


NEUTRAL = {"brightness": ONE, "contrast": ONE, "saturation": ONE, "hue": 0}
ENHANCED = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}
FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


def adjusted(images, **factors):
    """Images with factors [n] by the names of the parts, the others being neutral."""
    n = len(images)
    drawn = {name: np.full(n, value, np.int16) for name, value in NEUTRAL.items()}
    drawn |= {name: np.asarray(value, np.int16) for name, value in factors.items()} | {"order": np.zeros(n, np.uint8)}
    return Color().apply(images.clone(), drawn)


def by_pillow(change, images, *parameters):
    """change(image, its parameter...) of each image as Pillow has it, uint8 [n, 3, H, W]."""
    pillow = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    changed = [change(*these) for these in zip(pillow, *parameters, strict=True)]
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in changed])


def levels_apart(a, b):
    return (a.int() - b.int()).abs()


@FORMATS
@pytest.mark.parametrize("part", ENHANCED)
def test_factors_give_the_bits_of_pillow_and_at_most_a_level_less_or_more_than_torchvision(part, memory_format):
    images, factors = pictures(64, 31, 27), np.linspace(0, 2 * ONE, 64).astype(int)
    ours = adjusted(images.contiguous(memory_format=memory_format), **{part: factors})
    assert torch.equal(ours, by_pillow(lambda i, f: ENHANCED[part](i).enhance(f / ONE), images, factors.tolist()))
    theirs = torch.stack([getattr(tv, f"adjust_{part}")(i, f / ONE) for i, f in zip(images, factors, strict=True)])
    assert levels_apart(ours, theirs).max() <= 1


def test_the_hue_is_the_exact_one_rounded_and_at_most_a_level_from_torchvision():
    images, steps = pictures(64, 9, 11), np.linspace(-3072, 3072, 64).astype(int)
    images[0, :, 0], images[1, :, 0] = 255, 0
    ours = adjusted(images, hue=steps)
    exact = np.empty(images.shape)
    for i, step in enumerate(steps.tolist()):
        for y, x in np.ndindex(9, 11):
            hue, saturation, value = colorsys.rgb_to_hsv(*(images[i, :, y, x].numpy() / 255))
            exact[i, :, y, x] = colorsys.hsv_to_rgb((hue + step / 6144) % 1, saturation, value)
    assert abs(ours.numpy() - 255 * exact).max() <= 0.5 + 1e-9
    theirs = torch.stack([tv.adjust_hue(image, step / 6144) for image, step in zip(images, steps, strict=True)])
    assert levels_apart(ours, theirs).max() <= 1


def test_every_colour_turns_in_loops_as_it_does_in_steps(monkeypatch):
    """For every fifteenth of all colours."""
    values = torch.cartesian_prod(*[torch.arange(0, 256, step, dtype=torch.uint8) for step in (5, 3, 1)])
    images = values[: len(values) // 96 * 96].view(96, 1, -1, 3).permute(0, 3, 1, 2)
    steps = np.linspace(-3072, 3072, 96).astype(int)
    in_loops = adjusted(images, hue=steps)
    monkeypatch.setattr(colour, "in_loops", lambda images: False)
    assert torch.equal(in_loops, adjusted(images, hue=steps))


def test_the_parts_are_applied_in_the_order_that_was_drawn():
    """By Pillow, and by an adjustment of the hue alone, one part after the other."""
    operation = Color(0.8, 0.8, 0.8, 0.2)
    images, drawn = pictures(200, 8, 8), operation.draw(words_of(operation, 200))
    assert len(set(drawn["order"].tolist())) == 24
    orders = np.array(list(permutations(NEUTRAL)))[drawn["order"]]
    expected = images.clone()
    for i in range(200):
        for part in orders[i]:
            factor = drawn[part][i : i + 1]
            if part == "hue":
                expected[i : i + 1] = adjusted(expected[i : i + 1], hue=factor)
            else:
                expected[i : i + 1] = by_pillow(
                    lambda image, f, part=part: ENHANCED[part](image).enhance(f / ONE), expected[i : i + 1], factor
                )
    assert torch.equal(operation.apply(images, drawn), expected)


@FORMATS
def test_gray_and_solarize_give_the_bits_of_pillow(memory_format):
    images = pictures(64, 31, 27)
    ones = np.ones(64, np.uint8)
    ours = Gray().apply(images.clone(memory_format=memory_format), {"gray": ones})
    assert torch.equal(ours, by_pillow(lambda image: image.convert("L").convert("RGB"), images))
    assert levels_apart(ours, tv.rgb_to_grayscale(images, 3)).max() <= 1
    ours = Solarize().apply(images.clone(memory_format=memory_format), {"solarize": ones})
    assert torch.equal(ours, by_pillow(ImageOps.solarize, images)) and torch.equal(ours, tv.solarize(images, 128))


@FORMATS
@pytest.mark.parametrize("size", [(224, 224), (160, 176), (32, 32)])
def test_blur_is_at_most_a_level_from_torchvision(size, memory_format):
    sigmas = np.array([1, 40, 90, 128, 170, 200, 230, 255], np.uint8)
    images = pictures(8, *size)
    ours = Blur().apply(images.clone(memory_format=memory_format), {"sigma": sigmas})
    for i, sigma in enumerate(sigmas.tolist()):
        wide, reach = float(deviation(sigma, min(size))), max(1, len(kernel(sigma, min(size))) - 1)
        theirs = tv.gaussian_blur(images[i], [2 * reach + 1] * 2, [wide, wide])
        assert levels_apart(ours[i], theirs).max() <= 1 and levels_apart(ours[i], theirs).float().mean() < 0.01


@pytest.mark.parametrize("side", [1, 2, 3, 32, 160, 224, 640])
def test_kernels_are_gaussians_that_sum_to_one(side):
    assert [float(deviation(sigma, 224)) for sigma in (1, 128, 255)] == pytest.approx([0.1037, 1.05, 1.9963], abs=1e-4)
    for sigma in range(1, 256):
        weights = np.array(kernel(sigma, side))
        assert weights[0] + 2 * weights[1:].sum() == SMOOTHED and (weights > 0).all() and len(weights) <= side
        wide = float(deviation(sigma, side))
        places = np.arange(int(np.ceil(3 * wide)) + 1)
        exact = np.exp(-(places**2) / (2 * wide**2))
        exact *= SMOOTHED / (exact[0] + 2 * exact[1:].sum())
        exact[: len(weights)] -= weights
        assert abs(exact[1:]).max() <= 0.5 + 1e-6 and abs(exact[0]) <= len(exact)


def test_blur_keeps_every_plain_image_as_it_is():
    """Sums of the largest values stay within 31 bits."""
    plain = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).repeat(1, 3, 3, 3)
    for weights in ([SMOOTHED, 0, 0], [SMOOTHED - 4, 1, 1], [13108, 13107, 13107]):
        assert torch.equal(smooth(plain, np.array([weights] * 256)), plain)


@FORMATS
def test_the_largest_weights_of_a_blend_do_not_overflow(memory_format):
    images, levels = pictures(20, 7, 9, seed=1), pictures(20, 7, 9, seed=2)[:, :1].int()
    weights = np.random.default_rng(0).integers(0, 16 * ONE, 20)
    a, b, w = images.numpy().astype(float), levels.numpy().astype(float), weights.reshape(20, 1, 1, 1) / ONE
    expected = np.clip(np.floor(a * w + b * (1 - w)), 0, 255)
    assert np.array_equal(blend(images.contiguous(memory_format=memory_format), levels, weights).numpy(), expected)


# Torchvision's draws, 4,000 of each.
N = 4000


@pytest.mark.parametrize(("part", "most"), [("brightness", 0.4), ("contrast", 1.5), ("saturation", 0.7), ("hue", 0.1)])
def test_factors_are_spread_as_those_of_torchvision(part, most):
    torch.manual_seed(0)
    jitter, ours = reference.ColorJitter(**{part: most}), Color(**{**dict.fromkeys(NEUTRAL, 0.0), part: most})
    theirs = [jitter.make_params([])[f"{part}_factor"] for _ in range(N)]
    drawn = ours.draw(words_of(ours, N))
    assert stats.ks_2samp(drawn[part] / (6144 if part == "hue" else ONE), theirs).pvalue > 0.01
    assert all((drawn[name] == value).all() for name, value in NEUTRAL.items() if name != part)


def test_factors_and_orders_are_independent_and_every_order_is_as_probable():
    drawn = Color(0.4, 0.4, 0.4, 0.5).draw(words_of(Color(), 24_000))
    assert stats.chisquare(np.bincount(drawn["order"], minlength=24)).pvalue > 0.01
    correlations = np.corrcoef([drawn[name] for name in (*NEUTRAL, "order")])
    assert abs(correlations - np.eye(5)).max() < 0.03


def test_the_ends_of_the_ranges_are_drawn():
    words = np.array([[0] * 4, [2**64 - 1] * 4], np.uint64)
    drawn = Color(0.25, 2, 10, 0.5).draw(words)
    assert {name: array.tolist() for name, array in drawn.items()} == {
        "brightness": [768, 1280],
        "contrast": [0, 3072],
        "saturation": [0, 11264],
        "hue": [-3072, 3072],
        "order": [0, 23],
    }


@pytest.mark.parametrize(("operation", "name"), [(Gray, "gray"), (Solarize, "solarize"), (Blur, "sigma")])
def test_as_many_images_are_changed_as_asked_for(operation, name):
    for p in (0.2, 0.5):
        changed = np.count_nonzero(operation(p).draw(words_of(operation(), N))[name])
        assert stats.chisquare([changed, N - changed], [p * N, (1 - p) * N]).pvalue > 0.01
    assert not operation(0).draw(words_of(operation(), N))[name].any()
    assert operation(1).draw(words_of(operation(), N))[name].all()


def test_blurs_are_spread_as_those_of_torchvision():
    torch.manual_seed(0)
    theirs = [reference.GaussianBlur(9, (0.1, 2.0)).make_params([])["sigma"][0] for _ in range(N)]
    ours = [float(deviation(sigma, 224)) for sigma in Blur(1).draw(words_of(Blur(), N))["sigma"].tolist()]
    assert stats.ks_2samp(ours, theirs).pvalue > 0.01


def test_three_does_exactly_one_and_each_as_often():
    drawn = Three().draw(words_of(Three(), N))
    done = np.stack([drawn[name] > 0 for name in ("gray", "solarize", "sigma")])
    assert (done.sum(0) == 1).all() and stats.chisquare(done.sum(1)).pvalue > 0.01
    images = pictures(N // 100)
    few = {name: array[: len(images)] for name, array in drawn.items()}
    for operation, name in ((Gray(), "gray"), (Solarize(), "solarize"), (Blur(), "sigma")):
        rows = np.flatnonzero(few[name])
        expected = operation.apply(images[rows], {name: few[name][rows]})
        assert torch.equal(Three().apply(images.clone(), few)[rows], expected)
