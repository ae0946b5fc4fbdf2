"""What readers do with damaged and hostile caches, in a folder and packed in one HDF5 file; writes JSON.

    python bench/fuzz_caches.py

Flips: single bits, drawn evenly over all bytes of all files. Each must be found, with the file named, or change nothing
that kdcache reads: then all records, labels, prior and identity are compared with the undamaged cache's. Fuzz: random,
truncated, lengthened, swapped, renamed, linked, emptied and oversized files, mutated JSON, and damaged chunks whose
commits have been forged to fit. Every case must end in the same values or in a KdcacheError, within seconds and without
taking memory; each runs in a process of its own kind, so that a crash counts as one and names its seed.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c  # zarr's
import numpy as np
import torch

sys.path += [str(Path(__file__).parent)]
import fuzzing
from fuzzing import within

from kdcache.cache import Cache, Identity, KdcacheError, open_cache
from kdcache.cache.packing import pack_hdf5
from kdcache.cache.records.encoding import tail_distribution
from kdcache.cache.store import chunks
from kdcache.pipeline.verify import verify
from kdcache.train.bench.bench import machine

SECONDS, MEGABYTES = 20, 512
BATCH = 100  # cases a process


def small_cache(path: Path) -> Cache:
    """Two views in two parts of random answers to 60 samples: top 4 of 20 classes, with all that can be stored."""
    data = {"name": "toy", "fingerprint": "f" * 64, "full_contents": False, "files": True}
    about = {
        "teacher": {
            "architecture": "toy", "weights": "a" * 64, "mean": (0.5,) * 3, "std": (0.2,) * 3,
            "input_size": 8, "numeric": "float32",
        },
        "data": {**data, "split": "train", "samples": 60},
        "evaluation": {**data, "split": "eval", "samples": 20},
        "views": {"policy": "crop,flip", "seed": 0, "renderer": "toy"},
        "record": {
            "classes": 20, "k": 4, "temperatures": (1.0, 4.0), "precision": "uint8", "labels": 1, "tail_std": True,
        },
        "class_map": None,
        "part": 40,
    }  # fmt: skip
    identity = Identity.model_validate(about)
    cache, writer = Cache.create(path, identity), {"host": "bench"}
    generator = torch.Generator().manual_seed(0)
    for store, views in ((cache.evaluation, 1), (cache.train, 2)):
        labels = torch.randint(0, 20, (store.samples, 1), generator=generator)
        store.write_labels(labels.numpy().astype(np.uint8), writer)
        store.write_sizes(np.full((store.samples, 2), 40, np.int32), writer)
        for view in range(views):
            for part in range(store.parts):
                rows = slice(store.rows(part).start, store.rows(part).stop)
                logits = 3 * torch.randn(rows.stop - rows.start, 20, generator=generator)
                records = chunks.encode_as(identity.record, logits, labels[rows])
                sums = tail_distribution(logits, records).numpy() if store.carries_tail_sums(view) else None
                store.write_shard(view, part, chunks.as_arrays(records), "0" * 64, writer, sums)
    cache.write_prior(writer)
    return cache


def contents(path: Path) -> dict[str, str]:
    """Digests of all that readers get."""
    cache = open_cache(path)
    sizes = cache.train.sizes.tobytes() + cache.evaluation.sizes.tobytes()
    found = {"identity": cache.key, "sizes": hashlib.sha256(sizes).hexdigest()}
    views = {f"view {view}": cache.read(view) for view in cache.views}
    for name, records in {"evaluation": cache.read_evaluation(), **views}.items():
        digest = hashlib.sha256(records.labels.numpy().tobytes())
        for rows in chunks.as_arrays(records).values():
            digest.update(rows.tobytes())
        if name != "evaluation":  # without view 0 there is no prior for it
            digest.update(b"none" if records.prior is None else records.prior.numpy().tobytes())
        found[name] = digest.hexdigest()
    return found


class Sandbox:
    """A cache to damage, and its undamaged files to put back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = {p: p.read_bytes() for p in _files(path)}
        self.want = contents(path)

    def restore(self) -> None:
        for path in _files(self.path):
            if path not in self.files:
                path.unlink() if not path.is_dir() or path.is_symlink() else shutil.rmtree(path)
        for path, content in self.files.items():
            if path.is_symlink() or not path.is_file() or path.stat().st_size != len(content):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            elif path.read_bytes() != content:
                path.write_bytes(content)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if not p.is_dir() or p.is_symlink())


# ---- single bits ----


def flip(box: Sandbox, rng: random.Random) -> tuple[str, str]:
    """One bit, and what became of it: ('found' | 'harmless' | 'SILENT' | 'UNNAMED', kind of file)."""
    paths = list(box.files)
    path = rng.choices(paths, [len(box.files[p]) for p in paths])[0]
    content = bytearray(box.files[path])
    at = rng.randrange(8 * len(content))
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(bytes(content))
    kind = _kind(box.path, path)
    try:
        problems = verify(Cache(box.path)).problems
    except KdcacheError as e:
        problems = [str(e)]
    if problems:
        # A shard's files are named by its commit, an array's by its folder.
        named = any(str(path) in p or path.stem in p for p in problems)
        return ("found" if named else "UNNAMED"), kind
    return ("harmless" if contents(box.path) == box.want else "SILENT"), kind


def _kind(root: Path, path: Path) -> str:
    if path == root:
        return "packed file"
    if path.name == "zarr.json":
        return "zarr.json (for plain zarr; kdcache reads none)"
    return "commit" if "commits" in path.parts else "identity.json" if path.name == "identity.json" else "chunk"


# ---- any damage ----


def random_bytes(box: Sandbox, path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.choice([1, 20, 300, 5000])))


def overwritten(box: Sandbox, path: Path, rng: random.Random) -> None:
    content = bytearray(box.files[path])
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(bytes(content))


def truncated(box: Sandbox, path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(len(box.files[path])))


def lengthened(box: Sandbox, path: Path, rng: random.Random) -> None:
    with path.open("ab") as f:
        f.write(rng.randbytes(rng.randint(1, 5000)))


def oversized(box: Sandbox, path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.choice([2**31, 10**10]))  # sparse: takes no space


def emptied(box: Sandbox, path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def removed(box: Sandbox, path: Path, rng: random.Random) -> None:
    path.unlink()


def swapped(box: Sandbox, path: Path, rng: random.Random) -> None:
    other = rng.choice(list(box.files))
    path.write_bytes(box.files[other])
    other.write_bytes(box.files[path])


def renamed(box: Sandbox, path: Path, rng: random.Random) -> None:
    path.rename(path.with_name(rng.choice(["1", "2", "v00002-p0000.json", "v00000-p0007.json", "x", "labels.json"])))


def linked(box: Sandbox, path: Path, rng: random.Random) -> None:
    target = rng.choice(["/dev/zero", "/etc/passwd", str(rng.choice(list(box.files))), "missing", path.name])
    path.unlink()
    path.symlink_to(target)


def a_folder(box: Sandbox, path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(box: Sandbox, path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def other_json(box: Sandbox, path: Path, rng: random.Random) -> None:
    """A field of a JSON file changed in kind, size or name."""
    path = rng.choice([p for p in box.files if p.suffix == ".json"] or [path])
    if path == box.path or path.suffix != ".json":
        return overwritten(box, path, rng)
    value = json.loads(box.files[path])
    inner: Any = value
    while True:
        name = rng.choice(sorted(inner))
        if not isinstance(inner[name], dict) or not inner[name] or rng.random() < 0.2:
            break
        inner = inner[name]
    odd = [None, -1, 0, 1, 2**63, 10**30, 1e308, "", "x" * 100_000, "../../etc/passwd", [], {}, True, [[[]]], "\0"]
    how = rng.randrange(4)
    if how == 0:
        del inner[name]
    elif how == 1:
        inner[rng.choice(["extra", "", "__proto__", "../x"])] = rng.choice(odd)
    elif how == 2 and isinstance(inner[name], int):
        inner[name] = rng.choice([inner[name] + 1, inner[name] * 2**20, -inner[name]])
    else:
        inner[name] = rng.choice(odd)
    text = json.dumps(value)
    path.write_text(rng.choice([text, text, text * 2, "[" * 50_000, text[:-1], text.replace("{", '{"format":9,', 1)]))
    return None


def forged(box: Sandbox, path: Path, rng: random.Random) -> None:
    """A damaged chunk with a valid checksum of its own, and a commit that names its digests."""
    chunks = [p for p in box.files if "/c/" in str(p)]
    if not chunks:
        return overwritten(box, path, rng)
    path = rng.choice(chunks)
    body = bytearray(box.files[path][:-4])
    where = rng.choice(["header", "anywhere", "cut", "other"])
    if where == "cut":
        body = body[: rng.randrange(1, len(body))]
    elif where == "other":
        body = bytearray(box.files[rng.choice(chunks)][:-4])
    else:
        for _ in range(rng.randint(1, 6)):
            body[rng.randrange(min(len(body), 16 if where == "header" else len(body)))] = rng.randrange(256)
    if rng.random() < 0.7 and len(body) >= 16:  # a header that declares what belongs there
        body[4:8] = box.files[path][4:8]
        body[12:16] = len(body).to_bytes(4, "little")
    content = bytes(body) + google_crc32c.value(bytes(body)).to_bytes(4, "little")
    path.write_bytes(content)
    for commit in (p for p in box.files if "commits" in p.parts):
        value = json.loads(box.files[commit])
        root = commit.parent.parent
        for file in value["files"]:
            if root / file == path:
                value["files"][file].update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
                commit.write_text(json.dumps(value, sort_keys=True, separators=(",", ":")))
    return None


DAMAGES: tuple[Callable[[Sandbox, Path, random.Random], None], ...] = (
    random_bytes, overwritten, truncated, lengthened, oversized, emptied, removed, swapped, renamed, linked, a_folder,
    a_pipe, other_json, other_json, forged, forged, forged,
)  # fmt: skip


def damage(box: Sandbox, seed: int) -> tuple[str, str]:
    """One case: ('refused' | 'same' | 'other values' | what went wrong, kind of damage)."""
    rng = random.Random(seed)
    how = rng.choice(DAMAGES)
    how(box, rng.choice(list(box.files)), rng)

    def read() -> str:
        try:
            found = contents(box.path)
        except KdcacheError as e:
            return "refused" if "\n" not in str(e) else "SEVERAL LINES"
        except Exception as e:
            return f"{type(e).__name__}: {e}"[:200]
        if found.items() <= box.want.items():
            return "same" if found == box.want else "fewer views"
        # Forged commits claim other contents: that is for replay to find, and for a key's owner not to sign.
        return "other values" if how is forged else "SILENT"

    outcome = within(SECONDS, MEGABYTES, read)
    return outcome, how.__name__


def in_processes(box: Sandbox, seeds: range) -> collections.Counter[tuple[str, str]]:
    """Every case, in forked processes of BATCH cases; one that ends by a signal is counted with its last seed."""
    found: collections.Counter[tuple[str, str]] = collections.Counter()

    def case(seed: int) -> tuple[str, str]:
        result = damage(box, seed)
        box.restore()
        return result

    for seed, outcome, kind in fuzzing.in_processes(seeds, BATCH, case):
        found[(outcome, kind) if outcome else (f"DIED by {kind}", f"seed {seed}")] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/fuzz_caches.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": machine(),
        "command": f"python bench/fuzz_caches.py --flips {a.flips} --cases {a.cases} --seed {a.seed}",
    }
    with tempfile.TemporaryDirectory() as top:
        cache = small_cache(Path(top) / "folder")
        shutil.rmtree(cache.path / "scratch", ignore_errors=True)
        pack_hdf5(cache, Path(top) / "cache.h5", cache.views)
        for name, path in (("folder", cache.path), ("hdf5", Path(top) / "cache.h5")):
            box, rng = Sandbox(path), random.Random(a.seed)
            flips: collections.Counter[tuple[str, str]] = collections.Counter()
            for _ in range(a.flips):
                flips[flip(box, rng)] += 1
                box.restore()
            cases = in_processes(box, range(a.seed, a.seed + a.cases // 2))
            result[name] = {
                kind: [{"outcome": o, "of": k, "cases": n} for (o, k), n in sorted(counts.items())]
                for kind, counts in (("flips", flips), ("fuzz", cases))
            }
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("folder", "hdf5"):
        for kind in ("flips", "fuzz"):
            for row in result[name][kind]:
                print(f"{name:7} {kind:6} {row['cases']:6} {row['outcome']:14} {row['of']}")


if __name__ == "__main__":
    main()
