"""What every parser of kdcache does with damaged and hostile input, in one command; writes JSON.

    python bench/fuzz.py [--cases 100000] [--parser NAME] [--seed 0]

The table of parsers is in bench/parsers/. A case is a sound file or text, damaged in one way (damages.py), or forged so
that its checksums fit (forgeries.py). It must be read as before, give other values where no digest covers it, or be
refused by a KdcacheError of one line. Everything else is a finding: another exception, a crash, more than 2 seconds of
CPU, more memory than its row allows, or other values where a digest covers the file. All chance comes from the parser's
name and the case's seed: `--parser NAME --seed N --cases 1 --show` tries a finding again.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import selectors
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import click

sys.path += [str(Path(__file__).parent)]
import fuzzing
from parsers import PARSERS
from parsers.caches import template
from parsers.parser import Parser, Prepared

from kdcache.cache import KdcacheError
from kdcache.cache.errors import in_one_line

SECONDS = 4  # half of them are slow
BATCH = 250  # cases a process
MOST_CHARACTERS = 4000  # of an error's line
_ROOM = 8 << 30  # bytes of memory that a case may reserve, so that a bomb does not take the machine with it
_KEPT = 40  # findings of a parser that are told one by one
FINE = ("same", "refused", "other values")


class Cases:
    """The cases of a parser that is ready: case(seed) gives the outcome and the way of the damage."""

    def __init__(self, parser: Parser, prepared: Prepared) -> None:
        self.name, self.megabytes, self.prepared = parser.name, parser.megabytes, prepared
        self.wanted = {seed: prepared.read(seed, content) for seed, content in prepared.seeds.items()}

    def __call__(self, seed: int) -> tuple[str, str]:
        name, content, way = self.damaged(seed)
        forges = getattr(way, "forges", False)

        def read() -> str:
            return _outcome(lambda: self._told(name, content, forges))

        return fuzzing.within(SECONDS, self.megabytes, read), f"{name}, {way.__name__}"

    def damaged(self, seed: int) -> tuple[str, bytes, Any]:
        """The seed's name, the damaged content and the way of the damage."""
        rng = random.Random(f"{self.name} {seed}")
        name, way = rng.choice(list(self.prepared.seeds)), rng.choice(self.prepared.ways)
        others = [*(c for n, c in self.prepared.seeds.items() if n != name), *self.prepared.others]
        return name, way(self.prepared.seeds[name], others, rng), way

    def _told(self, name: str, content: bytes, forges: bool) -> str:
        if self.prepared.read(name, content) == self.wanted[name]:
            return "same"
        return "SILENT" if self.prepared.covered(name, content) and not forges else "other values"


def _outcome(read: Callable[[], str]) -> str:
    """What became of it: what `read` gives, 'refused', or in another word or line what went wrong."""
    try:
        return read()
    except KdcacheError as e:
        text = str(e)
    except click.UsageError as e:  # of a value that is no option's
        text = in_one_line(e.format_message())
    except Exception as e:
        frames = [f for f in traceback.extract_tb(e.__traceback__) if "site-packages" not in f.filename]
        at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return f"{type(e).__name__} at {at}: {' '.join(ascii(str(e)).split())}"[:240]
    if len(text.splitlines()) > 1:
        return f"SEVERAL LINES: {text!a}"[:240]
    return "refused" if len(text) <= MOST_CHARACTERS else f"LONG: {text!a}"[:240]


def ready(parser: Parser, top: Path) -> Cases:
    """Make what the parser needs in an empty folder; its process is not used for another parser after that."""
    warnings.simplefilter("ignore")  # of other people's parsers, which errors follow
    top.mkdir()
    os.fsync = lambda fd: None  # takes most of the time
    return Cases(parser, parser.prepare(top))


def _work(parser: Parser, seeds: range, top: Path, out: IO[str]) -> None:
    """Try all cases of a parser, and write a line for each."""
    import torch

    torch.set_num_threads(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    cases = ready(parser, top)
    for fd in (1, 2):  # C libraries complain there
        os.dup2(silent, fd)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, used + _ROOM))
    for seed, outcome, kind in fuzzing.in_processes(seeds, BATCH, cases):
        print(json.dumps([seed, outcome or f"DIED by {kind}", kind]), file=out, flush=seed % 16 == 0)


def begin(parser: Parser, seeds: range, top: Path) -> tuple[int, IO[bytes]]:
    """Start a process for a parser's cases; its id, and where its lines come from."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            with os.fdopen(writer, "w") as out:
                _work(parser, seeds, top, out)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    return child, os.fdopen(reader, "rb")


class Tally:
    """What has been found of one parser so far."""

    def __init__(self, cases: int) -> None:
        self.cases, self.done, self.findings = cases, 0, 0
        self.started, self.seconds = time.monotonic(), 0.0
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.kept: list[dict[str, Any]] = []

    def add(self, seed: int, outcome: str, kind: str) -> None:
        self.done += 1
        self.outcomes[outcome if outcome in FINE else "FINDING"] += 1
        if outcome not in FINE:
            self.findings += 1
            if len(self.kept) < _KEPT:
                self.kept.append({"seed": seed, "outcome": outcome, "of": kind})

    def facts(self) -> dict[str, Any]:
        rate = self.done / self.seconds if self.seconds else 0
        return {
            "cases": self.done, "findings": self.findings, "seconds": round(self.seconds, 1),
            "a second": round(rate, 1), "outcomes": dict(sorted(self.outcomes.items())), "found": self.kept,
        }  # fmt: skip


def run(chosen: dict[Parser, range], processes: int, say: Callable[[str], None]) -> dict[str, Tally]:
    """Try the parsers' cases, in so many processes at once; each parser's process makes what it needs itself."""
    template()
    tallies: dict[str, Tally] = {}
    todo = list(chosen.items())
    total, started, told = sum(map(len, chosen.values())), time.monotonic(), 0.0
    with tempfile.TemporaryDirectory(prefix="kdcache-fuzz-") as top, selectors.DefaultSelector() as waiting:
        while todo or waiting.get_map():
            while todo and len(waiting.get_map()) < processes:
                parser, seeds = todo.pop(0)
                tallies[parser.name] = Tally(len(seeds))
                child, lines = begin(parser, seeds, Path(top) / str(len(tallies)))
                waiting.register(lines, selectors.EVENT_READ, (parser, child, len(tallies), _Rest()))
            for key, _ in waiting.select(1.0):
                parser, child, number, rest = key.data
                tally, content = tallies[parser.name], os.read(key.fd, 1 << 16)
                for line in rest.lines(content):
                    tally.add(*json.loads(line))
                tally.seconds = time.monotonic() - tally.started
                if not content:
                    waiting.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
                    os.waitpid(child, 0)
                    shutil.rmtree(Path(top) / str(number), ignore_errors=True)
                    _finish(parser, tally, say)
            done, now = sum(tally.done for tally in tallies.values()), time.monotonic()
            if now - told > 15 and done:
                told = now
                rate = done / (now - started)
                found = sum(tally.findings for tally in tallies.values())
                say(
                    f"{done:,} of {total:,} cases, {found} findings, {rate:.0f} a second, "
                    f"about {(total - done) / rate:.0f} s left"
                )
    return tallies


class _Rest:
    """What came of a line so far."""

    def __init__(self) -> None:
        self._rest = b""

    def lines(self, content: bytes) -> Iterator[bytes]:
        *whole, self._rest = (self._rest + content).split(b"\n")
        yield from whole


def _finish(parser: Parser, tally: Tally, say: Callable[[str], None]) -> None:
    if tally.done < tally.cases:
        tally.findings += 1
        tally.kept.append({"seed": None, "outcome": f"ended after {tally.done} of {tally.cases} cases", "of": ""})
    say(f"{parser.name:24} {tally.done:6} cases {tally.seconds:6.1f} s  {dict(sorted(tally.outcomes.items()))}")
    seen: set[str] = set()
    for one in tally.kept:
        if (kind := one["outcome"].partition(": ")[0]) not in seen:
            seen.add(kind)
            say(f"    --parser {parser.name!r} --seed {one['seed']}  {one['of']}: {one['outcome']}")


def shares(cases: int, first: int, only: list[str]) -> dict[Parser, range]:
    """How many of all cases each parser gets: by its share, or all that are chosen alike."""
    chosen = [PARSERS[name] for name in only] if only else list(PARSERS.values())
    whole = sum(parser.share for parser in chosen)
    return {p: range(first, first + max(1, -int(-cases * p.share // whole))) for p in chosen}


def show(parser: Parser, seeds: range) -> None:
    """Print the damaged content of cases, and the whole traceback of what their reading raises."""
    with tempfile.TemporaryDirectory() as top:
        cases = ready(parser, Path(top) / "p")
        for seed in seeds:
            name, content, way = cases.damaged(seed)
            print(f"{seed}: {name}, {way.__name__}: {len(content)} bytes: {content[:2000]!r}")
            try:
                print(cases._told(name, content, getattr(way, "forges", False)))
            except Exception:
                traceback.print_exc()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="of all parsers together")
    parser.add_argument(
        "--parser", action="append", default=[], choices=list(PARSERS), help="only this one; may repeat"
    )
    parser.add_argument("--seed", type=int, default=0, help="of each parser's first case")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="print cases and tracebacks")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/fuzz.json")
    a = parser.parse_args()
    chosen = shares(a.cases, a.seed, a.parser)
    if a.show:
        for one, seeds in chosen.items():
            show(one, seeds)
        return
    from kdcache.train.bench.bench import machine

    started = time.monotonic()
    tallies = run(chosen, a.processes, lambda line: print(line, flush=True))
    found = sum(tally.findings for tally in tallies.values())
    only = "".join(f" --parser {name!r}" for name in a.parser)
    result = {
        "machine": machine(), "command": f"python bench/fuzz.py --cases {a.cases} --seed {a.seed}{only}",
        "cases": sum(tally.done for tally in tallies.values()), "findings": found,
        "seconds": round(time.monotonic() - started), "processes": a.processes,
        "parsers": {name: tally.facts() for name, tally in tallies.items()},
    }  # fmt: skip
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['cases']:,} cases of {len(tallies)} parsers in {result['seconds']} s: {found} findings, in {a.out}")


if __name__ == "__main__":
    main()
