"""A run goes on after an interruption as if there had been none, from its folder alone, and as no other run."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from kdcache.cache import KdcacheError
from kdcache.cli import main
from kdcache.pipeline.teachers.weights import read_weights
from kdcache.tests.helpers import warm
from kdcache.tests.helpers.training import metrics_of, quiet
from kdcache.train.commands import students
from kdcache.train.config import TrainConfig
from kdcache.train.loop import runfolder
from kdcache.train.loop.runfolder import config_of, read_config
from kdcache.train.losses import NKD
from kdcache.train.run import train

AVERAGED = ("--ema", "0.9", "--accumulate", "2", "--optimiser", "adamw")


@pytest.mark.parametrize(("epochs", "loss"), [(3, ("nkd", *AVERAGED)), (2, ("bdkd", "--online"))])
def test_killed_within_an_epoch_and_resumed_equals_uninterrupted(home, tmp_path, epochs, loss):
    line = ["train", "--cache", str(home / "default"), "--loss", *loss, "--epochs", str(epochs), "--out"]
    command = [sys.executable, "-m", "kdcache.cli", *line]
    assert CliRunner().invoke(main, [*line, str(tmp_path / "whole")], catch_exceptions=False).exit_code == 0
    killed = tmp_path / "killed"
    process = warm.Popen([*command, str(killed), "--save-every", "0"], stderr=subprocess.DEVNULL)
    while (at := stopped_at(process, killed))["epoch"] < 1 or at["batch"] == 0:
        process.send_signal(signal.SIGCONT)
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert len((killed / "metrics.jsonl").read_text().splitlines()) == at["epoch"] < epochs
    resumed = warm.run([*command, str(killed), "--resume"], check=True)
    assert f"after epoch {at['epoch']} and {at['batch']} batches of {epochs}" in resumed.stderr
    a, b = (metrics_of(folder) for folder in (killed, tmp_path / "whole"))
    assert len(a) == epochs and a == b
    files = {p.name for p in (tmp_path / "whole").glob("*.safetensors")}
    assert len(files) == (2 if "bdkd" in loss else 1) and files == {p.name for p in killed.glob("*.safetensors")}
    for file in files:
        weights, whole = (read_weights(f / file)[0] for f in (killed, tmp_path / "whole"))
        assert all(torch.equal(weights[name], whole[name]) for name in whole), file


def stopped_at(process, folder):
    """How far a run had come when it was last kept; it is held still meanwhile."""
    assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    file = folder / "state.pt"
    return torch.load(file, weights_only=True)["training"] if file.exists() else {"epoch": 0, "batch": 0}


def test_a_cache_that_goes_away_is_one_line_and_the_run_goes_on_once_it_is_back(home, tmp_path):
    config = TrainConfig("nkd", cache=str(tmp_path / "cache"), epochs=4, out=str(tmp_path / "run"), batch_size=256)
    whole = train(replace(config, cache=str(home / "exact"), out=str(tmp_path / "whole")), quiet)
    shutil.copytree(home / "exact", tmp_path / "cache")

    def say(text):
        if text.startswith("epoch 1/"):
            (tmp_path / "cache").rename(tmp_path / "aside")

    with pytest.raises(KdcacheError, match="cache has gone: bring the disk or folder back, and go on with --resume"):
        train(config, say)
    (tmp_path / "aside").rename(tmp_path / "cache")
    for file in (tmp_path / "cache" / "views" / "v00002").rglob("c/0/*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    resumed = replace(config, resume=True)
    with pytest.raises(KdcacheError, match=r"v00002/.* is missing .* run kdcache build again"):
        train(resumed, quiet)
    shutil.copytree(home / "exact", tmp_path / "cache", dirs_exist_ok=True)
    again = train(resumed, quiet)
    assert {k: v for k, v in again.items() if "second" not in k and k != "run"} == {
        k: v for k, v in whole.items() if "second" not in k and k != "run"
    }


def test_a_run_is_not_resumed_with_other_settings(home, tmp_path):
    config = TrainConfig("ce", cache=str(home / "default"), epochs=1, out=str(tmp_path / "run"), batch_size=512)
    train(config, quiet)
    others = {"optimiser": "adamw", "amp": "fp16", "accumulate": 2, "clip": 1.0, "ema": 0.9, "compile": True}
    others["crops_per_decode"] = 2
    for name, value in others.items():
        with pytest.raises(KdcacheError, match=rf"is another run and is not resumed: .*{name}: the run has"):
            train(replace(config, resume=True, **{name: value}), quiet)


@pytest.mark.parametrize("restarted", [True, False])
def test_a_run_in_the_default_folder_keeps_its_views(home, tmp_path, monkeypatch, restarted):
    """Restarted by torchrun or resumed, though its cache has more of them now."""
    monkeypatch.chdir(tmp_path)
    config = TrainConfig("kd", str(home / "default"), student="resnet8", epochs=1)
    train(replace(config, views=2), quiet)
    if restarted:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(replace(config, resume=not restarted), quiet)["epochs"] == 1


# Of a run of the first version: all that its config.json held.
FIRST = {
    "cache", "data", "student", "loss", "loss_options", "epochs", "batch_size", "lr", "weight_decay", "momentum",
    "warmup", "seed", "views", "image_size", "online", "fresh_views", "amp",
}  # fmt: skip


def test_a_run_of_an_older_version_is_resumed(home, tmp_path, monkeypatch):
    """Settings that came later are compared with what held before them, those of the loss too."""
    monkeypatch.setattr(NKD, "options_before", lambda: {"gamma": 9.0})
    out, config = tmp_path / "run", TrainConfig("nkd:gamma=9", str(home / "default"), epochs=1, batch_size=512)
    want = train(replace(config, out=str(out)), quiet)
    later = read_config(out)
    older = {k: v for k, v in later.items() if k in FIRST}
    del older["loss_options"]["gamma"]
    (out / "config.json").write_text(json.dumps(older))
    again = TrainConfig(cache=config.cache, out=str(out), resume=True)
    assert train(again, quiet)["loss"] == want["loss"]
    for name, value, had in (
        ("ema", 0.9, "None"), ("optimiser", "adamw", "sgd"), ("accumulate", 2, "1"), ("validation", 0.1, "None"),
        ("crops_per_decode", 2, "1"),
        ("loss", "nkd:gamma=8", ".*'gamma': 9.0"),
    ):  # fmt: skip
        with pytest.raises(KdcacheError, match=rf"not resumed: {name}\w*: the run has {had}.*, asked for "):
            train(replace(again, **{name: value}), quiet)
    # Every setting has such a value, or is not compared.
    assert set(later) <= FIRST | set(config_of(out)) | runfolder.FREE


UNUSUAL = (
    *("--loss", "nkd:gamma=2,mixed=both", "--student", "resnet8", "--views", "2", "--seed", "3", "--lr", "0.003"),
    *("--optimiser", "adamw", "--ema", "0.9", "--accumulate", "2", "--clip", "1", "--batch-size", "100"),
    *(
        "--crops-per-decode",
        "2",
        "--validation",
        "0.1",
        "--weight-decay",
        "0.1",
        "--warmup",
        "0.5",
        "--evaluate-every",
        "2",
        "--epochs",
        "3",
    ),
)


def test_the_folder_is_all_that_is_needed_to_resume(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c").symlink_to(home / "default")

    def invoke(*args, **env):
        return CliRunner().invoke(main, ["train", *args], env=env, catch_exceptions=False)

    assert invoke("--cache", "c", *UNUSUAL, "--out", "whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(
            students, "say", lambda text: text.startswith("epoch 2/3") and signal.raise_signal(signal.SIGTERM)
        )
        assert invoke("--cache", "c", *UNUSUAL, "--out", "run").exit_code == 130
    differing = invoke("--resume", "--out", "run", "--epochs", "4", "--clip", "1", "--seed", "0")
    assert differing.exit_code == 2, differing.output
    names = "not resumed: epochs: the run has 3, asked for 4; seed: the run has 3, asked for 0"
    assert differing.stderr.splitlines()[-1].endswith(names)
    monkeypatch.chdir(home)  # from anywhere
    settings = {"KDCACHE_STUDENT": "resnet20", "KDCACHE_EPOCHS": "3", "KDCACHE_LOSS": "kd"}
    resumed = invoke("--resume", "--out", str(tmp_path / "run"), **settings)
    assert resumed.exit_code == 0, resumed.output
    (note,) = (text for text in resumed.stderr.splitlines() if text.startswith("note: /"))
    assert "its own student resnet8, loss nkd:gamma=2.0" in note and "epochs" not in note
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    for file in ("last", "best"):
        weights, whole = (read_weights(tmp_path / f / f"{file}.safetensors")[0] for f in ("run", "whole"))
        assert all(torch.equal(weights[name], whole[name]) for name in whole), file


def test_a_function_that_only_the_folder_names_is_not_called(home, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train(TrainConfig("ce", str(home / "default"), epochs=1, batch_size=512, out=str(out)), quiet)
    had = read_config(out)
    for name in ("data", "student"):
        (out / "config.json").write_text(json.dumps({**had, name: "os:abort"}))
        with pytest.raises(KdcacheError, match=rf"names the \w+ 'os:abort', .*: .* give --{name} os:abort"):
            train(TrainConfig(out=str(out), resume=True), quiet)
    monkeypatch.setattr("kdcache.train.plan.plan.open_data", lambda spec, *_, **__: pytest.fail(f"{spec} is opened"))
    (out / "config.json").write_text(json.dumps({**had, "data": "my:images"}))
    with pytest.raises(
        pytest.fail.Exception, match="my:images is opened"
    ):  # also where a setting of the user's names it
        train(TrainConfig(out=str(out), resume=True, data="my:images"), quiet, given=set())
    wrong = {"data": 5, "student": ["a"], "epochs": "many", "loss_options": 3, "cache_path": 7, "amp": "fp8"}
    for name, value in wrong.items():
        (out / "config.json").write_text(json.dumps({**had, name: value}))
        with pytest.raises(KdcacheError, match=r"run/config\.json is not what kdcache writes .*: give another --out"):
            train(TrainConfig(out=str(out), resume=True), quiet)
    for name in ("cache", "data", "loss_options"):
        (out / "config.json").write_text(json.dumps({k: v for k, v in had.items() if k not in (name, "cache_path")}))
        with pytest.raises(KdcacheError, match=rf"is not what kdcache writes \(no '{name}'\)"):
            train(TrainConfig(out=str(out), resume=True), quiet)
