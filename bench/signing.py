"""What signing adds to a push, and checking signatures to a pull, of a cache of ImageNet's size; CPU seconds.

    python bench/signing.py [--views 2] [--rounds 3]

The cache has ImageNet's number of samples and record layout, with random contents. It is pushed into a registry in a
folder and pulled from there. What the signature takes is measured within each push and pull, since two pushes differ by
more than that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import cryptography
import numpy as np
from registry import large

from kdcache import __version__
from kdcache.cache import Cache
from kdcache.cache.home import home_at
from kdcache.pipeline import share
from kdcache.tests.helpers.signing import key_of, trust_in

OUT = Path(__file__).parent / "results" / "signing.json"


def quiet(line: str) -> None:
    pass


class Within:
    """Counts the CPU seconds within calls of a function, while it stands in the function's place."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run, self.seconds = run, 0.0

    def __call__(self, *args: Any, **how: Any) -> Any:
        start = time.process_time()
        try:
            return self.run(*args, **how)
        finally:
            self.seconds += time.process_time() - start


def timed(run: Callable[[], object], *within: Within) -> tuple[float, float]:
    """CPU seconds of a call, and of those within it."""
    for one in within:
        one.seconds = 0.0
    start = time.process_time()
    run()
    return time.process_time() - start, sum(one.seconds for one in within)


def measured(work: Path, cache: Cache, rounds: int) -> dict[str, Any]:
    key, trust = key_of(work / "alice"), trust_in(work / "signers", work / "alice")
    found: dict[str, list[tuple[float, float]]] = {"push": [], "pull": []}
    signing = share.sign_pushed = Within(share.sign_pushed)  # type: ignore[assignment]
    checking = [Within(share.say_signed), Within(share.fetch_signatures)]
    share.say_signed, share.fetch_signatures = checking  # type: ignore[assignment]
    root, out = work / "shared", str(work / "out")
    for _ in range(rounds):
        root.mkdir()
        with home_at(work / "home"):
            found["push"].append(timed(lambda: share.push(cache.path, str(root), say=quiet, key=key), signing))
            found["pull"].append(
                timed(lambda: share.pull(cache.key, str(root), out=out, say=quiet, trust=trust), *checking)
            )
        for folder in (root, work / "out", work / "home", cache.path / "signatures"):
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "commits": len(cache.commits()),
        "bytes": cache.size(),
        "cpu_seconds": {name: [round(whole, 3) for whole, _ in each] for name, each in found.items()},
        "of_signatures": {name: [round(part, 4) for _, part in each] for name, each in found.items()},
        "share": {
            name: round(statistics.median(part / (whole - part) for whole, part in each), 5)
            for name, each in found.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), large(Path(folder) / "cache", asked.views), asked.rounds)
    result = {
        "views": asked.views,
        **found,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "kdcache": __version__, "python": platform.python_version(), "numpy": np.__version__,
            "cryptography": cryptography.__version__,
        },
    }  # fmt: skip
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
