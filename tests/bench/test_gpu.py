"""bench/gpu.py: it goes on where it was stopped, no part holds up the others, and a dry run goes through them."""

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdcache.tests.helpers import warm
from kdcache.tests.helpers.places import BENCH

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def gpu():
    """The script as a module; it imports others of its folder."""
    spec = importlib.util.spec_from_file_location("bench_gpu", BENCH / "gpu.py")
    module = sys.modules["bench_gpu"] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        spec.loader.exec_module(module)
        yield module
    for name in ("bench_gpu", "gpu_parts", "gpu_airbench", "files", "pixels"):
        sys.modules.pop(name, None)


@pytest.fixture
def kit(gpu, tmp_path):
    return Kit(gpu, tmp_path)


class Kit:
    """The script with toy parts, which note each time that they run."""

    def __init__(self, gpu, folder):
        self.gpu, self.notes = gpu, folder / "notes"
        self.setting, self.out = gpu.Setting(folder, "cpu", True), folder / "out.json"

    def part(self, name, work=lambda setting: {"found": 1}, seconds=20.0):
        def run(setting):
            with self.notes.open("a") as file:
                file.write(f"{name} {os.getpid()}\n")
            return work(setting)

        return self.gpu.Part(run, seconds)

    def run(self, parts, seconds=60.0):
        return self.gpu.run_parts(parts, self.setting, self.gpu.Results(self.out, self.setting), seconds)

    def ran(self):
        return [line.split()[0] for line in self.notes.read_text().splitlines()]

    @property
    def outcomes(self):
        return json.loads(self.out.read_text())["parts"]


def gone(pid):
    """Whether the process has ended, or ends within some seconds."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def sleep_with_a_child(setting):
    child = subprocess.Popen(["sleep", "600"])
    (setting.work / "child").write_text(str(child.pid))
    print("about to hang", flush=True)
    time.sleep(600)


def test_finished_parts_are_not_run_again_after_a_kill_and_what_they_had_started_is_gone(kit):
    parts = {"one": kit.part("one"), "two": kit.part("two", sleep_with_a_child, 500.0), "three": kit.part("three")}
    process = multiprocessing.get_context("fork").Process(target=kit.run, args=(parts,))
    process.start()
    child = kit.setting.work / "child"
    while not (child.exists() and child.read_text()):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert kit.outcomes.keys() == {"one"} and gone(int(child.read_text()))
    parts["two"] = kit.part("two")
    assert kit.run(parts) == []
    assert kit.ran() == ["one", "two", "two", "three"]
    assert {outcome["status"] for outcome in kit.outcomes.values()} == {"done"}
    assert kit.outcomes["one"]["result"] == {"found": 1} and kit.outcomes["one"]["date"]


def test_a_part_that_hangs_is_stopped_with_its_children_and_the_others_go_on(kit):
    began = time.monotonic()
    undone = kit.run({"slow": kit.part("slow", sleep_with_a_child, 1.5), "next": kit.part("next")})
    assert undone == ["slow"] and kit.ran() == ["slow", "next"] and time.monotonic() - began < 30
    outcome = kit.outcomes["slow"]
    assert outcome["status"] == "ran over" and "after 2 s; it said last: about to hang" in outcome["error"]
    assert gone(int((kit.setting.work / "child").read_text()))


def test_parts_that_fail_are_named_with_their_errors_and_run_again(kit):
    def half(setting):
        raise kit.gpu.PartError("2 tests failed", {"passed": 3})

    def lacks(setting):
        raise kit.gpu.LeftOutError("no such library")

    parts = {
        "raises": kit.part("raises", lambda setting: 1 / 0), "dies": kit.part("dies", lambda setting: os._exit(7)),
        "half": kit.part("half", half), "lacks": kit.part("lacks", lacks), "good": kit.part("good"),
    }  # fmt: skip
    assert kit.run(parts) == ["raises", "dies", "half"]
    found = kit.outcomes
    assert found["raises"]["error"] == "ZeroDivisionError: division by zero"
    assert "ended with 7" in found["dies"]["error"] and found["half"]["result"] == {"passed": 3}
    assert found["lacks"]["status"] == "left out" and found["good"]["status"] == "done"
    assert kit.run(parts) == ["raises", "dies", "half"]
    assert kit.ran() == [*parts, "raises", "dies", "half"]


def test_no_part_begins_when_the_time_is_up_or_for_another_setting(kit, capsys):
    assert kit.run({"late": kit.part("late")}, seconds=1.0) == ["late"] and not kit.notes.exists()
    assert "the same command goes on here" in capsys.readouterr().out
    kit.run({"one": kit.part("one")})
    kit.setting = kit.gpu.Setting(kit.setting.work, "cpu", True, "cifar10")
    with pytest.raises(SystemExit, match="give another --out"):
        kit.run({"one": kit.part("one")})


def test_the_parts_fit_into_eight_minutes_and_a_wrong_name_is_refused(gpu, monkeypatch, capsys):
    assert gpu.SECONDS <= 480 and max(part.seconds for part in gpu.PARTS.values()) < gpu.SECONDS / 3
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--only", "machine; nothing"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "there is no part 'nothing'" in capsys.readouterr().err


def test_seconds_to_an_accuracy_are_those_of_the_shortest_run_that_reaches_it(gpu):
    runs = [{"seconds": s, "top1": t} for s, t in ((5.0, 0.93), (9.0, 0.95), (20.0, 0.96), (40.0, 0.955))]
    assert [gpu.gpu_airbench.seconds_to(runs, t) for t in (0.9, 0.94, 0.96, 0.97)] == [5.0, 9.0, 20.0, None]


def test_a_dry_run_goes_through_the_parts(gpu, tmp_path):
    """Through all but FFCV's, whose loader compiles for ten seconds."""
    names = [name for name in gpu.PARTS if name != "steps from ffcv"]
    out = tmp_path / "dry.json"
    line = [sys.executable, "gpu.py", "--dry", "--out", str(out), "--only", ";".join(names)]
    done = warm.run(line, cwd=BENCH, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["parts"]
    assert [name for name in found if found[name]["status"] == "done"] == names
    assert found["machine"]["result"]["versions"]["torch"] and found["tests"]["result"]["passed"] > 40
    for name in ("steps at 32", "steps at 224"):
        assert {"online", "cached", "ce"} <= found[name]["result"]["images_per_second"].keys()
    assert found["build vit_l_16"]["result"]["images_per_second"].keys() == {"build", "bare teacher", "images alone"}
    assert found["fast student, nkd"]["result"]["seconds_to"] == {"94%": None, "96%": None}
