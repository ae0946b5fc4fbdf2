"""Stage 1: what is stored is what the teacher answers, whoever stops, resumes, extends or disturbs the build."""

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import example, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from kdcache.cache import Cache, KdcacheError, encode, open_cache
from kdcache.cache import errors as e
from kdcache.cache.home import list_caches
from kdcache.cache.store import chunks, leases
from kdcache.cache.store.layout import shard_name
from kdcache.cache.store.publish import SplitStore
from kdcache.pipeline import verify as verify_module
from kdcache.pipeline.build import build as build_module
from kdcache.pipeline.build import builder, plan
from kdcache.pipeline.build import spool as spool_module
from kdcache.pipeline.build.answers import answers, record_batches, teacher_renderer, view_parameters
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.source import open_source
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.data.defaults import defaults_for
from kdcache.pipeline.data.kinds.files import FileDataset
from kdcache.pipeline.info import describe, facts, one_line
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.pipeline.verify import verify
from kdcache.pipeline.views.policy import draw
from kdcache.pipeline.views.render import _Pixels
from kdcache.tests.helpers.building import BATCH, PART, PARTS, TOY, settings


def quiet(_):
    pass


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with the module kd_toy and an empty home of kdcache's."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "kd_toy.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("KDCACHE_HOME", str(folder / "home"))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for networks this small, more only wait for each other
        yield folder
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _home(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def source(toy):
    return open_source(settings(), quiet)


@pytest.fixture(scope="module")
def reference(toy, source):
    """The cache of `settings()`, built without a disturbance."""
    build(settings(out=str(toy / "reference")), quiet, source)
    return toy / "reference"


def content(path):
    """Every file's bytes, and of commits all but who wrote them; nothing is left of builders.

    But for the temporary files of those that died before they were known: they wait for a minute to pass.
    """
    found = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and not (name.startswith(("leases/.", "scratch/.")) and name.endswith(".tmp")):
            found[name] = file.read_bytes()
            if "commits/" in name:
                about = json.loads(found[name])
                assert set(about.pop("writer")) >= {"host", "torch", "time"}
                found[name] = about
    return found


def spooled(tmp_path):
    return [p for p in (tmp_path / "home" / "spool").rglob("*") if p.is_file() and p.name != "lock"]


def equal(a, b):
    fields = ("classes", "gaps", "target_gap", "tail", "labels", "prior")
    pairs = [(getattr(a, f), getattr(b, f)) for f in fields]
    return all((x is None and y is None) or x.equal(y) for x, y in pairs)


# ---- what is stored ----


def rendered_apart(data, boxes, flips):
    """uint8 [n, H, W, 3]: each crop on its own, by numpy."""
    out = []
    for image, (top, left, height, width), flip in zip(data.pixels.numpy(), boxes, flips, strict=True):
        pad = max(height, width)
        black = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        cut = black[pad + top : pad + top + height, pad + left : pad + left + width]
        out.append(cut[:, ::-1] if flip else cut)
    return np.stack(out)


@pytest.mark.parametrize(("k", "precision"), [(4, "float16"), (None, "float32")])
def test_records_and_prior_are_those_of_the_teachers_answers(tmp_path, source, k, precision):
    """Rendered, batched, encoded and averaged again here, apart from the product."""
    import kd_toy

    config = settings(topk=k or 12, precision=precision, out=str(tmp_path / "c"))
    build(config, quiet)
    cache = open_cache(tmp_path / "c")
    assert cache.identity.record.k == k
    network = kd_toy.net(12).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (source.train.mean, source.train.std))
    still = np.tile([0, 0, 10, 10], (40, 1)), np.zeros(40, bool)
    first_view = []
    for data, view, records in (
        (source.evaluation, None, cache.read_evaluation()),
        *((source.train, v, cache.read(v)) for v in cache.views),
    ):
        drawn = draw("crop,flip", 0, view or 0, range(len(data)), data.sizes)
        pixels = rendered_apart(data, *(still if view is None else (drawn.boxes, drawn.flips)))
        for part in range(0, len(data), PART):
            for at in range(part, min(part + PART, len(data)), BATCH):
                rows = np.arange(at, min(at + BATCH, part + PART, len(data)))
                full = np.pad(rows, (0, BATCH - len(rows)), mode="edge")
                images = torch.from_numpy(pixels[full]).permute(0, 3, 1, 2)
                with torch.inference_mode():
                    logits = network((images - mean) / std)[: len(rows)]
                if view == 0:
                    first_view.append(logits)
                labels = torch.from_numpy(data.labels[rows])
                want = replace(encode(logits, labels, k, (1.0, 4.0), precision), prior=cache.prior)
                assert equal(records[torch.from_numpy(rows)], want)
    if k is None:
        assert cache.prior is None
        return
    prior = np.zeros((2, 12))
    for z, y in zip(torch.cat(first_view).double().numpy(), source.train.labels[:, 0], strict=True):
        rest = sorted(set(range(12)) - set(np.argsort(-z, kind="stable")[:k].tolist()) - {int(y)})
        for i, t in enumerate((1.0, 4.0)):
            share = np.exp((z[rest] - z[rest].max()) / t)
            prior[i, rest] += share / share.sum()
    prior = 0.999 * prior / prior.sum(1, keepdims=True) + 0.001 / 12
    np.testing.assert_allclose(cache.prior.numpy(), prior, rtol=1e-6)


def test_every_batch_is_full_and_the_evaluation_split_is_first(tmp_path, source, monkeypatch):
    sizes, shards = [], []
    answer, write = Teacher.logits, SplitStore.write_shard
    monkeypatch.setattr(Teacher, "logits", lambda self, images: sizes.append(len(images)) or answer(self, images))
    monkeypatch.setattr(
        SplitStore, "write_shard", lambda self, v, p, *a: shards.append((self.split, v, p)) or write(self, v, p, *a)
    )
    monkeypatch.setattr(build_module, "_probe", lambda *a: (1.0, 1.0))
    result = build(settings(out=str(tmp_path / "c")), quiet, source)
    assert set(sizes) == {BATCH} and result.teacher_images == 40 + 2 * 150
    assert shards == [("eval", 0, 0), *(("train", v, p) for v in (0, 1) for p in range(PARTS))]


def test_a_batch_does_not_depend_on_where_the_build_went_on(source):
    whole = list(record_batches(source, source.train, source.train_labels, 1, range(64, 128), BATCH, 0))
    for skipped in (1, 3):
        rows = range(64 + skipped * BATCH, 128)
        rest = list(record_batches(source, source.train, source.train_labels, 1, rows, BATCH, 0))
        assert len(rest) == len(whole) - skipped
        for (a, z), (b, y) in zip(rest, whole[skipped:], strict=True):
            assert equal(a, b) and z.equal(y)


def test_unlabelled_and_single_class_records_are_built(tmp_path):
    config = settings(teacher="kd_toy:twelve", topk=1, unlabelled=True, views=1, out=str(tmp_path / "c"))
    result = build(config, quiet)
    records = open_cache(tmp_path / "c").read(0)
    assert result.teacher_top1 is None
    assert records.gaps.shape == (150, 0) and records.labels.shape == (150, 0) and records.tail.shape == (150, 2)
    assert verify(open_cache(tmp_path / "c"), open_source(config, quiet)).passed
    assert build(config, quiet).teacher_images == 0


def test_logits_that_are_not_finite_are_an_error_that_names_the_sample(tmp_path, source, monkeypatch):
    answer = Teacher.logits

    def nan(self, images):
        logits = answer(self, images).clone()
        logits[5] = torch.nan
        return logits

    monkeypatch.setattr(build_module, "_probe", lambda *a: (1.0, 1.0))
    build(settings(views=1, out=str(tmp_path / "c")), quiet, source)
    monkeypatch.setattr(Teacher, "logits", nan)
    with pytest.raises(e.InputError, match=r"logits are not finite: view 1, sample 5 of train"):
        build(settings(out=str(tmp_path / "c")), quiet, source)
    assert open_cache(tmp_path / "c").views == (0,)


def test_a_standard_deviation_that_cannot_be_stored_ends_the_build_before_it_is_committed(
    tmp_path, source, monkeypatch
):
    answer = Teacher.logits
    monkeypatch.setattr(Teacher, "logits", lambda self, images: 1e7 * answer(self, images))
    with pytest.raises(e.InputError, match=r"above 65,504, more than --tail-std can store: build without it, or dense"):
        build(settings(views=1, tail_std=True, out=str(tmp_path / "c")), quiet)
    assert not (tmp_path / "c").exists()
    monkeypatch.setattr(build_module, "_probe", lambda *a: (1.0, 1.0))  # later images alone may be so
    with pytest.raises(e.InputError, match=r"above 65,504, more than --tail-std can store: build without it, or dense"):
        build(settings(views=1, tail_std=True, out=str(tmp_path / "c")), quiet)
    assert open_cache(tmp_path / "c").views == ()


def test_a_batch_larger_than_the_data_is_refused(tmp_path, source):
    with pytest.raises(e.InputError, match=r"--batch-size 151 is larger than the data, 150 images"):
        build(settings(batch_size=151, out=str(tmp_path / "c")), quiet, source)
    assert not (tmp_path / "c").exists()


def test_a_compiled_teacher_answers_alike_and_one_that_cannot_be_compiled_is_one_line(tmp_path, source, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiled(*a, **{**k, "mode": None, "backend": "aot_eager"}))
    asked = []
    answer = source.teacher.compile(BATCH).compiled
    assert answer is not None
    monkeypatch.setattr(Teacher, "compile", lambda self, batch: asked.append(batch) or replace(self, compiled=answer))
    build(settings(compile=True, views=1, out=str(tmp_path / "c")), quiet, source)
    assert asked == [BATCH] and verify(open_cache(tmp_path / "c"), source).passed
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", lambda *a, **k: lambda images: images.no_such_method())
    with pytest.raises(e.InputError, match=r"kd_toy:net cannot be compiled here: .*--no-compile") as caught:
        build(settings(compile=True, out=str(tmp_path / "d")), quiet, source)
    assert "\n" not in str(caught.value)


def test_whether_the_teacher_is_compiled_depends_on_neither_what_is_left_nor_ranks(tmp_path, source, monkeypatch):
    monkeypatch.setattr(Teacher, "compile", lambda self, batch: replace(self, compiled=self.model))
    on_gpu = replace(source, teacher=replace(source.teacher, device=torch.device("cuda")))

    def compiled(of, records, choice=None):
        monkeypatch.setattr(plan, "WORTH_COMPILING", records)
        planned = plan.plan_build(settings(compile=choice), of)
        return build_module._compiled(planned, quiet).source.teacher.compiled is not None

    usual = 150 * 16
    assert compiled(on_gpu, usual) and not compiled(on_gpu, usual + 1) and not compiled(source, usual)
    assert compiled(source, usual, True) and not compiled(on_gpu, usual, False)


def test_a_shard_is_not_gone_on_with_by_a_teacher_that_is_compiled(tmp_path, source, monkeypatch):
    """Nor does the other way mix: what one has spooled is not in the other's shard, and commits say which it was."""
    monkeypatch.setattr(build_module, "_probe", lambda *a: (1.0, 1.0))
    monkeypatch.setattr(spool_module, "SPOOL_SECONDS", -1.0)
    answer, asked = Teacher.logits, []

    def stop(self, images):
        asked.append(len(images))
        if len(asked) == stop.at:
            raise ZeroDivisionError
        return answer(self, images)

    monkeypatch.setattr(Teacher, "logits", stop)
    monkeypatch.setattr(Teacher, "compile", lambda self, batch: replace(self, compiled=self.model))
    config, stop.at = settings(views=1, out=str(tmp_path / "c")), 5  # after 2 of the evaluation split's 3 batches ...
    with pytest.raises(ZeroDivisionError):
        build(config, quiet, source)
    assert len(spooled(tmp_path)) == 1
    stop.at = None
    again = build(replace(config, compile=True), quiet, source)
    assert again.teacher_images == 150  # ... 3 of them are committed, and of view 0 all is computed anew
    commits = Cache(tmp_path / "c")
    assert commits.evaluation.commit(shard_name(0, 0)).writer["compiled"] == "no"
    assert {commits.train.commit(shard_name(0, part)).writer["compiled"] for part in range(PARTS)} == {"yes"}


# ---- again, and more ----


def test_more_views_leave_what_is_there_untouched(tmp_path, reference, source):
    path = tmp_path / "c"
    build(settings(views=1, out=str(path)), quiet, source)

    def state():
        files = [p for p in path.rglob("*") if p.is_file() and p.parent.name != "scratch"]
        return {p: (p.stat().st_mtime_ns, p.stat().st_ino, hashlib.sha256(p.read_bytes()).digest()) for p in files}

    before = state()
    assert build(settings(out=str(path)), quiet, source).teacher_images == 150
    after = state()
    assert {p: after[p] for p in before} == before
    assert {p.relative_to(path).parts[:2] for p in after.keys() - before.keys()} == {
        ("views", "v00001"),
        *(("commits", f"v00001-p000{p}.json") for p in range(PARTS)),
    }
    assert content(path) == content(reference)


def test_reuse_asks_the_teacher_nothing_and_writes_nothing(tmp_path, reference, source, monkeypatch):
    monkeypatch.setattr(Teacher, "logits", None)
    monkeypatch.setattr(os, "fsync", None)
    monkeypatch.setattr(os, "link", None)
    said = []
    for views in (2, 1):
        result = build(settings(views=views, out=str(reference)), said.append, source)
        assert result.teacher_images == 0 and result.key == source.identity.key
    assert ["nothing to compute" in line for line in said] == [True, True]
    # The same cache at its usual place, by its key.
    shutil.copytree(reference, tmp_path / "home" / "caches" / source.identity.key)
    assert build(settings(), quiet, source).teacher_images == 0


def test_labels_or_a_prior_that_are_gone_are_made_again_without_the_teacher(tmp_path, reference, source, monkeypatch):
    path = tmp_path / "c"
    for gone in ("commits/prior.json", "commits/labels.json", "eval/commits/labels.json"):
        shutil.copytree(reference, path)
        (path / gone).unlink()
        with pytest.raises(KdcacheError, match="run kdcache build again"):
            (Cache(path).read_evaluation() if "eval" in gone else Cache(path).read(0))
        with monkeypatch.context() as patch:
            patch.setattr(Teacher, "logits", None)
            assert build(settings(out=str(path)), quiet, source).teacher_images == 0
        assert content(path) == content(reference)
        shutil.rmtree(path)


def test_a_shard_whose_commit_was_removed_as_told_is_made_anew(tmp_path, reference, source):
    path = tmp_path / "c"
    shutil.copytree(reference, path)
    chunk = path / "views/v00000/gaps/c/1/0"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    with pytest.raises(e.CorruptError, match=r"remove .*v00000-p0001\.json and run kdcache build") as caught:
        Cache(path).read(0)
    Path(str(caught.value).split("remove ")[1].split(" and run")[0]).unlink()
    assert build(settings(out=str(path)), quiet, source).teacher_images == 64
    assert content(path) == content(reference)


def test_another_class_map_is_another_cache(tmp_path, reference, source):
    mapping = tmp_path / "map.csv"
    mapping.write_text("".join(f"{a},{(i + 1) % 12}\n" for i, a in enumerate("abcdefghijkl")))
    other = open_source(settings(class_map=str(mapping)), quiet)
    assert other.identity.key != source.identity.key
    before = content(reference)
    with pytest.raises(e.MismatchError, match="class_map: the cache has None, asked for"):
        build(settings(class_map=str(mapping), out=str(reference)), quiet, other)
    assert content(reference) == before
    (problem,) = verify(Cache(reference), other).problems
    assert "class_map: the cache has None" in problem
    mapping.write_text("".join(f"{a},{i}\n" for i, a in enumerate("abcdefghijkl")))
    assert open_source(settings(class_map=str(mapping)), quiet).identity == source.identity


def test_a_teacher_that_is_not_the_caches_is_refused_before_it_is_asked(tmp_path, reference, source, monkeypatch):
    """As where a published cache in another numeric type is taken: complete it is named, else nobody builds on."""
    teacher = source.teacher.identity.model_copy(update={"numeric": "bf16", "input_size": 12})
    other = replace(source, teacher=replace(source.teacher, identity=teacher))
    path = tmp_path / "c"
    shutil.copytree(reference, path)
    assert build(settings(out=str(path)), quiet, other).teacher_images == 0
    before = content(path)
    monkeypatch.setattr(Teacher, "logits", None)
    for config in (settings(views=3, out=str(path)), settings(out=str(tmp_path / "new"))):
        with pytest.raises(e.MismatchError, match=r"numeric: the cache has float32, this teacher has bf16") as caught:
            build(config, quiet, other)
        assert "input_size: the cache has 10, this teacher has 12" in str(caught.value)
    assert content(path) == before and not (tmp_path / "new").exists()


def test_one_class_of_several_has_the_sum_of_their_probabilities(tmp_path, source):
    """Two of the toy's twelve classes to one class of the data each, and the rest left out."""
    import kd_toy

    mapping = tmp_path / "map.json"
    groups = [[i, (5 * i + 3) % 24 + 12] for i in range(12)]
    mapping.write_text(json.dumps(dict(zip("abcdefghijkl", groups, strict=True))))
    config = settings(teacher="kd_toy:forty", class_map=str(mapping), topk=None, precision="float32", views=1)
    said = []
    merging = open_source(config, said.append)
    assert any("makes one class of several of the teacher's, so students have the data's 12" in line for line in said)
    build(replace(config, out=str(tmp_path / "c")), quiet, merging)
    cache = Cache(tmp_path / "c")
    assert cache.identity.record.classes == 12 and cache.identity.class_map not in (None, source.identity.class_map)
    assert (cache.train.labels == source.train.labels).all()
    assert verify(cache, open_source(config, quiet)).passed
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (source.train.mean, source.train.std))
    images = source.evaluation.pixels.permute(0, 3, 1, 2)
    with torch.inference_mode():
        p = kd_toy.forty().eval()((images - mean) / std).double().exp()
    sums = torch.stack([p[:, group].sum(1) for group in groups], 1)
    want = sums / sums.sum(1, keepdim=True)
    np.testing.assert_allclose(cache.read_evaluation().dense(1.0), want, rtol=1e-4, atol=1e-7)
    compiled = torch.compile(merging.teacher.model, backend="eager")
    with torch.inference_mode():
        assert compiled(images[:BATCH]).equal(merging.teacher.logits(images[:BATCH]))


def test_two_classes_of_the_data_may_be_one_of_the_teachers_where_a_file_says_so(tmp_path):
    mapping = tmp_path / "map.csv"
    mapping.write_text("".join(f"{a},{i % 11}\n" for i, a in enumerate("abcdefghijkl")))
    said = []
    config = settings(class_map=str(mapping), views=1, out=str(tmp_path / "c"))
    source = open_source(config, said.append)
    assert any("'a' and 'l' are one class of the teacher's" in line for line in said)
    build(config, quiet, source)
    assert (Cache(tmp_path / "c").train.labels == source.train.labels % 11).all()
    assert verify(Cache(tmp_path / "c"), source).passed


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("probabilities", "answers with probabilities"),
        ("constant", "answers alike to all of 128 training images"),
        ("careless", r"answers the same image differently each time, as in training mode \(network\.8\)"),
        ("huge", "records hold 65,504"),
        ("net", r"among 12 classes the teacher is right on .*chance is 7\.8%"),
    ],
)
def test_a_teacher_that_is_not_what_it_seems_is_refused(tmp_path, toy, teacher, message):
    config = settings(teacher=f"kd_toy:{teacher}", allow_low_accuracy=False, out=str(tmp_path / "c"))
    with pytest.raises(e.InputError, match=message) as caught:
        build(config, quiet)
    assert "\n" not in str(caught.value) and not (tmp_path / "c").exists()


def test_a_teacher_whose_classes_change_places_is_refused_and_named(taught, tmp_path):
    source, *_ = taught
    said, config = [], settings(weights=str(taught[2].parent / "4.pt"), allow_low_accuracy=False, views=1)
    build(replace(config, out=str(tmp_path / "good")), said.append, source)
    rolled = {name: value.clone() for name, value in source.teacher.model.network.state_dict().items()}
    for name in ("8.weight", "8.bias"):
        rolled[name][:4] = rolled[name][:4].roll(1, 0)
    torch.save(rolled, tmp_path / "rolled.pt")
    config = replace(config, weights=str(tmp_path / "rolled.pt"), out=str(tmp_path / "c"))
    with pytest.raises(e.InputError, match=r"images of [abcd] are answered as [abcd], .*--class-map FILE") as caught:
        build(config, quiet)
    shown = str(caught.value).split(": ")[1].split(" (")[0].split(", ")
    assert sorted(shown) == [f"images of {a} are answered as {b}" for a, b in ("ab", "bc", "cd", "da")]
    assert build(replace(config, allow_low_accuracy=True), quiet).teacher_images == 190


def test_another_cache_in_the_same_place_is_refused_field_by_field(reference):
    before = content(reference)
    with pytest.raises(e.MismatchError) as caught:
        build(settings(topk=3, seed=7, augment="flip", out=str(reference)), quiet)
    for line in ("record.k: the cache has 4, asked for 3", "views.seed: the cache has 0, asked for 7", "views.policy"):
        assert line in str(caught.value)
    assert content(reference) == before


def test_a_record_too_large_for_a_shard_is_refused_before_the_teacher_works(source, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 300)
    with pytest.raises(e.InputError, match=r"a shard would hold 384 B .*4 classes a record are too many, lower --topk"):
        open_source(settings(precision="float16"), quiet)


# ---- stopped and resumed ----

DRIVER = """
import json, os, random, shutil, signal, sys, time, warnings
warnings.filterwarnings("ignore", ".*multi-threaded, use of fork")
import torch
torch.set_num_threads(1)
from pathlib import Path
from kdcache.cache.store import cache
from kdcache.pipeline.build import build as module
from kdcache.pipeline.build import builder, spool
from kdcache.pipeline.teachers.teacher import Teacher
spool.SPOOL_SECONDS = 0.0
builder._POLL_SECONDS = 0.01
quiet = lambda line: None
config = module.BuildConfig(**json.loads(sys.argv[1]) | {"temperatures": (1.0, 4.0)})
source = module.open_source(config, quiet)

def in_child(work):
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def run(path, facts=None):
    from dataclasses import replace
    result = module.build(replace(config, out=str(path)), quiet, source)
    if facts:
        facts.write_text(json.dumps(result.teacher_images))

def killed_at(event, by=signal.SIGKILL):
    # Every step that leaves a trace, and every answer of the teacher, is a moment to die.
    left = [event]
    def counting(function):
        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                left[0] = 10**9
                os.kill(os.getpid(), by)
            return function(*args, **kwargs)
        return counted
    os.fsync, os.link, os.replace = counting(os.fsync), counting(os.link), counting(os.replace)
    os.mkdir, os.unlink, Teacher.logits = counting(os.mkdir), counting(os.unlink), counting(Teacher.logits)
    return left
"""


def start(toy, script, *arguments, **env):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", DRIVER + script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(toy), **{k: str(v) for k, v in env.items()}},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=200)
    print(err)  # for whoever sees a later assertion fail
    assert process.returncode == 0, err
    return out


def as_json(config):
    return json.dumps(vars(config))


def images_left(path, home, views):
    """What a build that was killed has neither committed nor spooled, from the files that it left."""
    left = 0
    for root, prefix, samples, count in ((path / "eval", "eval-", 40, 1), (path, "", 150, views)):
        for view in range(count):
            for part in range(-(-samples // PART)):
                rows = min(PART, samples - part * PART)
                if (root / "commits" / f"{shard_name(view, part)}.json").exists():
                    continue
                blocks = (home / "spool").glob(f"*/{prefix}{shard_name(view, part)}-b{BATCH}-cpu-0/*.block")
                left += rows - max((int(b.stem.split("-")[1]) for b in blocks), default=0)
    return left


@pytest.mark.timeout(280)
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(toy, tmp_path):
    """SIGKILL at chosen steps and, in the last rounds, at random times; then at a second one; then to the end."""
    script = """
folder, rng = Path(sys.argv[2]), random.Random(4)
assert ended(in_child(lambda: run(folder / "whole"))) == 0
def count():
    left = killed_at(10**9)
    run(folder / "counted")
    (folder / "events").write_text(str(10**9 - left[0]))
assert ended(in_child(count)) == 0
events = int((folder / "events").read_text())
first = sorted({0, 3, 6, 9, events - 1, events - 3, *(rng.randrange(events) for _ in range(int(sys.argv[3])))})
for n in [*first, -1, -2, -3]:
    place = folder / str(n)
    os.environ["KDCACHE_HOME"] = str(place / "home")
    for attempt in (0, 1):
        def victim():
            if n >= 0:
                killed_at(n if attempt == 0 else rng.randrange(events // 2))
            else:
                slow = Teacher.logits
                def logits(*args):
                    time.sleep(0.004)
                    return slow(*args)
                Teacher.logits = logits
            run(place / "cache")
        child = in_child(victim)
        if n < 0:
            time.sleep(rng.uniform(0.05, 0.6))
            os.kill(child, signal.SIGKILL)
        assert ended(child) in (-signal.SIGKILL, 0)
    rng.random()
    for name in ("cache", "home"):
        if (place / name).exists():
            shutil.copytree(place / name, place / f"{name}-killed")
    assert ended(in_child(lambda: run(place / "cache", place / "facts"))) == 0
    print(n)
"""
    env = {"KDCACHE_HOME": tmp_path / "home"}
    killed = finish(start(toy, script, as_json(settings()), tmp_path, 10, **env)).split()
    want = content(tmp_path / "whole")
    assert content(tmp_path / "counted") == want and len(killed) > 15
    saved = 0
    for n in killed:
        place = tmp_path / n
        assert content(place / "cache") == want, n
        assert not list(place.glob("home/spool/*")), n
        left = images_left(place / "cache-killed", place / "home-killed", 2)
        assert json.loads((place / "facts").read_text()) == left, n
        saved += 340 - left
        # What was readable when it was killed was right.
        with contextlib.suppress(e.NotFoundError):
            early = Cache(place / "cache-killed")
            for view in early.views:
                assert equal(early.train.read(view, None), replace(Cache(place / "cache").read(view), prior=None))
    assert saved > 340


@pytest.mark.parametrize(("how", "saved"), [("half", 32), ("empty", 32), ("a bit", 0), ("gap", 16), ("whole", 48)])
def test_a_damaged_spool_costs_time_only(tmp_path, reference, source, monkeypatch, how, saved):
    monkeypatch.setattr(spool_module, "SPOOL_SECONDS", -1.0)
    monkeypatch.setattr(build_module, "_probe", lambda *a: (1.0, 1.0))
    path, answers, answer = tmp_path / "c", [], Teacher.logits

    def stop(self, images):
        answers.append(len(images))
        if len(answers) == 3 + 4 + 4:  # the evaluation split, part 0, and the last batch of part 1
            raise ZeroDivisionError
        return answer(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "logits", stop)
        with pytest.raises(ZeroDivisionError):
            build(settings(out=str(path)), quiet, source)
    blocks = sorted(spooled(tmp_path))
    assert [b.name for b in blocks] == [f"{i:012d}-{i + 16:012d}.block" for i in (0, 16, 32)]
    if how == "half":
        os.truncate(blocks[2], blocks[2].stat().st_size // 2)
    elif how == "empty":
        blocks[2].write_bytes(b"")
    elif how == "a bit":
        data = bytearray(blocks[0].read_bytes())
        data[len(data) // 2] ^= 4
        blocks[0].write_bytes(data)
    elif how == "gap":
        blocks[1].unlink()
    assert build(settings(out=str(path)), quiet, source).teacher_images == 340 - 40 - 64 - saved
    assert content(path) == content(reference) and spooled(tmp_path) == []


def test_builds_of_one_key_in_two_places_do_not_share_a_spool(tmp_path, reference, source, monkeypatch):
    monkeypatch.setattr(spool_module, "SPOOL_SECONDS", -1.0)
    write, other = SplitStore.write_shard, iter([tmp_path / "b"])

    def interrupted(self, *args):
        if self.split == "train" and (place := next(other, None)):
            build(settings(out=str(place)), quiet, source)
        write(self, *args)

    monkeypatch.setattr(SplitStore, "write_shard", interrupted)
    assert build(settings(out=str(tmp_path / "a")), quiet, source).teacher_images == 340
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(reference)
    assert spooled(tmp_path) == []


def test_leavings_of_a_build_killed_at_its_very_end_go_with_the_next(tmp_path, reference, source):
    shutil.copytree(reference, tmp_path / "c")
    block = (
        spool_module.spool_folder(tmp_path / "c", source.identity.key)
        / "v00001-p0002-b16-cpu-0"
        / "000000000000-000000000016.block"
    )
    block.parent.mkdir(parents=True)
    block.write_bytes(b"left")
    with FileLock(block.parent / "lock"):  # by a build that was stopped here, and may wake up
        assert build(settings(out=str(tmp_path / "c")), quiet, source).teacher_images == 0
        assert block.exists()
    assert build(settings(out=str(tmp_path / "c")), quiet, source).teacher_images == 0
    assert spooled(tmp_path) == [] and list((tmp_path / "home" / "spool").iterdir()) == []


# ---- two builders ----


def test_a_build_that_was_overtaken_computes_nothing_again(tmp_path, reference, source, monkeypatch):
    create, path = Cache.create.__func__, tmp_path / "c"

    def overtaken(cls, *args):
        monkeypatch.undo()
        build(settings(out=str(path), views=1), quiet, source)
        return create(cls, *args)

    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Cache, "create", classmethod(overtaken))
    assert build(settings(out=str(path)), quiet, source).teacher_images == 150
    assert content(path) == content(reference)


@pytest.mark.timeout(200)
def test_builders_share_the_work_though_one_is_killed_and_one_stopped(toy, tmp_path):
    """Four at once; in the later rounds one dies and one is stopped until others have taken over, then goes on."""
    script = """
from kdcache.cache.store import chunks, leases
leases.EXPIRES = 1.0
answer = Teacher.logits
def slow(*args):
    time.sleep(0.02)
    return answer(*args)
Teacher.logits = slow
folder, rng = Path(sys.argv[2]), random.Random(1)
for i in range(3):
    place = folder / str(i)
    place.mkdir()
    moments = rng.randrange(20, 90), rng.randrange(20, 90)
    def work(me):
        if i and me < 2:
            killed_at(moments[me], (signal.SIGKILL, signal.SIGSTOP)[me])
        run(place / "cache", place / str(me))
    children = [in_child(lambda: work(me)) for me in range(4)]
    codes = [ended(child) for child in (children[0], *children[2:])]  # who do not wait for the one that has stopped
    os.kill(children[1], signal.SIGCONT)
    codes.append(ended(children[1]))
    print(json.dumps(codes))
"""
    env = {"KDCACHE_HOME": tmp_path / "home"}
    with start(toy, script, as_json(settings(views=3)), tmp_path, **env) as process:
        codes = [json.loads(line) for line in finish(process).splitlines()]
    assert codes == [[0, 0, 0, 0], *2 * [[-signal.SIGKILL, 0, 0, 0]]]
    want = content(tmp_path / "0" / "cache")
    for i in range(3):
        computed = [json.loads(p.read_text()) for p in (tmp_path / str(i)).glob("[0-3]")]
        assert len(computed) == (4 if i == 0 else 3)
        assert (sum(computed) == 40 + 3 * 150) if i == 0 else sum(computed) <= 2 * (40 + 3 * 150)
        assert sum(n > 0 for n in computed) >= 2
        assert content(tmp_path / str(i) / "cache") == want
        assert verify(Cache(tmp_path / str(i) / "cache")).passed
    assert spooled(tmp_path) == []


def test_readers_beside_a_build_see_what_is_committed_and_no_errors(tmp_path, reference, source, monkeypatch):
    path, write, seen = tmp_path / "home" / "caches" / source.identity.key, SplitStore.write_shard, []

    def look():
        cache = open_cache(source.identity.key)
        line = one_line(cache).rpartition(",")[0]  # the size may grow meanwhile, as the build goes on
        assert [c.key for c in list_caches()[0]] == [cache.key] and describe(cache, facts(cache)).startswith(line)
        assert not any("remove" in problem for problem in verify(cache).problems)
        for view in cache.train.complete_views():
            assert equal(cache.train.read(view, None), replace(Cache(reference).read(view), prior=None))
        seen.append(len(cache.views))

    def watched(self, *args):
        look()
        assert write(self, *args)
        look()

    monkeypatch.setattr(SplitStore, "write_shard", watched)
    build(settings(), quiet, source)
    assert content(path) == content(reference) and set(seen) == {0, 1, 2}


def test_a_build_that_is_interrupted_gives_its_leases_back(tmp_path, source, monkeypatch):
    path, answers, answer = tmp_path / "c", [], Teacher.logits

    def interrupted(self, images):
        answers.append(len(images))
        if len(answers) == 8:
            assert {p.name.split(".")[1] for p in (path / "leases").iterdir()} == {"0", "json"}
            raise KeyboardInterrupt
        return answer(self, images)

    monkeypatch.setattr(build_module, "_probe", lambda *a: (1.0, 1.0))
    monkeypatch.setattr(Teacher, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(settings(out=str(path)), quiet, source)
    assert not [p for name in ("leases", "scratch") for p in (path / name).rglob("*") if p.is_file()]


def test_a_build_says_for_whom_it_waits_and_does_not_wait_for_the_dead(tmp_path, reference, source, monkeypatch):
    path, said = tmp_path / "c", []
    monkeypatch.setattr(builder, "_POLL_SECONDS", 0.01)
    shutil.copytree(reference, path)
    (path / "commits" / "v00001-p0001.json").unlink()
    with Cache(path).writing() as other:
        assert other.take("v00001-p0001")
        sleep, polls = time.sleep, []

        def poll(seconds):
            polls.append(seconds)
            if len(polls) == 5:
                other.release("v00001-p0001")
            sleep(seconds)

        monkeypatch.setattr(builder.time, "sleep", poll)
        assert build(settings(out=str(path)), said.append, source).teacher_images == 64
    who = f"{socket.gethostname()} (process {os.getpid()}, since 20"
    assert [line for line in said if line.startswith(f"sharing the work with {who}")] != []
    assert len([line for line in said if line.startswith(f"waiting for the last 1 shards, at {who}")]) == 1
    assert len(polls) == 5 and content(path) == content(reference)


def test_a_lease_lost_under_way_ends_in_what_the_other_committed(tmp_path, reference, source, monkeypatch):
    path, answers, answer = tmp_path / "c", [], Teacher.logits

    def overtaken(self, images):
        answers.append(len(images))
        if len(answers) == 6:  # in the first shard of view 0: stopped here, while another builds all
            while not (path / "eval" / "commits" / "v00000-p0000.json").exists():
                time.sleep(0.01)
            monkeypatch.setattr(Teacher, "logits", answer)
            for file in (path / "leases").iterdir():
                file.unlink()
            for folder in (path / "scratch").iterdir():
                shutil.rmtree(folder)
            assert build(settings(out=str(path)), quiet, source).teacher_images == 300
        return answer(self, images)

    monkeypatch.setattr(leases, "EXPIRES", 0.05)
    monkeypatch.setattr(build_module, "_probe", lambda *a: (1.0, 1.0))
    monkeypatch.setattr(Teacher, "logits", overtaken)
    said = []
    result = build(settings(out=str(path)), said.append, source)
    assert 40 + 64 >= result.teacher_images > 40
    assert "by this build" in said[-1] and content(path) == content(reference)
    assert spooled(tmp_path) == []


# ---- the spool ----


def test_each_builder_of_a_shard_has_its_own_spool_and_the_next_takes_over_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "SPOOL_SECONDS", -1.0)

    def block(value):
        return {"gaps": np.full((4, 2), value)}

    with contextlib.closing(spool_module.Spool(tmp_path / "s", 12)) as first:
        first.add(block(1), None)
        with contextlib.closing(spool_module.Spool(tmp_path / "s", 12)) as second:
            assert second.rows == 0
            second.add(block(2), None)
            second.add(block(2), None)
            second.remove()
        first.add(block(1), None)
    with contextlib.closing(spool_module.Spool(tmp_path / "s", 12)) as third:
        assert third.rows == 8 and (third.arrays()["gaps"] == 1).all()
        third.remove()
    assert list(tmp_path.iterdir()) == []


@given(
    st.lists(st.floats(0.01, 40), min_size=1, max_size=60)
    | st.builds(lambda seconds, n: [seconds] * n, st.floats(40, 60), st.integers(1, 5))
)
def test_no_more_than_a_minute_of_the_teachers_time_is_ever_at_risk(tmp_path_factory, durations):
    """Killed at the end of a batch, which is when most is lost."""
    now, saved = [0.0], [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool_module.time, "monotonic", lambda: now[0])
        patch.setattr(spool_module, "replace_file", lambda *a: saved.append(now[0]))
        with contextlib.closing(spool_module.Spool(tmp_path_factory.mktemp("spool") / "s", 100)) as spool:
            for seconds in durations:
                now[0] += seconds
                assert now[0] - saved[-1] <= 60
                spool.add({"gaps": np.zeros((1, 1))}, None)


# ---- no room ----


@contextlib.contextmanager
def little_room(kind, folder, size):
    """Room for `size` bytes: on a disk of its own or, where none can be mounted, in each file. Gives a way to more."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if kind == "disk" and shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode:
        try:
            yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size if kind == "file" else 900, hard))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("disk", 30_000),
        ("disk", 120_000),
        ("disk", 220_000),
        ("file", 20),
        ("file", 500),
        ("file", 800),
        ("file", 1150),
    ],
)
@pytest.mark.parametrize("spool", [False, True])
def test_a_full_disk_is_an_error_that_names_it_and_the_build_goes_on(
    tmp_path, reference, source, monkeypatch, kind, size, spool
):
    monkeypatch.setattr(spool_module, "SPOOL_SECONDS", -1.0)
    monkeypatch.setattr(build_module, "_probe", lambda *a: (1.0, 1.0))
    small = tmp_path / "small"
    small.mkdir()
    if spool:
        monkeypatch.setenv("KDCACHE_HOME", str(small / "home"))
    path = small / "c"
    with little_room(kind, small, size) as more:
        with pytest.raises(OSError, match=r"No space left|File too large") as caught:
            build(settings(out=str(path)), quiet, source)
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert str(caught.value.filename).startswith(str(tmp_path))
        with contextlib.suppress(e.NotFoundError):
            for view in Cache(path).views:
                assert equal(Cache(path).train.read(view, None), replace(Cache(reference).read(view), prior=None))
        more()
        assert build(settings(out=str(path)), quiet, source).teacher_images <= 340
        assert content(path) == content(reference)


@pytest.mark.parametrize("seconds", [39, 41])
def test_batches_so_long_that_more_than_a_minute_may_be_lost_are_noted(tmp_path, source, monkeypatch, seconds):
    said = []
    monkeypatch.setattr(build_module, "_probe", lambda *a: (BATCH / seconds, 1.0))
    build(settings(out=str(tmp_path / "c"), views=1), said.append, source)
    assert ("loses up to a batch, here 41 s: lower --batch-size" in "".join(said)) == (seconds == 41)


# ---- replay ----


@pytest.fixture(scope="module")
def taught(toy):
    """Sources of two neighbouring checkpoints of a teacher that has learnt, and a cache of the first."""
    import kd_toy

    images, labels, _ = kd_toy.images("train")
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.3)
    y = torch.from_numpy(labels)
    network, order = kd_toy.net(12), torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    sources = []
    for epoch in range(6):
        for batch in torch.randperm(150, generator=order).split(32):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(network.train()(x[batch]), y[batch]).backward()
            optimiser.step()
        if epoch >= 4:
            torch.save(network.state_dict(), toy / f"{epoch}.pt")
            sources.append(open_source(settings(weights=str(toy / f"{epoch}.pt")), quiet))
    build(settings(out=str(toy / "taught")), quiet, sources[0])
    return *sources, toy / "taught"


def forge(path, change, target=0, source=None):
    """Each shard of view `target`: its rows as `change` gives them, and a commit that fits."""
    cache = Cache(path)
    store = cache.train
    view = cache.train.read(target if source is None else source, None)
    rows = {name: change(getattr(view, name)).numpy() for name in ("classes", "gaps", "target_gap", "tail")}
    for part in range(PARTS):
        about = store.commit(shard_name(target, part))
        sums = store.read_shard(0, part)["tail_sums"][0] if target == 0 else None
        (path / "commits" / f"{shard_name(target, part)}.json").unlink()
        at = slice(store.rows(part).start, store.rows(part).stop)
        store.write_shard(target, part, {n: r[at] for n, r in rows.items()}, about.parameters, about.writer, sums)


def test_replay_passes_on_what_was_built(taught, toy):
    source, _, path = taught
    report = verify(Cache(path), source)
    assert report.problems == [] and report.passed
    assert report.total_variation < 1e-6 and report.replayed == 40 + 2 * 150 and report.shards == 1 + 2 * PARTS


@pytest.mark.parametrize("how", ["another view", "shifted by one", "swapped pair of samples' order"])
def test_replay_fails_on_records_that_are_not_in_their_place(taught, tmp_path, how):
    source, _, good = taught
    path = tmp_path / "c"
    shutil.copytree(good, path)
    if how == "another view":
        forge(path, lambda rows: rows, source=1)
    elif how == "shifted by one":
        forge(path, lambda rows: rows.roll(1, 0))
    else:
        forge(path, lambda rows: rows.view(-1, 2, rows.shape[1]).flip(1).reshape(rows.shape), target=1)
    assert verify(Cache(path)).passed  # bytes, hashes and values are sound
    (problem,) = verify(Cache(path), source).problems
    assert "is not what the teacher answers now: mean total variation" in problem and str(path) in problem


def test_replay_fails_on_a_neighbouring_checkpoint(taught):
    source, later, path = taught
    (problem,) = verify(Cache(path), later).problems
    assert "teacher.weights: the cache has" in problem
    # Even one that claims to be the cache's.
    forged = replace(later, identity=source.identity, teacher=replace(later.teacher, identity=source.teacher.identity))
    problems = verify(Cache(path), forged).problems
    assert len(problems) == 3 and all("mean total variation" in p for p in problems)


def test_replay_fails_on_inverted_flips(taught, monkeypatch):
    source, _, path = taught
    crops = _Pixels.crops
    monkeypatch.setattr(_Pixels, "crops", lambda self, index, boxes, flips: crops(self, index, boxes, ~flips))
    assert len(verify(Cache(path), source).problems) == 3


def test_replay_fails_on_batch_norm_in_training(taught, monkeypatch):
    source, _, path = taught
    answer = Teacher.logits
    state = {name: value.clone() for name, value in source.teacher.model.state_dict().items()}

    def in_training(self, images):
        assert answer(self, images).shape[1] == 12
        self.model.train()
        try:
            with torch.inference_mode():
                return self.model(images).float()
        finally:
            self.model.eval()

    monkeypatch.setattr(Teacher, "logits", in_training)
    problems = verify(Cache(path), source).problems
    source.teacher.model.load_state_dict(state)
    assert len(problems) == 3 and all("mean total variation" in p for p in problems)


def test_replay_fails_on_other_view_parameters(taught, tmp_path):
    source, _, good = taught
    path = tmp_path / "c"
    shutil.copytree(good, path)
    commit = path / "commits" / "v00001-p0001.json"
    about = json.loads(commit.read_bytes())
    commit.write_text(json.dumps({**about, "parameters": "0" * 64}))
    assert Cache(path).read(1) is not None
    (problem,) = verify(Cache(path), source).problems
    assert "view 1, part 1 was built with other view parameters" in problem


def test_replay_names_a_single_record_that_is_wrong(taught, tmp_path, monkeypatch):
    source, _, good = taught
    path = tmp_path / "c"
    shutil.copytree(good, path)
    first = Cache(path).read(0).classes[:, 0]
    other = int((first != first[7]).nonzero()[0])
    swapped = torch.arange(len(first))
    swapped[[7, other]] = torch.tensor([other, 7])
    forge(path, lambda rows: rows[swapped])
    (problem,) = verify(Cache(path), source).problems
    assert re.search(rf"view 0 .*: mean total variation 0.*; sample ({other}|7) differs most", problem)
    # Among more records than a toy has, the mean would not show it.
    monkeypatch.setattr(verify_module, "TOLERANCE", {"float32": 1.0})
    (problem,) = verify(Cache(path), source).problems
    assert re.search(rf"view 0, sample ({other}|7) is not what the teacher answers now: total variation 0\.", problem)


@pytest.mark.parametrize("threads", [1, 2])
def test_replay_passes_with_any_number_of_threads(taught, threads):
    source, _, path = taught
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        report = verify(Cache(path), source)
    finally:
        torch.set_num_threads(before)
    assert report.passed and report.total_variation < 0.002


def test_replay_in_another_numeric_type_goes_by_the_coarser_tolerance(taught, tmp_path, monkeypatch):
    float32, _, path = taught
    weights = str(path.parent / "4.pt")
    bf16 = open_source(settings(weights=weights, amp="bf16"), quiet)
    build(settings(weights=weights, amp="bf16", out=str(tmp_path / "bf16")), quiet, bf16)
    for cache, source in ((Cache(path), bf16), (Cache(tmp_path / "bf16"), float32), (Cache(tmp_path / "bf16"), bf16)):
        report = verify(cache, source)
        assert report.passed and report.replayed, report.problems
        assert report.total_variation <= 0.02
    assert verify(Cache(path), bf16).total_variation > 0.0001
    crops = _Pixels.crops
    monkeypatch.setattr(_Pixels, "crops", lambda self, index, boxes, flips: crops(self, index, boxes, ~flips))
    assert not verify(Cache(path), bf16).passed


# ---- depths and repair ----


def flip_a_bit(file, at=-3):
    content = bytearray(file.read_bytes())
    content[at] ^= 8
    file.write_bytes(bytes(content))


def test_each_depth_sees_what_it_looks_at(taught, tmp_path):
    path = tmp_path / "c"
    shutil.copytree(taught[2], path)
    assert verify(Cache(path), contents=False).passed
    chunk = path / "views" / "v00001" / "gaps" / "c" / "1" / "0"
    flip_a_bit(chunk)
    assert verify(Cache(path), contents=False).passed  # sizes are as committed, nothing is read
    (problem,) = verify(Cache(path)).problems
    assert f"{chunk} is not what was committed" in problem and "v00001-p0001" in problem
    chunk.write_bytes(chunk.read_bytes()[:-1])
    (problem,) = verify(Cache(path), contents=False).problems
    assert "bytes that was committed" in problem and str(chunk) in problem
    chunk.unlink()
    (problem,) = verify(Cache(path), contents=False).problems
    assert f"{chunk} is missing" in problem


def test_repair_removes_what_is_damaged_and_the_next_build_makes_it_anew(taught, tmp_path):
    source, _, good = taught
    path = tmp_path / "c"
    shutil.copytree(good, path)
    flip_a_bit(path / "views" / "v00000" / "classes" / "c" / "0" / "0")
    flip_a_bit(path / "views" / "v00001" / "tail" / "c" / "2" / "0")
    flip_a_bit(path / "prior" / "c" / "0" / "0")
    flip_a_bit(path / "labels" / "c" / "1" / "0")
    (path / "commits" / "v00001-p0000.json").write_text("{")
    looked = verify(Cache(path))
    assert len(looked.problems) == 5 and looked.repaired == []
    repaired = verify(Cache(path), repair=True)
    assert len(repaired.problems) == 5
    assert [name.split()[0] for name in repaired.repaired] == [
        "labels", "v00000-p0000", "v00001-p0000", "v00001-p0002", "prior",
    ]  # fmt: skip
    assert Cache(path).views == ()
    report = build(settings(out=str(path)), quiet, source)
    assert report.teacher_images == 64 + 64 + 22
    assert verify(Cache(path), source).passed
    for file in (p for p in good.rglob("*") if p.is_file() and "commits" not in p.parts and "scratch" not in p.parts):
        assert (path / file.relative_to(good)).read_bytes() == file.read_bytes()


def test_repair_leaves_alone_what_cannot_be_read_now(taught, tmp_path, monkeypatch):
    path = tmp_path / "c"
    shutil.copytree(taught[2], path)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    chunk = path / "views" / "v00001" / "gaps" / "c" / "1" / "0"
    opened = os.open

    def failing(file, *args, **kwargs):
        if str(file) == str(chunk):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return opened(file, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    report = verify(Cache(path), repair=True)
    (problem,) = report.problems
    assert f"{chunk} cannot be read: Input/output error" in problem and "remove" not in problem
    assert report.repaired == []
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_repair_does_not_remove_shards_for_a_damaged_identity(taught, tmp_path):
    path = tmp_path / "c"
    shutil.copytree(taught[2], path)
    identity = path / "identity.json"
    identity.write_text(identity.read_text().replace('"seed":0', '"seed":1'))
    report = verify(Cache(path), repair=True)
    assert report.problems and all(str(identity) in problem for problem in report.problems)
    assert report.repaired == [] and len(list((path / "commits").iterdir())) == 2 * PARTS + 2


def test_a_view_that_is_gone_is_a_problem(taught, tmp_path):
    path = tmp_path / "c"
    shutil.copytree(taught[2], path)
    for commit in (path / "commits").glob("v00000-*.json"):
        commit.unlink()
    (problem,) = verify(Cache(path)).problems
    assert "lacks views [0]: run kdcache build again" in problem


def test_a_builders_leavings_lie_under_the_token_of_its_lease(tmp_path, source, monkeypatch):
    decide, places = SplitStore._decide, []

    def watched(self, *args):
        places.append((self._scratch.name, {p.stem for p in (tmp_path / "c" / "leases").glob("*.json")}))
        return decide(self, *args)

    monkeypatch.setattr(SplitStore, "_decide", watched)
    build(settings(out=str(tmp_path / "c")), quiet, source)
    assert len({token for token, _ in places}) == 1 and all(token in leased for token, leased in places)


def test_uint8_is_refused_below_temperature_one():
    with pytest.raises(
        KdcacheError, match=r"temperature 0.5 asks for finer gaps than uint8 has: give --precision float16"
    ):
        open_source(settings(temperatures=(0.5, 1.0)), quiet)
    open_source(settings(temperatures=(0.5, 1.0), precision="float16"), quiet)


# ---- image files ----


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 and 8 smooth images of many sizes, PNG and JPEG, in four classes, and a map to classes of a thousand."""
    top = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, each in (("train", 6), ("val", 2)):
        for name in "abcd":
            (top / split / name).mkdir(parents=True)
            for i in range(each):
                small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
                image = Image.fromarray(small).resize(
                    tuple(map(int, rng.integers(40, 90, 2))), Image.Resampling.BICUBIC
                )
                image.save(top / split / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    (top / "map.csv").write_text("a,17\nb,999\nc,0\nd,512\n")
    return top


def test_a_dense_cache_of_many_classes_is_asked_for_as_it_is(toy, photos, tmp_path):
    where = {"data": f"imagefolder:{photos}", "class_map": str(photos / "map.csv")}
    config = settings(teacher="kd_toy:thousand", augment="rrc,flip", views=1, topk=1000, part=10, **where)
    build(replace(config, out=str(tmp_path / "c"), batch_size=8), quiet)
    cache = Cache(tmp_path / "c")
    assert cache.identity.record.dense and cache.read(0).gaps.shape == (24, 1000)
    assert verify(cache, verify_module.source_of(cache, teacher="kd_toy:thousand", **where)).passed


def test_image_files_are_built_alike_with_any_number_of_workers(toy, photos, tmp_path):
    config = settings(
        teacher="kd_toy:thousand", data=f"imagefolder:{photos}", augment="rrc,flip", topk=None, batch_size=8,
        class_map=str(photos / "map.csv"), part=10,
    )  # fmt: skip
    source = open_source(config, quiet)
    for workers in (0, 2):
        torch.set_num_threads(2 - workers // 2)
        out = str(tmp_path / str(workers))
        result = build(replace(config, workers=workers, out=out), quiet, source)
        assert result.teacher_images == 8 + 2 * 24
    assert content(tmp_path / "0") == content(tmp_path / "2")
    cache = Cache(tmp_path / "2")
    assert cache.identity.record.k == 20 and cache.identity.teacher.input_size == 224
    assert set(cache.train.labels[:, 0].tolist()) == {17, 999, 0, 512}
    data = source.train
    assert data.pixels is None and len(np.unique(data.sizes, axis=0)) > 10
    drawn = draw("rrc,flip", 0, 1, range(24), data.sizes)
    records = cache.read(1)
    for part in (0, 10, 20):
        rows = np.arange(part, min(part + 8, 24))
        full = np.pad(rows, (0, 8 - len(rows)), mode="edge")
        cuts = [tv.resized_crop(data.decode(i), *drawn.boxes[i].tolist(), [224, 224], antialias=True) for i in full]
        images = torch.stack([c.flip(2) if drawn.flips[i] else c for i, c in zip(full, cuts, strict=True)])
        logits = source.teacher.logits(images.contiguous(memory_format=torch.channels_last))[: len(rows)]
        labels = torch.from_numpy(source.train_labels[rows])
        want = replace(encode(logits, labels, 20, (1.0, 4.0), "uint8"), prior=cache.prior)
        assert equal(records[torch.from_numpy(rows)], want)
    assert verify(cache, source).passed


def test_the_bytes_are_the_same_however_many_views_are_cut_from_a_decode(toy, photos, tmp_path, monkeypatch):
    """Also where views go on from different rows; and an image is decoded once for all of them."""
    config = settings(
        teacher="kd_toy:thousand", data=f"imagefolder:{photos}", augment="rrc,flip", views=5, topk=3, batch_size=4,
        class_map=str(photos / "map.csv"), part=10, workers=0,
    )  # fmt: skip
    source = open_source(config, quiet)
    monkeypatch.setattr(build_module, "_probe", lambda *a: (1.0, 1.0))
    decoded, decode = [], FileDataset.decode
    monkeypatch.setattr(FileDataset, "decode", lambda self, i: decoded.append(i) or decode(self, i))
    counts = {}
    for together in (1, 3, 5):
        decoded.clear()
        build(replace(config, views_per_decode=together, out=str(tmp_path / str(together))), quiet, source)
        counts[together] = len(decoded)
    assert counts == {1: 8 + 5 * 24, 3: 8 + 2 * 24, 5: 8 + 24}
    monkeypatch.setattr(spool_module, "SPOOL_SECONDS", -1.0)
    answers, answer = [], Teacher.logits

    def stop(self, images):
        answers.append(len(images))
        if len(answers) == stop.at:
            raise ZeroDivisionError
        return answer(self, images)

    monkeypatch.setattr(Teacher, "logits", stop)
    resumed = replace(config, out=str(tmp_path / "resumed"))
    for stop.at, together in ((4, 1), (3, 5), (15, 3)):
        answers.clear()
        with pytest.raises(ZeroDivisionError):
            build(replace(resumed, views_per_decode=together), quiet, source)
    assert len({len(list(p.glob("*.block"))) for p in (tmp_path / "home" / "spool").glob("*/v*")}) > 1
    build(replace(resumed, views_per_decode=5), quiet, source)
    want = content(tmp_path / "1")
    assert all(content(tmp_path / name) == want for name in ("3", "5", "resumed"))
    assert spooled(tmp_path) == []


def of_files(photos, out, **changes):
    """Three views of image files, cut together, in parts of 10, 10 and 4 samples; a part's last batch is short."""
    return settings(
        teacher="kd_toy:thousand", data=f"imagefolder:{photos}", augment="rrc,flip", views=3, topk=3, batch_size=4,
        class_map=str(photos / "map.csv"), part=10, workers=0, out=str(out), **changes,
    )  # fmt: skip


def test_image_files_killed_when_all_rows_of_a_part_are_spooled_are_gone_on_with(toy, photos, tmp_path, monkeypatch):
    script = """
write = cache.SplitStore.write_shard
def killed(self, *args):
    if self.split == "train":
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *args)
cache.SplitStore.write_shard = killed
module.build(config, quiet, source)
"""
    config = of_files(photos, tmp_path / "c")
    with start(toy, script, as_json(config), KDCACHE_HOME=tmp_path / "home") as process:
        process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
    assert sorted(p.relative_to(tmp_path / "home").parts[2:] for p in spooled(tmp_path)) == [
        (f"v{view:05d}-p0000-b4-cpu-0", f"{i:012d}-{min(i + 4, 10):012d}.block") for view in range(3) for i in (0, 4, 8)
    ]
    monkeypatch.setattr(build_module, "_probe", lambda *a: (1.0, 1.0))
    assert build(config, quiet).teacher_images == 3 * (24 - 10)
    build(replace(config, out=str(tmp_path / "undisturbed")), quiet)
    assert content(tmp_path / "c") == content(tmp_path / "undisturbed") and spooled(tmp_path) == []


@settings_of_hypothesis(max_examples=20, deadline=None)
@example([3, 3, 3])
@example([3, 2, 3])
@given(st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_answers_go_on_from_any_state_of_the_spool(files_source, whole_answers, done):
    """done: how many of its three batches each view has."""
    source, views, renderer = files_source
    starts = [min(4 * count, 10) for count in done]
    found = list(answers(source, renderer, source.train_labels, views[: len(done)], starts, range(10), 4))
    want = {(place, i) for place, count in enumerate(done) for i in range(count, 3)}
    assert len(found) == len(want) and {(place, at.start // 4) for place, at, *_ in found} == want
    for place, at, records, logits in found:
        same, z = whole_answers[place, at]
        assert equal(records, same) and logits.equal(z)


@pytest.fixture(scope="module")
def files_source(toy, photos):
    """The source of `of_files`, the parameters of its views' first part, and a renderer."""
    source = open_source(of_files(photos, "unused"), quiet)
    views = [view_parameters(source.train, source.identity, view, range(10)) for view in range(3)]
    return source, views, teacher_renderer(source.train, source, 0)


@pytest.fixture(scope="module")
def whole_answers(files_source):
    """Records and logits of the first part by view and rows."""
    source, views, renderer = files_source
    found = answers(source, renderer, source.train_labels, views, [0, 0, 0], range(10), 4)
    return {(place, at): answered for place, at, *answered in found}


@pytest.mark.parametrize(
    ("kind", "device", "size", "samples", "batch"),
    [
        ("files", "cpu", 224, 10**6, 8),
        ("files", "cpu", 129, 10**6, 8),
        ("files", "cpu", 128, 10**6, 32),
        ("files", "cpu", 32, 10**6, 128),
        ("files", "cuda", 224, 10**6, 128),
        ("files", "cpu", 224, 5, 5),
        ("images", "cpu", 32, 10**6, 256),
        ("images", "cpu", 64, 10**6, 32),
        ("images", "cuda", 64, 10**6, 256),
        ("images", "cuda", 32, 40, 40),
    ],
)
def test_the_batch_of_a_build_goes_by_device_and_input_size(source, photos, kind, device, size, samples, batch):
    data = source.train if kind == "images" else open_data(f"imagefolder:{photos}", "train")
    assert defaults_for(data).batch_for(device, size, samples) == batch


def test_a_build_by_another_batch_size_goes_on_and_answers_alike(toy, photos, tmp_path, monkeypatch):
    """What the other has spooled is left alone, because it may differ in its last bits, and goes with the shard."""
    config = of_files(photos, tmp_path / "c")
    source, answer, asked = open_source(config, quiet), Teacher.logits, []
    monkeypatch.setattr(build_module, "_probe", lambda *a: (1.0, 1.0))
    monkeypatch.setattr(spool_module, "SPOOL_SECONDS", -1.0)

    def stop(self, images):
        asked.append(len(images))
        if len(asked) == 2 + 3 * 3 + 4:  # the evaluation split, part 0 in three views, and some of part 1
            raise ZeroDivisionError
        return answer(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "logits", stop)
        with pytest.raises(ZeroDivisionError):
            build(config, quiet, source)
    assert len(spooled(tmp_path)) == 3
    asked.clear()
    monkeypatch.setattr(Teacher, "logits", lambda self, images: asked.append(len(images)) or answer(self, images))
    assert build(replace(config, batch_size=None), quiet, source).teacher_images == 3 * 14
    assert set(asked) == {8} and spooled(tmp_path) == []
    assert verify(Cache(tmp_path / "c"), source).passed


def test_an_image_that_cannot_be_decoded_stops_the_build_which_then_goes_on(toy, photos, tmp_path):
    config = settings(
        teacher="kd_toy:thousand", data=f"imagefolder:{photos}", augment="rrc,flip", views=1, topk=3, batch_size=8,
        class_map=str(photos / "map.csv"), part=10, workers=2, out=str(tmp_path / "c"),
    )  # fmt: skip
    source = open_source(config, quiet)
    broken = photos / "train" / "d" / "5.png"
    kept = broken.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "_probe", lambda *a: (1.0, 1.0))
        broken.write_bytes(kept[: len(kept) // 2])
        try:
            with pytest.raises(e.InputError, match=str(broken)):
                build(config, quiet, source)
        finally:
            broken.write_bytes(kept)
        assert Cache(tmp_path / "c").train.committed() == {0: {0, 1}}
        assert build(config, quiet, source).teacher_images == 4


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_training_reaches_its_workers_through_it_alone(toy, photos, tmp_path, by):
    """SIGTERM to the whole group, as from torchrun, Slurm or systemd; and workers end with a process that is killed."""
    config = settings(
        teacher="kd_toy:thousand", data=f"imagefolder:{photos}", augment="rrc,flip", views=1, topk=3, batch_size=8,
        class_map=str(photos / "map.csv"), workers=0, out=str(tmp_path / "c"),
    )  # fmt: skip
    build(config, quiet)
    line = (
        f"train --loss nkd:temperature=1 --cache {config.out} --data {config.data} --student kd_toy:thousand "
        f"--image-size 32 --batch-size 8 --epochs 100000 --workers 2 --device cpu --out {tmp_path / 'run'}"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "kdcache.cli", *line.split()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(toy), *filter(None, sys.path)])},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        lines, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 100
        while process.poll() is None and not lines.exists() and time.monotonic() < until:
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, by) if by == signal.SIGTERM else process.kill()
        _, said = process.communicate(timeout=60)  # until nobody has its standard error, the workers too
    assert lines.exists(), said
    if by == signal.SIGTERM:
        assert process.returncode == 130 and "Error" not in said, said
        training = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["training"]
        assert training["epoch"] >= 1
