"""Builds of image files: many views of each decode, by worker processes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as tv

from kdcache.cache import Cache, encode
from kdcache.cache import errors as e
from kdcache.pipeline import verify as verify_module
from kdcache.pipeline.build import build as build_module
from kdcache.pipeline.build import spool as spool_module
from kdcache.pipeline.build.answers import answers, teacher_renderer, view_parameters
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.source import open_source
from kdcache.pipeline.data.kinds.files import FileDataset
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.pipeline.verify import verify
from kdcache.pipeline.views.parameters import draw
from kdcache.tests.helpers import warm
from kdcache.tests.helpers.building import (
    MIXED_FILES,
    as_json,
    content,
    equal,
    of_files,
    quiet,
    settings,
    spooled,
    start_build,
)

pytestmark = pytest.mark.usefixtures("home")


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
    monkeypatch.setattr(build_module, "probe", lambda *a: (1.0, 1.0))
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


def test_image_files_killed_when_all_rows_of_a_part_are_spooled_are_gone_on_with(toy, photos, tmp_path, monkeypatch):
    script = """
write = SplitStore.write_shard
def killed(self, *args):
    if self.split == "train":
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *args)
SplitStore.write_shard = killed
module.build(config, quiet, source)
"""
    config = of_files(photos, tmp_path / "c")
    with start_build(toy, script, as_json(config), KDCACHE_HOME=tmp_path / "home") as process:
        process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
    assert sorted(p.relative_to(tmp_path / "home").parts[2:] for p in spooled(tmp_path)) == [
        (f"v{view:05d}-p0000-b4-cpu-0", f"{i:012d}-{min(i + 4, 10):012d}.block") for view in range(3) for i in (0, 4, 8)
    ]
    monkeypatch.setattr(build_module, "probe", lambda *a: (1.0, 1.0))
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


@pytest.fixture(scope="module", params=[{}, MIXED_FILES], ids=["format-1", "mixed-and-spread"])
def files_source(request, toy, photos):
    """The source of `of_files`, the parameters of its views' first part, and a renderer."""
    source = open_source(of_files(photos, "unused", **request.param), quiet)
    views = [view_parameters(source.train, source.identity, view, range(10)) for view in range(3)]
    return source, views, teacher_renderer(source.train, source, 0)


@pytest.fixture(scope="module")
def whole_answers(files_source):
    """Records and logits of the first part by view and rows."""
    source, views, renderer = files_source
    found = answers(source, renderer, source.train_labels, views, [0, 0, 0], range(10), 4)
    return {(place, at): answered for place, at, *answered in found}


def test_a_build_by_another_batch_size_goes_on_and_answers_alike(toy, photos, tmp_path, monkeypatch):
    """What the other has spooled is left alone, because it may differ in its last bits, and goes with the shard."""
    config = of_files(photos, tmp_path / "c")
    source, answer, asked = open_source(config, quiet), Teacher.logits, []
    monkeypatch.setattr(build_module, "probe", lambda *a: (1.0, 1.0))
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
        patch.setattr(build_module, "probe", lambda *a: (1.0, 1.0))
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
    with warm.Popen(
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
