"""View parameters are a pure function of (policy, seed, view, sample, size), and always the same one."""

import itertools
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.pipeline.views.parameters import TEACHING, ViewParameters, draw, evaluation_view
from kdcache.tests.contracts.policies import PolicyContract
from kdcache.tests.helpers import warm

M = (1 << 64) - 1


def philox_block(seed, view, block):
    """Philox 4x64-10 from the paper (Salmon et al. 2011), one block of four words."""
    x, key = [block & M, view, 0, 0], [seed, 0]
    for r in range(10):
        if r:
            key = [(key[0] + 0x9E3779B97F4A7C15) & M, (key[1] + 0xBB67AE8584CAA73B) & M]
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(b >> 64) ^ x[1] ^ key[0], b & M, (a >> 64) ^ x[3] ^ key[1], a & M]
    return x


def sizes_of(n, height=32, width=32):
    return np.tile(np.array([height, width], np.int32), (n, 1))


def equal(a, b):
    return np.array_equal(a.boxes, b.boxes) and np.array_equal(a.flips, b.flips)


@pytest.mark.parametrize(("seed", "view", "sample"), [(0, 0, 0), (7, 3, 12345), (2**62, 99_999, 1_281_166)])
def test_the_draw_is_philox_as_published(seed, view, sample):
    """NumPy steps the counter before it draws, so sample i of a one-block policy has block i + 1."""
    u = [(w >> 11) * 2.0**-53 for w in philox_block(seed, view, sample + 1)]
    got = draw("crop,flip", seed, view, range(sample, sample + 1), sizes_of(sample + 1))
    assert got.boxes.tolist() == [[int(u[1] * 9) - 4, int(u[2] * 9) - 4, 32, 32]]
    assert got.flips.tolist() == [u[0] < 0.5]


@pytest.mark.parametrize("policy", ["crop,flip", "rrc,flip"])
def test_a_teacher_is_taught_on_views_that_no_cache_holds(policy):
    sizes = np.random.default_rng(0).integers(30, 500, (40, 2)).astype(np.int32)
    cached = {draw(policy, s, v, range(40), sizes).digest() for s in (0, 1, 2**32, 2**63 - 1) for v in range(64)}
    taught = {draw(policy, s, e, range(40), sizes, stream=TEACHING).digest() for s in (0, 1, 2**32) for e in range(64)}
    assert len(cached) == 256 and len(taught) == 192 and not cached & taught


def test_the_views_of_caches_stay_as_they_are():
    """Digests that stand in the commits of caches of every release."""
    sizes = np.random.default_rng(0).integers(30, 500, (40, 2)).astype(np.int32)
    pinned = {
        ("crop,flip", 0, 0): "04250ff7d7c31072",
        ("crop,flip", 7, 63): "56172d1ef91cb643",
        ("rrc,flip", 0, 1): "fe5ebc74cede2f9d",
    }
    for (policy, seed, view), digest in pinned.items():
        assert draw(policy, seed, view, range(40), sizes).digest().startswith(digest)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["none", "flip", "crop", "crop,flip", "rrc", "rrc,flip"]),
    st.integers(0, 2**62),
    st.integers(0, 10**6),
    st.integers(0, 90),
    st.integers(1, 30),
)
def test_any_range_is_drawn_without_the_others(policy, seed, view, start, count):
    sizes = np.random.default_rng(seed).integers(1, 500, (120, 2)).astype(np.int32)
    whole = draw(policy, seed, view, range(120), sizes)
    stop = min(start + count, 120)
    assert equal(draw(policy, seed, view, range(start, stop), sizes), whole[start:stop])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**62), st.integers(1, 400), st.integers(1, 400))
def test_random_resized_crops_lie_inside(seed, height, width):
    boxes = draw("rrc,flip", seed, 0, range(50), sizes_of(50, height, width)).boxes.astype(int)
    top, left, h, w = boxes.T
    assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def test_random_resized_crops_have_the_published_distribution():
    """Area uniform over 8-100% and aspect log-uniform over 3/4-4/3, less what does not fit."""
    boxes = draw("rrc", 0, 0, range(20_000), sizes_of(20_000, 400, 400)).boxes.astype(float)
    area, aspect = boxes[:, 2] * boxes[:, 3] / 400**2, boxes[:, 3] / boxes[:, 2]
    assert 0.079 < area.min() < 0.09 and area.max() <= 1
    assert 0.745 < aspect.min() and aspect.max() < 1.345
    # Below 3/4 of the area every aspect fits, so nothing is lost there.
    small = area[area < 0.7]
    quantiles = np.quantile(small, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quantiles, 0.08 + 0.62 * np.array([0.25, 0.5, 0.75]), atol=0.015)
    assert abs(np.log(aspect).mean()) < 0.01


def test_crops_and_flips_are_uniform_and_differ_between_views():
    a, b = (draw("crop,flip", 0, v, range(20_000), sizes_of(20_000)) for v in (0, 1))
    counts = np.bincount(a.boxes[:, 0] + 4, minlength=9)
    assert (abs(counts / 20_000 - 1 / 9) < 0.01).all()
    assert abs(a.flips.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(a.boxes[:, 1], b.boxes[:, 1])[0, 1]) < 0.03
    assert not draw("crop", 0, 0, range(100), sizes_of(100)).flips.any()


# What version 1 of the parameters has always been: caches in the world depend on it.
DIGESTS = {
    "none": "570e9b742487df04",
    "crop,flip": "412855b1c30f8b8a",
    "rrc,flip": "b648c36d3f47e8dd",
}


@pytest.mark.parametrize("policy", DIGESTS)
def test_digests_never_change(policy):
    sizes = (np.arange(2000, dtype=np.int32).reshape(1000, 2) % 400) + 17
    assert draw(policy, 5, 2, range(1000), sizes).digest()[:16] == DIGESTS[policy]


def test_every_parameter_changes_the_digest():
    p = draw("crop,flip", 0, 0, range(10), sizes_of(10))
    for i in range(10):
        flips = p.flips.copy()
        flips[i] ^= True
        boxes = p.boxes.copy()
        boxes[i, i % 4] += 1
        assert len({p.digest(), ViewParameters(p.boxes, flips).digest(), ViewParameters(boxes, p.flips).digest()}) == 3


def test_another_process_draws_the_same(tmp_path):
    arguments = [("rrc,flip", 3, view, range(500), sizes_of(500, 333, 500)) for view in (0, 9)]
    (tmp_path / "asked").write_bytes(pickle.dumps(arguments))
    code = (
        "import itertools, pickle\n"
        "from pathlib import Path\n"
        "from kdcache.pipeline.views.parameters import draw\n"
        "asked = pickle.loads(Path('asked').read_bytes())\n"
        "Path('drawn').write_bytes(pickle.dumps(list(itertools.starmap(draw, asked))))\n"
    )
    warm.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    drawn = pickle.loads((tmp_path / "drawn").read_bytes())
    for there, here in zip(drawn, itertools.starmap(draw, arguments), strict=True):
        assert equal(there, here)


def test_evaluation_views_are_the_whole_or_the_central_square():
    assert evaluation_view(sizes_of(1), whole=True).boxes.tolist() == [[0, 0, 32, 32]]
    assert evaluation_view(sizes_of(1, 256, 320), whole=False).boxes.tolist() == [[16, 48, 224, 224]]


class TestNone(PolicyContract):
    policy, random = "none", False


class TestFlip(PolicyContract):
    policy = "flip"


class TestCrop(PolicyContract):
    policy = "crop"


class TestCropAndFlip(PolicyContract):
    policy = "crop,flip"


class TestResizedCrop(PolicyContract):
    policy = "rrc"


class TestResizedCropAndFlip(PolicyContract):
    policy = "rrc,flip"


class TestStrong(PolicyContract):
    policy = (
        "rrc(0.3,1),flip(0.2),three,trivial,randaugment(2,9),color(0.4,0.3,0.2,0.1),gray(0.2),blur(0.5),erase(0.25)"
    )


class TestMixup(PolicyContract):
    policy = "crop,flip,mixup(0.2)"


class TestMixupAndCutmix(PolicyContract):
    policy = "rrc,flip,erase(0.5),mixup(0.2),cutmix(1)"


class TestSpread(PolicyContract):
    policy, sequence = "rrc,flip,trivial,cutmix(1)", "spread"
