"""Stage 1: what is stored is what the teacher answers, and what is there already stays as it is."""

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.cache import Cache, KdcacheError, encode, open_cache
from kdcache.cache import errors as e
from kdcache.cache.store.publish import SplitStore
from kdcache.pipeline.build import build as build_module
from kdcache.pipeline.build import plan
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.source import open_source
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.pipeline.verify import verify
from kdcache.pipeline.views.parameters import draw
from kdcache.tests.helpers.building import (
    BATCH,
    PART,
    PARTS,
    content,
    equal,
    quiet,
    record_batches,
    settings,
)

pytestmark = pytest.mark.usefixtures("home")


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
    monkeypatch.setattr(build_module, "probe", lambda *a: (1.0, 1.0))
    result = build(settings(out=str(tmp_path / "c")), quiet, source)
    assert set(sizes) == {BATCH} and result.teacher_images == 40 + 2 * 150
    assert shards == [("eval", 0, 0), *(("train", v, p) for v in (0, 1) for p in range(PARTS))]


def test_a_batch_does_not_depend_on_where_the_build_went_on(source):
    whole = list(record_batches(source, "train", 1, range(64, 128), BATCH))
    for skipped in (1, 3):
        rows = range(64 + skipped * BATCH, 128)
        rest = list(record_batches(source, "train", 1, rows, BATCH))
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

    monkeypatch.setattr(build_module, "probe", lambda *a: (1.0, 1.0))
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
    monkeypatch.setattr(build_module, "probe", lambda *a: (1.0, 1.0))  # later images alone may be so
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
        return build_module.compiled(planned, quiet).source.teacher.compiled is not None

    usual = 150 * 16
    assert compiled(on_gpu, usual) and not compiled(on_gpu, usual + 1) and not compiled(source, usual)
    assert compiled(source, usual, True) and not compiled(on_gpu, usual, False)


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


def test_another_cache_in_the_same_place_is_refused_field_by_field(reference):
    before = content(reference)
    with pytest.raises(e.MismatchError) as caught:
        build(settings(topk=3, seed=7, augment="flip", out=str(reference)), quiet)
    for line in ("record.k: the cache has 4, asked for 3", "views.seed: the cache has 0, asked for 7", "views.policy"):
        assert line in str(caught.value)
    assert content(reference) == before


@pytest.mark.parametrize("seconds", [39, 41])
def test_batches_so_long_that_more_than_a_minute_may_be_lost_are_noted(tmp_path, source, monkeypatch, seconds):
    said = []
    monkeypatch.setattr(build_module, "probe", lambda *a: (BATCH / seconds, 1.0))
    build(settings(out=str(tmp_path / "c"), views=1), said.append, source)
    assert ("loses up to a batch, here 41 s: lower --batch-size" in "".join(said)) == (seconds == 41)
