"""Boxes and flips: the rules, the pieces that they are drawn in, and what is the same for ever."""

import hashlib
import math
import tracemalloc

import numpy as np
import pytest

from kdcache.cache import KdcacheError
from kdcache.pipeline.views.draws import words
from kdcache.pipeline.views.operations.kinds.geometry import Crop, Flip, ResizedCrop, Whole, geometry
from kdcache.pipeline.views.parameters import TEACHING

RULES = {"none": Whole(), "crop": Crop(), "rrc": ResizedCrop()}
# Drawn by the release that drew all samples at once.
DIGESTS = {
    "none": "d3a90c3dc5958974",
    "flip": "db7ad4fa4f3eb981",
    "crop": "8e1b6cfc3e21fc96",
    "crop,flip": "a6d9b995d8a76a15",
    "rrc": "86131703fa24ad36",
    "rrc,flip": "e932ef430c5ce433",
}


def many_sizes(n):
    """Sides from 1 to 2,003 in every proportion, so that a third of the samples needs a second try, or all ten."""
    return (np.arange(2 * n, dtype=np.int64).reshape(n, 2) * 7919 % 2003 + 1).astype(np.int32)


def digest(boxes, flips):
    start = b"kdcache view parameters 1\0"
    return hashlib.sha256(start + boxes.astype("<i4").tobytes() + flips.astype("u1").tobytes()).hexdigest()[:16]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("policy", DIGESTS)
def test_draws_in_pieces_are_those_of_the_first_release(policy):
    rule, flip = RULES.get(policy.split(",")[0], Whole()), Flip() if "flip" in policy else None
    drawn = geometry(rule, flip, 11, 0, 3, range(70_001, 90_001), many_sizes(20_000))
    assert digest(*drawn) == DIGESTS[policy]


def test_draws_of_teaching_are_those_of_the_first_release():
    drawn = geometry(ResizedCrop(), Flip(), 2**62, TEACHING, 5, range(70_001, 90_001), many_sizes(20_000))
    assert digest(*drawn) == "a0d60971d9c268e4"


@pytest.mark.parametrize("sequence", ["random", "spread"])
@pytest.mark.parametrize("rule", RULES.values())
def test_any_samples_are_drawn_alike(rule, sequence):
    sizes, order = many_sizes(9000), np.random.default_rng(0).permutation(9000)
    boxes, flips = geometry(rule, Flip(), 1, 0, 4, range(50, 9050), sizes, sequence)
    assert equal(geometry(rule, Flip(), 1, 0, 4, 50 + order, sizes[order], sequence), (boxes[order], flips[order]))
    later = geometry(rule, Flip(), 1, 0, 4, range(4000, 4300), sizes[3950:4250], sequence)
    assert equal(later, (boxes[3950:4250], flips[3950:4250]))


def test_memory_does_not_grow_with_the_samples():
    n = 200_000
    sizes, order = np.tile(np.array([375, 500], np.int32), (n, 1)), np.random.default_rng(0).permutation(n)[: n // 4]
    geometry(ResizedCrop(), Flip(), 0, 0, 0, range(10), sizes[:10], "spread")  # fills the table of steps
    for samples in (range(n), order):
        for sequence in ("random", "spread"):
            tracemalloc.start()
            boxes, flips = geometry(ResizedCrop(), Flip(), 0, 0, 1, samples, sizes[: len(samples)], sequence)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak - boxes.nbytes - flips.nbytes < 6 * 2**20


def resized_crop(drawn, height, width, least, most):
    """The box of one sample from its 24 words, try by try, as torchvision's RandomResizedCrop.get_params goes."""
    u = [(int(word) >> 11) / 2**53 for word in drawn]
    for i in range(4, 24, 2):
        area = height * width * (least + (most - least) * u[i])
        aspect = math.exp((2 * (int(u[i + 1] * 4096) + 0.5) / 4096 - 1) * math.log(4 / 3))
        aspect = round(aspect * 2**20) / 2**20
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(u[1] * (height - h + 1)), int(u[2] * (width - w + 1)), h, w]
    h, w = (height, min(width, height * 4 // 3)) if width > height else (min(height, width * 4 // 3), width)
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize(("least", "most"), [(0.08, 1.0), (0.35, 0.5), (1.0, 1.0), (0.001, 0.002)])
def test_resized_crops_are_those_of_one_sample_after_another(least, most):
    sizes = many_sizes(600)
    boxes, _ = geometry(ResizedCrop(least, most), None, 5, 0, 2, range(600), sizes)
    drawn = words(5, 0, 2, range(600), 24)
    assert boxes.tolist() == [
        resized_crop(row, int(h), int(w), least, most) for row, (h, w) in zip(drawn, sizes, strict=True)
    ]


def test_areas_are_drawn_between_the_arguments():
    sizes = np.full((20_000, 2), 1000, np.int32)
    boxes, _ = geometry(ResizedCrop(0.2, 0.6), None, 0, 0, 0, range(20_000), sizes)
    area = boxes[:, 2].astype(float) * boxes[:, 3] / 1e6
    assert 0.199 < area.min() and area.max() < 0.601
    np.testing.assert_allclose(np.quantile(area, [0.25, 0.5, 0.75]), [0.3, 0.4, 0.5], atol=0.01)


@pytest.mark.parametrize(("least", "most"), [(0, 1), (0.5, 0.4), (0.5, 1.1), (-0.1, 1), (math.nan, 1), (0.1, math.nan)])
def test_areas_that_cannot_be_are_refused(least, most):
    with pytest.raises(KdcacheError, match=r"^rrc\(.*\) has no areas to draw from: the first number must be above 0"):
        ResizedCrop(least, most)


@pytest.mark.parametrize("p", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("sequence", ["random", "spread"])
def test_flips_come_with_their_probability(p, sequence):
    sizes = np.full((20_000, 2), 8, np.int32)
    _, flips = geometry(Whole(), Flip(p), 0, 0, 7, range(20_000), sizes, sequence)
    assert abs(flips.mean() - p) < (0.015 if 0 < p < 1 else 1e-9)


def test_spread_flips_alternate_from_a_random_start():
    views = [geometry(Crop(), Flip(), 0, 0, v, range(2000), many_sizes(2000), "spread")[1] for v in range(6)]
    assert equal(views[::2], views[:1] * 3) and equal(views[1::2], [~views[0]] * 3)
    assert abs(views[0].mean() - 0.5) < 0.03


def test_spread_flips_of_another_probability_come_as_often_for_each_sample():
    drawn = [geometry(Whole(), Flip(0.3), 0, 0, v, range(500), many_sizes(500), "spread")[1] for v in range(100)]
    often = np.sum(drawn, 0)
    assert 28 <= often.min() and often.max() <= 32


def test_spread_boxes_cover_an_image_more_evenly():
    """The mean over a sample's 32 views of where its boxes lie differs less between samples than by chance."""
    sizes = np.full((400, 2), 224, np.int32)

    def deviation(sequence):
        boxes = np.stack([geometry(ResizedCrop(), None, 0, 0, v, range(400), sizes, sequence)[0] for v in range(32)])
        middle = boxes[:, :, :2] + boxes[:, :, 2:] / 2
        return np.concatenate([middle, boxes[:, :, 2:]], 2).mean(0).std(0)

    assert (deviation("spread") < 0.6 * deviation("random")).all()
