"""Everything that a GPU machine tells of kdcache, in at most eight minutes: tests, speeds, students against the clock.

    python bench/gpu.py [--out FILE] [--cifar SPEC] [--only "PART; PART"]
    python bench/gpu.py --dry

Each part runs in a process of its own and for so long at most; its result is in the JSON file as soon as it is there. A
part that fails or runs over is named, and the others go on. The same command runs only what is not done yet. SPEC is
CIFAR-10 as in --data (cifar10:PATH, imagefolder:PATH); without it, noise takes its place, which is good for speeds
alone. --dry runs all parts in tiny sizes on the CPU, so that a GPU's time is not lost to a mistake in here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import gpu_airbench
import gpu_parts
from gpu_parts import LeftOutError, PartError, Setting

from kdcache.cache.files import replace_file

SECONDS = 475.0
_LEAST = 5.0  # seconds, with less of which no part is begun
DONE = ("done", "left out")


@dataclass(frozen=True)
class Part:
    """What it measures, and how many seconds it may take."""

    run: Callable[[Setting], dict[str, Any]]
    seconds: float


PARTS: dict[str, Part] = {
    "machine": Part(gpu_parts.about, 20),
    "tests": Part(gpu_parts.tests, 90),
    "steps at 32": Part(gpu_parts.steps_in_memory, 60),
    "steps at 224": Part(gpu_parts.steps_from_files, 70),
    "steps from ffcv": Part(gpu_parts.steps_from_ffcv, 40),
    "build resnet34": Part(partial(gpu_parts.building, teacher="resnet34", amp=None), 60),
    "build vit_l_16": Part(partial(gpu_parts.building, teacher="vit_l_16", amp="bf16"), 75),
    "fast teacher": Part(gpu_airbench.teach_and_build, 90),
    "fast student, ce": Part(partial(gpu_airbench.students, loss="ce:label_smoothing=0.2"), 80),
    "fast student, nkd": Part(partial(gpu_airbench.students, loss="nkd"), 80),
}


class Results:
    """The file of results, which is whole at any moment."""

    def __init__(self, path: Path, setting: Setting) -> None:
        self._path = path
        self._all: dict[str, Any] = {"command": "python bench/gpu.py", "setting": setting.described(), "parts": {}}
        if path.exists():
            before = json.loads(path.read_text())
            if before["setting"] != self._all["setting"]:
                sys.exit(
                    f"{path} holds results of {before['setting']}, not of {self._all['setting']}: give another --out"
                )
            self._all = before

    @property
    def parts(self) -> dict[str, Any]:
        found: dict[str, Any] = self._all["parts"]
        return found

    def add(self, name: str, outcome: dict[str, Any]) -> None:
        self.parts[name] = outcome
        replace_file(self._path, (json.dumps(self._all, indent=2) + "\n").encode())


def run_parts(parts: Mapping[str, Part], setting: Setting, results: Results, seconds: float = SECONDS) -> list[str]:
    """Run what is not done yet, for so many seconds in all; the names of what is not done then."""
    started = time.monotonic()
    for name, part in parts.items():
        if results.parts.get(name, {}).get("status") in DONE:
            print(f"{name}: done before", flush=True)
            continue
        left = seconds - (time.monotonic() - started)
        if left < _LEAST:
            print(f"{name}: not begun, since the time is up; the same command goes on here", flush=True)
            continue
        outcome = in_a_process(name, part.run, setting, min(part.seconds, left))
        results.add(name, outcome)
        print(
            f"{name}: {outcome['status']} in {outcome['seconds']:.0f} s  {outcome.get('error', '')}".rstrip(),
            flush=True,
        )
    return [name for name in parts if results.parts.get(name, {}).get("status") not in DONE]


def in_a_process(name: str, run: Callable[[Setting], dict[str, Any]], setting: Setting, limit: float) -> dict[str, Any]:
    """The outcome of a part: its status, result or error, seconds and date. What it prints is in a log file.

    The process is forked, so that imports cost their time once. It leads a session of its own, and whatever it has
    started ends with it.
    """
    place = setting.work / name.replace(" ", "-").replace(",", "")
    place.mkdir(parents=True, exist_ok=True)
    told, log = place / "outcome.json", place / "log.txt"
    told.unlink(missing_ok=True)
    began, date = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    process = multiprocessing.get_context("fork").Process(target=_part, args=(run, setting, told, log))
    process.start()
    try:
        process.join(limit)
        over = process.is_alive()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()
    outcome: dict[str, Any]
    if over:
        outcome = {"status": "ran over", "error": f"stopped after {limit:.0f} s; {last_line(log)}"}
    elif told.exists():
        outcome = json.loads(told.read_text())
    else:
        outcome = {"status": "failed", "error": f"ended with {process.exitcode}; {last_line(log)}"}
    return {**outcome, "seconds": round(time.monotonic() - began, 2), "date": date}


def _ends_with(parent: int) -> None:
    """End this process and all that it has started when the one that asked for the part is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def _part(run: Callable[[Setting], dict[str, Any]], setting: Setting, told: Path, log: Path) -> None:
    os.setsid()
    threading.Thread(target=_ends_with, args=(os.getppid(),), daemon=True).start()
    file = log.open("w", buffering=1)
    for stream in (1, 2):  # also what libraries print that do not ask Python
        os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = file
    outcome: dict[str, Any]
    try:
        outcome = {"status": "done", "result": run(setting)}
    except LeftOutError as e:
        outcome = {"status": "left out", "error": str(e)}
    except Exception as e:
        traceback.print_exc()
        result = {"result": e.result} if isinstance(e, PartError) else {}
        outcome = {"status": "failed", "error": f"{type(e).__name__}: {e}"[:500], **result}
    replace_file(told, json.dumps(outcome).encode())


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    return f"it said last: {said[-1][:200]}" if said else "it said nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the file of results [bench/results/gpu.json; with --dry none]")
    parser.add_argument("--work", type=Path, help="a folder for caches and logs, which a second call needs again")
    parser.add_argument("--cifar", metavar="SPEC", help="CIFAR-10 as in --data [noise]")
    parser.add_argument("--only", metavar="PART; ...", help=f"of {'; '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts together [%(default)s]")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    a = parser.parse_args()
    names = [name.strip() for name in a.only.split(";")] if a.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}: --only takes {'; '.join(PARTS)}, with ; between them")
    device = "cpu" if a.dry else "cuda"
    # Should anything here ask whether there is a GPU, it does not begin with CUDA, which parts could not fork from.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    with ExitStack() as stack:
        work = a.work
        if work is None and a.dry:  # in memory where there is such a folder, for the disk's speed tells nothing here
            memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kdcache-gpu-", dir=memory)))
        work = (work or Path(tempfile.gettempdir()) / f"kdcache-gpu-{os.getuid()}").absolute()
        out = a.out or (work / "gpu.json" if a.dry else Path(__file__).parent / "results" / "gpu.json")
        work.mkdir(parents=True, exist_ok=True)
        os.environ["KDCACHE_HOME"], tempfile.tempdir = str(work / "home"), str(work)
        setting = Setting(work, device, a.dry, a.cifar)
        undone = run_parts({name: PARTS[name] for name in names}, setting, Results(out.absolute(), setting), a.seconds)
    if undone:
        sys.exit(f"not done: {', '.join(undone)}; the logs are in {work}, and the same command goes on with these")


if __name__ == "__main__":
    main()
