"""How far the mean of two teachers is off when it is made of their top-k caches; writes JSON.

    python bench/ensembles.py LOGITS.npz [--out FILE]

LOGITS.npz: `logits` float16 [V, N, C] of a real classifier for V views of N images, and `labels` [N]. The first and the
second half of the views are taken for two teachers' answers to the same V/2 views: they differ as two good teachers do
who see an image differently. Truth is the mean of their probabilities in float64.

Each teacher's answers are stored as a cache stores them (top K, with the class prior of the first view), mixed as
`kdcache mix` does it, and read back. Beside that: top-k records of the true mean, which are what is left of the error
where the members are dense, and those of the mixed records whose stored classes may be any, also such that no teacher
has stored. Figures are means over all records but those of view 0, which the priors are made of:

    kl                  KL divergence of what is read from the truth, in nats, at temperature T
    total_variation     half the L1 distance at temperature T
    target              relative error of the label's probability at temperature 1
    top1                how often the most probable class is that of the truth
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.identity import RecordIdentity
from kdcache.cache.records.encoding import class_prior, encode, tail_distribution
from kdcache.cache.records.records import Records
from kdcache.pipeline.ensembles.mean import log_probabilities, mean_of
from kdcache.train.bench.bench import machine

TEMPERATURES = (1.0, 2.0, 4.0)
WEIGHTS = (0.5, 0.5)


def stored(z: Tensor, y: Tensor, k: int, precision: Any) -> list[Records]:
    """A teacher's records of each view, with the prior of the first; z: [V, N, C]."""
    views = [encode(of_view, y, k, TEMPERATURES, precision) for of_view in z]
    prior = class_prior(tail_distribution(z[0], views[0]))
    return [replace(view, prior=prior) for view in views]


def mixed(teachers: list[list[Records]], k: int, precision: Any) -> list[Records]:
    """The records of the mean, as `kdcache mix` makes them."""
    first = teachers[0][0]
    record = RecordIdentity(
        classes=first.num_classes, k=k, temperatures=TEMPERATURES, precision=precision, tail_std=False, labels=1
    )
    means = [mean_of(members, WEIGHTS, record, sums=True) for members in zip(*teachers, strict=True)]
    assert means[0].sums is not None
    prior = class_prior(means[0].sums)
    return [replace(mean.records, prior=prior) for mean in means]


def errors(views: list[Records], truth: Tensor) -> dict[str, Any]:
    """The figures of the docstring. truth: float64 [V, N, C], the logarithm of the mean's probabilities."""
    found: dict[str, list[float]] = {}
    for records, log in zip(views[1:], truth[1:], strict=True):
        for t in TEMPERATURES:
            want = torch.log_softmax(log / t, 1)
            got = records.dense(t).double()
            p = want.exp()
            found.setdefault(f"kl at T = {t:g}", []).append(float((p * (want - got.log())).sum(1).mean()))
            found.setdefault(f"total_variation at T = {t:g}", []).append(float((p - got).abs().sum(1).mean()) / 2)
        y = records.labels[:, :1].long()
        target = records.softened(1.0).target()[:, 0].double()
        exact = log.exp().gather(1, y)[:, 0]
        found.setdefault("target", []).append(float((target / exact - 1).abs().mean()))
        found.setdefault("top1", []).append(float((records.predictions() == log.argmax(1)).double().mean()))
    return {name: float(np.mean(values)) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logits", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/ensembles.json")
    a = parser.parse_args()
    started = time.monotonic()
    with np.load(a.logits) as file:
        z = torch.from_numpy(file["logits"].astype(np.float32))
        y = torch.from_numpy(file["labels"].astype(np.int64))
    halves = z[: len(z) // 2], z[len(z) // 2 : len(z) // 2 * 2]
    truth = torch.log(sum(w * torch.softmax(half.double(), -1) for w, half in zip(WEIGHTS, halves, strict=True)))
    same = (halves[0].argmax(-1) == halves[1].argmax(-1)).double().mean()
    result: dict[str, Any] = {
        "machine": machine(), "command": f"python bench/ensembles.py {a.logits.name}", "views": len(halves[0]),
        "samples": len(y), "classes": z.shape[2], "the two teachers name the same class": float(same), "errors": {},
    }  # fmt: skip
    dense = [[encode(of_view, y, None, precision="float32") for of_view in half] for half in halves]
    record = RecordIdentity(classes=z.shape[2], k=None, temperatures=(), precision="float32", tail_std=False, labels=1)
    made = [mean_of(members, WEIGHTS, record).records for members in zip(*dense, strict=True)]
    off = max(
        float((torch.softmax(m.logits().double(), 1) - log.exp()).abs().max())
        for m, log in zip(made, truth, strict=True)
    )
    result["dense float32: largest error of a probability"] = off
    for precision in ("uint8", "float16"):
        for k in (10, 20, 50):
            teachers = [stored(half, y, k, precision) for half in halves]
            logs = [
                torch.logsumexp(torch.stack([log_probabilities(r) for r in v]), 0) for v in zip(*teachers, strict=True)
            ]
            result["errors"][f"K = {k}, {precision}"] = {
                "mixed": errors(mixed(teachers, k, precision), truth),
                "top-k records of the true mean": errors(stored(truth.float(), y, k, precision), truth),
                "mixed, stored classes may be any": errors(stored(torch.stack(logs).float(), y, k, precision), truth),
                "each teacher's own records, of its own answers": [
                    errors(teacher, torch.log_softmax(half.double(), -1))
                    for teacher, half in zip(teachers, halves, strict=True)
                ],
            }
    result["seconds"] = time.monotonic() - started
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
