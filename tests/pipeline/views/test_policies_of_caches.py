"""The policy in a cache's identity: this kdcache draws it as it was drawn when the cache was built, or says why not."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from kdcache.cache import Cache
from kdcache.cache import errors as e
from kdcache.cache.identity import ViewsIdentity
from kdcache.cli import main
from kdcache.pipeline.build.build import build
from kdcache.pipeline.verify import verify
from kdcache.pipeline.views.parameters import draw_as, shares_as
from kdcache.pipeline.views.policy import policy_of
from kdcache.tests.helpers.building import quiet, settings
from kdcache.train.loaders.cached import CachedLoader

MIXED = "crop,flip,mixup(0.2)"


def views(policy, **changes):
    return ViewsIdentity(**{"policy": policy, "seed": 0, "renderer": "toy", **changes})


@pytest.mark.parametrize(
    ("policy", "mixed", "kind", "message"),
    [
        ("crop,jigsaw(2)", False, e.MismatchError, r"cannot draw \(unknown operation 'jigsaw'.*\): update kdcache$"),
        (
            "crop,mixup(0.35)",
            True,
            e.MismatchError,
            r"cannot draw \(.*no table of Beta\(0.35, .*: update kdcache$",
        ),
        ("crop,erase(7)", False, e.MismatchError, r"cannot draw \(erase .*\): update kdcache$"),
        ("crop,rrc", False, e.MismatchError, r"cannot draw \(.* has two crops.*: update kdcache$"),
        ("", False, e.MismatchError, r"cannot draw \(.*: update kdcache$"),
        (MIXED, False, e.CorruptError, "mixup.*, but views that are not said to be mixed: .* copy the cache again"),
        ("crop,flip", True, e.CorruptError, "'crop,flip', but views that are said to be mixed: .* copy the cache"),
        ("flip,crop", False, e.CorruptError, "'flip,crop', which kdcache spells 'crop,flip': .* copy the cache again"),
        ("crop, flip", False, e.CorruptError, "which kdcache spells 'crop,flip'"),
        ("rrc(0.08,1)", False, e.CorruptError, "which kdcache spells 'rrc'"),
        ("erase(0.250)", False, e.CorruptError, r"which kdcache spells 'erase\(0.25\)'"),
        ("funmatch", True, e.CorruptError, r"which kdcache spells 'rrc,flip,mixup\(1\)'"),
        ("mixup", True, e.CorruptError, r"which kdcache spells 'mixup\(0.8\)'"),
    ],
)
def test_a_policy_that_is_not_what_kdcache_writes_is_refused_with_one_line(policy, mixed, kind, message):
    with pytest.raises(kind, match=message) as caught:
        policy_of(views(policy, mixed=mixed), "cache /x")
    assert "cache /x has" in str(caught.value) and "\n" not in str(caught.value)
    sizes = np.full((4, 2), 8, np.int32)
    with pytest.raises(kind):
        draw_as(views(policy, mixed=mixed), 0, range(4), sizes)
    if mixed:
        with pytest.raises(kind):
            shares_as(views(policy, mixed=mixed), 0, 4, (8, 8))


def test_imported_views_have_a_policy_that_does_nothing():
    for name in ("stored", "foreign"):
        policy = policy_of(views(name))
        assert not policy.mixed and policy.operations == () and not policy.flip


@pytest.fixture
def built(source, home, tmp_path):
    build(settings(views=1, out=str(tmp_path / "c")), quiet, source)
    return tmp_path / "c"


def forge(path, change):
    """Change the identity of a cache, and give its commits the new key."""
    old = Cache(path).key
    about = json.loads((path / "identity.json").read_bytes())
    change(about)
    (path / "identity.json").write_text(json.dumps(about))
    new = Cache(path).key
    for commit in path.rglob("commits/*.json"):
        commit.write_text(commit.read_text().replace(old, new).replace('"format":1', f'"format":{about["format"]}'))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["views"].update(policy="crop,flip,jigsaw(2)"), r"unknown operation 'jigsaw' .*: update kdcache"),
        (lambda a: a["views"].update(policy=MIXED), "but views that are not said to be mixed"),
        (lambda a: a["views"].update(policy="flip,crop"), "which kdcache spells 'crop,flip'"),
    ],
)
def test_nothing_is_trained_from_a_cache_with_such_a_policy(built, tmp_path, change, message):
    """What needs no pixels still works: its bytes are what was committed."""
    forge(built, change)
    run = CliRunner()
    base = f"--cache {built} --data kd_toy:images --device cpu"
    for line in (f"train --loss kd:alpha=0.5,temperature=1 {base} --student resnet8 --out {tmp_path / 'run'}",
                 f"train --loss kd:alpha=0.5,temperature=1 {base} --student resnet8 --online --out {tmp_path / 'run'}",
                 f"verify {built} --data kd_toy:images --teacher kd_toy:net --device cpu"):  # fmt: skip
        said = run.invoke(main, line.split())
        assert said.exit_code == 2, said.output
        (error,) = (text for text in said.output.splitlines() if text.startswith("Error: "))
        assert str(built) in error
        assert re.search(message, error), error
    assert not (tmp_path / "run").exists()
    assert verify(Cache(built)).passed and run.invoke(main, ["info", str(built)]).exit_code == 0
    with pytest.raises(e.KdcacheError, match=message):
        CachedLoader(Cache(built), "kd_toy:images", 16)
