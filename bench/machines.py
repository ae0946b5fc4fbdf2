"""Machines that invent sequences of what people and crashes do to a cache, in hundreds of sequences. Writes JSON.

    python bench/machines.py [--sequences 200] [--steps 30] [--only folders --only bucket --only turns]
    python bench/machines.py --plant

folders  two homes and a registry in a folder: builds, kills, power cuts, full disks, second builders, packing, damage
bucket   two homes and a bucket: the same, and lost answers, busy and absent servers
turns    the version in the commit --before, and this one, by turns over the same homes and the same registry

The sequences are those of tests/machines/, of which `make test` runs a few. A machine stops at the first sequence that
breaks its promise, which Hypothesis prints as a program. --seed gives others. A run that was stopped goes on where it
was with --resume. The bucket is one in memory. --plant plants faults into kdcache one at a time: a machine has to find
each.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from kdcache.tests.machines.buckets import Buckets
from kdcache.tests.machines.folders import Folders
from kdcache.tests.machines.plants import PLANTS
from kdcache.tests.machines.turns import Turns, Version
from kdcache.tests.machines.world import MODULE, toy
from kdcache.train.bench.bench import machine

ROOT = Path(__file__).parent.parent
BEFORE = "74f7bcb"  # where there is no tag
AT_ONCE = 20  # sequences between two lines of progress
PLANTED = 200  # sequences, at most, in which a planted fault has to be found


def run(kind: Any, number: int, sequences: int, steps: int, shrink: bool = True) -> None:
    """Run some sequences of a machine, which the number determines."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    seeded: Any = seed(number)(type(kind.__name__, (kind,), {}))
    run_state_machine_as_test(
        seeded,
        settings=settings(
            max_examples=sequences, stateful_step_count=steps, database=None, deadline=None, phases=phases,
            suppress_health_check=list(HealthCheck), print_blob=False,
        ),
        _min_steps=steps,
    )  # fmt: skip


def measure(kind: Any, number: int, sequences: int, steps: int, done: dict[str, Any], save: Callable[[], None]) -> None:
    """Run what is left of the sequences of one machine; `done` grows with them."""
    while (had := done.get("sequences", 0)) < sequences:
        start = time.process_time(), time.monotonic()
        kind.tally.clear()
        kind.lengths.clear()
        run(kind, number * 1000 + done.get("runs", 0), min(AT_ONCE, sequences - had), steps)
        whole = [length for length in kind.lengths if length >= steps]
        done["runs"] = done.get("runs", 0) + 1
        done["sequences"] = had + len(whole)
        done["steps"] = done.get("steps", 0) + sum(whole)
        done["cpu_seconds"] = round(done.get("cpu_seconds", 0) + time.process_time() - start[0], 1)
        done["seconds"] = round(done.get("seconds", 0) + time.monotonic() - start[1], 1)
        called = done.setdefault("called", {})
        for rule, count in kind.tally.items():
            called[rule] = called.get(rule, 0) + count
        print(f"{kind.__name__}: {done['sequences']} of {sequences} sequences in {done['seconds']:.0f} s", flush=True)
        save()


@contextmanager
def in_folders(kind: type[RuleBasedStateMachine], work: Path) -> Iterator[None]:
    with toy(work) as made:
        kind.toy = made  # type: ignore[attr-defined]
        yield


@contextmanager
def in_turns(work: Path, commit: str) -> Iterator[None]:
    """Both versions at work."""
    code = work / "before" / "kdcache"
    code.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(code)], input=archive, check=True)
    (work / "now").mkdir()
    (work / "now" / "kdcache").symlink_to(ROOT)
    (work / "toy").mkdir()
    (work / "toy" / "kd_machines.py").write_text(MODULE)
    Turns.versions = {name: Version(work / name, work / "toy") for name in ("before", "now")}
    try:
        for name in ("a", "b", "shared"):
            (work / "whole" / name).mkdir(parents=True)
        where: dict[str, Any] = {"root": str(work / "whole"), "who": "a", "step": 0}
        Turns.versions["now"].ask("build", **where, views=3, to="home")
        Turns.expected = Turns.versions["now"].ask("read", **where, place="a")
        yield
    finally:
        for version in Turns.versions.values():
            version.close()


def latest() -> str:
    """The last tag, if there is one."""
    found = subprocess.run(["git", "describe", "--tags", "--abbrev=0"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or BEFORE


def plant(steps: int, number: int) -> dict[str, Any]:
    """Plant each fault by itself: after how many sequences and steps a machine has found it, and how that read."""
    found: dict[str, Any] = {}
    kinds: dict[str, Any] = {"folders": Folders, "bucket": Buckets}
    for name, (which, fault) in PLANTS.items():
        kind = kinds[which]
        with tempfile.TemporaryDirectory() as work, in_folders(kind, Path(work)), pytest.MonkeyPatch.context() as patch:
            kind.lengths.clear()
            fault(patch)
            start, told = time.process_time(), None
            try:
                run(kind, number, PLANTED, steps, shrink=False)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                told = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else repr(error)
                told = re.sub(r"/\S*/machine\w+/", "", told)[:200]
        found[name] = {
            "machine": which, "found": told is not None, "told": told, "sequences": len(kind.lengths),
            "steps": sum(kind.lengths), "cpu_seconds": round(time.process_time() - start, 1),
        }  # fmt: skip
        print(f"{name}: {'found' if told else 'NOT FOUND'} in sequence {len(kind.lengths)}: {told}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=["folders", "bucket", "turns"])
    parser.add_argument("--before", default=latest(), help="a commit, or a tag: the other version of `turns`")
    parser.add_argument("--plant", action="store_true", help="plant faults, which the machines have to find")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "machines.json")
    a = parser.parse_args()
    result: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {}

    def save() -> None:
        result["machine"] = machine()
        a.out.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")

    if a.plant:
        result["planted"] = plant(a.steps, a.seed)
        save()
        sys.exit(0 if all(one["found"] for one in result["planted"].values()) else 1)
    for name in a.only or ["folders", "bucket", "turns"]:
        about = {"seed": a.seed, "least_steps_of_a_sequence": a.steps}
        about |= {"before": a.before} if name == "turns" else {}
        done = result.get(name, {}) if a.resume else {}
        result[name] = done = {**done, **about}
        kind: Any = {"folders": Folders, "bucket": Buckets, "turns": Turns}[name]
        with tempfile.TemporaryDirectory() as work:
            place = Path(work).resolve()
            with in_turns(place, a.before) if name == "turns" else in_folders(kind, place):
                measure(kind, a.seed, a.sequences, a.steps, done, save)


if __name__ == "__main__":
    main()
