"""Two machines, what lies on them and between them, and what people do there with one small cache.

Whatever happens, a record that can be read is the one of an uninterrupted build, and what cannot be read is told by a
KdcacheError that names it.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import secrets
import shutil
import stat
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import BaseFileLock, Timeout

from kdcache.cache import care
from kdcache.cache.errors import KdcacheError
from kdcache.cache.home import open_registry
from kdcache.cache.registry import bucket, transfer
from kdcache.cache.registry import leases as bucket_leases
from kdcache.cache.registry.kinds import network
from kdcache.cache.store import chunks, leases, publish, split
from kdcache.cache.store.cache import Cache
from kdcache.pipeline import share
from kdcache.pipeline.build import build as build_module
from kdcache.pipeline.build import builder, spool
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.plan import plan_build
from kdcache.pipeline.build.source import open_source
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.pipeline.pack import pack, unpack
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers.caches import same
from kdcache.tests.machines.processes import (
    LIVES,
    Fate,
    Killed,
    Process,
    Serial,
    hook,
    monotonic,
    running,
    since,
    sync,
    unwatched,
)

# 64 images in two parts of 32; two batches a part. The teacher is a real network, which answers once for all machines.
MODULE = """
import numpy as np, torch
from torch import nn

def images(split):
    rng, n = np.random.default_rng(split == "train"), 64 if split == "train" else 16
    return rng.integers(0, 256, (n, 8, 8, 3), dtype="u1"), np.arange(n) * 5 % 12, tuple("abcdefghijkl")

def net(classes):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, classes))
"""
VIEWS, PART, BATCH = 3, 32, 16
HOMES = ("a", "b")
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
_ADVICE = re.compile(r"remove (?:the folder |the file )?(/\S+?)(?=[,;:)]*(?:\s|$))")


def quiet(_: str) -> None:
    pass


def settings(**changes) -> BuildConfig:
    usual = {
        "teacher": "kd_machines:net", "data": "kd_machines:images", "augment": "crop,flip", "views": VIEWS, "topk": 4,
        "temperatures": (1.0, 4.0), "batch_size": BATCH, "allow_low_accuracy": True, "device": "cpu", "part": PART,
    }  # fmt: skip
    return BuildConfig(**{**usual, **changes})


@dataclass
class Toy:
    """The data and the teacher, and what an uninterrupted build makes of them.

    whole: every file of the cache but the commits' writers, which are the same too. other: files of another cache.
    """

    folder: Path
    source: object
    key: str
    records: dict
    evaluation: object
    whole: dict[str, bytes]
    other: dict[str, bytes]


@contextmanager
def toy(folder: Path):
    """The toy, made in an empty folder; inside, commands are simulated (see `processes`)."""
    (folder / "kd_machines.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("KDCACHE_HOME", str(folder / "home"))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        _simulate(patch)
        source = open_source(settings(), quiet)
        one, two = folder / "one", folder / "two"
        build_module.build(settings(out=str(one)), quiet, source)
        other = settings(seed=1, views=VIEWS)
        build_module.build(replace_out(other, two), quiet, open_source(other, quiet))
        cache = Cache(one)
        records = {view: cache.read(view) for view in cache.views}
        yield Toy(folder, source, cache.key, records, cache.read_evaluation(), content(one), content(two))
        torch.set_num_threads(threads)


def replace_out(config: BuildConfig, out: Path) -> BuildConfig:
    return BuildConfig(**{**vars(config), "out": str(out)})


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a cache, without what builders and publishers leave beside it."""
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {n: p.read_bytes() for n, p in found.items() if not n.startswith(("leases/", "scratch/", "published/"))}


def _simulate(patch: pytest.MonkeyPatch) -> None:
    """Have commands run in one thread and one order of steps, as processes whose end, time and names are simulated."""
    hook()
    for module in (publish, split, transfer, bucket, network, share, spool):
        patch.setattr(module, "ThreadPoolExecutor", Serial)
    patch.setattr(os, "fsync", sync)
    tokens = itertools.count()
    patch.setattr(secrets, "token_hex", lambda n=32: hashlib.sha256(b"%d" % next(tokens)).hexdigest()[: 2 * n])
    patch.setattr(builder, "time", _Clock(lambda _: running[-1].wait()))
    patch.setattr(network, "time", _Clock(lambda _: None))
    for module in (leases, bucket_leases):
        patch.setattr(module, "time", _Waiting())
    unchanged = leases.Leases._unchanged
    patch.setattr(leases.Leases, "_unchanged", lambda self, who, sign, at: unchanged(self, who, since(sign), at))
    patch.setattr(build_module.provenance, "writer", lambda *a: {"host": "toy", "torch": "toy", "time": "toy"})
    patch.setattr(build_module, "probe", lambda *a: (1e9, 1.0))
    patch.setattr(spool, "SPOOL_SECONDS", 0.0)
    for module in (bucket_leases, bucket):
        patch.setattr(module, "PAUSE", 0.0)
    patch.setattr(bucket, "LONGEST_PAUSE", 0.0)
    patch.setattr(builder, "answers", _remembered_answers(builder.answers))
    patch.setattr(chunks, "encode_part", _remembered_chunks(chunks.encode_part))
    patch.setattr(leases.Leases, "__init__", _as_process(leases.Leases.__init__))
    patch.setattr(leases, "ended", _ended)
    patch.setattr(bucket_leases, "ended", _ended)
    patch.setattr(BaseFileLock, "acquire", _without_waiting(BaseFileLock.acquire))


class _Clock:
    """The module `time`, in which sleeping takes no time but counts."""

    def __init__(self, sleep) -> None:
        self._sleep, self._slept = sleep, 0.0
        self.time, self.strftime, self.gmtime = time.time, time.strftime, time.gmtime

    def monotonic(self) -> float:
        return time.monotonic() + self._slept

    def sleep(self, seconds: float) -> None:
        self._slept += seconds
        self._sleep(seconds)


class _Waiting:
    """The module `time`, in which the time that commands wait passes too."""

    strftime, gmtime, monotonic = time.strftime, time.gmtime, staticmethod(monotonic)


def _remembered_answers(real):
    """The teacher answers once for each shard, since it would always answer the same."""
    kept: dict = {}

    def answers(source, renderer, labels, views, starts, rows, batch, skip=lambda _: False):
        key = (source.identity.key, renderer is None, len(labels), tuple(v.digest() for v in views), tuple(starts),
               rows, batch)  # fmt: skip
        if key not in kept:
            kept[key] = list(real(source, renderer, labels, views, starts, rows, batch))
        return (answer for answer in kept[key] if not skip(answer.place))

    return answers


def _remembered_chunks(real):
    kept: dict = {}

    def encode_part(spec, part, rows):
        key = spec.name, spec.shape, part, rows.dtype.str, rows.tobytes()
        if key not in kept:
            kept[key] = real(spec, part, rows)
        return kept[key]

    return encode_part


def _as_process(real):
    def init(self, token, say):
        real(self, token, say)
        if running:
            process = running[-1]
            about = {"process": process.number, "host": process.who, "machine": process.machine, "started": 1}
            self._owner = self._owner.model_copy(update=about)
            process.leases.append(self)

    return init


def _ended(owner) -> bool:
    here = owner.machine == running[-1].machine if running else False
    return here and owner.process not in {process.number for process in running}


def _without_waiting(real):
    """Nobody gives a lock back while others run: whoever waits for one is killed while it waits."""

    def acquire(self, timeout=None, *args, **kwargs):
        if not running or (self.timeout if timeout is None else timeout) >= 0:
            return real(self, timeout, *args, **kwargs)
        try:
            return real(self, 0, *args, **kwargs)
        except Timeout:
            running[-1].die()

    return acquire


class World:
    """The homes of two machines and what they share, below one folder. url: the registry."""

    def __init__(self, toy: Toy, root: Path, url: str | None = None) -> None:
        self.toy, self.root, self.key = toy, root, toy.key
        self.url = url or str(root / "shared")
        self.boots = dict.fromkeys(HOMES, 0)
        for name in (*HOMES, "shared"):
            (root / name).mkdir()

    def cache(self, place: str) -> Path:
        return self.root / place / "caches" / self.key

    # How commands run

    def run(self, who: str, work, fate: Fate = LIVES) -> str:
        """Run a command on a machine: "done", "ended" (killed or interrupted), or how it was refused."""
        process = Process(self.root, who, self.boots[who], fate, self.pass_time)
        before, os.environ["KDCACHE_HOME"] = os.environ.get("KDCACHE_HOME", ""), str(self.root / who)
        running.append(process)
        try:
            work()
            outcome = "ended" if process.dead else "done"
        except Killed:
            outcome = "ended"
        except KeyboardInterrupt:
            outcome = "ended"
        except KdcacheError as error:
            outcome = "ended" if process.dead else self._told(str(error))
        except OSError as error:
            if not process.dead and not (process.full and error.errno == errno.ENOSPC and error.filename):
                raise
            outcome = "ended" if process.dead else f"refused: {error}"
        finally:
            running.pop()
            os.environ["KDCACHE_HOME"] = before
        if fate.kind == "power" and process.dead:
            with unwatched():
                process.lose_power()
            self.boots[who] += 1
        return outcome

    def _told(self, message: str) -> str:
        assert any(name in message for name in (str(self.root), self.url, self.key[:12])), f"names nothing: {message}"
        assert "\n" not in message
        return f"refused: {message}"

    def pass_time(self, seconds: float) -> None:
        """All files get older, or younger."""
        with unwatched():
            age(self.root, seconds)

    # What people do: each is a command

    def build(self, views: int, to: str = "home", whole: bool = False):
        """to: "home", "looked" (in the registry first) or "shared"."""
        shared = None if to == "home" else share.open_shared(self.url, to == "shared")
        plan = plan_build(settings(views=views), self.toy.source)
        return share.build_shared(plan, shared, to == "shared", quiet, whole=whole)

    def pack(self, who: str, kind: str):
        path = self.packed(who, kind)
        pack(str(self.cache(who)), kind, str(path), None, self.toy.source.train if kind == "ffcv" else None, quiet)

    def packed(self, who: str, kind: str) -> Path:
        return self.root / who / ("c.h5" if kind == "hdf5" else "c.beton")

    def unpack(self, of: str):
        unpack(str(self.packed(of, "hdf5")), None, quiet)

    def push(self, who: str):
        share.push(str(self.cache(who)), self.url, name="best", say=quiet)

    def pull(self, what: str | None = None):
        share.pull(what or self.key, self.url, say=quiet)

    def remove(self, who: str):
        care.remove(*care.find(str(self.cache(who))))

    def remove_shared(self):
        if "best" in open_registry(self.url).all_names():
            care.remove_name("best", self.url)
        care.remove(*care.find(self.key, self.url))

    def collect(self, days: float = 30.0, there: bool = True):
        """gc, with the removal."""
        registry = self.url if there else None
        return care.gc([*care.leavings(days, registry), *spool.leavings(days)], True)

    def repair(self, place: str):
        return verify(Cache(self.cache(place)), repair=True)

    def heal(self, place: str, who: str) -> None:
        """What a user does with a damaged cache: verify --repair, build, and whatever an error's advice is."""
        told: list[str] = []
        while (outcome := self.run(who, partial(self._mend, place, "home" if place == who else "shared"))) != "done":
            told.append(outcome)
            assert len(told) < 12 and self.follow(outcome), f"no advice that helps: {told}"
        assert content(self.cache(place)) == self.toy.whole, f"{place} is not as it was, after {told}"

    def _mend(self, place: str, to: str) -> None:
        if (self.cache(place) / "identity.json").exists():
            self.repair(place)
        self.build(VIEWS, to)

    def follow(self, message: str) -> bool:
        """Remove what a message says is to be removed; whether there was such a thing."""
        found = False
        for name in _ADVICE.findall(message):
            path = Path(name)
            if str(path).startswith(str(self.root)) and path.exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                found = True
        return found

    # What is to be seen

    def look(self, place: str, hurt: bool) -> tuple[int, ...]:
        """Read the cache at a place; the complete views. Only a `hurt` one may have any that cannot be read."""
        path = self.cache(place)
        if not (path / "identity.json").exists():
            return ()
        return self.look_at(partial(Cache, path), str(path), hurt)

    def look_at(self, opening, where: str, hurt: bool) -> tuple[int, ...]:
        cache = self.readable(opening, where, hurt)
        if cache is None or cache.key != self.key:
            assert cache is None or hurt
            views = () if cache is None else self.readable(lambda: cache.views, where, hurt) or ()
            assert all(self.readable(partial(cache.read, view), where, True) is None for view in views)
            return ()
        views = self.readable(lambda: cache.views, where, hurt) or ()
        for view in views:
            found = self.readable(partial(cache.read, view), where, hurt)
            assert found is None or same(found, self.toy.records[view]), f"{where}: wrong records in view {view}"
        if 0 in self.readable(cache.evaluation.complete_views, where, hurt) or ():
            found = self.readable(cache.read_evaluation, where, hurt or not cache.complete)
            assert found is None or _but_prior(found, self.toy.evaluation), f"{where}: wrong records of evaluation"
        return views

    def look_into(self, kind: str, path: Path, hurt: bool) -> None:
        """Read a packed file."""
        opening = partial(FFCVFile if kind == "ffcv" else Cache, path)
        file = self.readable(opening, str(path), hurt)
        if file is None:
            return
        assert file.key == self.key
        for view in file.views:
            found = self.readable(partial(file.read, view), str(path), hurt)
            assert found is None or same(found, self.toy.records[view]), f"{path}: wrong records in view {view}"
        found = self.readable(file.read_evaluation, str(path), hurt)
        assert found is None or same(found, self.toy.evaluation), f"{path}: wrong records of evaluation"
        if kind == "ffcv" and self.readable(lambda: file.check_pixels() or True, str(path), hurt):
            pixels = self.toy.source.train.pixels
            assert all(file.image(i).equal(pixels[i].permute(2, 0, 1)) for i in range(len(pixels)))

    def readable(self, get, where: str, hurt: bool):
        """What is read; None where that is refused, as it may be in a `hurt` place, by an error that names it."""
        try:
            return get()
        except KdcacheError as error:
            told = str(error)
        assert hurt, f"cannot be read, although nobody damaged it: {told}"
        assert where in told or str(self.root) in told, f"{told} does not name {where}"
        return None


def _but_prior(found, expected) -> bool:
    """Whether records are the same but for the prior, which an unfinished cache lacks."""
    return same(found, expected) if found.prior is not None else found.gaps.equal(expected.gaps)


def age(folder: Path, seconds: float) -> None:
    """Have everything below a folder get older, or younger."""
    seen = set()
    for path in folder.rglob("*"):
        about = path.lstat()
        if about.st_ino not in seen:  # of several names of one file, one is enough
            seen.add(about.st_ino)
            then = about.st_mtime_ns - int(seconds * 1e9)
            os.utime(path, ns=(then, then), follow_symlinks=False)


def signature(path: Path) -> tuple:
    """What changes when anything below a path does."""
    found = []
    for one in sorted([path, *path.rglob("*")]) if path.exists() else []:
        about = one.lstat()
        if not stat.S_ISDIR(about.st_mode):
            found.append((str(one), about.st_ino, about.st_size, about.st_ctime_ns))
    return tuple(found)
