"""What grows with the number of samples, beside the code that did everything at once: seconds and memory; writes JSON.

    python bench/pieces.py [--samples 1281167,14200000] [--before COMMIT] [--out FILE]

Each case is a process of its own, for either code and each number of samples. Seconds are those of the processor, of
all threads. `peak_mib` is the most memory that the process had while the case ran, above what it had before (VmHWM,
which Linux lets a process reset); `held_mib` is what it had in the end, with the case's result. The data are computed:
sizes and names like ImageNet's, no files.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
BEFORE = "a02f24b"  # the last commit that did these at once
CLASSES, BATCH, PART, SIDE = 21_841, 256, 262_144, 32
SIZES = [(375, 500), (500, 375), (333, 500), (500, 500)]


def memory(what: str) -> float:
    """MiB of this process: VmRSS, what it has now, or VmHWM, the most that it had."""
    return int(re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def measured(work: Callable[[], Any]) -> dict[str, float]:
    gc.collect()
    before, started = memory("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    result = work()
    seconds, peak = time.process_time() - started, memory("VmHWM")
    gc.collect()
    held = memory("VmRSS")
    del result
    return {
        "cpu_seconds": round(seconds, 3),
        "peak_mib": round(peak - before, 1),
        "held_mib": round(max(0.0, held - before), 1),
    }


def names(n: int) -> Iterator[str]:
    return (f"n{i % CLASSES:08d}/n{i % CLASSES:08d}_{i}.JPEG" for i in range(n))


class Names:
    """Names that are made when they are asked for, so that they take no memory."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, at: int) -> str:
        return f"{at}.JPEG"


def paths(n: int) -> Any:
    """The paths of image files, as a dataset keeps them."""
    from kdcache.pipeline.data import imagefiles

    return getattr(imagefiles, "Paths", SimpleNamespace(of=tuple)).of(names(n))


def headers(n: int) -> Any:
    """Sizes from the headers of all files, of which none is read here."""
    from kdcache.pipeline.data import imagefiles

    imagefiles.image_size = lambda path: (375, 500)
    return imagefiles._header_sizes(Path("images"), Names(n))  # type: ignore[arg-type]


def labels_of(n: int) -> Any:
    return np.random.default_rng(0).integers(0, CLASSES, n)


def held_out(n: int) -> Callable[[], Any]:
    """Every tenth image of each class, where there is no evaluation split."""
    from kdcache.pipeline.data.kinds import folders

    labels = labels_of(n)
    return lambda: folders.held_out(labels, 10)


def fingerprint(n: int) -> Any:
    """Which 4,096 files a fingerprint covers."""
    from kdcache.pipeline.data.kinds.base import drawn_places

    return drawn_places(n, 4096)


def trial(n: int) -> Callable[[], Any]:
    """Which images a teacher is tried out with, and where they are cut."""
    from kdcache.pipeline.build import suspicions
    from kdcache.pipeline.views.table import Table

    data = _data(n, labels_of(n), tuple(map(str, range(CLASSES))))
    source: Any = SimpleNamespace(train=data, train_labels=data.labels)
    renderer: Any = SimpleNamespace(batches=lambda parameters, batches: iter([Table(parameters, 0)]))

    def chosen() -> Any:
        tried = suspicions.choose_trial(source, lambda classes: suspicions.count_of(classes, n))
        return next(tried.rendered(source, renderer, BATCH))

    return chosen


def sizes_of(n: int) -> Any:
    return np.resize(np.array(SIZES, np.int32), (n, 2))


def order(n: int) -> Any:
    """The batches of an epoch."""
    from kdcache.train.loaders.order import epoch_batches

    return epoch_batches(n, BATCH, 0, 0)


class AnyDigest:
    """Stands in a commit for the digest of whatever is drawn."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


def _view(n: int, policy: str) -> tuple[Any, Any]:
    from kdcache.cache.identity import ViewsIdentity
    from kdcache.pipeline.views.render import RENDERER

    views = ViewsIdentity(policy=policy, seed=0, renderer=RENDERER, sequence="random", mixed=False)
    commit = SimpleNamespace(parameters=AnyDigest())
    parts = -(-n // PART)
    store = SimpleNamespace(
        parts=parts, commit=lambda name: commit, rows=lambda part: range(part * PART, min(n, (part + 1) * PART))
    )
    cache = SimpleNamespace(identity=SimpleNamespace(views=views), train=store, where="a cache")
    return cache, _data(n)


def _data(n: int, labels: Any = None, classes: tuple[str, ...] = ()) -> Any:
    """Images that are computed; labels [n], none by default."""
    import torch

    from kdcache.pipeline.data.kinds.base import Described

    class Computed(Described):
        pixels = None
        paths = ()

        def decode(self, index: int) -> Any:
            return torch.full((3, *self.sizes[index].tolist()), index % 256, dtype=torch.uint8)

        def _fingerprint(self, full: bool) -> str:
            return "0" * 64

        def _contents(self, places: Any) -> dict[str, Any]:
            return {}

    ids = np.empty((n, 0), np.int64) if labels is None else labels[:, None]
    return Computed("computed", "train", ids, classes, sizes_of(n), (0.5,) * 3, (0.25,) * 3)  # type: ignore[arg-type]


def parameters(n: int) -> Callable[[], Any]:
    """The parameters of a view as a trainer has them: drawn, and compared with the digests of all commits."""
    from kdcache.train.loaders.cached import stored_view

    cache, data = _view(n, "rrc,flip")
    return lambda: stored_view(cache, data, 1)


def first_batch(n: int) -> Callable[[], Any]:
    """The first batch of pixels, once parameters and order are there."""
    import torch

    from kdcache.pipeline.views.render import Renderer
    from kdcache.train.loaders.cached import stored_view
    from kdcache.train.loaders.order import epoch_batches

    cache, data = _view(n, "rrc,flip")
    parameters, batches = stored_view(cache, data, 1), epoch_batches(n, BATCH, 0, 0)
    renderer = Renderer(data, SIDE, torch.device("cpu"), "rrc,flip", 0)

    def begin() -> Any:
        rendered = renderer.batches(parameters, batches)
        return rendered, next(rendered)

    return begin


# By name; those of the second table make what they begin with before they are measured.
AT_ONCE: dict[str, Callable[[int], Any]] = {
    "paths": paths, "sizes from headers": headers, "fingerprint's files": fingerprint, "order of an epoch": order,
}  # fmt: skip
PREPARED: dict[str, Callable[[int], Callable[[], Any]]] = {
    "held-out tenth": held_out, "images to try a teacher with": trial, "parameters of a view": parameters,
    "first batch of pixels": first_batch,
}  # fmt: skip


def case(name: str, n: int) -> dict[str, float]:
    """Measure one case in this process."""
    if name in AT_ONCE:
        AT_ONCE[name](10_000)  # imports, and what is allocated once
        return measured(lambda: AT_ONCE[name](n))
    PREPARED[name](10_000)()
    return measured(PREPARED[name](n))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", default="1281167,14200000")
    parser.add_argument("--before", default=BEFORE)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/pieces.json")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.case:
        print(json.dumps(case(a.case[0], int(a.case[1]))))
        return
    from kdcache.train.bench.bench import machine

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        archive = subprocess.run(["git", "archive", a.before], cwd=ROOT, check=True, capture_output=True).stdout
        for version in ("before", "now"):
            (Path(place) / version).mkdir()
        (Path(place) / "before/kdcache").mkdir()
        subprocess.run(["tar", "-x", "-C", f"{place}/before/kdcache"], input=archive, check=True)
        (Path(place) / "now/kdcache").symlink_to(ROOT.resolve())
        for n in map(int, a.samples.split(",")):
            for name in (*AT_ONCE, *PREPARED):
                for version in ("before", "now"):
                    command = [sys.executable, __file__, "--case", name, str(n)]
                    env = os.environ | {"PYTHONPATH": f"{place}/{version}", "OMP_NUM_THREADS": "1"}
                    done = subprocess.run(command, env=env, cwd=place, check=True, capture_output=True, text=True)
                    found.setdefault(str(n), {}).setdefault(name, {})[version] = json.loads(done.stdout)
                print(n, name, json.dumps(found[str(n)][name]), flush=True)
    result = {
        "machine": machine() | {"numpy": np.__version__},
        "command": f"python bench/pieces.py --samples {a.samples} --before {a.before}",
        "samples": found,
    }
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
