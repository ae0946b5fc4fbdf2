"""One build by the processes that torchrun starts: the same cache, one voice, and nobody waits for the dead."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kdcache.cache import KdcacheError
from kdcache.cli import main
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.process.device import pick_device
from kdcache.pipeline.process.rank import Rank, cores, this_rank
from kdcache.tests.helpers import warm
from kdcache.tests.helpers.ranks import run_ranks


def agent(home, pids, line, ranks=2, restarts=1):
    """torchrun's; its standard output and error are pipes, and those of all ranks with them."""
    pids.mkdir()
    return warm.Popen(
        [sys.executable, "-m", "kdcache.tests.helpers.elastic", ranks, restarts, pids, *line.split()],
        env={**os.environ, "KDCACHE_HOME": str(home)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process):
    out, err = process.communicate(timeout=200)
    print(err)  # for whoever sees a later assertion fail
    return out, [line for line in err.splitlines() if line]


def content(path):
    """Every file, and of commits all but who wrote them."""
    found = {}
    for file in (p for p in sorted(path.rglob("*")) if p.is_file()):
        name = file.relative_to(path).as_posix()
        found[name] = file.read_bytes()
        if "commits/" in name:
            about = json.loads(found[name])
            found[name] = {**about, "writer": sorted(about["writer"])}
    return found


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A home in which two ranks taught a teacher first, and built one view with it; what they said."""
    home = tmp_path_factory.mktemp("home")
    line = "-m kdcache.cli build --teacher resnet8 --device cpu --views 1 --json"
    codes, out, err = run_ranks(2, line, KDCACHE_HOME=str(home))
    assert codes == {0}, err
    return home, out, err.splitlines()


def test_ranks_teach_once_speak_once_and_build_what_one_process_builds(taught, tmp_path, monkeypatch):
    home, out, err = taught
    monkeypatch.setenv("KDCACHE_HOME", str(home))
    built = json.loads(out)
    for beginning in ("data: digits", "no resnet8 has been taught", "teaching resnet8", "epoch 1/", "done in"):
        assert len([line for line in err if line.startswith(beginning)]) == 1, beginning
    (weights,) = home.glob("teachers/*/*.safetensors")
    alone = build(
        BuildConfig("resnet8", str(weights), views=1, device="cpu", out=str(tmp_path / "c")), lambda line: None
    )
    assert alone.key == built["key"] and alone.teacher_images == 1442 + 355
    assert content(tmp_path / "c") == content(Path(built["path"]))


def test_a_killed_rank_is_started_again_and_the_build_goes_on(taught, tmp_path, monkeypatch):
    home = taught[0]
    monkeypatch.setenv("KDCACHE_HOME", str(home))
    line = f"build --teacher resnet8 --device cpu --views 6 --json --out {tmp_path / 'c'}"
    with agent(home, tmp_path / "pids", line) as process:
        leases, until = [], time.monotonic() + 100
        while not leases and time.monotonic() < until:
            time.sleep(0.01)
            leases = list((tmp_path / "c").glob("leases/v*"))
        dead = json.loads(leases[0].read_text())["process"]
        os.kill(dead, signal.SIGKILL)
        out, err = ended(process)
    assert process.returncode == 0 and json.loads(out)["views"] == 6
    assert any(f"pid: {dead}" in line and "exitcode: -9" in line for line in err)
    # A process that is killed while it writes its lease leaves a temporary file, which later builds remove by its age.
    assert not [file for file in (tmp_path / "c" / "leases").iterdir() if file.suffix != ".tmp"]
    (weights,) = home.glob("teachers/*/*.safetensors")
    build(BuildConfig("resnet8", str(weights), views=6, device="cpu", out=str(tmp_path / "alone")), lambda line: None)
    assert content(tmp_path / "alone") == content(tmp_path / "c")


def test_what_is_wrong_alike_in_all_ranks_is_said_once(tmp_path):
    codes, out, err = run_ranks(2, "-m kdcache.cli build --teacher nonsense --device cpu", KDCACHE_HOME=str(tmp_path))
    assert codes == {2} and out == ""
    assert len([line for line in err.splitlines() if line.startswith("Error: ") and "nonsense" in line]) == 1
    assert not any("kdcache" in line for line in err.splitlines() if line.lstrip().startswith("File "))


def test_more_ranks_than_shards_are_told_so(taught, tmp_path, monkeypatch):
    (weights,) = taught[0].glob("teachers/*/*.safetensors")
    be_rank(monkeypatch, 0, 5)
    said = []
    config = BuildConfig("resnet8", str(weights), views=1, device="cpu", out=str(tmp_path / "c"))
    assert build(config, said.append).teacher_images == 1442 + 355
    assert "note: 5 processes for 2 shards: 3 of them have nothing to compute" in said


def be_rank(monkeypatch, rank, world):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", world)):
        monkeypatch.setenv(name, str(value))


def test_a_rank_takes_its_own_gpu(monkeypatch):
    be_rank(monkeypatch, 1, 4)
    assert cores() == max(1, len(os.sched_getaffinity(0)) // 4)
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr("torch.zeros", lambda n, device: chosen.append(device) or torch.ones(1))
    assert str(pick_device(None)) == str(pick_device("cuda")) == "cuda:1"
    assert str(pick_device("cpu")) == "cpu"
    with pytest.raises(KdcacheError, match="cuda:3 is one device, and torchrun started 4 ranks: give cpu or cuda"):
        pick_device("cuda:3")
    be_rank(monkeypatch, 0, 1)
    assert str(pick_device("cuda:3")) == "cuda:3"
    assert [str(d) for d in chosen] == ["cuda:1"] * 4 + ["cpu"] + ["cuda:3"] * 2


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_ranks_that_are_told_only_in_part_do_not_each_take_themselves_for_the_only_one(monkeypatch, tmp_path, missing):
    be_rank(monkeypatch, 0, 2)
    monkeypatch.delenv(missing)
    with pytest.raises(KdcacheError, match=f"WORLD_SIZE is 2, but {missing} is not set"):
        this_rank()
    monkeypatch.setenv(missing, "first")
    said = CliRunner().invoke(main, ["build", "--teacher", "resnet8", "--out", str(tmp_path / "c")])
    assert said.exit_code == 2 and said.output.startswith(f"Error: WORLD_SIZE is 2, but {missing} is first: start")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert this_rank() == Rank()
