"""What bars and logs cost a training: the same epochs with and without them, in turns, in one process.

    python bench/watching.py --out results/watching.json

The student is resnet8 on the digits, whose steps are among the shortest. CPU time of this process is counted, since the
processes of others do not change it; time on the wall stands beside it. The bar is drawn on a real pseudo-terminal.

Two whole trainings differ by some percent by chance alone, so the calls of each logger are also timed by themselves:
`calls` has their share of an epoch. The epochs are those of the training around them.
"""

import argparse
import contextlib
import fcntl
import json
import os
import platform
import pty
import statistics
import struct
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from kdcache.cache.store.cache import Cache
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.process.device import pick_device
from kdcache.pipeline.process.progress import Progress
from kdcache.pipeline.process.screen import Verbosity, set_verbosity
from kdcache.train.config import TeachConfig
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loop.logs.logs import LOGGERS, Logged
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.runfolder import RunFolder
from kdcache.train.loop.trainer import fit, new_classifier
from kdcache.train.losses.families.nkd import NKD
from kdcache.train.teach import teach


def terminal() -> Any:
    """A stream to a terminal of 120 columns, on which nobody looks."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    threading.Thread(target=_read_all, args=(ours,), daemon=True).start()
    return os.fdopen(theirs, "w")


def _read_all(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # the other end was closed
        while os.read(descriptor, 65536):
            pass


def drawing(seconds: float = 6.0) -> dict[str, float]:
    """What a bar costs by itself, in the CPU time of this thread: its drawings, and a step between them."""
    spent, draw = [], Progress._draw

    def timed(self: Progress, now: float, note: str) -> None:
        began = time.thread_time()
        draw(self, now, note)
        spent.append(time.thread_time() - began)

    stream, steps, began, end = terminal(), 0, time.thread_time(), time.monotonic() + seconds
    with (
        patch.object(Progress, "_draw", timed),
        Progress("epoch 3/20", 10**7, "steps", stream, facts=lambda: "loss 1.2345, lr 0.05") as progress,
    ):
        while time.monotonic() < end:
            for _ in range(1000):
                progress.advance(1)
            steps += 1000
            time.sleep(0.01)
    own = time.thread_time() - began - sum(spent)
    drawn = sum(spent[1:])  # the first one imports rich
    return {
        "drawings_a_second": len(spent) / seconds, "ms_a_drawing": 1000 * drawn / (len(spent) - 1),
        "share_of_a_core": drawn / seconds, "us_a_step": 1e6 * own / steps,
    }  # fmt: skip


class Calls:
    """Times what a training calls of its loggers, one after the other."""

    def __init__(self) -> None:
        self.cpu: dict[str, list[float]] = {}
        self.wall: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, kind in LOGGERS.items():
                for call in ("line", "close"):
                    method = self._timed(f"{name} {call}", getattr(kind, call))
                    stack.enter_context(patch.object(kind, call, method))
            yield

    def _timed(self, name: str, method: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any) -> None:
            cpu, wall = time.process_time(), time.perf_counter()
            method(*args)
            self.cpu.setdefault(name, []).append(time.process_time() - cpu)  # with the threads that it waits for
            self.wall.setdefault(name, []).append(time.perf_counter() - wall)

        return timed

    def summary(self, cpu_epoch: float, wall_epoch: float) -> dict[str, dict[str, float]]:
        """In milliseconds by call, and for lines their share of an epoch of so many seconds."""
        found = {}
        for name, cpu in self.cpu.items():
            wall = self.wall[name]
            found[name] = {"cpu_ms": 1000 * statistics.mean(cpu), "wall_ms": 1000 * statistics.mean(wall)}
            if name.endswith("line"):
                found[name]["of_an_epochs_cpu"] = statistics.mean(cpu) / cpu_epoch
                found[name]["of_an_epoch"] = statistics.mean(wall) / wall_epoch
        return found


def runs(folder: Path, epochs: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """By name, a whole training with or without what is to be measured."""
    teach(TeachConfig("resnet8", epochs=1, device=str(device)), print)
    build(
        BuildConfig("resnet8", views=2, out=str(folder / "cache"), allow_low_accuracy=True, device=str(device)), print
    )
    cache, stream, count = Cache(folder / "cache"), terminal(), iter(range(10**6))
    loader = CachedLoader(cache, "digits", 64, device=device)
    classes = cache.identity.record.classes

    def train(bar: bool, log: str | None) -> None:
        model = new_classifier("resnet8", classes, 8, loader.data, device, 0, whose="the data have")
        out = RunFolder(folder / f"run{next(count)}", {}, False) if log else None
        notes = {"input_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3, "class_names": []}
        before, sys.stderr = sys.stderr, stream
        set_verbosity(Verbosity.USUAL if bar else Verbosity.QUIET)
        try:
            fit(
                model, NKD(), loader, Recipe(epochs, 0.01), lambda m: {}, out, notes, lambda text: None,
                logged=Logged(log) if log else None,
            )  # fmt: skip
        finally:
            sys.stderr = before
            set_verbosity(Verbosity.USUAL)

    cases = {"nothing": (False, None), "bar": (True, None), "metrics.jsonl": (False, "none")}
    cases |= {name: (False, name) for name in ("csv", "tensorboard", "wandb", "mlflow")}
    return {name: lambda case=case: train(*case) for name, case in cases.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--device", default=None)
    parser.add_argument("--cases", default="nothing,bar,metrics.jsonl,csv,tensorboard,wandb,mlflow")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    device = pick_device(asked.device)
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "offline", "MLFLOW_ALLOW_FILE_STORE": "true", "TERM": "xterm-256color"}
        os.environ["KDCACHE_HOME"] = str(Path(folder) / "home")
        os.environ["MLFLOW_TRACKING_URI"] = (Path(folder) / "mlruns").as_uri()
        cases = {
            name: run
            for name, run in runs(Path(folder), asked.epochs, device).items()
            if name in asked.cases.split(",")
        }
        for run in cases.values():  # imports, and first starts
            run()
        calls = Calls()
        for turn in range(asked.rounds):
            for name in list(cases)[:: 1 if turn % 2 else -1]:
                cpu, wall = time.process_time(), time.perf_counter()
                with calls.timed():
                    cases[name]()
                found.setdefault(name, []).append((time.process_time() - cpu, time.perf_counter() - wall))
    steps = asked.epochs * (1437 // 64)
    summary: dict[str, Any] = {}
    for name, taken in found.items():
        cpu, wall = (statistics.median(values) for values in zip(*taken, strict=True))
        base = [statistics.median(values) for values in zip(*found["nothing"], strict=True)]
        own = "metrics.jsonl" if name in ("csv", "tensorboard", "wandb", "mlflow") else "nothing"
        before = statistics.median([c for c, _ in found.get(own, found["nothing"])])
        summary[name] = {
            "cpu_ms_a_step": 1000 * cpu / steps, "wall_ms_a_step": 1000 * wall / steps, "more_than": own,
            "more_cpu_of_a_step": cpu / before - 1, "more_cpu_ms_an_epoch": 1000 * (cpu - before) / asked.epochs,
            "more_wall_than_nothing": wall / base[1] - 1,
        }  # fmt: skip
        print(
            f"{name:14}{1000 * cpu / steps:8.3f} ms a step  {100 * (cpu / before - 1):+6.2f}% of the CPU time of {own}"
        )
    base = [statistics.median(values) / asked.epochs for values in zip(*found["nothing"], strict=True)]
    of_calls = calls.summary(base[0], base[1])
    for name, one in of_calls.items():
        share = f"  {100 * one['of_an_epochs_cpu']:.2f}% of an epoch's" if "of_an_epoch" in one else ""
        print(f"{name:20}{one['cpu_ms']:8.3f} ms of CPU time{share}, {one['wall_ms']:.3f} ms on the wall")
    bar = drawing()
    print(f"a bar: {bar}")
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "device": str(device),
        "torch": str(torch.__version__), "python": platform.python_version(), "epochs": asked.epochs,
        "steps_an_epoch": 1437 // 64, "rounds": asked.rounds, "figures": summary, "calls": of_calls, "bar": bar,
    }  # fmt: skip
    if asked.out:
        asked.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
