"""What fuzz.py and fuzz_images.py share: cases that may end their process, take long or take much memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator


def within(seconds: int, megabytes: int, work: Callable[[], str]) -> str:
    """The outcome that `work` returns, or SLOW or MEMORY if it took too much; a signal ends what takes far too long."""
    before, started = _peak(), time.monotonic()
    signal.alarm(seconds)
    try:
        outcome = work()
    finally:
        signal.alarm(0)
    if time.monotonic() - started > seconds / 2:
        outcome = "SLOW"
    if _peak() - before > megabytes:
        outcome = f"MEMORY {_peak() - before:.0f} MiB"
    return outcome


def _peak() -> float:
    """The most memory that this process has used so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_processes(
    seeds: range, batch: int, case: Callable[[int], tuple[str, str]]
) -> Iterator[tuple[int, str | None, str]]:
    """Run case(seed) for all seeds, in forked processes of `batch` cases; give each seed with its outcome and kind.

    The outcome is None where the process ended by a signal, and the kind then says by which; the next process goes on.
    """
    todo = list(seeds)
    while todo:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with os.fdopen(writer, "w", buffering=1) as out:
                for seed in todo[:batch]:
                    print(json.dumps(case(seed)), file=out)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as lines:
            results = [(str(outcome), str(kind)) for outcome, kind in map(json.loads, lines)]
        status = os.waitpid(child, 0)[1]
        for outcome, kind in results:
            yield todo.pop(0), outcome, kind
        if status:
            yield todo.pop(0), None, f"signal {os.WTERMSIG(status)}"
