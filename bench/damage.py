"""Every file and folder of a built cache, damaged in every way: what verify, repair, build and readers do. Writes JSON.

    python bench/damage.py

scikit-learn's digits, a resnet8 with seeded random weights, top-3 records of 2 views in 4 parts, beside what builders
leave: a lease, a decided shard, a folder of scratch. Each case damages one file (single bits, cut, emptied, longer,
deleted, a folder, a link, a loop, a pipe, another cache's) or one folder of a copy. Then

- verify has to name the damage, or the cache has to read as the undamaged one does;
- readers (a loader's epoch, info, pack, push) have to give the same values or one line of an error;
- verify --repair and build have to give the original, byte for byte but for who wrote a commit and when.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kdcache.cache import Cache, KdcacheError, files
from kdcache.cache.packing import pack_hdf5
from kdcache.cache.registry.transfer import into_folder
from kdcache.cache.store import chunks
from kdcache.pipeline.build import build as module
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import Source, open_source
from kdcache.pipeline.info import describe, facts
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers import damage
from kdcache.train.bench.bench import machine
from kdcache.train.loaders.cached import CachedLoader

SEED, FLIPS = 0, 6  # flips in each file


def quiet(line: str) -> None:
    pass


class Bench:
    """A cache that a build has made, another one of the same teacher, and the source of the first."""

    def __init__(self, work: Path) -> None:
        self.work = work
        os.environ["KDCACHE_HOME"] = str(work / "home")
        torch.manual_seed(SEED)
        teacher = Classifier(build_network("resnet8", 10, 8), (0.5,) * 3, (0.25,) * 3)
        save_file(teacher.network.state_dict(), work / "teacher.safetensors")
        self.config = BuildConfig(
            "resnet8", str(work / "teacher.safetensors"), views=2, topk=3, batch_size=64, part=400,
            allow_low_accuracy=True, device="cpu",
        )  # fmt: skip
        self.source: Source = open_source(self.config)
        module.probe = lambda *a: (1e9, 1.0)  # it times the teacher, which is of no interest here
        self.good, self.other = work / "good", work / "other"
        build(replace(self.config, out=str(self.good)), quiet, self.source)
        build(replace(self.config, out=str(self.other), seed=1), quiet)
        self.want, self.bytes = contents(self.good), content(self.good)
        self._leave()
        self.usual = {problem.replace(str(self.good), "") for problem in verify(Cache(self.good)).problems}

    def _leave(self) -> None:
        """Beside the cache, what a builder leaves that was killed: here one that had decided a shard."""
        lease = {"host": "gone", "machine": None, "process": 1, "seconds": 60.0, "since": "then", "started": None}
        for at in (self.good, self.other):
            name, decided = "v00001-p0002", at / "scratch" / "decided" / "train"
            for folder in (decided / name, at / "scratch" / "dead", at / "leases"):
                folder.mkdir(parents=True, exist_ok=True)
            (at / "scratch" / "dead" / "half").write_bytes(b"half of a chunk")
            (at / "leases" / "dead.json").write_text(json.dumps({**lease, "token": "dead"}))
            os.utime(at / "leases" / "dead.json", (0, 0))
            os.link(at / "leases" / "dead.json", at / "leases" / f"{name}.0")
            commit = at / "commits" / f"{name}.json"
            for file, stored in json.loads(commit.read_bytes())["files"].items():
                (at / file).rename(decided / name / stored["sha256"])
            commit.rename(decided / name / "commit.json")
            digest = files.sha256((decided / name / "commit.json").read_bytes())
            (decided / name / "commit.sha256").write_text(digest)

    def cases(self) -> Iterator[tuple[Callable[..., None], str, int]]:
        """Every way to damage something, what, and a number where a way is taken more than once."""
        for name in damage.files_of(self.good):
            for how in damage.FILE:
                yield from ((how, name, i) for i in range(FLIPS if how is damage.flipped else 1))
        folders = [p.relative_to(self.good).as_posix() for p in self.good.rglob("*") if p.is_dir()]
        yield from ((how, name, 0) for name in sorted(folders) for how in damage.FOLDER)

    def case(self, how: Callable[..., None], name: str, number: int) -> dict[str, str]:
        """Damage a copy: what verify says, what readers do, and whether repair and build give the original again."""
        path = self.work / "c"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.good, path)
        how(path / name, random.Random(f"{how.__name__} {name} {number}"), self.other / name)
        found = {"verify": self.verified(path, name), "readers": self.read(path)}
        if name.startswith("leases/") and os.path.lexists(path / name):  # what was touched just now counts as alive
            os.utime(path / name, (0, 0), follow_symlinks=False)
        before = content(self.other)
        try:
            with contextlib.suppress(KdcacheError):  # an identity that cannot be read: build writes it again
                verify(Cache(path), repair=True)
            build(replace(self.config, out=str(path)), quiet, self.source)
            found["again"] = "the original" if content(path) == self.bytes else "OTHER BYTES"
        except Exception as e:
            found["again"] = f"FAILED: {type(e).__name__}: {e}".replace(str(self.work), "")
        if content(self.other) != before:
            found["again"] = "ANOTHER CACHE WAS CHANGED"
        return found

    def verified(self, path: Path, name: str) -> str:
        try:
            problems = verify(Cache(path)).problems
        except KdcacheError as e:
            problems = [str(e)]
        except Exception as e:
            return f"{type(e).__name__}: {e}".upper()
        if new := [problem for problem in problems if problem.replace(str(path), "") not in self.usual]:
            # A shard's files may be named by its commit, and a folder's by what lies in it.
            exactly = any(str(path / name) in problem for problem in new)
            return "named" if exactly else "named by its commit" if any(str(path) in p for p in new) else "UNNAMED"
        if name.startswith(("leases", "scratch")):
            return "harmless: what builders leave, which no reader looks at"
        if contents(path).items() <= self.want.items():
            now = content(path)
            same = now.get(name) == self.bytes.get(name)
            return f"harmless: {'the same but for who wrote it' if same else kind_of(name)}"
        return "SILENT"

    def read(self, path: Path) -> str:
        """What readers do: each gives the values of the undamaged cache, or one line."""
        outcomes = set()
        for reader in (self.loaded, self.told, self.packed, self.pushed):
            try:
                same = reader(path)
            except KdcacheError as e:
                outcomes.add("one line" if "\n" not in str(e) else f"SEVERAL LINES of {reader.__name__}")
            except Exception as e:
                outcomes.add(f"{reader.__name__.upper()}: {type(e).__name__}: {e}".replace(str(self.work), ""))
            else:
                outcomes.add("the same values" if same else f"OTHER VALUES of {reader.__name__}")
        return " or ".join(sorted(outcomes))

    def loaded(self, path: Path) -> bool:
        cache = Cache(path)
        if not cache.views:
            return True
        for _ in CachedLoader(cache, self.source.train, 400):
            pass
        return contents(path).items() <= self.want.items()

    def told(self, path: Path) -> bool:
        cache = Cache(path)
        return bool(describe(cache, facts(cache)))

    def packed(self, path: Path) -> bool:
        out = self.work / "c.h5"
        out.unlink(missing_ok=True)
        pack_hdf5(Cache(path), out, Cache(path).views)
        return contents(out).items() <= self.want.items()

    def pushed(self, path: Path) -> bool:
        there = self.work / "there"
        shutil.rmtree(there, ignore_errors=True)
        into_folder(Cache(path), there, Cache(path).views)
        return contents(there).items() <= self.want.items()


def contents(path: Path) -> dict[str, str]:
    """Digests of all that readers get."""
    cache = Cache(path)
    found = {"labels": files.sha256(cache.train.labels.tobytes() + cache.evaluation.labels.tobytes())}
    views = {f"view {view}": cache.read(view) for view in cache.views}
    for name, records in {"evaluation": cache.read_evaluation(), **views}.items():
        rows = [records.labels.numpy(), *chunks.as_arrays(records).values()]
        if name != "evaluation" and records.prior is not None:  # without view 0 there is no prior for it
            rows.append(records.prior.numpy())
        found[name] = files.sha256(b"".join(array.tobytes() for array in rows))
    return found


def kind_of(name: str) -> str:
    return "a folder" if "." not in name and "/c" not in name else name.rpartition("/")[2]


def content(path: Path) -> dict[str, Any]:
    """Every file of the cache, links followed; of commits all but who wrote them."""
    found: dict[str, Any] = {}
    for where, _, names in os.walk(path, followlinks=True):
        for file in (Path(where, name) for name in names):
            name = file.relative_to(path).as_posix()
            found[name] = file.read_bytes() if file.is_file() else None
            if "commits/" in name:
                found[name] = damage.without_writer(found[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="do one of so many cases")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/damage.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    counts: dict[str, collections.Counter[tuple[str, str]]] = collections.defaultdict(collections.Counter)
    wrong, start = [], time.process_time()
    with tempfile.TemporaryDirectory() as top:
        bench = Bench(Path(top))
        cases = list(bench.cases())[:: a.every]
        for how, name, number in cases:
            found = bench.case(how, name, number)
            for what, outcome in found.items():
                counts[what][(how.__name__, outcome)] += 1
                if outcome != outcome.lower():
                    wrong.append([how.__name__, name, number, what, outcome])
                    print(*wrong[-1], flush=True)
    result = {
        "machine": machine(),
        "command": f"python bench/damage.py --every {a.every}",
        "cases": len(cases),
        "cpu_seconds": round(time.process_time() - start, 1),
        "wrong": wrong,
        **{
            what: [{"damage": how, "outcome": outcome, "cases": n} for (how, outcome), n in sorted(of.items())]
            for what, of in counts.items()
        },
    }
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    for what, of in counts.items():
        total: collections.Counter[str] = collections.Counter()
        for (_, outcome), n in of.items():
            total[outcome] += n
        for outcome, n in total.most_common():
            print(f"{what:8} {n:6} {outcome}")


if __name__ == "__main__":
    main()
