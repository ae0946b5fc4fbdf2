"""What carrying the errors of rounding does to uint8 records, beside rounding each number by itself, and float16.

    python bench/rounding.py --logits PATH/imagenet-logits.npz

The logits are those of bench/codec.py, as they are or made flatter and sharper (--sharper 0.7 1 3); the truth is in
float64, from the full logits. For each temperature: quantiles of the relative error of the label's probability; at 1
also the divergence from the teacher to the record's distribution, and the relative error of NKD's gradient, with
a uniform tail. Then how fast logits are encoded by one thread of the CPU, in turns, and how far an encoding moves, as
the mean and largest total variation, when noise is added to the logits.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from codec import Truth, chunk_bytes, fidelity
from torch import Tensor

from kdcache.cache import Records, encode
from kdcache.cache.records.choices import TEMPERATURES
from kdcache.cache.store.chunks import as_arrays
from kdcache.train.bench.bench import machine

KEPT = (10, 20, 50)
QUANTILES = (0.5, 0.9, 0.99)
NOISE = (1e-4, 1e-2)
BATCH = 256
KINDS = ("float16", "uint8, each by itself", "uint8, errors carried")


def encoded(kind: str, logits: Tensor, labels: Tensor, k: int) -> Records:
    precision = "float16" if kind == "float16" else "uint8"
    return encode(logits, labels, k, TEMPERATURES, precision, check=False, carry="carried" in kind)


def compared(truth: Truth, sharper: float) -> Iterator[dict[str, Any]]:
    truth = Truth(truth.logits * sharper, truth.labels, truth.student * sharper, truth.first)
    for k in KEPT:
        for kind in KINDS:
            records = encoded(kind, truth.logits.float(), truth.labels, k)
            sizes = chunk_bytes(as_arrays(records))
            row: dict[str, Any] = {"sharper": sharper, "k": k, "records": kind, "bytes": sum(sizes.values())}
            for t in TEMPERATURES:
                log_p_y = truth.answer(t)[0].gather(1, truth.labels[:, None])
                off = (records.softened(t, "uniform").log_target().double() - log_p_y).expm1().abs()
                row[f"T={t:g}"] = {"p_y": {f"{q:g}": float(off.quantile(q)) for q in QUANTILES}}
                if t == 1:
                    found = fidelity(truth, records, t, "uniform")
                    row[f"T={t:g}"] |= {"p_y_mean": float(off.mean()), "kl": found["kl"], "gradient": found["gradient"]}
            yield row


def speeds(truth: Truth, rounds: int = 15) -> Iterator[dict[str, Any]]:
    logits, labels = truth.logits[:BATCH].float(), truth.labels[:BATCH]
    for k in (*KEPT, 100):
        spent: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind in KINDS:
                start = time.process_time()
                encoded(kind, logits, labels, k)
                spent[kind].append(time.process_time() - start)
        yield {"k": k, "images_s": {kind: BATCH / sorted(each)[rounds // 2] for kind, each in spent.items()}}


def stability(truth: Truth) -> Iterator[dict[str, Any]]:
    logits, generator = truth.logits[:1000].float(), torch.Generator().manual_seed(0)
    for noise in NOISE:
        near = logits + noise * torch.randn(logits.shape, generator=generator)
        for kind in KINDS:
            for k in (10, 20):
                one, other = (encoded(kind, z, truth.labels[:1000], k).dense(1.0) for z in (logits, near))
                distance = (one - other).abs().sum(1) / 2
                found = {"mean": float(distance.mean()), "largest": float(distance.max())}
                yield {"noise": noise, "k": k, "records": kind, "total_variation": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logits", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/rounding.json")
    parser.add_argument("--sharper", type=float, nargs="+", default=[1.0])
    a = parser.parse_args()
    torch.set_num_threads(1)
    truth = Truth.load(a.logits)
    result: dict[str, Any] = {
        "machine": machine(),
        "command": f"python bench/rounding.py --logits {a.logits.name} --sharper {' '.join(map(str, a.sharper))}",
        "records": len(truth.logits),
        "encoding": list(speeds(truth)),
        "noise": list(stability(truth)),
        "compared": [row for sharper in a.sharper for row in compared(truth, sharper)],
    }
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def show(result: dict[str, Any]) -> None:
    print(f"{'':8} {'K':>3} {'records':24} {'bytes':>6} {'KL':>8} {'gradient':>9} {'p_y: mean':>9} {'99%':>8}  (T = 1)")
    for r in result["compared"]:
        at = r["T=1"]
        print(
            f"x {r['sharper']:<6} {r['k']:3} {r['records']:24} {r['bytes']:6.2f} {at['kl']:8.4f} {at['gradient']:9.4f} "
            f"{at['p_y_mean']:9.2%} {at['p_y']['0.99']:8.2%}"
        )
    for r in result["encoding"]:
        print(f"K = {r['k']}: " + ", ".join(f"{kind} {speed:,.0f} images/s" for kind, speed in r["images_s"].items()))
    for r in result["noise"]:
        mean, largest = r["total_variation"].values()
        print(f"noise {r['noise']:g}, K = {r['k']}, {r['records']}: {mean:.5f} on average, {largest:.3f} at most")


if __name__ == "__main__":
    main()
