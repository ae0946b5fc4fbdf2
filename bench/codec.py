"""Bytes a record against fidelity: how gaps, tails and ids are coded, beside peers' layouts; writes JSON and a plot.

    python bench/codec.py --logits PATH/imagenet-logits.npz

The file holds real logits float16 [V, N, C] and labels [N]; all V N records stand in one chunk an array, and every
array's chunk is counted. The truth is float64 from the full logits. KL: of the teacher to the record's distribution.
Gradient: relative error (Frobenius) of NKD's gradient, gamma 1.5, at a student that is another view's logits plus noise
of one nat (seeded). The class prior is taken from view 0, as a cache does.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from matplotlib import pyplot
from numcodecs import Blosc, Zstd
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache import Records, encode
from kdcache.cache.identity import RecordIdentity
from kdcache.cache.records.choices import TEMPERATURES
from kdcache.cache.records.encoding import class_prior, tail_distribution
from kdcache.cache.records.records import STEP, Tail
from kdcache.cache.store.chunks import array_metadata, as_arrays, encode_part, group_metadata
from kdcache.cache.store.layout import ArraySpec, record_arrays
from kdcache.train.bench.bench import machine

KEPT = (5, 10, 15, 20, 30, 50)
MEASURED = (1.0, 4.0)
GAMMA = 1.5
STUDIED = "coded, 1/8 nat"


@dataclass(frozen=True, eq=False)
class Truth:
    """The full answer for R records: logits [R, C] float64, labels [R], a student [R, C], and view 0's rows."""

    logits: Tensor
    labels: Tensor
    student: Tensor
    first: slice
    answers: dict[float, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @staticmethod
    def load(path: Path, seed: int = 0) -> Truth:
        stored = np.load(path)
        views = torch.from_numpy(stored["logits"].astype(np.float64))
        labels = torch.from_numpy(stored["labels"].astype(np.int64)).repeat(len(views))
        noise = torch.randn(views.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        student = (views.roll(-1, 0) + noise).flatten(0, 1)
        return Truth(views.flatten(0, 1), labels, student, slice(0, views.shape[1]))

    def answer(self, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """log p [R, C] at t, p_y [R] at 1, and NKD's gradient [R, C]."""
        if t not in self.answers:
            y = self.labels[:, None]
            log_p = torch.log_softmax(self.logits / t, 1)
            p_y = torch.softmax(self.logits, 1).gather(1, y)[:, 0]
            self.answers[t] = log_p, p_y, self.gradient(p_y, _others(log_p.exp(), y), t)
        return self.answers[t]

    def gradient(self, target: Tensor, others: Tensor, t: float) -> Tensor:
        """[R, C] of NKD at the student, for a teacher with p_y [R] and the distribution over the others [R, C]."""
        y = self.labels[:, None]
        q = torch.softmax(self.student, 1)
        q_others = torch.softmax(self.student.scatter(1, y, -torch.inf) / t, 1)
        hard = q - torch.zeros_like(q).scatter_(1, y, 1.0)
        return (1 + target)[:, None] * hard + GAMMA * t * (q_others - others)


def fidelity(truth: Truth, records: Records, t: float, tail: Tail) -> dict[str, float]:
    got = _spread(truth, records, t, tail)
    # The student's target term is at temperature 1 throughout.
    at_one = records.softened(1.0, tail).target()[:, 0].double()
    # Classes without any probability make KL infinite, and the bucket is no distribution over classes.
    return errors(truth, got, at_one, t, with_kl=tail in ("prior", "uniform"))


def errors(truth: Truth, got: Tensor, target: Tensor, t: float, with_kl: bool = True) -> dict[str, float]:
    """Of the distribution got [R, C] at t and its p_y [R] at 1, against the full answer."""
    log_p, p_y, want = truth.answer(t)
    difference = truth.gradient(target, _others(got, truth.labels[:, None]), t) - want
    found = {
        "gradient": float(difference.norm() / want.norm()),
        "p_y": float(((target - p_y).abs() / p_y).mean()),
    }
    return found | ({"kl": float((log_p.exp() * (log_p - got.log())).sum(1).mean())} if with_kl else {})


def _spread(truth: Truth, records: Records, t: float, tail: Tail) -> Tensor:
    """[R, C] the record's distribution; in the bucket's gradient its mass falls on classes as the student's does."""
    if tail != "bucket":
        return records.dense(t, tail).double()
    got = records.dense(t, "drop").double()
    q = torch.softmax(truth.student / t, 1)
    outside = q.masked_fill(got > 0, 0.0)
    missing = (1 - got.sum(1, keepdim=True)).clamp(min=0)
    return got + missing * outside / outside.sum(1, keepdim=True)


def _others(p: Tensor, y: Tensor) -> Tensor:
    others = p.scatter(1, y, 0.0)
    return others / others.sum(1, keepdim=True)


# How gaps can be coded: name -> (codes of absolute gaps, values of codes).
def _uniform(step: float) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return lambda gap: torch.round(gap / step), lambda code: code * step


def _root(steps: float) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return lambda gap: torch.round(steps * gap.sqrt()), lambda code: (code / steps) ** 2


QUANTISERS = {
    "coded, 1/16 nat": _uniform(1 / 16),
    STUDIED: _uniform(STEP),
    "coded, 3/16 nat": _uniform(3 / 16),
    "coded, 1/4 nat": _uniform(1 / 4),
    "coded, 1/2 nat": _uniform(1 / 2),
    "coded, square root, 8 steps": _root(8.0),
}


def coded(exact: Records, name: str, tail_step: float = STEP) -> tuple[Records, dict[str, NDArray[Any]]]:
    """Float records with the values that codes stand for, and the codes by array."""
    assert exact.classes is not None
    encode_gap, decode_gap = QUANTISERS[name]
    codes = encode_gap(exact.gaps)
    gaps = decode_gap(codes)
    most = math.log(exact.num_classes - exact.classes.shape[1]) - gaps[:, -1:] / torch.tensor(exact.temperatures)
    below = torch.round((most - exact.tail.float()) / tail_step).clamp(0, 253)
    stored = {
        "classes": exact.classes.numpy(),
        "gaps": torch.diff(codes, dim=1, prepend=torch.zeros_like(codes[:, :1])).to(torch.uint8).numpy(),
        "target_gap": exact.target_gap.numpy(),
        "tail": below.to(torch.uint8).numpy(),
    }
    return replace(exact, gaps=gaps, tail=most - tail_step * below), stored


def chunk_bytes(stored: dict[str, NDArray[Any]]) -> dict[str, float]:
    """Bytes a record of each array, as one chunk that the product writes."""
    out = {}
    for name, rows in stored.items():
        spec = ArraySpec(name, rows.shape, len(rows), str(rows.dtype), ("sample", "column"))
        out[name] = len(encode_part(spec, 0, rows)) / len(rows)
    return out


def study(truth: Truth) -> Iterator[dict[str, Any]]:
    logits = truth.logits.float()
    for k in KEPT:
        exact = encode(logits, truth.labels, k, TEMPERATURES, "float32")
        first = encode(logits[truth.first], truth.labels[truth.first], k, TEMPERATURES)
        exact = replace(exact, prior=class_prior(tail_distribution(logits[truth.first], first)))
        half = encode(logits, truth.labels, k, TEMPERATURES, "float16")
        kinds = {"float16": (replace(half, prior=exact.prior), as_arrays(half))}
        kinds |= {name: coded(exact, name) for name in QUANTISERS}
        # What is studied under that name is what the product stores; tails differ where float16's rounding tips a code.
        # So is each code by itself: bench/rounding.py has what carrying the errors does.
        product = as_arrays(encode(logits, truth.labels, k, TEMPERATURES, carry=False))
        for name, codes in kinds[STUDIED][1].items():
            assert np.abs(product[name].astype(np.float64) - codes).max() <= (name == "tail")
        for name, (records, stored) in kinds.items():
            sizes = chunk_bytes(stored)
            for t in MEASURED:
                for tail in get_args(Tail):
                    yield {
                        "quantiser": name, "k": k, "temperature": t, "tail": tail, "bytes": sum(sizes.values()),
                        "arrays": sizes, **fidelity(truth, records, t, tail),
                    }  # fmt: skip


def tail_steps(truth: Truth, k: int = 20) -> Iterator[dict[str, Any]]:
    exact = encode(truth.logits.float(), truth.labels, k, TEMPERATURES, "float32")
    for step in (1 / 4, 1 / 8, 1 / 16, 1 / 32):
        records, stored = coded(exact, STUDIED, step)
        for t in MEASURED:
            size = chunk_bytes({"tail": stored["tail"]})["tail"]
            yield {"step": step, "temperature": t, "tail_bytes": size, **fidelity(truth, records, t, "uniform")}


def codecs(truth: Truth, k: int = 20) -> Iterator[dict[str, Any]]:
    """Array codecs: bytes a record and MB/s of coding, for coded and for dense float16 records."""
    stored = as_arrays(encode(truth.logits.float(), truth.labels, k, TEMPERATURES))
    stored["dense gaps"] = encode(truth.logits.float(), truth.labels).gaps.numpy()
    shuffles = {"none": 0, "bytes": 1, "bits": 2}
    for array, rows in stored.items():
        choices: dict[str, Any] = {
            f"blosc zstd {level}, shuffle {shuffle}": Blosc("zstd", level, number)
            for level in (1, 5, 9)
            for shuffle, number in shuffles.items()
        }
        choices |= {f"zstd {level}": Zstd(level) for level in (3, 19)}
        for name, codec in choices.items():
            if rows.nbytes > 2e6 and ("9" in name or "none" in name):
                continue  # minutes
            started = time.perf_counter()
            data = codec.encode(np.ascontiguousarray(rows))
            encoded = time.perf_counter()
            codec.decode(data)
            yield {
                "array": array, "codec": name, "bytes": len(data) / len(rows),
                "encode_mb_s": rows.nbytes / (encoded - started) / 1e6,
                "decode_mb_s": rows.nbytes / (time.perf_counter() - encoded) / 1e6,
            }  # fmt: skip


def chunks(truth: Truth, k: int = 20) -> Iterator[dict[str, Any]]:
    """Bytes a record by rows a chunk, and of gaps stored as they are instead of as distances."""
    stored = as_arrays(encode(truth.logits.float(), truth.labels, k, TEMPERATURES))
    absolute = {"gaps": stored["gaps"].cumsum(1).clip(max=255).astype(np.uint8)}
    yield {"gaps": "distances", **chunk_bytes({"gaps": stored["gaps"]})}
    yield {"gaps": "as they are", **chunk_bytes(absolute)}
    for rows in (125, 250, 500, 1000, 2000, 6000):
        total = 0.0
        for start in range(0, len(truth.labels), rows):
            part = {name: array[start : start + rows] for name, array in stored.items()}
            total += len(part["gaps"]) * sum(chunk_bytes(part).values())
        yield {"rows_a_chunk": rows, "bytes": total / len(truth.labels)}


def id_palettes(truth: Truth, samples: int) -> Iterator[dict[str, Any]]:
    """Ids as places in a list of M classes a sample, that of view 0's largest logits; others are written out in full.

    A record then costs its codes, what is written out, and its share of the list, which V views pay together.
    """
    order = torch.sort(truth.logits, dim=1, descending=True, stable=True).indices
    palette = order[truth.first]
    rank = torch.empty_like(palette).scatter_(1, palette, torch.arange(palette.shape[1]).expand_as(palette))
    for k in (10, 20):
        later = order[samples:, :k]
        at = rank.repeat(len(later) // samples, 1).gather(1, later).numpy()
        plain = chunk_bytes({"classes": later.numpy().astype(np.uint16)})["classes"]
        for m in (16, 32, 64, 128):
            outside = at >= m
            codes = np.where(outside, m, at).astype(np.uint8)
            written = later.numpy()[outside].astype(np.uint16)
            sizes = chunk_bytes({"codes": codes, "palette": palette[:, :m].numpy().astype(np.uint16)})
            rows = written[:, None]
            full = chunk_bytes({"full": rows})["full"] * len(rows) / len(later)
            yield {
                "k": k, "m": m, "plain": plain, "codes": sizes["codes"], "written_out": full,
                "palette": sizes["palette"], "outside": float(outside.mean()),
                "total": {str(v): sizes["codes"] + full + sizes["palette"] / v for v in (12, 50, 100, 300)},
            }  # fmt: skip


def overhead(samples: int = 1_281_167, k: int = 20, part: int = 262_144) -> float:
    """Bytes a record of everything but chunks, for a view of ImageNet: metadata and commits."""
    record = RecordIdentity(classes=1000, k=k, temperatures=TEMPERATURES, precision="uint8", labels=1, tail_std=False)
    specs = record_arrays(record, samples, part)
    metadata = len(group_metadata()) + sum(len(array_metadata(s)) for s in specs)
    # A commit names, sizes and hashes a file for each array: 300 bytes each are more than it takes.
    return (metadata + -(-samples // part) * (600 + 300 * len(specs))) / samples


def peers(truth: Truth, views: int) -> Iterator[dict[str, Any]]:
    """TinyViT: a seed of 4 bytes, fp16 probabilities and int16 ids. FKD: a torch file an image, top 5 of each crop."""
    p = torch.softmax(truth.logits, 1)
    for k in KEPT:
        top = p.topk(k)
        values = top.values.half().double()
        rest = (1 - values.sum(1, keepdim=True)).clamp(min=0) / (p.shape[1] - k)
        got = rest.expand_as(p).scatter(1, top.indices, values).clamp(min=1e-30)
        target = got.gather(1, truth.labels[:, None])[:, 0]
        for t in MEASURED:
            # Stored at temperature 1: at others the even rest is softened with it.
            soft = got ** (1 / t)
            soft = soft / soft.sum(1, keepdim=True)
            yield {
                "layout": "TinyViT",
                "k": k,
                "temperature": t,
                "bytes": 4.0 + 4 * k,
                **errors(truth, soft, target, t),
            }
    top = p.topk(5)
    images = len(p) // views
    coordinates, flips = torch.rand(views, 4), torch.rand(views) < 0.5
    total = 0
    for image in range(images):
        rows = torch.arange(image, len(p), images)
        labels = [(top.values[r].half(), top.indices[r].short()) for r in rows]
        file = io.BytesIO()
        torch.save((coordinates.clone(), flips.clone(), labels), file)
        total += len(file.getvalue())
    yield {"layout": "FKD", "k": 5, "bytes": total / len(p)}
    yield {"layout": "dense float16", "k": p.shape[1], "bytes": 2.0 * p.shape[1]}


def plot(result: dict[str, Any], path: Path) -> None:
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    for panel, value, title in zip(
        panels, ("kl", "gradient"), ("KL to the full teacher, nats", "relative error of NKD's gradient"), strict=True
    ):
        for name in ("float16", *QUANTISERS):
            rows = [
                r for r in result["study"] if (r["quantiser"], r["temperature"], r["tail"]) == (name, 1.0, "uniform")
            ]
            style = {"linewidth": 3.0} if name == STUDIED else {"linewidth": 1.0, "alpha": 0.8}
            panel.plot([r["bytes"] for r in rows], [r[value] for r in rows], marker="o", label=name, **style)
        for row in (
            r for r in result["study"] if (r["quantiser"], r["temperature"], r["tail"]) == (STUDIED, 1.0, "uniform")
        ):
            panel.annotate(
                f"K={row['k']}", (row["bytes"], row[value]), textcoords="offset points", xytext=(-8, -14), fontsize=8
            )
        rows = [r for r in result["peers"] if r["layout"] == "TinyViT" and r["temperature"] == 1.0]
        panel.plot(
            [r["bytes"] for r in rows], [r[value] for r in rows], marker="s", color="black", label="TinyViT's layout"
        )
        panel.set(xscale="log", yscale="log", xlabel="bytes a record, compressed", ylabel=title)
        panel.grid(True, which="both", alpha=0.3)
        panel.legend(fontsize=8)
    figure.suptitle("Top-K records of real ImageNet logits (T = 1, uniform tail): size against fidelity")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logits", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/codec.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    truth = Truth.load(a.logits)
    samples = truth.first.stop
    result: dict[str, Any] = {
        "machine": machine(),
        "command": f"python bench/codec.py --logits {a.logits.name}",
        "records": len(truth.logits),
        "overhead_bytes_at_imagenet_size": overhead(),
        "peers": list(peers(truth, len(truth.logits) // samples)),
        "id_palettes": list(id_palettes(truth, samples)),
        "tail_steps": list(tail_steps(truth)),
        "chunks": list(chunks(truth)),
        "codecs": list(codecs(truth)),
        "study": list(study(truth)),
    }
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, a.out.with_suffix(".png"))
    show(result)


def show(result: dict[str, Any]) -> None:
    print(f"{'K':>3} {'quantiser':28} {'bytes':>7} {'KL':>8} {'gradient':>9} {'p_y':>7}   (T = 1, uniform tail)")
    for r in result["study"]:
        if r["temperature"] == 1 and r["tail"] == "uniform":
            print(
                f"{r['k']:3} {r['quantiser']:28} {r['bytes']:7.2f} {r['kl']:8.4f} {r['gradient']:9.4f} {r['p_y']:7.4f}"
            )
    for r in result["peers"]:
        found = f"{r['kl']:8.4f} {r['gradient']:9.4f} {r['p_y']:7.4f} (T = {r['temperature']:g})" if "kl" in r else ""
        print(f"{r['k']:3} {r['layout']:28} {r['bytes']:7.1f} {found}")
    print(f"metadata and commits: {result['overhead_bytes_at_imagenet_size']:.4f} bytes a record of ImageNet")


if __name__ == "__main__":
    main()
