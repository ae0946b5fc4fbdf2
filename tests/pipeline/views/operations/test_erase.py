"""Random erasing: torchvision's boxes in distribution, and black pixels in them and nowhere else."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomErasing

from kdcache.pipeline.views.operations.boxes import edges
from kdcache.pipeline.views.operations.kinds.erase import Erase
from kdcache.tests.contracts.operations import COUNT, OperationContract, pictures, words_of
from kdcache.tests.helpers.lazily import Lazily

stats = Lazily("scipy.stats")
LARGE = 1024  # pixels: torchvision's boxes have whole ones, which matter less the more there are


class TestErase(OperationContract):
    operation = Erase(0.6)
    drawn_digest = "161d4aeb2d520acb"
    pixels_digest = "e3547ada479411fb"
    apart = 3.0  # half of the pixels at a box's edges are black in the one order, all or none in the other


def test_boxes_are_distributed_as_torchvisions():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(3, LARGE, LARGE)
        theirs = [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(3000)]
    top, left, height, width = np.array(theirs).T
    ours = edges(Erase(1.0).draw(words_of(Erase(1.0), 3000))["box"], LARGE, LARGE)
    our_height, our_width = (ours[:, 2:] - ours[:, :2]).T
    for got, expected in (
        (ours[:, 0], top),
        (ours[:, 1], left),
        (our_height, height),
        (our_width, width),
        (our_height * our_width, height * width),
        (our_height / our_width, height / width),
        (ours[:, 0] / (LARGE - our_height), top / (LARGE - height)),
    ):
        assert stats.kstest(got, expected).pvalue > 1e-3


def test_areas_ratios_and_places_are_uniform_within_the_bounds():
    box = Erase(1.0).draw(words_of(Erase(1.0), 20_000))["box"] / 2**16
    height, width = (box[:, 2:] - box[:, :2]).T
    assert 0.01999 < (height * width).min() and (height * width).max() < 0.33001
    assert 0.2999 < (height / width).min() and (height / width).max() < 3.3001
    assert box.min() >= 0 and box.max() <= 1 and max(height.max(), width.max()) < 1
    for places in (box[:, 0] / (1 - height), box[:, 1] / (1 - width)):
        assert stats.kstest(places, "uniform").pvalue > 1e-3


def test_a_box_is_the_first_of_four_tries_that_fits():
    """By the formula of torchvision in float64, from words that make many tries fail."""
    words = words_of(Erase(1.0), 500)
    high = words_of(Erase(1.0), 500, seed=1) >> np.uint64(62) < 3
    words[:, 3:][high[:, :8]] |= np.uint64(0xF800 << 48)  # areas and ratios near the largest
    box = Erase(1.0).draw(words)["box"]
    tries = []
    for row, got in zip(words.tolist(), box.tolist(), strict=True):
        for number in range(4):
            area = 0.02 + 0.31 * row[3 + 2 * number] / 2**64
            step = (row[4 + 2 * number] * 4096 >> 64) + 0.5
            ratio = math.exp(math.log(0.3) + step / 4096 * math.log(3.3 / 0.3))
            height, width = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if height < 1 and width < 1:
                top, left = row[1] / 2**64 * (1 - height), row[2] / 2**64 * (1 - width)
                expected = [top, left, top + height, left + width]
                assert np.abs(np.array(got) / 2**16 - expected).max() <= 2**-15
                break
        else:
            number = 4
            assert got == [0, 0, 0, 0]
        tries.append(number)
    assert set(tries) == set(range(5))


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_as_many_images_are_erased_as_asked_for(p):
    n = 10_000
    share = Erase(p).draw(words_of(Erase(p), n))["box"].any(1).mean()
    assert share == p if p in (0, 1) else abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("size", [(13, 17), (32, 32), (224, 160)])
def test_pixels_in_the_box_are_black_and_no_others_change(size):
    images = pictures(COUNT, *size)
    drawn = Erase(0.6).draw(words_of(Erase(0.6)))
    got = Erase(0.6).apply(images.clone(), drawn)
    for before, after, box in zip(images, got, drawn["box"].tolist(), strict=True):
        expected = before.clone()
        top, left, bottom, right = (math.floor(e * size[i % 2] / 2**16 + 0.5) for i, e in enumerate(box))
        expected[:, top:bottom, left:right] = 0
        assert torch.equal(after, expected)
