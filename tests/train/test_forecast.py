"""What `kdcache plan` says before anything is built, against builds and against float64 references."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from kdcache.cache.errors import InputError
from kdcache.cache.identity import RecordIdentity
from kdcache.cache.records.choices import TEMPERATURES
from kdcache.cli import main
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.plan import plan_build
from kdcache.pipeline.build.source import open_source
from kdcache.tests.helpers.commands import paint
from kdcache.tests.helpers.training import quiet
from kdcache.train.config import TeachConfig
from kdcache.train.forecast import forecast as module
from kdcache.train.forecast.config import ForecastConfig
from kdcache.train.forecast.fidelity import by_classes
from kdcache.train.forecast.forecast import forecast
from kdcache.train.forecast.probe import Probe
from kdcache.train.forecast.table import table
from kdcache.train.teach import teach

pytestmark = pytest.mark.usefixtures("home", "one_thread")
SHORT = ForecastConfig(samples=1280, seconds=4)


def files(folder):
    return {p for p in folder.rglob("*") if p.is_file() and p.parent.name != "datasets"}


@pytest.mark.parametrize("topk", [None, 3])
def test_bytes_and_files_are_those_of_the_build_and_nothing_is_stored(home, tmp_path, topk):
    config = BuildConfig("resnet8", views=3, topk=topk, out=str(tmp_path / "cache"))
    before = files(home)
    found = forecast(config, SHORT, say=quiet)
    assert files(home) == before and not (tmp_path / "cache").exists()
    built = build(config, quiet)
    assert found["key"] == built.key and found["stored_classes"] == topk
    assert found["bytes"] == pytest.approx(built.bytes, rel=0.03)
    assert found["files"] == len(files(tmp_path / "cache"))
    assert found["time"]["records"] == built.teacher_images
    assert found["probe"]["teacher_top1"] > 0.7 and found["probe"]["chance"] < 0.2
    again = forecast(config, SHORT, say=quiet)
    assert again["time"]["records"] == 0 and "is built already" in table(again)


def test_files_mixed_and_without_labels(home, tmp_path):
    """Image files are cut into several views together; where labels are missing nothing is said of accuracy."""
    pics = paint(tmp_path / "pics", each=30)
    data = f"imagefolder:{pics}"
    teach(TeachConfig("resnet8", data=data, epochs=1), quiet)
    usual = {"data": data, "views": 3, "batch_size": 16, "workers": 0, "allow_low_accuracy": True}
    mixed = forecast(BuildConfig("resnet8", augment="rrc,flip,mixup(0.2)", **usual), SHORT, say=quiet)
    assert mixed["probe"]["views"] == 3 and mixed["probe"]["images"] == 96
    config = BuildConfig(
        "resnet8", unlabelled=True, weights=str(next(home.glob("teachers/*/resnet8.safetensors"))), **usual
    )
    blind = forecast(config, SHORT, say=quiet)
    assert blind["probe"]["teacher_top1"] is None and "right on" not in table(blind)
    assert 0 <= blind["records"][-1]["gradient_error"] < 0.01


def test_what_a_build_refuses_is_refused(home):
    config = BuildConfig("resnet8", data="digits", topk=11)
    with pytest.raises(InputError, match="--topk 11 does not fit the teacher's 10 classes"):
        forecast(config, SHORT, say=quiet)


def nkd_gradient(student, target, others, y, gamma=1.5):
    """[R, C] of NKD at temperature 1, averaged over the batch; target [R] is p_y, others [R, C] the rest's shares."""
    q = np.exp(student - student.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    rows = np.arange(len(y))
    hard, rest = q.copy(), q.copy()
    hard[rows, y] -= 1
    rest[rows, y] = 0
    rest /= rest.sum(1, keepdims=True)
    return ((1 + target)[:, None] * hard + gamma * (rest - others)) / len(y)


def test_head_and_gradient_error_against_float64():
    """By logits of 300 classes, of which records hold 10, 20, 50 or all; the tail is spread evenly here."""
    views, images, classes = 2, 48, 300
    rng = np.random.default_rng(3)
    z = rng.normal(0, 2.5, (views, images, classes))
    labels = np.tile(rng.integers(0, classes, images), (views, 1))
    record = RecordIdentity(
        classes=classes, k=20, temperatures=TEMPERATURES, precision="uint8", tail_std=False, labels=1
    )
    found = by_classes(record, torch.from_numpy(z).float(), torch.from_numpy(labels)[..., None])
    assert [row["k"] for row in found] == [10, 20, 50, None]
    flat = z.reshape(-1, classes)
    for row in found:
        for t, share in row["head"].items():
            p = np.exp((flat - flat.max(1, keepdims=True)) / float(t))
            p = np.sort(p / p.sum(1, keepdims=True), 1)[:, ::-1]
            assert share == pytest.approx(p[:, : row["k"] or classes].sum(1).mean(), abs=1e-6)
    errors = [row["gradient_error"] for row in found]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3
    assert [row["bytes"] for row in found] == sorted(row["bytes"] for row in found)
    # The error of records whose tail is spread evenly bounds that of the product, which spreads it by the class prior.
    noise = torch.randn((views, images, classes), generator=torch.Generator().manual_seed(0)).numpy()
    student, y = (np.roll(z, -1, 0) + noise).reshape(-1, classes), labels.reshape(-1)
    p = np.exp(flat - flat.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    rows = np.arange(len(y))

    def gradient(of):
        rest = of.copy()
        rest[rows, y] = 0
        return nkd_gradient(student, p[rows, y], rest / rest.sum(1, keepdims=True), y)

    truth = gradient(p)
    for row in found[:-1]:
        order = np.argsort(-flat, 1)
        even = p.copy()
        tail = order[:, row["k"] :]
        np.put_along_axis(even, tail, np.take_along_axis(p, tail, 1).mean(1, keepdims=True), 1)
        error = np.linalg.norm(gradient(even) - truth) / np.linalg.norm(truth)
        assert 0.5 * error < row["gradient_error"] < 1.5 * error + 0.02


def test_seconds_follow_from_the_rates(home):
    """Views, the plain images of the evaluation split and of the probe of a build each have their own rate."""
    config = BuildConfig("resnet8", views=4)
    plan = plan_build(config, open_source(config, quiet))
    rates = {"build": 100.0, "evaluation": 50.0, "teacher": 120.0, "images": 400.0}
    probe = Probe(torch.zeros(1, 1, 10), torch.zeros(1, 1, 1), 10, 0.9, 0.1, [], rates, 1.0)
    missing = {"train": 1442 * 4, "eval": 355}
    took = module._times(plan, probe, missing, 3.0, 2)
    first = 160 + 2 * 160  # sixteen of each of ten classes, and two times as many to see whether answers are steady
    assert took["seconds"] == pytest.approx(3 + 1442 * 4 / 100 + (355 + first) / 50)
    assert took["seconds_on_gpus"] == pytest.approx(3 + (took["seconds"] - 3) / 2)
    assert took["limit"] == "teacher"
    (even,) = module._break_even(plan, probe, 10)
    assert even["epochs"] == 10 and even["live_teacher_seconds"] == pytest.approx(14420 / 120)
    assert even["students"] == pytest.approx(4 / 100 / (10 / 120))


def test_the_command_line(home):
    """Facts as JSON; the table; and the build that is suggested, which can be run as it is printed."""
    line = "plan --teacher resnet8 --views 2 --temperatures 1,4 --topk 3 --seconds 2 --gpus 4"
    told = CliRunner().invoke(main, shlex.split(line), catch_exceptions=False)
    assert told.exit_code == 0, told.output
    assert "on 4 such devices" in told.stdout and "paid for after" in told.stdout and "<- as asked" in told.stdout
    facts = json.loads(CliRunner().invoke(main, [*shlex.split(line), "--json"], catch_exceptions=False).stdout)
    assert facts["command"] == "kdcache build --teacher resnet8 --views 2 --topk 3 --temperatures 1,4"
    assert facts["command"] in told.stdout
    built = CliRunner().invoke(main, shlex.split(facts["command"])[1:], catch_exceptions=False)
    assert built.exit_code == 0 and Path(built.stdout.strip()).name == facts["key"]
