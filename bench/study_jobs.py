"""Jobs of a study, each in a process of its own: done once, so many at a time, stopped and gone on with at any moment.

In a work folder, `done` has a file of results for each finished job, `spent` the seconds that each has taken so far,
`locks` who is at work, and `logs` what the processes say.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from filelock import FileLock, Timeout

from kdcache.cache.files import replace_file
from kdcache.train.bench.bench import machine

_LOOK_SECONDS = 1.0
# glibc gives a step's tensors back and asks for them anew in every step: a quarter of the time where pages are dear.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


class Job(Hashable, Protocol):
    """A frozen dataclass that says what is to be done."""

    @property
    def name(self) -> str:
        """The name of its files; equal for equal jobs alone."""
        ...


J = TypeVar("J", bound=Job)


def child(job: Job, work: Path, perform: Callable[[], dict[str, Any]]) -> None:
    """Do one job and file its results; times are summed over all processes that it took."""
    (work / "locks").mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "locks" / job.name, timeout=0):
            with stopwatch(work / "spent" / f"{job.name}.json") as spent:
                found = perform()
            about = machine()
            result = {
                "settings": asdict(job), **found, **spent(), "threads": torch.get_num_threads(),
                "processor": about["processor"], "torch": about["torch"],
            }  # fmt: skip
            replace_file(work / "done" / f"{job.name}.json", json.dumps(result).encode())
    except Timeout:
        sys.exit(f"{job.name} is under way in another process")
    except KeyboardInterrupt:
        sys.exit("stopped")


def done(work: Path) -> dict[str, Any]:
    """The results that lie in the work folder, by job."""
    return {file.stem: json.loads(file.read_text()) for file in sorted((work / "done").glob("*.json"))}


def merged(work: Path, out: Path, theirs: dict[str, Any], build: str) -> dict[str, Any]:
    """The jobs in `out` and those in the work folder; exits where the two hold different caches by the name `build`."""
    mine = done(work)
    if (a := theirs.get(build)) and (b := mine.get(build)) and a["key"] != b["key"]:
        sys.exit(f"{out} holds the students of another teacher: take its work folder, or give another --out")
    return {**theirs, **mine}


def arguments(doc: str | None, groups: Iterable[str], results: Path, logits_for: str) -> argparse.ArgumentParser:
    """What every study can be asked for. logits_for: the group that needs ImageNet logits."""
    names = list(groups)
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of teacher, caches, runs and logs")
    parser.add_argument("--data", type=Path, default=os.environ.get("STUDY_DATA"), help="the .npz (or STUDY_DATA)")
    parser.add_argument("--logits", type=Path, help=f"ImageNet logits, for the group {logits_for}")
    parser.add_argument("--only", type=lambda v: v.split(","), default=names, help=f"some of {','.join(names)}")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--report", action="store_true", help="results, plots and tables, from what is done")
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser


def command_of(script: str, a: argparse.Namespace, job: Job) -> list[str]:
    """The line that does one job in a process of its own."""
    logits = ["--logits", str(a.logits)] if a.logits else []
    kind = json.dumps([type(job).__name__, asdict(job)])
    return [sys.executable, script, "--work", str(a.work), "--data", str(a.data), *logits, "--job", kind]


@contextlib.contextmanager
def stopwatch(file: Path) -> Iterator[Callable[[], dict[str, float]]]:
    """Adds the seconds that pass, on the clock and of all cores, to those in a file."""
    before = json.loads(file.read_text()) if file.exists() else {"seconds": 0.0, "cpu_seconds": 0.0}
    started = time.monotonic(), time.process_time()

    def spent() -> dict[str, float]:
        now = time.monotonic(), time.process_time()
        return {name: before[name] + b - a for name, a, b in zip(before, started, now, strict=True)}

    try:
        yield spent
    finally:
        replace_file(file, json.dumps(spent()).encode())


def run_all(
    jobs: Sequence[J], at_once: int, command: Callable[[J], list[str]], work: Path, tell: Callable[[J, str], None]
) -> list[str]:
    """Run the jobs, so many at once, each with its share of the cores; the names of those that failed.

    Interrupted, it stops what is under way, which keeps its state, and goes.
    """
    waiting, running, failed = list(jobs), dict[J, subprocess.Popen[bytes]](), list[str]()
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", **_KEEP_MEMORY}
    (work / "logs").mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                with (work / "logs" / f"{job.name}.log").open("ab") as log:
                    # In a session of its own, so that Ctrl-C is heard once, by way of this process.
                    running[job] = subprocess.Popen(
                        ["nice", *command(job)], env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )  # fmt: skip
            time.sleep(_LOOK_SECONDS)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                status = running.pop(job).returncode
                if status:
                    failed.append(job.name)
                tell(job, "done" if not status else f"FAILED ({status}), see {work / 'logs' / job.name}.log")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return failed
