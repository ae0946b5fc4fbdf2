"""kdcache bench: it measures what it says, leaves nothing behind, and says in one line what it cannot do."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from kdcache.cache.identity import Identity
from kdcache.cli import main
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import open_source
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.tests.helpers import warm
from kdcache.train.bench import bench as bench_module
from kdcache.train.bench import measure, subject
from kdcache.train.bench.bench import bench
from kdcache.train.bench.config import BenchConfig
from kdcache.train.bench.layouts import FKD_CROPS, noise_cache, reading_cases
from kdcache.train.bench.table import table

SLOW = 0.3  # seconds more for every answer of the teacher: so many that no busy machine takes as long for anything else
SMALL = ["--teacher", "resnet8", "--batch-size", "16", "--samples", "64", "--rounds", "2"]


@pytest.fixture
def place(tmp_path, monkeypatch, one_thread, no_fsync):
    """An empty KDCACHE_HOME and an empty folder for temporary files; little to read."""
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(bench_module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(measure, "READ_RECORDS", 2048)
    monkeypatch.setattr(measure, "FKD_IMAGES", 4)
    return tmp_path


def test_a_slow_teacher_is_seen_where_it_answers_and_nowhere_else(place, monkeypatch):
    answer = Teacher.logits

    def slowly(self, images):
        time.sleep(SLOW)
        return answer(self, images)

    monkeypatch.setattr(Teacher, "logits", slowly)
    out = place / "bench.json"
    args = ["bench", *SMALL, "--views", "3", "--epochs", "5", "--json", "--out", str(out)]
    run = CliRunner().invoke(main, args, catch_exceptions=False)
    assert run.exit_code == 0
    found = json.loads(run.stdout)
    assert json.loads(out.read_text()) == found
    assert [p.name for p in place.iterdir()] == ["bench.json"]  # no home, nothing temporary

    groups = [found[name] for name in found if name.endswith(("_seconds", "_per_second"))]
    assert [sorted(group) for group in groups] == [
        ["cached", "ce", "data alone", "model alone", "online", "teacher forward"],
        ["cached", "ce"],
        ["bare teacher", "build", "images alone"],
        ["first epoch", "one file an image", "one seek a record", "shuffled epoch", "slab"],
    ]
    for figure in [f for group in [*groups, found["ratios"]] for f in group.values()]:
        low, high = figure["quartiles"]
        assert 0 < low <= figure["median"] <= high and figure["rounds"] == 2
    step = {name: figure["median"] for name, figure in found["step_seconds"].items()}
    assert min(step["online"], step["teacher forward"]) > SLOW > max(step["ce"], step["cached"], step["data alone"])
    # 64 images are 4 batches; the build's loop is measured without what it tries out first.
    built = {name: 64 / figure["median"] for name, figure in found["build_images_per_second"].items()}
    assert 4 * SLOW < min(built["build"], built["bare teacher"]) and built["images alone"] < 4 * SLOW
    assert built["build"] < 7 * SLOW

    even = found["break_even"]
    assert (even["views"], even["epochs"], even["samples"], even["steps_an_epoch"]) == (3, 5, 1442, 90)
    assert even["build_seconds"] == pytest.approx(3 * 1442 * built["build"] / 64, rel=0.1)
    assert even["seconds_saved_a_student"] == pytest.approx(5 * 90 * (step["online"] - step["cached"]))
    assert even["students"] == pytest.approx(even["build_seconds"] / even["seconds_saved_a_student"])
    assert found["command"] == f"kdcache {' '.join(args[:-3])}"
    assert found["machine"]["cores"] == os.cpu_count() and found["threads"] == 1

    text = table(found)
    assert "resnet8 -> resnet8 on digits (64 of 1,442 samples)" in text and "paid for after" in text
    even.update(students=None, seconds_saved_a_student=-1.0)
    assert table(found).endswith("loses 1.0 s: never paid for")


def test_image_files_and_a_loss_with_a_head_of_its_own(place):
    rng = np.random.default_rng(0)
    for i in range(8):
        path = place / "images" / "train" / f"class{i % 2}" / f"{i}.png"
        for file in (path, place / "images" / "val" / path.parent.name / path.name):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (70, 80, 3), np.uint8)).save(file)
    config = BenchConfig(
        "resnet8", "resnet8", f"imagefolder:{place / 'images'}", "uskd", batch_size=2, image_size=32, samples=7,
        rounds=2, workers=1,
    )  # fmt: skip
    found = bench(config, lambda _: None)
    setup = found["setup"]
    assert (setup["samples"], setup["of_samples"], setup["image_size"], setup["teacher_image_size"]) == (6, 8, 32, 224)
    assert (setup["loss"], setup["classes"], found["epoch_steps"]) == ("uskd", 2, 3)
    assert found["step_seconds"]["data alone"]["median"] > 0
    assert f"imagefolder:{place / 'images'}" in found["command"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("--teacher resnt8", "unknown network 'resnt8'"),
        ("--student resnt8 --teacher resnet8", "unknown network 'resnt8'"),
        ("--teacher resnet8 --batch-size 1000", "has 1442 samples for batches of 1000"),
        ("--teacher resnet8 --batch-size 64 --samples 100", "and --samples 100 for batches of 64"),
        ("--teacher resnet8 --loss nkt", "unknown loss 'nkt'"),
        ("--teacher resnet8 --device cuda:77", "device 'cuda:77' cannot be used here"),
        ("--data imagefolder:nowhere", "nowhere"),
        ("--rounds 1", "--rounds"),
        ("--out .", ". is a folder"),
    ],
)
def test_what_cannot_be_measured_is_one_line(place, args, says):
    run = CliRunner().invoke(main, ["bench", *args.split()], catch_exceptions=False)
    assert run.exit_code == 2
    errors = [line for line in run.stderr.splitlines() if line.startswith("Error")]
    assert len(errors) == 1 and says in errors[0] and "Traceback" not in run.stderr
    assert not list(place.iterdir())


def test_stopped_it_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "kdcache.cli", "bench", "--teacher", "resnet8"]
    env = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = warm.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    assert "resnet8 -> resnet8" in process.stderr.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("stopped;") and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("k", [None, 3])
def test_other_layouts_hold_the_same_records(tmp_path, monkeypatch, k):
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    weights = tmp_path / "teacher.safetensors"
    subject._untrained("resnet8", subject.open_data("digits", "train"), weights)
    source = open_source(BuildConfig("resnet8", str(weights), topk=k))
    data = source.identity.data.model_copy(update={"samples": 300})
    evaluation = data.model_copy(update={"split": "eval", "samples": 1})
    identity = source.identity.model_copy(update={"data": data, "evaluation": evaluation, "part": 200})
    assert isinstance(identity, Identity)
    made = []
    cache = noise_cache(tmp_path / "cache", identity, torch.randn(50, 10), made.append)
    assert sum(made) == 300 and cache.finished and cache.views == (0,)
    records = cache.read(0)
    assert len(np.unique(records.gaps.numpy(), axis=0)) > (290 if k is None else 100)

    cases = reading_cases(cache, tmp_path / "layouts", 64, 256, 3)
    assert {name: count for name, (_, count) in cases.items()} == {
        "slab": 300, "first epoch": 300, "shuffled epoch": 300, "one seek a record": 256, "one file an image": 3,
    }  # fmt: skip
    for work, _ in cases.values():
        work()
    ids, p, _ = records.softened(1.0, "uniform").ranked()
    width = ids.shape[1]
    assert (tmp_path / "layouts" / "tinyvit.bin").stat().st_size == 256 * (4 + 4 * width)
    rows = np.fromfile(tmp_path / "layouts" / "tinyvit.bin", f"({2 + 2 * width},)<i2")
    assert np.array_equal(rows[:, 2 + width :], ids[:256].numpy())
    assert np.array_equal(rows[:, 2 : 2 + width].view("<f2"), p[:256].half().numpy())
    boxes, flips, labels = torch.load(tmp_path / "layouts" / "fkd" / "2.tar", weights_only=True)
    assert (boxes.shape, flips.shape, len(labels)) == ((FKD_CROPS, 4), (FKD_CROPS,), FKD_CROPS)
    for i, (probabilities, classes) in enumerate(labels):
        at = 2 * FKD_CROPS + i
        assert torch.equal(classes.long(), ids[at, :5]) and torch.equal(probabilities, p[at, :5].half())
