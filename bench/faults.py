"""Builds that are killed, stopped and crowded: what is lost, and whether the result is the same. Writes JSON.

    python bench/faults.py [--only kills --only stops ...]

scikit-learn's digits, a resnet8 with seeded random weights, top-3 records of 4 views in 13 shards. Every build runs in
a forked child of this process, which imported torch once. Parts that are not run keep their figures in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

sys.path += [str(Path(__file__).parent)]

from kdcache.cache import Cache
from kdcache.cache.store import leases
from kdcache.cache.store.layout import shard_name
from kdcache.pipeline.build import build as module
from kdcache.pipeline.build import builder, spool
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import Source, open_source
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers import interleaving
from kdcache.train.bench.bench import machine

SEED, VIEWS, PART, BATCH = 0, 4, 512, 64
KILLED_BUILDS, ROUNDS, BUILDERS = 100, 20, 8
# So short that they matter in builds of seconds; a batch of the crowds takes as long as on a GPU.
SHORT_SPOOL, SHORT_EXPIRY, SHORT_BATCH = 0.05, 2.0, 0.03
SPOOL = spool.SPOOL_SECONDS


class Bench:
    """A teacher and its data, opened once, and the cache that an undisturbed build of them gives."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir()
        torch.manual_seed(SEED)
        teacher = Classifier(build_network("resnet8", 10, 8), (0.5,) * 3, (0.25,) * 3)
        weights = work / "teacher.safetensors"
        save_file(teacher.network.state_dict(), weights)
        self.config = BuildConfig(
            "resnet8", str(weights), views=VIEWS, topk=3, batch_size=BATCH, part=PART, allow_low_accuracy=True,
            device="cpu",
        )  # fmt: skip
        self.source: Source = open_source(self.config)
        module.probe = lambda *a: (1e9, 1.0)  # asks the teacher, which is counted here
        self.minimum = len(self.source.evaluation) + VIEWS * len(self.source.train)
        start = time.monotonic()
        assert ended(self.start(work / "whole")) == 0
        self.seconds = time.monotonic() - start
        self.want = content(work / "whole")

    def start(self, place: Path, who: str = "0", batch_seconds: float = 0.0) -> int:
        """A build of place/cache in a child: its number. It leaves the images it computed in place/WHO.

        Each batch is a line of place/WHO.log: when it was begun and ended, and its images; of one under way the first.
        """
        place.mkdir(parents=True, exist_ok=True)
        os.environ["KDCACHE_HOME"] = str(place / "home")
        if child := os.fork():
            return child
        code = 1
        try:
            answers = builder.answers
            with (place / f"{who}.log").open("a", buffering=1) as log:

                def timed(*args: Any) -> Iterator[Any]:
                    found = answers(*args)
                    while True:
                        log.write(f"{time.monotonic()}\n")
                        time.sleep(batch_seconds)
                        if (item := next(found, None)) is None:
                            return log.write("end of shard\n")
                        log.write(f"{time.monotonic()} {len(item[1])}\n")
                        yield item

                builder.answers = timed
                result = build(replace(self.config, out=str(place / "cache")), lambda line: None, self.source)
            (place / who).write_text(str(result.teacher_images))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def saved(self, place: Path) -> int:
        """Images for which the teacher need not be asked again: decided, committed or in the spool."""
        found = 0
        for split, root, prefix, data, views in (
            ("eval", place / "cache" / "eval", "eval-", self.source.evaluation, 1),
            ("train", place / "cache", "", self.source.train, VIEWS),
        ):
            for view in range(views):
                for part in range(-(-len(data) // PART)):
                    name = shard_name(view, part)
                    decided = place / "cache" / "scratch" / "decided" / split / name
                    if decided.exists() or (root / "commits" / f"{name}.json").exists():
                        found += min(PART, len(data) - part * PART)
                    else:
                        blocks = place.glob(f"home/spool/*/{prefix}{name}-b{BATCH}-cpu-0/*.block")
                        found += max((int(b.stem.split("-")[1]) for b in blocks), default=0)
        return found

    def killed(self, place: Path, seconds: float, batch_seconds: float = 0.0) -> float | None:
        """A build SIGKILLed after some seconds: the teacher time that it lost, in seconds; None if it had ended."""
        before, log = self.saved(place), place / "killed.log"
        log.unlink(missing_ok=True)
        child = self.start(place, "killed", batch_seconds)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        moment = time.monotonic()
        if ended(child) == 0:
            return None
        batches: list[tuple[float, float, int]] = []
        begun = None
        for line in log.read_text().splitlines() if log.exists() else ():
            fields = line.split()
            if begun is not None and len(fields) == 2:
                batches.append((begun, float(fields[0]), int(fields[1])))
            begun = float(line) if len(fields) == 1 else None
        lost = 0.0 if begun is None else moment - begun
        images = before + sum(n for _, _, n in batches) - self.saved(place)
        while images > 0:
            start, end, n = batches.pop()
            lost, images = lost + end - start, images - n
        return lost

    def sound(self, place: Path) -> bool:
        """Whether the cache equals the undisturbed one byte for byte, verifies, and nothing is left beside it."""
        problems = verify(Cache(place / "cache")).problems + leavings(place)
        if (found := content(place)) != self.want:
            problems += [
                f"{name} differs" for name in found.keys() | self.want if found.get(name) != self.want.get(name)
            ]
        print(*problems, sep="\n", end="", file=sys.stderr)
        return not problems


def content(place: Path) -> dict[str, Any]:
    """Every file of place/cache; of commits all but who wrote them."""
    found: dict[str, Any] = {}
    for path in sorted((place / "cache").rglob("*")):
        name = path.relative_to(place).as_posix()
        if path.is_file() and not name.startswith(("cache/scratch/", "cache/leases/")):
            found[name] = path.read_bytes()
            if "commits/" in name:
                found[name] = json.loads(found[name])
                del found[name]["writer"]
    return found


def leavings(place: Path) -> list[str]:
    folders = [place / "cache" / "scratch", place / "cache" / "leases", place / "home" / "spool"]
    # Of a builder killed before it was known, a temporary file waits for a minute to pass.
    found = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    return [str(p) for p in found if p.suffix != ".tmp" or p.parent.parent.name != "cache"]


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills(bench: Bench) -> dict[str, Any]:
    """Builds SIGKILLed one to three times at random moments and then completed."""
    rng, spool.SPOOL_SECONDS = random.Random(SEED), SHORT_SPOOL
    place, lost, sound, as_saved = bench.work / "kills", [], 0, 0
    for _ in range(KILLED_BUILDS):
        kills_before = len(lost)
        while len(lost) == kills_before:  # it can be done before it is killed
            shutil.rmtree(place, ignore_errors=True)
            losses = [bench.killed(place, rng.uniform(0, bench.seconds)) for _ in range(rng.randrange(1, 4))]
            lost += [seconds for seconds in losses if seconds is not None]
        left = bench.minimum - bench.saved(place)
        assert ended(bench.start(place, "last")) == 0
        as_saved += int((place / "last").read_text()) == left
        sound += bench.sound(place)
    return {
        "builds": KILLED_BUILDS,
        "kills": len(lost),
        "equal_and_without_leavings": sound,
        "computed_exactly_what_was_left": as_saved,
        "seconds_of_an_undisturbed_build": bench.seconds,
        "spool_seconds": SHORT_SPOOL,
        "largest_loss_seconds": max(lost),
        "mean_loss_seconds": sum(lost) / len(lost),
    }


def minute(bench: Bench) -> dict[str, Any]:
    """As `kills`, with the spool as it is and teachers so slow that it matters: all at once, for they only sleep."""
    rng, spool.SPOOL_SECONDS = random.Random(SEED), SPOOL
    moments = [(seconds, rng.uniform(45, 110)) for seconds in (0.5, 2, 5, 10, 15, 19, 25, 35, 45, 55)]
    with ThreadPoolExecutor(len(moments)) as threads:  # only to wait: the children are forked one after the other
        lost = []
        for i, (seconds, moment) in enumerate(moments):
            place = bench.work / f"minute-{i}"
            lost.append(threads.submit(bench.killed, place, moment, seconds))
            time.sleep(0.5)
        found = [future.result() for future in lost]
    for i in range(len(moments)):
        assert ended(bench.start(bench.work / f"minute-{i}")) == 0
    return {
        "spool_seconds": SPOOL,
        "batch_seconds_kill_after_seconds_lost_seconds": [[*m, f] for m, f in zip(moments, found, strict=True)],
        "largest_loss_seconds": max(f for f in found if f is not None),
        "equal_and_without_leavings": sum(bench.sound(bench.work / f"minute-{i}") for i in range(len(moments))),
    }


def builders(bench: Bench) -> dict[str, Any]:
    """BUILDERS builds of one key at once."""
    return crowd(bench, "builders", disturbed=False)


def stops(bench: Bench) -> dict[str, Any]:
    """BUILDERS builds at once: two are SIGKILLed, one SIGSTOPped until the others are done, and then continued."""
    leases.EXPIRES = SHORT_EXPIRY
    return {"lease_expires_after_seconds": SHORT_EXPIRY, **crowd(bench, "stops", disturbed=True)}


def crowd(bench: Bench, name: str, disturbed: bool) -> dict[str, Any]:
    rng, spool.SPOOL_SECONDS = random.Random(SEED), SPOOL
    place, rounds, sound = bench.work / name, [], 0
    for _ in range(ROUNDS):
        shutil.rmtree(place, ignore_errors=True)
        start = time.monotonic()
        children = [bench.start(place, str(i), SHORT_BATCH) for i in range(BUILDERS)]
        codes = []
        if disturbed:
            time.sleep(rng.uniform(0.2, bench.seconds))
            for child, by in zip(children, (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP), strict=False):
                os.kill(child, by)
            codes = [ended(child) for child in (*children[:2], *children[3:])]
            seconds = time.monotonic() - start
            os.kill(children[2], signal.SIGCONT)
            codes.append(ended(children[2]))
        else:
            codes = [ended(child) for child in children]
            seconds = time.monotonic() - start
        assert codes.count(0) >= BUILDERS - 2 * disturbed, codes
        sound += bench.sound(place)
        computed = [int(p.read_text()) for p in sorted(place.glob("[0-9]"))]
        rounds.append({"seconds": round(seconds, 2), "images_each": computed, "images": sum(computed)})
    return {
        "rounds": ROUNDS,
        "builders": BUILDERS,
        "batch_seconds_added": SHORT_BATCH,
        "images_at_least": bench.minimum,
        "equal_and_without_leavings": sound,
        "figures": rounds,
    }


def interleavings(bench: Bench) -> dict[str, Any]:
    """Every interleaving of the file operations of two writers of one shard, and a death of both in every state."""
    found = {}
    for case in interleaving.CASES + interleaving.LONG_CASES:
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=interleaving.IN_MEMORY) as folder:
            interleaving.stepwise(patch)
            states, deaths = interleaving.every_interleaving(case, Path(folder), bench.source.identity)
            found[case] = {"states": states, "states_of_the_files_from_which_a_third_builder_went_on": deaths}
    return found


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    f.__name__: f for f in (kills, minute, builders, stops, interleavings)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=sorted(PARTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/faults.json")
    a = parser.parse_args()
    torch.set_num_threads(1)  # others would not live on in a forked child
    result = json.loads(a.out.read_text()) if a.out.exists() else {}
    with tempfile.TemporaryDirectory() as work:
        for name in a.only or PARTS:
            child = os.fork()  # each part changes settings of its own
            if not child:
                start = time.monotonic()
                figures = PARTS[name](Bench(Path(work, name)))
                seconds = round(time.monotonic() - start, 1)
                Path(work, f"{name}.json").write_text(
                    json.dumps({"machine": machine(), "seed": SEED, "seconds": seconds, **figures})
                )
                os._exit(0)
            if ended(child):
                sys.exit(f"{name} failed")
            result[name] = json.loads(Path(work, f"{name}.json").read_text())
            print(json.dumps({name: result[name]}, indent=2), flush=True)
            a.out.parent.mkdir(parents=True, exist_ok=True)
            a.out.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
