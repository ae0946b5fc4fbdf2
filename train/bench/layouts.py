"""Reads a cache's records in shuffled order, and compares that with two other layouts for a teacher's answers.

The other two are written from their descriptions: TinyViT's one file of 4 + 4 K bytes a record, read by one seek a
record and stacked to batches; FKD's one torch file an image with the top 5 of all its crops, of which an epoch uses
one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.identity import Identity, id_dtype
from kdcache.cache.records.encoding import tail_distribution
from kdcache.cache.records.records import Records
from kdcache.cache.store import chunks
from kdcache.cache.store.cache import Cache
from kdcache.train.loaders.order import epoch_batches, gathered

FKD_CROPS, FKD_TOP = 12, 5
_BLOCK = 4096


def noise_cache(path: Path, identity: Identity, logits: Tensor, advance: Callable[[int], None]) -> Cache:
    """A cache of one view: rows of `logits` [M, C] drawn at random with noise of one nat, so that no two are equal.

    It is made if it is missing. One sample stands for the evaluation split, without which a cache is not complete.
    """
    record, data = identity.record, identity.data
    cache = Cache.create(path, identity)
    store = cache.train
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, record.classes, (data.samples, record.labels), generator=generator)
    writer = {"host": "bench"}
    ids = id_dtype(record.classes)
    store.write_labels(labels.numpy().astype(ids), writer)
    cache.evaluation.write_labels(labels[:1].numpy().astype(ids), writer)
    one = chunks.as_arrays(chunks.encode_as(record, logits[:1], labels[:1]))
    cache.evaluation.write_shard(0, 0, one, "0" * 64, writer)
    for part in range(store.parts):
        rows, blocks, sums = store.rows(part), [], None
        if part in store.committed().get(0, set()):
            advance(len(rows))
            continue
        for start in range(rows.start, rows.stop, _BLOCK):
            y = labels[start : min(start + _BLOCK, rows.stop)]
            base = logits[torch.randint(0, len(logits), (len(y),), generator=generator)]
            z = base + torch.randn(base.shape, generator=generator)
            records = chunks.encode_as(record, z, y)
            if store.carries_tail_sums(0):
                some = tail_distribution(z[:64], records[torch.arange(min(64, len(y)))])  # enough for a prior
                sums = some if sums is None else sums + some
            blocks.append(chunks.as_arrays(records))
            advance(len(y))
        shard = {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
        store.write_shard(0, part, shard, "0" * 64, writer, None if sums is None else sums.numpy())
    cache.write_prior(writer)
    return cache


def reading_cases(
    cache: Cache, folder: Path, batch: int, peers_records: int, fkd_images: int
) -> dict[str, tuple[Callable[[], object], int]]:
    """What to time, by name, and how many records each reads; the other layouts' files are written to `folder`.

    They hold the first `peers_records` of view 0, and 12 records an image for `fkd_images` images.
    """
    samples, rng = cache.train.samples, np.random.default_rng(0)
    records = cache.read(0)
    tinyvit, fkd = folder / "tinyvit.bin", folder / "fkd"
    k = _write_tinyvit(tinyvit, _first(records, peers_records))
    _write_fkd(fkd, _first(records, fkd_images * FKD_CROPS), fkd_images)

    def slab() -> None:
        Cache(cache.path).read(0)

    def epoch(out: Records | None) -> None:
        order = epoch_batches(samples, batch, 0, int(rng.integers(1000)))
        for _ in gathered(Cache(cache.path).read(0, out), order):
            pass

    def one_seek_a_record() -> None:
        size = 4 + 4 * k
        with tinyvit.open("rb") as f:
            for part in np.array_split(rng.permutation(peers_records), max(1, peers_records // batch)):
                probabilities, ids = [], []
                for i in part.tolist():
                    f.seek(i * size)
                    row = f.read(size)
                    probabilities.append(np.frombuffer(row, "<f2", k, 4))
                    ids.append(np.frombuffer(row, "<i2", k, 4 + 2 * k))
                torch.from_numpy(np.stack(probabilities)), torch.from_numpy(np.stack(ids))

    def one_file_an_image() -> None:
        for i in rng.permutation(fkd_images).tolist():
            _, _, labels = torch.load(fkd / f"{i}.tar", weights_only=True)
            labels[int(rng.integers(FKD_CROPS))]

    return {
        "slab": (slab, samples),
        "first epoch": (lambda: epoch(None), samples),
        "shuffled epoch": (lambda: epoch(records), samples),  # in memory that an earlier epoch's lay in
        "one seek a record": (one_seek_a_record, peers_records),
        "one file an image": (one_file_an_image, fkd_images),
    }


def _first(records: Records, count: int) -> Records:
    return records[torch.arange(count) % len(records)]


def _write_tinyvit(path: Path, records: Records) -> int:
    """Write a seed, K fp16 probabilities and K int16 ids for each record, and return K."""
    ids, p, _ = records.softened(1.0, "uniform").ranked()
    k = ids.shape[1]
    rows = np.empty(len(records), [("seed", "<i4"), ("p", "<f2", (k,)), ("ids", "<i2", (k,))])
    rows["seed"], rows["p"], rows["ids"] = np.arange(len(records)), p.numpy(), ids.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.tofile(path)
    return k


def _write_fkd(folder: Path, records: Records, images: int) -> None:
    """Write a file for each image with its crops' boxes, flips, top probabilities and ids."""
    folder.mkdir(parents=True, exist_ok=True)
    ids, p, _ = records.softened(1.0, "uniform").ranked()
    ids, p = ids[:, :FKD_TOP].short(), p[:, :FKD_TOP].half()
    for image in range(images):
        rows = range(image * FKD_CROPS, (image + 1) * FKD_CROPS)
        crops = (torch.rand(FKD_CROPS, 4), torch.rand(FKD_CROPS) < 0.5)
        # A clone: torch saves the whole of what a row is part of.
        torch.save((*crops, [(p[i].clone(), ids[i].clone()) for i in rows]), folder / f"{image}.tar")
