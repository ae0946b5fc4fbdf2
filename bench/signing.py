"""What signing adds to a push, and checking signatures to a pull: CPU seconds, in turns, in one process.

    python bench/signing.py [--samples 50000] [--views 20] [--rounds 5]

A cache of random logits with 100 classes is pushed into a registry in a folder, with and without a signature, and is
pulled from there with and without --trust. Only times of the CPU are compared, since those of a disk vary more than a
signature costs.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cryptography
import numpy as np
import torch

from kdcache import __version__
from kdcache.cache.home import home_at
from kdcache.cache.identity import Identity
from kdcache.pipeline.share import pull, push
from kdcache.tests.helpers.caches import Filled, identity
from kdcache.tests.helpers.signing import key_of, trust_in

OUT = Path(__file__).parent / "results" / "signing.json"


def cpu(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def quiet(line: str) -> None:
    pass


def measured(root: Path, about: Identity, views: int, rounds: int) -> dict[str, object]:
    cache = Filled(root / "c", about, views=views).cache
    key = key_of(root / "alice")
    trust = trust_in(root / "signers", root / "alice")
    times: dict[str, list[float]] = {"push": [], "push_signed": [], "pull": [], "pull_trusting": []}
    for round_ in range(rounds + 1):
        found = {}
        for signed in (False, True) if round_ % 2 else (True, False):
            shutil.rmtree(root / "shared", ignore_errors=True)
            shutil.rmtree(root / "out", ignore_errors=True)
            shutil.rmtree(cache.path / "signatures", ignore_errors=True)
            (root / "shared").mkdir()
            with home_at(root / f"home-{signed}"):
                name, given = ("push_signed", key) if signed else ("push", None)
                found[name] = cpu(lambda given=given: push(cache.path, str(root / "shared"), say=quiet, key=given))
                name, given = ("pull_trusting", trust) if signed else ("pull", None)
                found[name] = cpu(
                    lambda given=given: pull(
                        cache.key, str(root / "shared"), out=str(root / "out"), say=quiet, trust=given
                    )
                )
        if round_:  # the first one warms up
            for name, seconds in found.items():
                times[name].append(seconds)
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "commits": len(cache.commits()),
        "bytes": cache.size(),
        "cpu_seconds": {name: [round(s, 4) for s in seconds] for name, seconds in times.items()},
        "signing_adds": round(middle["push_signed"] / middle["push"] - 1, 5),
        "checking_adds": round(middle["pull_trusting"] / middle["pull"] - 1, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--views", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    about = identity(asked.samples, 10_000, part=10_000, classes=100, k=20, precision="uint8", temperatures=(1.0, 4.0))
    os.fsync = lambda fd: None  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), about, asked.views, asked.rounds)
    result = {
        "samples": asked.samples,
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
