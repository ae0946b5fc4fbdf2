"""Mixed images: torchvision's draws in distribution; pixels and weights of labels as drawn."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from kdcache.cache.errors import InputError
from kdcache.pipeline.views.operations import boxes
from kdcache.pipeline.views.operations.beta import THRESHOLDS
from kdcache.pipeline.views.operations.kinds.mix import Cutmix, Mixup, beta_weights, label_weights, mixed
from kdcache.tests.contracts.operations import COUNT, digest, pictures, words_of
from kdcache.tests.helpers.lazily import Lazily

stats = Lazily("scipy.stats")
MIXES = [Mixup(0.8), Mixup(0.1), Cutmix(1.0), Cutmix(0.5)]
FORMATS = [torch.contiguous_format, torch.channels_last]
LARGE = 1024  # pixels: torchvision's boxes have whole ones, which matter less the more there are


def drawn_of(mix, n=COUNT, seed=0):
    return mix.draw(words_of(mix, n, seed))


def both_kinds():
    """Mixup and cutmix by turns, and one row of both at once."""
    blends, pastes = (drawn_of(mix) for mix in (Mixup(0.8), Cutmix(1.0)))
    drawn = {name: blends[name].copy() for name in blends}
    for name, array in drawn.items():
        array[1::2] = pastes[name][1::2]
    drawn["weight"][1] = 100
    return drawn


def rows(drawn, some):
    return {name: array[some] for name, array in drawn.items()}


def partners_of(images):
    return images.flip(0)


@pytest.fixture
def torch_seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_a_mix_is_a_frozen_dataclass_whose_argument_has_bounds(mix):
    assert mix.stage == "mix" and mix.stream == {"mixup": 10, "cutmix": 11}[mix.name]
    (argument,) = dataclasses.fields(mix)
    bounds = tuple(argument.metadata[bound] for bound in ("least", "most"))
    assert bounds == (min(THRESHOLDS), max(THRESHOLDS)) and argument.default in THRESHOLDS
    with pytest.raises(dataclasses.FrozenInstanceError):
        mix.alpha = 1.0


DIGESTS = ["cc146d6ad300bb19", "96fc4dc7b62d7e54", "89e05e35135a51ad", "3db8170eaafbff51"]


@pytest.mark.parametrize(("mix", "expected"), list(zip(MIXES, DIGESTS, strict=True)), ids=str)
def test_what_is_drawn_never_changes(mix, expected):
    assert digest(drawn_of(mix)) == expected


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_each_row_is_drawn_from_its_own_words(mix):
    words, order = words_of(mix), np.random.default_rng(1).permutation(COUNT)[:20]
    whole = mix.draw(words)
    assert {name: (array.dtype, array.shape) for name, array in whole.items()} == {
        "weight": (np.uint16, (COUNT,)),
        "box": (np.int32, (COUNT, 4)),
    }
    assert digest(mix.draw(words[order])) == digest(rows(whole, order)) != digest(mix.draw(words[:20]))
    assert digest(mix.draw(words[:0])) == digest(rows(whole, slice(0))) and np.array_equal(words, words_of(mix))


@pytest.mark.parametrize("word", [0, 2**64 - 1])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_extreme_words_are_drawn_within_the_bounds(mix, word):
    drawn = mix.draw(np.full((1, mix.words), word, np.uint64))
    top, left, bottom, right = drawn["box"][0]
    assert drawn["weight"][0] <= 256 and 0 <= top <= bottom <= 2**16 and 0 <= left <= right <= 2**16


@pytest.mark.parametrize("alpha", THRESHOLDS)
def test_the_table_is_the_beta_distribution(alpha):
    """scipy's in float64: of draws that are rounded to 1/256."""
    expected = stats.beta.cdf((np.arange(256) + 0.5) / 256, alpha, alpha)
    assert np.abs(np.array(THRESHOLDS[alpha].split(), float) - expected[:128] * 2**32).max() <= 1
    words = np.arange(2**14, dtype=np.uint64) << np.uint64(50)
    weights = beta_weights(words, alpha)
    assert (np.diff(weights) >= 0).all() and np.array_equal(beta_weights(~words, alpha), 256 - weights)
    shares = np.bincount(weights, minlength=257).cumsum()[:256] / len(words)
    assert np.abs(shares - expected).max() <= 2**-14


def test_an_alpha_without_a_table_is_refused():
    for mix in (Mixup, Cutmix):
        for alpha in (0.25, 3.0, 0.0, -1.0, float("nan")):
            with pytest.raises(InputError, match=r"Beta\(.*\): take an alpha of 0\.1, 0\.2, .*, 1, 1\.5, 2, 4$"):
                mix(alpha)
    assert Mixup(1) == Mixup(1.0)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 4.0])
def test_weights_are_distributed_as_torchvisions(alpha, torch_seed):
    theirs = v2.MixUp(alpha=alpha, num_classes=2)
    expected = [round(theirs.make_params([])["lam"] * 256) for _ in range(5000)]
    assert stats.kstest(drawn_of(Mixup(alpha), 5000)["weight"], expected).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_boxes_are_distributed_as_torchvisions(alpha, torch_seed):
    theirs, image = v2.CutMix(alpha=alpha, num_classes=2), torch.empty(1, 3, LARGE, LARGE)
    params = [theirs.make_params([image]) for _ in range(3000)]
    drawn = drawn_of(Cutmix(alpha), 3000)
    assert (drawn["weight"] == 256).all()
    # Areas are drawn in steps of 1/256, so they are compared in these.
    parts = label_weights(drawn, LARGE, LARGE)[:, 1], 1 - np.array([p["lam_adjusted"] for p in params])
    assert stats.kstest(*(np.rint(256 * part) for part in parts)).pvalue > 1e-3
    left, top, right, bottom = np.array([p["box"] for p in params]).T
    ours, expected = boxes.edges(drawn["box"], LARGE, LARGE), np.stack([top, left, bottom, right], 1)
    ours, expected = (edges[edges[:, 2] - edges[:, 0] > LARGE // 8] for edges in (ours, expected))
    for edge in range(4):
        assert stats.kstest(ours[:, edge], expected[:, edge]).pvalue > 1e-3


@pytest.mark.parametrize("size", [32, 224])
def test_a_box_is_torchvisions_up_to_its_rounding(size, torch_seed):
    """From the same weights and middles. torchvision rounds middles and lengths down, we round edges to the nearest."""
    words = words_of(Cutmix(1.0), 500)
    ours = boxes.edges(Cutmix(1.0).draw(words)["box"], size, size)
    middles = (words[:, 1:] >> np.uint64(32)).astype(np.int64) * size >> 32
    theirs, image = v2.CutMix(alpha=1.0, num_classes=2), torch.empty(1, 3, size, size)
    for i, weight in enumerate(beta_weights(words[:, 0], 1.0).tolist()):
        theirs._dist = torch.distributions.Uniform(weight / 256, weight / 256 + 1e-7)
        at = iter(torch.from_numpy(middles[i, ::-1].copy()).split(1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randint", lambda *_, at=at, **__: next(at))
            left, top, right, bottom = theirs.make_params([image])["box"]
        larger = ours[i] - np.array([top, left, bottom, right])
        assert np.abs(larger[:2]).max() <= 1 and larger[2:].min() >= 0 and larger[2:].max() <= 2


@pytest.mark.parametrize("size", [(13, 17), (1, 1), (1, 7), (32, 32)])
def test_pixels_are_those_of_torchvisions_formulas_in_float64(size):
    images, drawn = pictures(COUNT, *size), both_kinds()
    partners = partners_of(images)
    got, own, other = (x.numpy().astype(np.float64) for x in (mixed(images, partners, drawn), images, partners))
    w = drawn["weight"][:, None, None, None] / 256
    blend = own * w + other * (1 - w)
    for i, (top, left, bottom, right) in enumerate(boxes.edges(drawn["box"], *size)):
        outside = np.ones(size, bool)
        outside[top:bottom, left:right] = False
        assert np.abs(got[i] - blend[i])[:, outside].max(initial=0) <= 0.5
        assert np.array_equal(got[i][:, ~outside], other[i][:, ~outside])


def test_every_value_is_blended_with_every_weight():
    values = torch.arange(256, dtype=torch.uint8)
    for weights in np.array_split(np.arange(257), 8):
        own, other = (values.view(1, 1, *shape).expand(len(weights), 1, 256, 256) for shape in ((-1, 1), (1, -1)))
        drawn = {"weight": weights.astype(np.uint16), "box": np.zeros((len(weights), 4), np.int32)}
        w = weights[:, None, None, None]
        exact = own.numpy().astype(np.int64) * w + other.numpy().astype(np.int64) * (256 - w) + 128 >> 8
        assert np.array_equal(mixed(own, other, drawn).numpy(), exact)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_batch_is_its_images_in_any_order_and_one_by_one(memory_format):
    images, drawn = pictures().contiguous(memory_format=memory_format), both_kinds()
    partners, before = partners_of(images), images.clone()
    whole = mixed(images, partners, drawn)
    assert whole.is_contiguous(memory_format=memory_format) and whole.dtype == torch.uint8
    assert torch.equal(images, before) and torch.equal(partners, partners_of(before))
    order = np.random.default_rng(1).permutation(COUNT)
    assert torch.equal(mixed(images[order], partners[order], rows(drawn, order)), whole[order])
    for i in range(COUNT):
        one = slice(i, i + 1)
        assert torch.equal(mixed(images[one], partners[one], rows(drawn, one)), whole[one])


def test_memory_formats_gaps_and_pieces_make_no_difference(monkeypatch):
    images, drawn = pictures(), both_kinds()
    partners = partners_of(images)
    expected = mixed(images, partners, drawn)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (images, partners)]
    gaps = [F.pad(x, (2, 3, 1, 4))[:, :, 1:-4, 2:-3] for x in (images, partners)]
    for own in (images, last[0], gaps[0]):
        for other in (partners, last[1], gaps[1]):
            assert torch.equal(mixed(own, other, drawn), expected)
    monkeypatch.setattr("kdcache.pipeline.views.operations.kinds.mix._CPU_PIECE", 3000)
    assert torch.equal(mixed(images, partners, drawn), expected)


def test_threads_make_no_difference():
    images, drawn, before = pictures(height=40, width=40), both_kinds(), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(mixed(images, partners_of(images), drawn))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_gpu_gives_the_same_bits(memory_format):
    images, drawn = pictures(height=40, width=40).contiguous(memory_format=memory_format), both_kinds()
    there = mixed(images.cuda(), partners_of(images).cuda(), drawn)
    assert there.is_cuda and there.is_contiguous(memory_format=memory_format)
    assert torch.equal(there.cpu(), mixed(images, partners_of(images), drawn))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("black", [False, True])
def test_pasting_by_mask_as_on_a_gpu_gives_what_a_cpu_pastes(memory_format, black):
    images = pictures().contiguous(memory_format=memory_format)
    source = None if black else partners_of(images)
    pixels = boxes.edges(drawn_of(Cutmix(1.0))["box"], *images.shape[2:])
    results = [images.clone(), images.clone()]
    boxes._paste_by_image(results[0], pixels, source)
    boxes._paste_by_mask(results[1], pixels, source)
    assert torch.equal(*results) and not torch.equal(results[0], images)


EDGE, SIDE = st.integers(0, 2**16), st.integers(1, 40)


@given(st.integers(0, 256), st.tuples(EDGE, EDGE, EDGE, EDGE), SIDE, SIDE)
def test_weights_of_labels_are_the_parts_of_the_pixels(weight, edges, height, width):
    """The pixels of a white image that a black one leaves, counted."""
    (top, bottom), (left, right) = sorted(edges[:2]), sorted(edges[2:])
    box = np.array([[top, left, bottom, right]], np.int32)
    white = torch.full((1, 3, height, width), 255, dtype=torch.uint8)
    pasted = mixed(white, torch.zeros_like(white), {"weight": np.array([256], np.uint16), "box": box})
    part = int((pasted[0, 0] == 255).sum()) * weight / (256 * height * width)
    got = label_weights({"weight": np.array([weight], np.uint16), "box": box}, height, width)
    assert got.dtype == np.float32 and got.shape == (1, 2)
    assert got[0, 0] == np.float32(part) and abs(got[0, 1] - (1 - part)) <= 2**-24


def test_both_of_a_pair_are_mixed_alike():
    images, drawn = pictures(), both_kinds()
    other = partners_of(images)
    total = mixed(images, other, drawn).int() + mixed(other, images, drawn).int()
    assert (total - images.int() - other.int()).abs().max() <= 1
    assert np.abs(label_weights(drawn, 13, 17).sum(1) - 1).max() <= 2**-23


def test_a_sample_that_is_alone_stays_as_it_is():
    images = pictures()
    assert torch.equal(mixed(images, images, both_kinds()), images)
