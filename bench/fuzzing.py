"""What the fuzzing scripts share: cases that may end their process, take long or take much memory."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

_WALL = 20  # times the seconds of CPU that a case may take: waiting for something that never comes is found by this


def within(seconds: int, megabytes: int, work: Callable[[], str]) -> str:
    """The outcome that `work` returns, or SLOW or MEMORY if it took too much; a signal ends what takes far too long.

    seconds: of CPU; half of them are slow.
    """
    before, started = _used(), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(seconds * _WALL)
    try:
        outcome = work()
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    if time.process_time() - started > seconds / 2:
        outcome = "SLOW"
    if _peak() - before > megabytes:
        outcome = f"MEMORY {_peak() - before:.0f} MiB"
    return outcome


def _used() -> float:
    """The memory that this process uses now, in MiB; from now on the peak counts anew, where Linux can do so."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> float:
    """The most memory that this process has used, in MiB."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


def in_processes(
    seeds: range, batch: int, case: Callable[[int], tuple[str, str]]
) -> Iterator[tuple[int, str | None, str]]:
    """Run case(seed) for all seeds, in forked processes of `batch` cases; give each seed with its outcome and kind.

    The outcome is None where the process ended by a signal, and the kind then says by which; the next process goes on.
    """
    todo = list(seeds)
    while todo:
        reader, writer = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                with os.fdopen(writer, "w", buffering=1) as out:
                    for seed in todo[:batch]:
                        print(json.dumps(case(seed)), file=out)
            finally:  # whatever a case has raised, there must not be two of the caller
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as lines:
            results = [(str(outcome), str(kind)) for outcome, kind in map(json.loads, lines)]
        status = os.waitpid(child, 0)[1]
        for outcome, kind in results:
            yield todo.pop(0), outcome, kind
        if len(results) < min(batch, len(todo) + len(results)):
            yield todo.pop(0), None, f"signal {os.WTERMSIG(status)}"
