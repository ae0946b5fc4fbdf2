"""Ctrl-C stops a command with one line and status 130, and leaves no process behind."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from kdcache.tests.helpers.commands import Place, commands_of, is_there, start, works


def test_ctrl_c(place: Place, large: Path) -> None:
    """In a build and in a training with workers: one line, status 130, no process left, and it goes on."""
    data = f"--data imagefolder:{large}/pics --workers 2"
    build = f"build --teacher resnet8 --weights {large}/teacher.safetensors {data} --allow-low-accuracy --out cache"
    train = f"train {data} --cache {large}/cache --student resnet8 --image-size 32 --batch-size 8 --out run"
    under_way = {
        start(f"{build} --views 500"): lambda: len(list(Path("cache/commits").glob("v*.json"))) > 1,
        start(f"{train} --epochs 500"): Path("run/state.pt").exists,
    }
    try:
        for process, ready in under_way.items():
            until = time.monotonic() + 120
            while not ready():
                assert process.poll() is None and time.monotonic() < until, process.communicate()
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 130, out
            assert "Traceback" not in out and "Error" not in out, out
            assert out.splitlines()[-1].startswith("stopped; nothing is lost"), out
            gone = time.monotonic() + 20
            while is_there(process.pid):  # one that has ended waits a moment for the system to take note
                assert time.monotonic() < gone
                time.sleep(0.02)
    finally:
        for process in under_way:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    done = len(list(Path("cache/commits").glob("v*.json")))
    built = json.loads(works(f"{build} --views {done + 1} --workers 0 --json").stdout)
    assert built["views"] == done + 1 and 0 < built["teacher_images"] <= 32 * 2


@pytest.mark.parametrize("stage", ["build", "train"])
def test_ctrl_c_while_a_network_is_compiled(place: Place, large: Path, quick: str, stage: str) -> None:
    """At a terminal the compiler gets it too: no complaint of it, nor is it left."""
    teacher = f"--teacher resnet8 --weights {large}/teacher.safetensors --data imagefolder:{large}/pics"
    line = f"{quick} --loss kd" if stage == "train" else f"build {teacher} --allow-low-accuracy"
    process = start(f"{line} --compile --out run", TORCHINDUCTOR_CACHE_DIR=str(Path("inductor").absolute()))
    try:
        until = time.monotonic() + 120
        while "cc1plus" not in (names := commands_of(process.pid)) and "clang++" not in names:
            assert process.poll() is None and time.monotonic() < until, process.communicate()
            time.sleep(0.1)  # to look at all processes takes longer than most other waits
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 130, out
    assert "Traceback" not in out and "Error" not in out, out
    assert out.splitlines()[-1].startswith("stopped; nothing is lost"), out
    gone = time.monotonic() + 20
    while is_there(process.pid):
        assert time.monotonic() < gone
        time.sleep(0.02)
