"""Caches of random logits, and what stands in them."""

import copy
import os
import shutil
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from kdcache.cache import Cache, Identity
from kdcache.cache.records.encoding import class_prior, tail_distribution
from kdcache.cache.records.pairs import partners
from kdcache.cache.store.chunks import as_arrays, encode_as

FIELDS = ("classes", "gaps", "target_gap", "tail", "tail_std", "labels", "prior")
WRITER = {"host": "test"}
# What makes an identity of each format; those of format 2 differ in nothing else.
FORMATS = {
    "format-1": {},
    "mixed": {"mixed": True},
    "spread": {"sequence": "spread"},
    "mixed-and-spread": {"mixed": True, "sequence": "spread"},
}
# Fixtures that make a cache, for both formats.
BOTH = ("format-1", "mixed-and-spread")


def identity(samples=21, held_out=9, part=8, mixed=False, sequence="random", **record):
    """`labels` are those of a single sample, so that the records of mixed views have twice as many."""
    usual = {"classes": 12, "k": 4, "temperatures": (1.0, 4.0), "precision": "float16", "labels": 1, "tail_std": False}
    record = {**usual, **record}
    views = {"policy": "crop,flip", "seed": 0, "renderer": "toy"}
    if mixed:
        views |= {"policy": "crop,flip,mixup(0.2),cutmix(1)", "mixed": True}
        record["labels"] *= 2
    if sequence != "random":
        views["sequence"] = sequence
    if record["k"] is None:
        precision = "float16" if record["precision"] == "uint8" else record["precision"]
        record = {**record, "temperatures": (), "precision": precision, "tail_std": False}
    data = {"name": "toy", "fingerprint": "f" * 64, "full_contents": False, "files": True}
    return Identity.model_validate(
        {
            "format": 2 if mixed or sequence != "random" else 1,
            "teacher": {
                "architecture": "toy:teacher",
                "weights": "a" * 64,
                "mean": (0.5, 0.5, 0.5),
                "std": (0.2, 0.2, 0.2),
                "input_size": 8,
                "numeric": "float32",
            },
            "data": {**data, "split": "train", "samples": samples},
            "evaluation": {**data, "split": "eval", "samples": held_out},
            "views": views,
            "record": record,
            "class_map": None,
            "part": part,
        }
    )


class Copies:
    """Copies of the caches that were asked for before: to write one takes ten times as long."""

    def __init__(self):
        self._asked, self._made = set(), {}

    def take(self, key, path):
        """Copy the cache with this key to a path; what goes with it, or None where it has to be made."""
        if key not in self._made:
            return None
        folder, more = self._made[key]
        shutil.copytree(folder.name, path, copy_function=shutil.copy, dirs_exist_ok=True)
        return copy.deepcopy(more)

    def keep(self, key, path, more):
        """Keep a cache that was made for the second time, and is likely to be asked for again."""
        if key in self._asked:
            folder = tempfile.TemporaryDirectory(prefix="kdcache-kept-")
            shutil.copytree(path, folder.name, dirs_exist_ok=True)
            self._made[key] = folder, copy.deepcopy(more)
        self._asked.add(key)


COPIES = Copies()


class Filled:
    """A cache with `views` complete views of random logits, and what its records are."""

    more = ()  # what a cache depends on besides the arguments; None: on what nobody can compare

    def __init_subclass__(cls):
        cls.more = None

    def __init__(self, path, about, views=2, seed=0):
        key = None if self.more is None else (type(self), about.model_dump_json(), views, seed, self.more)
        if key is not None and (found := COPIES.take(key, path)):
            self.__dict__.update(found, cache=Cache.create(path, about))
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda fd: None)  # takes most of the time
            self._fill(path, about, views, seed)
        if key is not None:
            COPIES.keep(key, path, {name: value for name, value in vars(self).items() if name != "cache"})

    def _fill(self, path, about, views, seed):
        self.cache, self.about, self.rng = Cache.create(path, about), about, np.random.default_rng(seed)
        r = about.record
        self.labels = {}
        for store in (self.cache.evaluation, self.cache.train):
            y = self.rng.integers(0, r.classes, (store.samples, about.sample_labels))
            self.labels[store.split] = torch.from_numpy(y)
            store.write_labels(y.astype(store.layout.labels.dtype), WRITER)
            store.write_sizes(self.sizes(store), WRITER)
        self.logits = {("eval", 0): self.draw(self.cache.evaluation)}
        self.logits |= {("train", v): self.draw(self.cache.train) for v in range(views)}
        for split, view in self.logits:
            store = self.cache.train if split == "train" else self.cache.evaluation
            for part in range(store.parts):
                self.write(store, view, part)
        self.cache.write_prior(WRITER)

    def sizes(self, store):
        return self.rng.integers(1, 900, (store.samples, 2)).astype(np.int32)

    def draw(self, store):
        z = self.rng.normal(0, 3, (store.samples, self.about.record.classes)).astype(np.float32)
        return torch.from_numpy(z)

    def encode(self, store, view, rows=slice(None)):
        r = self.about.record
        z, y = self.logits[store.split, view][rows], self.labels_in(store, view)[rows]
        return encode_as(r, z, y), z

    def labels_in(self, store, view):
        """The labels [N, L] of the records of a view."""
        own, views = self.labels[store.split], self.about.views
        if store.split == "eval" or not views.mixed:
            return own
        return torch.cat([own, own[partners(views.seed, view, range(store.samples), store.samples)]], 1)

    def write(self, store, view, part):
        rows = store.rows(part)
        records, z = self.encode(store, view, slice(rows.start, rows.stop))
        sums = tail_distribution(z, records).numpy() if store.carries_tail_sums(view) else None
        return store.write_shard(view, part, as_arrays(records), self.digest(store, view, part), WRITER, sums)

    def digest(self, store, view, part):
        """What its commit says of a shard's view parameters."""
        return f"digest of {view} {part}"

    def prior(self):
        records, z = self.encode(self.cache.train, 0)
        return None if records.classes is None else class_prior(tail_distribution(z, records))


def same(a, b):
    return all(
        x is y is None or (x is not None and y is not None and x.dtype == y.dtype and x.equal(y))
        for x, y in ((getattr(a, f), getattr(b, f)) for f in FIELDS[:6])
    )


@st.composite
def shapes(draw):
    classes = draw(st.sampled_from([2, 5, 255, 256, 300, 70_000]))
    samples = draw(st.integers(1, 3 if classes == 70_000 else 40))
    k = draw(st.sampled_from([None, 1, min(classes - 1, 6)]))
    return identity(
        samples=samples,
        held_out=draw(st.integers(1, 5)),
        part=draw(st.integers(1, samples)) if samples < 6 else draw(st.integers(samples // 3, samples + 3)),
        classes=classes,
        k=k,
        temperatures=draw(st.sampled_from([(1.0,), (0.5, 1.0, 20.0)])),
        precision=draw(st.sampled_from(["uint8", "float16", "float32"])),
        tail_std=draw(st.booleans()),
        **draw(
            st.one_of(
                st.fixed_dictionaries({"labels": st.integers(0, 2)}),
                st.fixed_dictionaries({"labels": st.integers(0, 1), "mixed": st.just(True)}),
            )
        ),
        sequence=draw(st.sampled_from(["random", "spread"])),
    )
