"""TrivialAugment and RandAugment beside torchvision's: every member at every level, and what is drawn how often."""

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from kdcache.pipeline.views.operations.kinds import auto, members
from kdcache.pipeline.views.operations.kinds.auto import (
    LEVELS,
    MEMBERS,
    NARROW,
    WIDE,
    RandAugment,
    Trivial,
    changed,
    curves,
)
from kdcache.pipeline.views.operations.kinds.members import ONE, sines
from kdcache.tests.contracts.operations import OperationContract, pictures, words_of
from kdcache.tests.helpers.lazily import Lazily

stats = Lazily("scipy.stats")
pytestmark = pytest.mark.usefixtures("one_thread")

SPACES = {"wide": WIDE, "narrow": NARROW}
OF_TORCHVISION = {"wide": v2.TrivialAugmentWide, "narrow": v2.RandAugment}
SIGNED, PLAIN, MOVED = MEMBERS[1:10], MEMBERS[10:12], MEMBERS[1:6]


class TestTrivial(OperationContract):
    operation, apart = Trivial(), 4.0  # nearest pixels of another grid
    drawn_digest, pixels_digest = "bf6cd2e2a5e3d05c", "046b694d23cdcde6"


class TestRandAugment(OperationContract):
    operation, apart = RandAugment(2, 9), 6.0
    drawn_digest, pixels_digest = "7b8f3a073fa50460", "b4fa60aa90fe43a1"


class TestStrongRandAugment(OperationContract):
    operation, apart = RandAugment(3, 15), 6.0
    drawn_digest, pixels_digest = "6d51760d803b8ab2", "2d2a290d551c9d36"


@pytest.fixture
def in_steps(monkeypatch):
    """Images on the CPU are changed as those on a GPU are."""
    monkeypatch.setattr(auto, "in_loops", lambda images: False)


@pytest.mark.usefixtures("in_steps")
class TestTrivialInSteps(TestTrivial):
    pass


@pytest.mark.usefixtures("in_steps")
class TestStrongRandAugmentInSteps(TestStrongRandAugment):
    pass


def levels_of(name):
    """All levels that a member can be drawn with."""
    return range(-LEVELS, LEVELS + 1) if name in SIGNED else range(LEVELS + 1) if name in PLAIN else [0]


def images_of(height, width):
    """Noise, few gray values, a smooth picture and flat channels."""
    made = pictures(4, height, width)
    made[2] = made[2] // 8 + 100
    made[3, 0], made[3, 2] = 77, made[3, 1]
    return made.contiguous(memory_format=torch.channels_last)


def ours(name, images, levels, space):
    """Every image at every level, [level, image, 3, H, W]."""
    many = images.repeat(len(levels), 1, 1, 1).contiguous(memory_format=torch.channels_last)
    level = np.repeat(np.array(levels, np.int8), len(images))[:, None]
    return changed(many, np.full_like(level, MEMBERS.index(name)), level, space).unflatten(0, (len(levels), -1))


def magnitude(name, level, space, height=224, width=224):
    """torchvision's number of this level, exactly."""
    if name.startswith("Shear"):
        return Fraction(space.shear * level, 1000)
    if name.startswith("Translate"):
        return space.shift * level * (width if name == "TranslateX" else height)
    if name == "Posterize":
        return 8 - round(Fraction(space.bits * level, LEVELS))
    if name == "Solarize":
        return Fraction(LEVELS - level, LEVELS)
    return space.turn * level if name == "Rotate" else Fraction(space.tone * level, 1000)


def theirs(name, images, level, space):
    """torchvision's answer to images of one size at one level."""
    exact = magnitude(name, level, space, *images.shape[2:])
    none = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    corner = {"center": [0, 0]}
    slope = math.degrees(math.atan(exact))
    calls = {
        "Identity": lambda: images,
        "ShearX": lambda: tv.affine(images, **(none | corner | {"shear": [slope, 0.0]})),
        "ShearY": lambda: tv.affine(images, **(none | corner | {"shear": [0.0, slope]})),
        "TranslateX": lambda: tv.affine(images, **(none | {"translate": [math.trunc(exact), 0]})),
        "TranslateY": lambda: tv.affine(images, **(none | {"translate": [0, math.trunc(exact)]})),
        "Rotate": lambda: tv.rotate(images, float(exact)),
        "Brightness": lambda: tv.adjust_brightness(images, 1 + float(exact)),
        "Color": lambda: tv.adjust_saturation(images, 1 + float(exact)),
        "Contrast": lambda: tv.adjust_contrast(images, 1 + float(exact)),
        "Sharpness": lambda: tv.adjust_sharpness(images, 1 + float(exact)),
        "Posterize": lambda: tv.posterize(images, exact),
        "Solarize": lambda: tv.solarize(images, float(255 * exact)),
        "AutoContrast": lambda: tv.autocontrast(images),
        "Equalize": lambda: tv.equalize(images),
    }
    return calls[name]()


# At most this share of values differs from torchvision's over all levels, and at a single one: (wide, narrow).
SHARES = {
    "ShearX": ((0, 0), (0.005, 0.1)),
    "ShearY": ((0, 0), (0.005, 0.1)),
    "Color": ((0.005, 0.02), (0.01, 0.1)),
    "Brightness": ((0, 0), (0.001, 0.03)),
    "Sharpness": ((0.0005, 0.005), (0.0005, 0.01)),
    "AutoContrast": ((0.03, 0.03), (0.03, 0.03)),
}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_at_every_level_is_as_torchvision_has_it(name, space):
    images, levels = images_of(32, 32), levels_of(name)
    expected = torch.stack([theirs(name, images, level, SPACES[space]) for level in levels])
    away = (ours(name, images, levels, SPACES[space]).int() - expected.int()).abs()
    assert name in MOVED or away.max() <= 1
    differs = (away > 0).flatten(1).float().mean(1)
    most, at_once = SHARES.get(name, ((0, 0), (0, 0)))[space == "narrow"]
    assert differs.mean() <= most and differs.max() <= at_once


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", MOVED)
def test_large_images_move_as_torchvision_moves_them(name, space):
    """Ties apart, which are in every fifth row of a shear by 1/5, say."""
    images, levels = images_of(224, 224)[:1], [-27, -11, 4, 17, 25]
    expected = torch.stack([theirs(name, images, level, SPACES[space]) for level in levels])
    differs = (ours(name, images, levels, SPACES[space]) != expected).flatten(1).float().mean(1)
    most = {"Rotate": 0.0002, "ShearX": 0.05, "ShearY": 0.05}.get(name, 0)
    assert differs.max() <= most
    assert name not in ("ShearX", "ShearY") or (differs == 0).sum() >= 3


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", [*SIGNED, *PLAIN])
def test_magnitudes_are_torchvisions(name, space):
    table, signed = OF_TORCHVISION[space]._AUGMENTATION_SPACE[name]
    got = [float(magnitude(name, level, SPACES[space])) for level in range(LEVELS + 1)]
    np.testing.assert_allclose(got, table(LEVELS + 1, 224, 224), atol=2e-5)
    assert signed == (name in SIGNED)


def places(name, level, space, height, width):
    """Where the pixels come from as fractions of pixels, without the roundings of the code: columns, and rows."""
    m = magnitude(name, level, space, height, width)
    down, across = np.meshgrid(*([Fraction(i) for i in range(n)] for n in (height, width)), indexing="ij")
    half = Fraction(1, 2)
    if name == "ShearX":
        return across + m * (down + half), down
    if name == "ShearY":
        return across, down + m * (across + half)
    if name == "TranslateX":
        return across - math.trunc(m), down
    if name == "TranslateY":
        return across, down - math.trunc(m)
    cosine, sine = (Fraction(int(table[level + LEVELS]), ONE) for table in sines(space.turn))
    x, y = across - Fraction(width - 1, 2), down - Fraction(height - 1, 2)
    return cosine * x - sine * y + Fraction(width - 1, 2), sine * x + cosine * y + Fraction(height - 1, 2)


@pytest.mark.parametrize("size", [(15, 12), (4, 130), (504, 3)])
@pytest.mark.parametrize("name", MOVED)
def test_pixels_come_from_the_nearest_places_of_exact_fractions(name, size):
    """Ties go up; beyond the edge is black."""
    height, width = size
    images = pictures(1, *size)
    framed = np.zeros((3, height + 2, width + 2), np.uint8)
    framed[:, 1:-1, 1:-1] = images[0]
    levels = [-30, -19, 10, 24]
    for level, got in zip(levels, ours(name, images, levels, WIDE), strict=True):
        column, row = (np.vectorize(math.floor)(p + Fraction(1, 2)) for p in places(name, level, WIDE, *size))
        expected = framed[:, row.clip(-1, height) + 1, column.clip(-1, width) + 1]
        assert np.array_equal(got[0].numpy(), expected), level


def toned(name, pixels, thousandths):
    """An image int64 [3, H, W] of exact values that are cut off."""
    gray = np.tensordot([2989, 5870, 1140], pixels, 1) // 10_000
    rest = 1000 - thousandths
    if name == "Brightness":
        return pixels * thousandths // 1000
    if name == "Color":
        return (pixels * thousandths + gray * rest) // 1000
    if name == "Contrast":
        return (pixels * thousandths * gray.size + gray.sum() * rest) // (1000 * gray.size)
    if name == "AutoContrast":
        least = pixels.min((1, 2), keepdims=True)
        span = pixels.max((1, 2), keepdims=True) - least
        return np.where(span > 0, (pixels - least) * 255 // span.clip(1), pixels)
    blurred = pixels.copy()
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (3, 3), (1, 2)).sum((3, 4))
    blurred[:, 1:-1, 1:-1] = (2 * (windows + 4 * pixels[:, 1:-1, 1:-1]) + 13) // 26
    return (pixels * thousandths + blurred * rest) // 1000


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", ["Brightness", "Color", "Contrast", "Sharpness", "AutoContrast"])
def test_tones_are_exact_values_cut_off(name, space):
    images, levels = images_of(23, 31), levels_of(name)
    for level, got in zip(levels, ours(name, images, levels, SPACES[space]), strict=True):
        for image, result in zip(images.numpy().astype(np.int64), got.numpy(), strict=True):
            expected = toned(name, image, 1000 + SPACES[space].tone * level).clip(0, 255)
            assert np.array_equal(result, expected), level


def test_sines_and_curves_are_the_same_on_every_machine():
    h = hashlib.sha256()
    for space in SPACES.values():
        for wave, table in zip((math.cos, math.sin), sines(space.turn), strict=True):
            exact = [wave(math.radians(float(space.turn * k))) * ONE for k in range(-LEVELS, LEVELS + 1)]
            assert max(abs(number - value) for number, value in zip(table, exact, strict=True)) < 0.5 - 0.005
            h.update(table.astype("<i8").tobytes())
        h.update(curves(space).tobytes())
    assert h.hexdigest()[:16] == "00fae202b39647b8"


def test_several_changes_come_one_after_the_other():
    operation, images = RandAugment(4, 12), pictures(40, 20, 20)
    drawn = operation.draw(words_of(operation, 40))
    whole = operation.apply(images.clone(), drawn)
    for i in range(4):
        images = changed(images, drawn["member"][:, i : i + 1], drawn["level"][:, i : i + 1], NARROW)
    assert torch.equal(images, whole)


@pytest.mark.usefixtures("in_steps")
def test_no_change_takes_all_pixels_at_once(monkeypatch):
    """Large batches are changed in pieces, with the same result."""
    operation, images = Trivial(), pictures(64, 12, 12)
    drawn = operation.draw(words_of(operation))
    whole = operation.apply(images.clone(), drawn)
    monkeypatch.setattr("kdcache.pipeline.views.operations.kinds.auto._AT_ONCE", 200)
    assert torch.equal(operation.apply(images.clone(), drawn), whole)


def drawn_by(transform, count):
    """What torchvision draws for `count` images: members, and their magnitudes."""
    found = []
    transform._apply_image_or_video_transform = lambda image, *drawn, **_: found.append(drawn) or image
    image = torch.zeros(3, 224, 224, dtype=torch.uint8)
    torch.manual_seed(7)
    for _ in range(count):
        transform(image)
    return np.array([MEMBERS.index(name) for name, _ in found]), np.array([number for _, number in found])


def nearest_levels(member, number, space):
    """The levels of magnitudes that torchvision has drawn."""
    levels = np.zeros(len(member), np.int64)
    for index in set(member):
        exact = [float(magnitude(MEMBERS[index], level, space)) for level in range(-LEVELS, LEVELS + 1)]
        rows = member == index
        levels[rows] = abs(number[rows, None] - exact).argmin(1) - LEVELS
    return levels


@pytest.mark.parametrize(
    ("transform", "operation", "space"),
    [(v2.TrivialAugmentWide(), Trivial(), WIDE), (v2.RandAugment(2, 9), RandAugment(2, 9), NARROW)],
)
def test_what_is_drawn_has_torchvisions_distribution(transform, operation, space):
    """Members, and levels with their signs, of which some members have none."""
    member, number = drawn_by(transform, 4000)
    drawn = {name: array.reshape(-1) for name, array in operation.draw(words_of(operation, 100_000)).items()}
    table = np.array([np.bincount(some, minlength=len(MEMBERS)) for some in (member, drawn["member"])])
    assert stats.chi2_contingency(table).pvalue > 0.01
    for names in (SIGNED, ("Solarize",)):
        here, there = (np.isin(some, [MEMBERS.index(name) for name in names]) for some in (drawn["member"], member))
        levels = drawn["level"][here] + LEVELS, nearest_levels(member[there], number[there], space) + LEVELS
        table = np.array([np.bincount(some, minlength=2 * LEVELS + 1) for some in levels])
        table = table[:, table.any(0)]
        assert table.shape[1] == 1 or stats.chi2_contingency(table).pvalue > 0.01
    without = ~np.isin(drawn["member"], [MEMBERS.index(name) for name in (*SIGNED, *PLAIN)])
    assert not drawn["level"][without].any()


@pytest.mark.parametrize("space", [auto.NARROW, auto.WIDE])
def test_every_pixel_comes_from_the_place_of_its_matrix(space):
    height, width = 65, 80
    images = torch.randint(1, 256, (61, height, width, 3), dtype=torch.uint8)
    rows, columns = np.mgrid[:height, :width]
    levels = np.arange(-LEVELS, LEVELS + 1, dtype=np.int8)[:, None]
    for member, matrices in enumerate(auto.matrices(space, height, width), auto.SHEAR_X):
        in_loops = changed(images.permute(0, 3, 1, 2).clone(), np.full_like(levels, member), levels, space)
        assert torch.equal(members.moved(images, matrices), in_loops.permute(0, 2, 3, 1))
        for image, got, (x, y) in zip(images.numpy(), members.moved(images, matrices), matrices, strict=True):
            column, row = ((m[0] * columns + m[1] * rows + m[2]) >> members.BITS for m in (x, y))
            inside = (0 <= column) & (column < width) & (0 <= row) & (row < height)
            want = image[row.clip(0, height - 1), column.clip(0, width - 1)] * inside[..., None]
            assert np.array_equal(got.numpy(), want)


def every_change():
    """All members at all of their levels, int8 [n] each."""
    found = [(member, level) for member, name in enumerate(MEMBERS) for level in levels_of(name)]
    return np.array(found, np.int8).T


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (5, 1), (2, 3), (3, 3), (4, 31), (32, 32), (61, 7)])
@pytest.mark.parametrize("space", SPACES)
def test_loops_on_a_cpu_give_the_bits_of_steps(space, size):
    """Every member at every level, and another change before and after it."""
    member, level = every_change()
    order = np.random.default_rng(size).permutation(len(member))
    drawn = [np.stack([of, of[order], of[::-1]], 1) for of in (member, level)]
    images = images_of(*size).repeat(len(member) // 4 + 1, 1, 1, 1)[: len(member)]
    expected = auto.by_steps(images.permute(0, 2, 3, 1), *drawn, SPACES[space]).permute(0, 3, 1, 2)
    for layout in (torch.contiguous_format, torch.channels_last):
        got = changed(images.clone(memory_format=layout), *drawn, SPACES[space])
        assert torch.equal(got, expected) and got.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("size", [(300, 224), (513, 130)])
def test_loops_on_a_cpu_give_the_bits_of_steps_on_large_images(size):
    """The second size needs places of more than 32 bits."""
    member, level = every_change()
    images = images_of(*size).repeat(7, 1, 1, 1)
    for space in SPACES.values():
        some = np.random.default_rng(size).permutation(len(member))[: 2 * len(images)]
        drawn = [of[some].reshape(-1, 2) for of in (member, level)]
        expected = auto.by_steps(images.permute(0, 2, 3, 1), *drawn, space).permute(0, 3, 1, 2)
        assert torch.equal(changed(images.clone(), *drawn, space), expected)
