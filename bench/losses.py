"""What top-k records cost in accuracy and what losses cost in time and memory; writes JSON and prints the tables.

    python bench/losses.py --logits PATH/imagenet-logits.npz

The file holds real logits float16 [views, N, C] and labels [N]. Accuracy: teacher = view 1, class prior from view 0 (as
a cache has it), student = view 2 plus noise of one nat (seeded); errors of the loss and of its gradient against the
same loss from dense float32 records, for the whole loss and without its cross-entropy to the labels, which is exact and
hides them. Speed: forward and backward from records at B = 1024, C = 1000, K = 20, medians
over rounds in which all losses take turns; on one thread, so that a busy machine disturbs little. With --rounds 0 the
speed in the file stays as it is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kdcache.cache import Records, encode
from kdcache.cache.records.encoding import class_prior, tail_distribution
from kdcache.train.bench.bench import machine
from kdcache.train.losses import Loss
from kdcache.train.losses.options import LOSSES, make_loss, options_of

CLASSES = 1000
# Each loss as for ImageNet; the last ones at the temperatures of CIFAR, where the head holds less.
TOP_K = [
    "kd", "nkd", "dkd", "wsld", "gkd", "skew-kl", "skew-rkl", "bdkd", "logit-std",
    "kd:temperature=4", "nkd:temperature=3", "dkd:temperature=4", "wsld:temperature=4", "gkd:temperature=4",
]  # fmt: skip
TAILS = ("uniform", "prior")
KEPT = (10, 20)


def with_prior(records: Records, of: Tensor, labels: Tensor, k: int) -> Records:
    """Records with the class prior that a cache takes from the logits `of` of view 0."""
    first = encode(of, labels, k, tail_std=True)
    return replace(records, prior=class_prior(tail_distribution(of, first)))


Measured = tuple[float, Tensor]  # a value, and its gradient


def value_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Measured:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    return float(value.detach()), leaf.grad


def accuracy(path: Path, seed: int = 0) -> list[dict[str, Any]]:
    stored = np.load(path)
    views = torch.from_numpy(stored["logits"][:3].astype(np.float32))
    labels = torch.from_numpy(stored["labels"].astype(np.int64))
    noise = torch.randn(views[2].shape, generator=torch.Generator().manual_seed(seed))
    student, teacher = views[2] + noise, views[1]
    exact = encode(teacher, labels, precision="float32")
    of_labels = value_and_gradient(lambda v: F.cross_entropy(v, labels), student)
    rows = []
    for spec in TOP_K:
        loss = make_loss(spec, CLASSES)
        share = ce_weight(loss)
        want = value_and_gradient(lambda v: call(loss, v, labels, exact), student)  # noqa: B023
        for k in KEPT:
            records = with_prior(encode(teacher, labels, k, tail_std=True), views[0], labels, k)
            # gkd has no tail to model.
            for tail in TAILS if "tail" in options_of(loss) else ("none",):
                loss = replace(loss, tail=tail) if tail != "none" else loss
                got = value_and_gradient(lambda v: call(loss, v, labels, records), student)  # noqa: B023
                heads = {f"{t:g}": float(records.softened(t, "drop").head_mass.mean()) for t in loss.needs.temperatures}
                rows.append({
                    "loss": spec, "k": k, "tail": tail, **errors(got, want),
                    "term": errors(without(got, share, of_labels), without(want, share, of_labels)),
                    "head_mass": heads,
                })  # fmt: skip
    return rows


def ce_weight(loss: Any) -> float:
    """What the cross-entropy to the labels counts for in a loss."""
    return 1.0 if loss.name in ("nkd", "dkd", "wsld") else float(loss.alpha)


def without(whole: Measured, share: float, part: Measured) -> Measured:
    return whole[0] - share * part[0], whole[1] - share * part[1]


def errors(got: Measured, want: Measured) -> dict[str, float]:
    return {
        "value": abs(got[0] - want[0]) / abs(want[0]),
        "gradient": float((got[1] - want[1]).norm() / want[1].norm()),
    }


def call(loss: Loss, logits: Tensor, labels: Tensor, records: Records) -> Tensor:
    if loss.needs.features:
        return loss(logits, labels, None, features=FEATURES[: len(logits)])
    return loss(logits, labels, records)


FEATURES = torch.randn(1024, 256, generator=torch.Generator().manual_seed(1))


def speed(rounds: int, batch: int = 1024, classes: int = CLASSES, k: int = 20) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(batch, classes, generator=generator) for _ in range(2))
    labels = teacher.argmax(1)
    dense = encode(teacher, labels)
    sparse = with_prior(encode(teacher, labels, k, tail_std=True), teacher, labels, k)
    cases: dict[tuple[str, str], tuple[Loss, Records]] = {}
    for name in LOSSES:
        loss = make_loss(name, classes)
        if loss.needs.features:
            loss.make_head(FEATURES.shape[1], classes)
        if loss.needs.first_view:
            loss.prepare(dense)
        if loss.needs.dense:
            cases[name, "dense"] = loss, dense
        elif loss.needs.temperatures or loss.needs.standardised:
            cases[name, "dense"], cases[name, "top 20"] = (loss, dense), (loss, sparse)
        else:
            cases[name, "no teacher"] = loss, dense
    times: dict[tuple[str, str], list[float]] = {key: [] for key in cases}
    for round_ in range(rounds):
        for key, (loss, records) in cases.items():
            if key[0] == "cmkd" and round_:  # quadratic in C: seconds
                continue
            leaf = student.clone().requires_grad_()
            started = time.perf_counter()
            call(loss, leaf, labels, records).backward()
            times[key].append(time.perf_counter() - started)
    plain = statistics.median(times["ce", "no teacher"])
    return [
        {
            "loss": name, "records": form, "milliseconds": 1e3 * statistics.median(taken),
            "fastest": 1e3 * min(taken), "of_cross_entropy": statistics.median(taken) / plain,
            "peak_mib": peak(*cases[name, form], student, labels) / 2**20,
        }
        for (name, form), taken in times.items()
    ]  # fmt: skip


def peak(loss: Loss, records: Records, student: Tensor, labels: Tensor) -> int:
    """The most bytes that forward and backward hold at once, beside student logits and records."""
    leaf = student.clone().requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call(loss, leaf, labels, records).backward()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logits", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/losses.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    measured = {"machine": machine(), "command": f"python bench/losses.py --logits {a.logits.name} --rounds {a.rounds}"}
    result = {
        **measured,
        "threads": 1,
        "accuracy": accuracy(a.logits),
        "speed": {"batch": 1024, "classes": CLASSES, "k": 20, "rounds": a.rounds, **measured, "losses": speed(a.rounds)}
        if a.rounds
        else json.loads(a.out.read_text())["speed"],
    }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'loss':20} {'K':>3} {'tail':8} {'value':>8} {'gradient':>8} {'of term':>8} {'gradient':>8}  head mass")
    for r in result["accuracy"]:
        heads = ", ".join(f"{mass:.2f} at T = {t}" for t, mass in r["head_mass"].items())
        figures = " ".join(f"{r_[name]:8.4f}" for r_ in (r, r["term"]) for name in ("value", "gradient"))
        print(f"{r['loss']:20} {r['k']:3} {r['tail']:8} {figures}  {heads}")
    print(f"\n{'loss':12} {'records':11} {'ms':>8} {'x CE':>6} {'peak MiB':>9}")
    for r in result["speed"]["losses"]:
        line = f"{r['milliseconds']:8.1f} {r['of_cross_entropy']:6.1f} {r['peak_mib']:9.1f}"
        print(f"{r['loss']:12} {r['records']:11} {line}")


if __name__ == "__main__":
    main()
