"""`kdcache mix`: one cache of several teachers' answers, made, found again, gone on with, and refused."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from kdcache.cache import Cache, Identity
from kdcache.cache.errors import InputError, MismatchError, NotFoundError
from kdcache.cache.identity import canonical, parse
from kdcache.cli import main
from kdcache.pipeline.ensembles import mix as module
from kdcache.pipeline.ensembles.config import MixConfig, parse_weights
from kdcache.pipeline.ensembles.mix import mix
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.pipeline.info import describe, facts, one_line
from kdcache.pipeline.pack import pack
from kdcache.pipeline.share import pull, push
from kdcache.pipeline.verify import source_of, verify
from kdcache.tests.helpers import warm
from kdcache.tests.helpers.building import content
from kdcache.tests.helpers.caches import FORMATS, identity, same
from kdcache.tests.helpers.ensembles import Answered, answered, mean64, softmax64
from kdcache.tests.helpers.training import metrics_of
from kdcache.train.config import TrainConfig
from kdcache.train.plan.choosing import with_one_cache
from kdcache.train.plan.feeds import feed_of

pytestmark = pytest.mark.usefixtures("own_home", "one_thread", "no_fsync")


BUILD = "build --data kd_toy:images --teacher kd_toy:net --views 2 --allow-low-accuracy --device cpu --topk 4"


def quiet(_):
    pass


def kdcache(line, *, status=0):
    result = CliRunner().invoke(main, line.split(), catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def mixed(caches, say=quiet, **how):
    return mix(MixConfig(tuple(str(c.cache.path) for c in caches), **how), say)


@pytest.mark.parametrize("kind", FORMATS)
def test_dense_caches_become_the_mean_in_every_view(tmp_path, kind):
    caches = answered(tmp_path, 3, k=None, precision="float32", **FORMATS[kind])
    result = mixed(caches, weights=(1, 2, 1))
    order = sorted(caches, key=lambda c: c.cache.key)
    weights = [0.5 if c is caches[1] else 0.25 for c in order]
    cache = Cache(result.path)
    assert result.views == 2 and result.records == 2 * 21 + 9 and cache.complete
    for split, view in caches[0].logits:
        got = cache.read(view) if split == "train" else cache.read_evaluation()
        want = mean64(order, weights, split, view)
        assert np.abs(softmax64(got.logits().numpy()) - want).max() < 1e-6
        store = caches[0].cache.split(split)
        assert np.array_equal(got.labels, caches[0].labels_in(store, view))
        label = np.take_along_axis(want, got.labels.long().numpy(), 1)
        np.testing.assert_allclose(got.target_gap, np.log(want.max(1, keepdims=True) / label), rtol=1e-3, atol=1e-3)
        for part in range(store.parts):
            name = f"v{view:05d}-p{part:04d}"
            assert cache.split(split).commit(name).parameters == store.commit(name).parameters
    want = mean64(order, weights, "eval", 0).argmax(1)
    for one, member in zip(result.members, order, strict=True):
        assert one.agreement == pytest.approx((member.logits["eval", 0].argmax(1).numpy() == want).mean())
    assert result.top1 == pytest.approx((want == caches[0].labels["eval"][:, 0].numpy()).mean())


@pytest.mark.parametrize("kind", ["format-1", "mixed"])
def test_top_k_caches_become_a_top_k_cache_with_a_prior(tmp_path, kind):
    caches = answered(tmp_path, 2, precision="uint8", **FORMATS[kind])
    caches[1] = Answered(tmp_path / "more", identity(k=6, precision="float32", **FORMATS[kind]), number=2)
    cache = Cache(mixed(caches).path)
    record = cache.identity.record
    assert (record.k, record.precision, record.temperatures) == (6, "float32", (1.0, 4.0))
    assert cache.prior.shape == (2, 12) and verify(cache).passed
    order = sorted(caches, key=lambda c: c.cache.key)
    error = np.abs(cache.read(1).dense(1.0).numpy() - mean64(order, (0.5, 0.5), "train", 1)).sum(1) / 2
    assert error.mean() < 0.05


def test_the_order_in_which_caches_are_given_is_no_matter(tmp_path):
    caches = answered(tmp_path, 3)
    keys = set()
    for order in itertools.permutations(range(3)):
        result = mixed([caches[i] for i in order], weights=tuple(0.1 * (i + 1) for i in order))
        keys.add((result.key, result.path))
    assert len(keys) == 1
    assert mixed(caches, weights=(1, 2, 3)).key == mixed(caches, weights=(10, 20, 30)).key
    assert mixed(caches).key == mixed(caches, weights=(5, 5, 5)).key != result.key


def test_what_it_is_stands_in_its_identity(tmp_path):
    caches = answered(tmp_path, 2, k=None)
    cache = Cache(mixed(caches, weights=(0.7, 0.3)).path)
    about = cache.identity
    weights = {caches[0].cache.key: 0.7, caches[1].cache.key: 0.3}
    assert about.format == 2 and {m.key: m.weight for m in about.members} == pytest.approx(weights)
    assert about.teacher.network == "mix" and about.teacher.input_size == 9
    assert (about.data, about.views, about.part) == (caches[0].about.data, caches[0].about.views, 8)
    assert parse(Identity, canonical(about), "here", "").key == cache.key
    assert "members" not in caches[0].about.model_dump(mode="json")
    text = describe(cache, facts(cache))
    assert "mix (net" in one_line(cache) and all(f"member       {key[:12]} with weight" in text for key in weights)


@pytest.mark.parametrize(
    "change",
    [
        lambda members: members[:1],
        lambda members: members[::-1],
        lambda members: [members[0], members[0]],
        lambda members: [{**members[0], "weight": 0.9}, members[1]],
        lambda members: [{**members[0], "key": "../../elsewhere"}, members[1]],
    ],
)
def test_an_identity_with_members_that_cannot_be_is_refused(tmp_path, change):
    raw = Cache(mixed(answered(tmp_path, 2, k=None)).path).identity.model_dump(mode="json")
    raw["members"] = change(raw["members"])
    with pytest.raises(ValueError):
        Identity.model_validate_json(json.dumps(raw))


def test_an_extended_mix_goes_on_with_the_same_command(tmp_path):
    caches = answered(tmp_path, 2, views=1)
    first = mixed(caches)
    assert first.views == 1
    caches[0].add_view()
    said = []
    assert mixed(caches, said.append).views == 1 and any("1 view is left out of net0" in line for line in said)
    caches[1].add_view()
    again = mixed(caches)
    assert (again.key, again.views, again.records) == (first.key, 2, 21)
    other = mixed(caches, out=str(tmp_path / "whole"))
    assert content(other.path) == content(again.path)
    assert mixed(caches).records == 0


SCRIPT = """
import os, signal, sys, warnings
warnings.filterwarnings("ignore", ".*multi-threaded, use of fork")
import torch
torch.set_num_threads(1)
from kdcache.cache.store import publish
from kdcache.pipeline.ensembles.config import MixConfig
from kdcache.pipeline.ensembles.mix import mix

def killed_after(left):
    def counting(function):
        def counted(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return counted
    os.link, os.replace, os.mkdir, os.unlink = map(counting, (os.link, os.replace, os.mkdir, os.unlink))
    publish.SplitStore.write_shard = counting(publish.SplitStore.write_shard)
    os.fsync = lambda fd: None

kills = 0
for events in range(70, 300, 7):
    if not (child := os.fork()):
        killed_after(events)
        mix(MixConfig((sys.argv[2], sys.argv[3]), out=sys.argv[1]), lambda line: None)
        os._exit(0)
    if not (status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])):
        break
    assert status == -signal.SIGKILL, status
    kills += 1
print(kills)
"""


def test_a_mix_that_is_killed_goes_on_to_the_same_bytes(tmp_path):
    """By SIGKILL, after a number of the steps that leave a trace; again and again until it is done."""
    caches = answered(tmp_path, 2)
    whole, out = mixed(caches, out=str(tmp_path / "whole")), tmp_path / "killed"
    arguments = [str(out), *(str(c.cache.path) for c in caches)]
    run = warm.run([sys.executable, "-c", SCRIPT, *arguments])
    assert run.returncode == 0 and int(run.stdout) >= 3, run.stderr
    assert content(out) == content(whole.path) and verify(Cache(out)).passed
    assert mixed(caches, out=str(out)).records == 0


def test_several_mixes_at_once_wait_for_each_other(tmp_path, monkeypatch):
    caches = answered(tmp_path, 2, views=1)
    whole = mixed(caches, out=str(tmp_path / "whole"))
    there = Cache.create(tmp_path / "shared", Cache(whole.path).identity)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    said = []
    with there.writing() as leases:
        assert leases.take("v00000-p0001")

        def say(line):
            said.append(line)
            if line.startswith("waiting"):
                leases.release("v00000-p0001")

        mixed(caches, say, out=str(tmp_path / "shared"))
    assert any(line.startswith("waiting for 1 shards") for line in said)
    assert content(tmp_path / "shared") == content(whole.path)


# What is refused


def changed(**groups):
    about = identity(k=None)
    for group, change in groups.items():
        new = getattr(about, group).model_copy(update=change) if isinstance(change, dict) else change
        about = about.model_copy(update={group: new})
    return about


UNEQUAL = {
    "views.seed": changed(views={"seed": 1}),
    "views.policy": changed(views={"policy": "crop"}),
    "views.renderer": changed(views={"renderer": "other"}),
    "data.fingerprint": changed(data={"fingerprint": "e" * 64}),
    "evaluation.samples": changed(evaluation={"samples": 10}),
    "record.classes": identity(k=None, classes=13),
    "record.labels": identity(k=None, labels=0),
    "class_map": changed(class_map="0" * 64),
    "part": identity(k=None, part=7),
}


@pytest.mark.parametrize("field", UNEQUAL)
def test_caches_of_other_images_are_refused_field_by_field(tmp_path, field):
    one = Answered(tmp_path / "one", identity(k=None), 1)
    other = Answered(tmp_path / "other", UNEQUAL[field], 1, number=1)
    with pytest.raises(MismatchError, match=rf"^these caches cannot be mixed: (.*; )?{field}: ") as e:
        mixed([one, other])
    assert str(one.cache.path) in str(e.value) and str(other.cache.path) in str(e.value)
    assert not (tmp_path / "home" / "caches").exists()


def test_temperatures_must_be_equal_and_have_1_among_them(tmp_path):
    one, two, dense = (
        Answered(tmp_path / f"{n}", identity(**how), 1, number=n)
        for n, how in enumerate([{}, {"temperatures": (1.0, 2.0)}, {"k": None}])
    )
    with pytest.raises(MismatchError, match=r"record\.temperatures: .* has \[1\.0, .\.0\], .* \[1\.0, .\.0\]"):
        mixed([one, two])
    assert Cache(mixed([one, dense]).path).identity.record.temperatures == (1.0, 4.0)
    cold = Answered(tmp_path / "cold", identity(temperatures=(2.0, 4.0)), 1, number=3)
    with pytest.raises(InputError, match=r"does not store temperature 1, .*--temperatures 1,2,4"):
        mixed([dense, cold])


def test_other_labels_other_pixels_and_other_sizes_are_refused(tmp_path):
    one = Answered(tmp_path / "one", identity(k=None), 1)
    other = Answered(tmp_path / "other", identity(k=None), 1, number=1)
    commit = other.cache.path / "commits" / "v00000-p0001.json"
    raw = json.loads(commit.read_text())
    commit.write_text(json.dumps({**raw, "parameters": "others"}, sort_keys=True, separators=(",", ":")))
    with pytest.raises(MismatchError, match=r"view 0, part 1 of .* were drawn differently, so they hold answers"):
        mixed([one, other])
    for name, what in (("labels", "have other labels"), ("sizes", "are of images of other sizes")):
        wrong = Answered(tmp_path / name, identity(k=None), 1, number=1)
        found = getattr(wrong.cache.train, name).copy()
        found[3] = (found[3] + 1) % 12
        wrong.cache.train.remove(name)
        getattr(Cache(wrong.cache.path).train, f"write_{name}")(found, {})
        with pytest.raises(MismatchError, match=rf"{what} \(1 of 21 differ\)"):
            mixed([one, wrong])


def test_views_that_not_all_have_are_left_out_and_none_is_refused(tmp_path):
    one, other = answered(tmp_path, 2, views=1)
    (other.cache.path / "commits" / "v00000-p0001.json").unlink()
    with pytest.raises(NotFoundError, match=r"net1 .* lacks view 0"):
        mixed([one, other])
    (other.cache.path / "eval" / "commits" / "v00000-p0001.json").unlink()
    with pytest.raises(NotFoundError, match=r"net1 .* is not finished"):
        mixed([one, other])


def test_wrong_settings_are_refused(tmp_path):
    one, two = answered(tmp_path, 2, views=1)
    dense = Answered(tmp_path / "dense", identity(k=None), 1, number=2)
    with pytest.raises(InputError, match=r"the same cache .*give each once"):
        mixed([one, one])
    with pytest.raises(InputError, match="needs two caches"):
        mixed([one])
    with pytest.raises(InputError, match="3 numbers for 2 caches"):
        mixed([one, two], weights=(1, 1, 1))
    with pytest.raises(InputError, match="--topk 5: these caches hold up to 4"):
        mixed([one, two], topk=5)
    with pytest.raises(InputError, match="--topk 12: a record of all classes needs"):
        mixed([one, dense], topk=12)
    with pytest.raises(InputError, match="--precision uint8"):
        mixed([dense, Answered(tmp_path / "d", identity(k=None), 1, number=3)], precision="uint8")
    imported = identity()
    imported = imported.model_copy(update={"views": imported.views.model_copy(update={"policy": "foreign"})})
    Cache.create(tmp_path / "imported", imported)
    with pytest.raises(InputError, match=r"imported was imported, with views of its own"):
        mix(MixConfig((str(one.cache.path), str(tmp_path / "imported"))), quiet)
    for text in ("", "1,a", "0,1", "1,-1", "nan,1", "1,1e-9"):
        with pytest.raises(ValueError):
            parse_weights(text)


# What becomes of it


def test_a_mix_is_read_like_any_cache(tmp_path):
    caches = answered(tmp_path, 2)
    cache = Cache(mixed(caches).path)
    with pytest.raises(InputError, match=r"no one teacher to ask: give --depth contents$"):
        source_of(cache)
    with pytest.raises(InputError, match=r"no one teacher to ask: train without --online"):
        feed_of(cache).live()
    packed = pack(cache.path, "hdf5", out=str(tmp_path / "m.h5"), say=quiet)
    assert same(Cache(packed.path).read(1), cache.read(1))
    pushed = push(cache.path, str(tmp_path / "registry"), say=quiet)
    assert pushed.teacher is None
    pull(cache.key, str(tmp_path / "registry"), out=str(tmp_path / "pulled"), say=quiet)
    assert same(Cache(tmp_path / "pulled").read(1), cache.read(1)) and verify(Cache(tmp_path / "pulled")).passed


def test_a_mix_of_a_mix(tmp_path):
    one, two, three = answered(tmp_path, 3, k=None, precision="float32")
    inner = mixed([one, two])
    whole = mix(MixConfig((str(inner.path), str(three.cache.path)), weights=(2, 1)), quiet)
    found = Cache(whole.path).read(0).logits()
    want = Cache(mixed([one, two, three]).path).read(0).logits()
    torch.testing.assert_close(torch.softmax(found, 1), torch.softmax(want, 1), rtol=1e-5, atol=1e-7)


def test_verify_names_the_members_that_are_at_hand(tmp_path):
    caches = answered(tmp_path / "home" / "caches", 2, views=1)
    for c in caches:
        c.cache.path.rename(c.cache.path.parent / c.cache.key)
    cache = Cache(mix(MixConfig(tuple(c.cache.key[:8] for c in caches)), quiet).path)
    keys = sorted(c.cache.key for c in caches)
    with pytest.raises(
        InputError, match=f"or verify its members: kdcache verify {keys[0][:12]} and kdcache verify {keys[1][:12]}"
    ):
        source_of(cache)


def test_online_with_several_caches_is_refused_before_anything_is_mixed():
    with pytest.raises(InputError, match="--online asks one live teacher, and 2 caches are named"):
        with_one_cache(TrainConfig(online=True), ("a", "b"), quiet)
    assert with_one_cache(TrainConfig(cache="a"), ("a",), quiet).cache == "a"


def test_the_commands(toy_at_hand, tmp_path):
    """Mixed, trained from by the long and the short form, evaluated, checked and packed, as a user does it."""
    import kd_toy

    weights = kd_toy.net(12).state_dict()
    weights["8.weight"] = weights["8.weight"].flip(0)
    torch.save(weights, "other.pt")
    kdcache(f"{BUILD} --out a")
    kdcache(f"{BUILD} --weights other.pt --out b")
    result = json.loads(kdcache("mix a b --json").stdout)
    assert {m["teacher"] for m in result["members"]} == {"kd_toy:net"} and result["views"] == 2
    train = "train --data kd_toy:images --student resnet8 --epochs 1 --batch-size 32 --loss nkd --device cpu"
    run = kdcache(f"{train} --cache a --cache b --out short --json")
    assert "their mean is trained from" in run.stderr and " 0 of 340 records by this mix" in run.stderr
    kdcache(f"{train} --cache {result['key']} --out long")
    short, long = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("short", "long"))
    assert short["cache"] == long["cache"] == result["key"]
    assert metrics_of(tmp_path / "short") == metrics_of(tmp_path / "long")
    assert "agreement" in kdcache("eval short --data kd_toy:images --device cpu").stdout
    assert run.stderr.count(" of the mix is not measured: it is not under KDCACHE_HOME") == 2
    kdcache(f"verify {result['key']} --depth contents")
    assert "mix (kd_toy:net + kd_toy:net)" in kdcache("ls").stdout
    for line, says in (
        (f"{train} --cache a --cache b --online", "--online asks one live teacher"),
        (f"{train} --cache {result['key']} --online", "no one teacher to ask: train without --online"),
        (f"verify {result['key']}", "no one teacher to ask: give --depth contents"),
        ("mix a", "a mix needs two caches"),
        ("mix a b --weights 1,x", "'1,x' is not a list of numbers"),
    ):
        assert says in kdcache(line, status=2).stderr.splitlines()[-1]
    kdcache(f"pack {result['key']} --to ffcv --data kd_toy:images --out m.beton")
    assert same(FFCVFile(tmp_path / "m.beton").read(1), Cache(Path(result["path"])).read(1))
