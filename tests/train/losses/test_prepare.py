"""Which caches can serve a loss, what is warned of, and the errors that the docs state."""

import json
import shutil

import numpy as np
import pytest

from kdcache.cache import KdcacheError, encode
from kdcache.cache.identity import RecordIdentity
from kdcache.tests.helpers.caches import Filled, identity
from kdcache.tests.helpers.losses import sample
from kdcache.tests.helpers.places import ROOT
from kdcache.train.losses import CE, DKD, KD, NKD, LogitStd, SkewKL
from kdcache.train.losses.options import make_loss
from kdcache.train.losses.prepare import head_mass_warning, prepared, require_served


def record(**changes):
    base = {"classes": 100, "k": 5, "temperatures": (1.0, 2.0), "precision": "float16", "labels": 1, "tail_std": False}
    return RecordIdentity(**{**base, **changes})


def test_a_cache_that_cannot_serve_is_refused_with_the_flags_that_help():
    with pytest.raises(KdcacheError, match=r"at temperature 4; this cache holds 1,2: .*--temperatures 1,2,4"):
        require_served(KD(temperature=4.0), record())
    with pytest.raises(KdcacheError, match="built with --unlabelled"):
        require_served(NKD(), record(labels=0))
    with pytest.raises(KdcacheError, match=r"logit-std needs .* tau 2: build .* --tail-std .* or with --topk 100"):
        require_served(LogitStd(), record())
    with pytest.raises(KdcacheError, match=r"standardised to tau 3: .*serves tau=2"):
        require_served(LogitStd(tau=3.0), record(tail_std=True))
    require_served(LogitStd(), record(tail_std=True))
    for name in ("ikl", "dist", "cmkd", "mse"):
        with pytest.raises(KdcacheError, match=rf"{name} needs all 100 .* holds the top 5: build one with --topk 100"):
            require_served(make_loss(name, 1000), record())
    for name in ("ikl", "dist", "cmkd", "mse", "logit-std"):
        require_served(make_loss(name, 1000), record(k=None, temperatures=()))
    with pytest.raises(KdcacheError, match=r"dkd has no meaning for mixed labels.*without mixup or cutmix"):
        require_served(DKD(), record(labels=2))
    require_served(KD(temperature=4.0), record(k=None, temperatures=()))
    require_served(KD(alpha=0.0), record(labels=0))
    require_served(SkewKL(), record(labels=0))
    for name in ("ce", "tf-nkd", "uskd"):
        require_served(make_loss(name, 1000), record(temperatures=(9.0,)))


def test_a_small_head_is_warned_of():
    _, t, y = sample()
    few = encode(t * 0.3, y, 2)
    warning = head_mass_warning(KD(0.1, 0.9, 4.0), few)
    assert warning is not None and "T = 4" in warning and "--topk" in warning and "\n" not in warning
    assert head_mass_warning(KD(), encode(t, y, 20)) is None
    assert head_mass_warning(KD(0.1, 0.9, 4.0), encode(t * 0.3, y)) is None
    assert head_mass_warning(CE(), few) is None
    # Which tail is trained on changes nothing about what is missing.
    assert head_mass_warning(KD(0.1, 0.9, 4.0, "renorm"), few) == warning


def test_what_is_warned_of_is_read_from_the_first_part_alone(tmp_path):
    """In a large cache all of a view takes long, before the first batch."""
    about = identity(classes=300, k=2, samples=70, part=16)
    cache, said = Filled(tmp_path / "c", about).cache, []
    expected = head_mass_warning(KD(0.1, 0.9, 4.0), cache.read(0)[:16])
    shutil.rmtree(tmp_path / "c/views/v00000/gaps/c/1")
    for samples in (None, np.arange(0, 70, 5), np.arange(1, 16)):
        prepared(KD(0.1, 0.9, 4.0), cache, None, 8, False, said.append, samples)
    assert len(said) == 3 and said[0] == f"warning: {expected}"
    with pytest.raises(KdcacheError, match="p0001"):
        prepared(KD(0.1, 0.9, 4.0), cache, None, 8, False, said.append, np.arange(20, 70))


def test_the_errors_in_the_docs_are_those_that_were_measured():
    """docs/losses.md beside bench/results/losses.json, for K = 20: value / gradient, of the whole loss and alone."""
    measured = json.loads((ROOT / "bench" / "results" / "losses.json").read_text())["accuracy"]
    page = (ROOT / "docs" / "losses.md").read_text().split("## From top-k records")[1].split("## Every loss trains")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    told = {row[0].split("`")[1]: [cell for cell in row[1:] if cell] for row in rows if "`--loss`" not in row[0]}
    want = {}
    for spec in dict.fromkeys(one["loss"] for one in measured):
        of = {one["tail"]: one for one in measured if (one["loss"], one["k"]) == (spec, 20)}
        parts = [part for tail in ("none", "prior", "uniform") if tail in of for part in (of[tail], of[tail]["term"])]
        want[spec] = [f"{part['value']:.3f} / {part['gradient']:.3f}" for part in parts]
    assert told == want
