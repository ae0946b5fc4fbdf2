"""Losses by name: presets, specifications, and what is said of them."""

import pytest

from kdcache.cache import KdcacheError
from kdcache.train.losses import BDKD, DIST, DKD, IKL, KD, NKD, USKD, WSLD, LogitStd
from kdcache.train.losses.options import LOSSES, described, make_loss, options_of

CIFAR_PRESETS = {
    "nkd": NKD(3.5, 3.0),
    "kd": KD(0.1, 0.9, 4.0),
    "uskd": USKD(0.1, 0.1, 0.1),
    "dkd": DKD(1.0, 8.0, 4.0, 20),
    "ikl": IKL(1.0, 4.0, 4.0, 100.0, "teacher", 20),
    "dist": DIST(1.0, 2.0, 4.0),
    "wsld": WSLD(2.25, 4.0),
    "logit-std": LogitStd("kd", 0.1, 9.0, 2.0),
    "logit-std:base=dkd": LogitStd("dkd", 1.0, 9.0, 2.0, 1.0, 8.0, 20),
}
IMAGENET_PRESETS = {
    "nkd": NKD(1.5, 1.0),
    "kd": KD(0.5, 0.5, 1.0),
    "uskd": USKD(1.0, 0.1, 0.005),
    "dkd": DKD(1.0, 0.5, 1.0, 1),
    "ikl": IKL(1.0, 0.5, 1.0, 1.0, "prior", 1),
    "dist": DIST(1.0, 2.0, 1.0),
    "wsld": WSLD(2.5, 2.0),
    "logit-std": LogitStd("kd", 1.0, 9.0, 2.0),
    "logit-std:base=dkd": LogitStd("dkd", 1.0, 9.0, 2.0, 1.0, 0.5, 1),
}


@pytest.mark.parametrize("spec", CIFAR_PRESETS)
def test_presets_go_by_the_number_of_classes(spec):
    """The presets for CIFAR-100 hold near its number of classes; ten, as many as CIFAR-10 has, are too few."""
    for classes in (50, 100, 200):
        assert make_loss(spec, classes) == CIFAR_PRESETS[spec]
    for classes in (2, 10, 49, 201, 1000):
        assert make_loss(spec, classes) == IMAGENET_PRESETS[spec]


def test_an_option_that_came_later_says_what_held_before():
    before = {name: found for name, loss in LOSSES.items() if (found := loss.options_before())}
    assert before == {"dist": {"eps": 0.0}, "cmkd": {"eps": 0.0}}


def test_options_override_presets():
    assert make_loss("nkd:gamma=2,tail=uniform,mixed=both", 1000) == NKD(2.0, 1.0, "uniform", "both")
    assert make_loss("dkd:beta=2,warmup=3", 100) == DKD(1.0, 2.0, 4.0, 3)
    assert make_loss("cmkd:standardise=false", 100).standardise is False
    online = make_loss("bdkd:start=taught,teacher_alpha=0.5,regulariser=0", 100)
    assert online == BDKD(start="taught", teacher_alpha=0.5, regulariser=0.0)
    assert options_of(make_loss("dkd", 100)) == {
        "alpha": 1.0, "beta": 8.0, "temperature": 4.0, "warmup": 20, "tail": "prior",
    }  # fmt: skip


def test_the_line_at_start_says_which_preset_and_why():
    assert described("nkd", 10) == (
        "nkd:gamma=1.5,temperature=1,tail=prior,mixed=heavier (as published for ImageNet, since there are 10 classes; "
        "from 50 to 200 as for CIFAR-100: gamma=3.5,temperature=3)"
    )
    assert described("nkd:gamma=2", 100) == (
        "nkd:gamma=2,temperature=3,tail=prior,mixed=heavier (as published for CIFAR-100, since there are 100 classes; "
        "below 50 and above 200 as for ImageNet: temperature=1)"
    )
    # Nothing was chosen where all was given, or where there is one setting.
    assert described("nkd:gamma=2,temperature=2", 10) == "nkd:gamma=2,temperature=2,tail=prior,mixed=heavier"
    assert described("tf-nkd", 10) == "tf-nkd"
    assert described("logit-std:base=dkd", 10).endswith("CIFAR-100: others=8,warmup=20)")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nkdd", "unknown loss 'nkdd': take one of ce, kd, nkd"),
        ("nkd:gama=1", "no option 'gama': it has gamma, temperature, tail, mixed"),
        ("tf-nkd:gamma=1", "tf-nkd has no option 'gamma': it has none"),
        ("nkd:gamma=x", "gamma='x' is no number"),
        ("nkd:gamma=nan", "gamma=nan must be finite"),
        ("nkd:gamma=inf", "gamma=inf must be finite"),
        ("nkd:gamma=-1", "not negative"),
        ("nkd:gamma=1,gamma=2", "gamma is given twice"),
        ("nkd:tail=zero", "tail='zero' is not one of prior, uniform"),
        ("skew-kl:tail=bucket", "'bucket' is not one of prior, uniform, renorm, drop"),
        ("bdkd:tail=drop", "'drop' is not one of prior, uniform"),
        ("bdkd:start=cold", "start='cold' is not one of scratch, taught"),
        ("nkd:mixed=all", "mixed='all' is not one of heavier, both"),
        ("kd:temperature=0", "temperature=0 must be positive"),
        ("dkd:warmup=2.5", "warmup='2.5' is no whole number"),
        ("dkd:warmup=0", "warmup=0 must be positive"),
        ("cmkd:standardise=maybe", "standardise='maybe' is neither true nor false"),
        ("ce:label_smoothing=2", "label_smoothing=2 must lie between 0 and 1"),
        ("gkd:mass=0", "mass=0 must be positive"),
        ("gkd:mass=1.5", "mass=1.5 must lie between 0 and 1"),
        ("skew-rkl:skew=1", "skew=1 must lie between 0 and 1, without both"),
        ("skew-kl:skew=0", "skew=0 must be positive"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(spec, message):
    with pytest.raises(KdcacheError, match=message) as caught:
        make_loss(spec, 100)
    assert "\n" not in str(caught.value)
