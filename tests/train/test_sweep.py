"""Several losses and seeds: every combination in its own folder, one table, and nothing lost by a failure or a kill."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from kdcache.cache import KdcacheError
from kdcache.cache.sealed import read_sealed
from kdcache.cli import main
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.tests.helpers import warm
from kdcache.train.config import TeachConfig, TrainConfig
from kdcache.train.run import train
from kdcache.train.sweep import sweep, table
from kdcache.train.teach import teach


def quiet(_):
    pass


@pytest.fixture(scope="module")
def home(tmp_path_factory, one_thread):
    """A taught teacher and a top-3 cache of it, the only one under KDCACHE_HOME."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCACHE_HOME", str(folder))
        teach(TeachConfig("resnet8", epochs=1), quiet)
        build(BuildConfig("resnet8", views=1, topk=3), quiet)
        yield folder


SETTINGS = {"epochs": 1, "batch_size": 256, "lr": 0.01}
QUICK = {"--epochs": "1", "--batch-size": "256", "--lr": "0.01"}


def invoke(*args, **env):
    quick = [word for item in QUICK.items() if item[0] not in args for word in item]
    return CliRunner().invoke(main, ["train", *quick, *map(str, args)], env=env, catch_exceptions=False)


def figures(summary):
    """What must be equal of a run: everything but times and places."""
    return {k: v for k, v in summary.items() if isinstance(v, float) and not k.startswith("seconds")}


def test_every_combination_is_trained_as_alone_and_compared(home, tmp_path):
    losses, seeds = ["ce", "dkd:beta=2,warmup=3"], [0, 4]
    result = sweep(TrainConfig("ce", out=str(tmp_path / "s"), **SETTINGS), losses, seeds, quiet)
    assert [(r["loss"], r["seed"]) for r in result["runs"]] == [(x, s) for x in losses for s in seeds]
    assert read_sealed(tmp_path / "s" / "sweep.json", "") == result
    assert sorted(p.name for p in (tmp_path / "s").iterdir() if p.is_dir()) == [
        "ce-seed0", "ce-seed4", "dkd-beta=2-warmup=3-seed0", "dkd-beta=2-warmup=3-seed4",
    ]  # fmt: skip
    alone = train(TrainConfig(losses[1], seed=4, out=str(tmp_path / "alone"), **SETTINGS), quiet)
    assert figures(result["runs"][3]["summary"]) == figures(alone)

    lines = table(result).splitlines()
    assert lines[0].split() == ["loss", "seeds", "top-1", "(%)", "nll", "ece", "agreement", "(%)", "s", "an", "epoch"]
    assert len(lines) == 3
    for row, (loss, line) in enumerate(zip(result["losses"], lines[1:], strict=True)):
        top1 = [r["summary"]["top1"] for r in result["runs"][2 * row : 2 * row + 2]]
        mean, spread = statistics.mean(top1), statistics.stdev(top1)
        assert loss["figures"]["top1"] == pytest.approx({"mean": mean, "spread": spread})
        assert line.startswith(losses[row]) and f"{100 * mean:.2f} ± {100 * spread:.2f}" in line
        assert {"nll", "brier", "ece", "agreement", "kl", "seconds_an_epoch"} <= loss["figures"].keys()


def test_a_run_that_fails_does_not_lose_the_others(home, tmp_path):
    result = invoke("--loss", "ce", "--loss", "dist", "--loss", "kd", "--out", tmp_path / "s")
    assert result.exit_code == 1
    last = result.stdout.splitlines()[-1]
    assert last.startswith("FAILED dist, seed 0: dist needs all 10 classes' logits") and "--topk 10" in last
    kept = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [("summary" in r, "error" in r) for r in kept["runs"]] == [(True, False), (False, True), (True, False)]
    assert [(x["seeds"], x["failed"]) for x in kept["losses"]] == [(1, 0), (0, 1), (1, 0)]
    assert "±" not in result.stdout  # one seed has no spread


def test_finished_runs_are_kept_and_others_added(home, tmp_path):
    out = tmp_path / "s"
    first = invoke("--loss", "ce", "--seed", "0,1", "--out", out, "--json")
    assert first.exit_code == 0
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*") if p.is_file()}
    refused = invoke("--loss", "ce", "--loss", "kd", "--out", out)
    assert refused.exit_code == 2 and "ce-seed0 holds a run already: give --resume" in refused.stderr
    again = invoke("--loss", "ce", "--loss", "kd", "--seed", "0,1", "--out", out, "--resume", "--json")
    assert again.exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    was, now = (json.loads(r.stdout) for r in (first, again))
    assert now["runs"][:2] == was["runs"] and len(now["runs"]) == 4
    (out / "kd-seed0" / "summary.json").write_text("[]")
    damaged = invoke("--loss", "ce", "--loss", "kd", "--out", out, "--resume")
    assert damaged.exit_code == 1 and "kd-seed0/summary.json is not what kdcache writes: remove it" in damaged.stdout
    (out / "kd-seed0" / "summary.json").unlink()
    whole = json.loads(invoke("--loss", "ce", "--loss", "kd", "--out", out, "--resume", "--json").stdout)
    assert [figures(run["summary"]) for run in whole["runs"]] == [figures(run["summary"]) for run in now["runs"]]
    # A run of other settings is an error of its own, not one that is overwritten or taken for the same.
    command = ["train", "--loss", "ce", "--seed", "0,1", "--out", str(out), "--resume", "--epochs", "2"]
    other = CliRunner().invoke(main, command, catch_exceptions=False)
    assert other.exit_code == 1 and other.stdout.count("epochs: the run has 1, asked for 2") == 2


def test_the_folder_is_all_that_a_sweep_needs_to_go_on(home, tmp_path):
    """Its losses, seeds and settings; also for runs that had not begun."""
    out = tmp_path / "s"
    asked = ["--loss", "ce", "--loss", "dkd:beta=2,warmup=3", "--seed", "0,4", "--validation", "0.2"]
    whole = json.loads(invoke(*asked, "--out", out, "--json").stdout)
    shutil.rmtree(out / "dkd-beta=2-warmup=3-seed4")
    kept = read_sealed(out / "sweep.json", "")
    (out / "sweep.json").write_text(json.dumps({**kept, "runs": kept["runs"][:2]}))  # as it was when it was killed
    resumed = CliRunner().invoke(main, ["train", "--resume", "--out", str(out), "--json"], catch_exceptions=False)
    assert resumed.exit_code == 0, resumed.output
    again = json.loads(resumed.stdout)
    assert [figures(run["summary"]) for run in again["runs"]] == [figures(run["summary"]) for run in whole["runs"]]
    assert table(again).splitlines()[0].split()[2:5] == ["validation", "(%)", "top-1"]


def test_a_killed_sweep_goes_on(home, tmp_path):
    command = [
        *(sys.executable, "-m", "kdcache.cli", "train", "--epochs", "6", "--batch-size", "128", "--loss", "ce,kd"),
        *("--seed", "0", "--json", "--out", str(tmp_path / "killed")),
    ]
    # As many threads as here, on which the last digits depend.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = warm.Popen(command, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    second = tmp_path / "killed" / "kd-seed0"
    deadline = time.monotonic() + 200
    while not (second / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (second / "state.pt").exists() and not (second / "summary.json").exists()
    first = (tmp_path / "killed" / "ce-seed0" / "state.pt").stat().st_mtime_ns
    config = TrainConfig("ce", out=str(tmp_path / "killed"), epochs=6, batch_size=128, resume=True)
    said = []
    resumed = sweep(config, ["ce", "kd"], [0], said.append)
    assert (tmp_path / "killed" / "ce-seed0" / "state.pt").stat().st_mtime_ns == first
    assert any(text.startswith(f"resuming {second} after epoch") for text in said)
    alone = train(TrainConfig("kd", out=str(tmp_path / "alone"), epochs=6, batch_size=128), quiet)
    assert figures(resumed["runs"][1]["summary"]) == figures(alone)


def test_one_loss_and_one_seed_is_a_run_as_ever(home, tmp_path):
    result = invoke("--loss", "dkd:beta=2,warmup=3", "--seed", "7", "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["run"] == str(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["loss"], config["loss_options"]["warmup"], config["seed"]) == ("dkd", 3, 7)
    assert not (tmp_path / "run" / "sweep.json").exists()


@pytest.mark.parametrize("where", ["flags", "one flag", "file", "file's list", "environment"])
def test_lists_on_the_command_line_in_the_file_and_in_the_environment(monkeypatch, tmp_path, where):
    asked = []

    def note(config, losses, seeds, say, given):
        asked.append((losses, seeds))
        return {"runs": [], "losses": []}

    monkeypatch.setattr("kdcache.train.sweep.sweep", note)
    monkeypatch.chdir(tmp_path)
    args, env = [], {}
    if where == "flags":
        args = ["--loss", "nkd", "--loss", "dkd:beta=2,warmup=3", "--loss", "kd", "--seed", "0", "--seed", "5"]
    elif where == "one flag":
        args = ["--loss", "nkd,dkd:beta=2,warmup=3,kd", "--seed", "0,5"]
    elif where == "environment":
        env = {"KDCACHE_LOSS": "nkd,dkd:beta=2,warmup=3,kd", "KDCACHE_TRAIN_SEED": "0,5"}
    elif where == "file":
        Path("kdcache.toml").write_text('loss = "nkd,dkd:beta=2,warmup=3,kd"\n[train]\nseed = "0,5"\n')
    else:
        Path("kdcache.toml").write_text('[train]\nloss = ["nkd", "dkd:beta=2,warmup=3", "kd"]\nseed = [0, 5]\n')
    result = invoke(*args, **env)
    assert result.exit_code == 0, result.output
    assert asked == [(("nkd", "dkd:beta=2,warmup=3", "kd"), (0, 5))]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--loss", "ce,nkdd"], "unknown loss 'nkdd'"),
        (["--loss", "ce", "--loss", "nkd:gama=1"], "no option 'gama'"),
        (["--loss", "nkd:gamma=1,temperature"], "unknown loss 'temperature'"),
        (["--loss", "ce,kd,ce"], "given twice"),
        (["--seed", "1,1"], "given twice"),
        (["--loss", ","], "no loss is named"),
        (["--seed", "0,x"], "'x' is not a valid integer"),
        (["--seed", "0,-1"], "-1 is not in the range"),
        (["--loss", "ce,kd", "--cache", "nowhere"], "nowhere"),
        (["--loss", "ce,kd", "--teacher", "resnet14"], "no cache of digits by resnet14"),
    ],
)
def test_a_mistake_that_concerns_all_is_refused_before_the_first_run(home, tmp_path, args, message):
    result = invoke(*args, "--out", tmp_path / "s")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "s").exists()


def test_a_sweep_in_which_all_fail_has_a_table_too(home, tmp_path):
    result = sweep(TrainConfig("mse", out=str(tmp_path / "s"), **SETTINGS), ["mse", "dist"], [0], quiet)
    assert table(result).count("FAILED") == 2
    with pytest.raises(KdcacheError, match="holds the top 3"):
        train(TrainConfig("mse", out=str(tmp_path / "alone"), **SETTINGS), quiet)
