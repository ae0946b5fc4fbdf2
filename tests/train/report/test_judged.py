"""Runs whose weights are judged again: the figures are those of kdcache eval, and what lacks is said."""

import json
import shutil

import pytest
from click.testing import CliRunner

from kdcache.cli import main
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.tests.helpers.reports import Markup
from kdcache.train.config import TeachConfig, TrainConfig
from kdcache.train.evaluate import evaluate_run
from kdcache.train.sweep import sweep
from kdcache.train.teach import teach

pytestmark = pytest.mark.usefixtures("no_fsync")


def quiet(_):
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    """A sweep of two losses and two seeds, its cache, and its teacher."""
    folder = tmp_path_factory.mktemp("judged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCACHE_HOME", str(folder / "home"))
        patch.chdir(folder)
        teach(TeachConfig("resnet8", epochs=2), quiet)
        build(BuildConfig("resnet8", views=1), quiet)
        config = TrainConfig("ce", out="sweep", epochs=2, batch_size=256, lr=0.02)
        sweep(config, ["ce", "nkd"], [0, 1], quiet)
        yield folder


def reported(line, out):
    result = CliRunner().invoke(main, ["report", *line.split(), "--json", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    page = Markup(out.read_text())
    assert page.faults == []
    return json.loads(result.stdout)["runs"], page


def test_the_best_run_of_each_group_is_judged_as_eval_does(place, tmp_path):
    runs, page = reported("sweep", tmp_path / "r.html")
    assert len(runs["judged"]) == 2 and len(runs["groups"]) == 2 and len(runs["runs"]) == 4
    for one in runs["judged"]:
        same = [run for run in runs["runs"] if run["group"] == one["group"]]
        assert one["top1"] == pytest.approx(max(run["figures"]["top1"] for run in same))
        assert one["analysis"] == json.loads(json.dumps(evaluate_run(one["path"])))["analysis"]
    assert runs["steps"] == 1442 // 256 and 0 <= runs["teacher"]["top1"] <= 1
    assert "Accuracy by class: " in page.text and "after temperature scaling" in page.text
    assert "the teacher: " in page.text and "training view" in page.text


def test_judge_says_how_many(place, tmp_path):
    runs, page = reported("sweep --judge 1", tmp_path / "r.html")
    assert len(runs["judged"]) == 1
    runs, page = reported("sweep --judge 0", tmp_path / "r.html")
    assert runs["judged"] == [] and "No weights were judged again" in page.text


def test_weights_and_caches_that_are_gone_are_said(place, tmp_path):
    shutil.copytree("sweep/ce-seed0", tmp_path / "run")
    (tmp_path / "run" / "last.safetensors").unlink()
    runs, page = reported(str(tmp_path / "run"), tmp_path / "r.html")
    assert "no run with a whole epoch" in runs["judged"][0]["missing"] and "were not judged again" in page.text
    shutil.move("home/caches", "home/elsewhere")
    try:
        runs, page = reported("sweep", tmp_path / "r.html")
    finally:
        shutil.move("home/elsewhere", "home/caches")
    assert all("no cache" in one["missing"] for one in runs["judged"]) and runs["teacher"] is None
    assert len(runs["groups"]) == 2 and "seconds an epoch" in page.text
