"""Who is mixed with whom, at a size beyond ImageNet-21k's: seconds, memory, and that it is an involution.

    python bench/pairs.py [--samples 14200000] [--out FILE]

Partners are drawn in pieces, as a build draws them for its parts, with one thread. `extra_mib` is the peak of the
process (VmHWM) while it draws all pieces, one after another, above what it had before. That the partner's partner is
the sample, is then looked up for every sample in an even and an odd total.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np

from kdcache.cache.records.pairs import lone, pair_numbers, pairs, partners
from kdcache.train.bench.bench import machine

PART = 262_144


def peak() -> float:
    """The largest memory that the process has had, in MiB."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def in_pieces(seed: int, view: int, total: int) -> None:
    for start in range(0, total, PART):
        partners(seed, view, range(start, min(start + PART, total)), total)


def involution(seed: int, view: int, total: int) -> bool:
    """For every sample: the partner of the partner is the sample, and only the lone one is its own."""
    everyone = np.arange(total)
    found = partners(seed, view, range(total), total)
    alone = np.flatnonzero(found == everyone).tolist()
    return np.array_equal(found[found], everyone) and alone == [x for x in [lone(seed, view, total)] if x is not None]


def seconds(call: object, *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)  # type: ignore[operator]
    return round(time.perf_counter() - start, 4)


def measure(total: int) -> dict[str, object]:
    before = peak()
    result: dict[str, object] = {"samples": total, "part": PART, "partners_s": seconds(in_pieces, 1, 0, total)}
    result["extra_mib"] = round(peak() - before, 1)
    result["first_batch_of_256_s"] = seconds(partners, 2, 0, range(256), total)
    result["next_batch_of_256_s"] = seconds(partners, 2, 0, range(256, 512), total)
    result["pair_numbers_s"] = seconds(pair_numbers, 1, 0, range(total), total)
    result["pairs_s"] = seconds(pairs, 1, 0, total)
    result["involution"] = {str(n): involution(1, 4, n) for n in (total, total - 1)}
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=14_200_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pairs.json")
    given = parser.parse_args()
    figures = {"machine": machine(), "command": f"python bench/pairs.py --samples {given.samples}"} | measure(
        given.samples
    )
    given.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
