"""Runs are not overwritten, damaged ones are refused, whole ones evaluated; the shortest commands suffice."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdcache.tests.helpers.commands import Place, invoke, start, works


@pytest.fixture
def run(place: Place, quick: str) -> Path:
    """A copy of a whole run of two epochs."""
    whole = place.root / "whole"
    if not whole.exists():
        works(f"{quick} --out {whole}")
    return shutil.copytree(whole, place.work / "run")


def test_a_run_is_not_overwritten(run: Path, quick: str, refused: Callable[..., str]) -> None:
    refused(f"{quick} --out {run}", str(run), "--resume", "--out")
    different = "lr: the run has 0.025, asked for 0.3", "student: the run has resnet8, asked for resnet14"
    refused(f"{quick} --out {run} --resume --lr 0.3 --student resnet14", "another run", *different)
    refused(f"{quick} --out {run} --resume --loss kd", "loss: the run has nkd, asked for kd")


def test_damaged_runs(run: Path, quick: str, refused: Callable[..., str]) -> None:
    state = (run / "state.pt").read_bytes()
    for content in (b"", b"no pickle" * 30, state[:2000]):
        (run / "state.pt").write_bytes(content)
        refused(f"{quick} --out {run} --resume", f"{run}/state.pt", "remove it")
    whole = torch.load(io.BytesIO(state))
    for odd in ({}, [1], {**whole, "model": {}}, {**whole, "optimiser": {}}, {**whole, "random": None, "x": 1}):
        torch.save(odd, run / "state.pt")
        refused(f"{quick} --out {run} --resume", f"{run}/state.pt", "remove it")
    (run / "state.pt").write_bytes(state)
    for text in (b"", b"{", b"[]", b"\xff\xfe"):
        (run / "config.json").write_bytes(text)
        refused(f"{quick} --out {run} --resume", f"{run}/config.json")
    (run / "last.safetensors").write_bytes(b"")
    refused(f"eval {run}", f"{run}/last.safetensors")


def test_a_run_that_never_had_an_epoch_is_started_again(quick: str, refused: Callable[..., str]) -> None:
    """The loss is not finite, the user corrects it: the folder must not be in the way."""
    result = invoke(f"{quick} --lr 1e30 --out run")
    assert result.exit_code == 2 and "lower --lr" in result.stderr
    refused("eval run", "no run with a whole epoch")
    works(f"{quick} --epochs 1 --out run")
    refused(f"{quick} --epochs 1 --out run", "holds a run already")


def test_eval(run: Path, place: Place, refused: Callable[..., str]) -> None:
    found = json.loads(works(f"eval {run} --json").stdout)
    summary = json.loads((run / "summary.json").read_text())
    assert found["top1"] == summary["top1"] and found["weights"] == f"{run}/last.safetensors"
    assert re.search(r"^top1 +\d+\.\d\d%$", works(f"eval {run}/last.safetensors").stdout, re.M)
    refused(f"eval {run} --data digits", "was not trained on digits's classes '0', '1'")
    refused(f"eval {run} --cache {place.pics}", f"{place.pics} is not a kdcache cache")


def test_the_short_form_on_a_fresh_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = str(tmp_path / "home")
    for line in ("build --teacher resnet8", "train --loss nkd"):
        process = start(line, fresh=True, KDCACHE_HOME=home)
        out, _ = process.communicate(timeout=250)
        assert process.returncode == 0, out
        if line.startswith("build"):
            assert "data: digits" in out and "teaching one first" in out
    summary = json.loads(Path("runs/digits-resnet8-nkd-seed0/summary.json").read_text())
    assert summary["top1"] > 0.95
    listed = json.loads(works("ls --json", KDCACHE_HOME=home).stdout)
    assert len(listed) == 1 and listed[0]["identity"]["data"]["name"] == "digits"
