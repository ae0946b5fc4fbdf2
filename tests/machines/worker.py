"""One version of kdcache at work for `turns`: reads a command a line, does it, and writes a line with what came of it.

It runs with the code of that version, so that it uses only what both have; nothing of tests/ is imported.
"""

import hashlib
import itertools
import json
import os
import sys
import traceback
from pathlib import Path

import torch

from kdcache.cache import care
from kdcache.cache.errors import KdcacheError
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

SETTINGS = {
    "teacher": "kd_machines:net", "data": "kd_machines:images", "augment": "crop,flip", "topk": 4,
    "temperatures": (1.0, 4.0), "batch_size": 16, "allow_low_accuracy": True, "device": "cpu", "part": 32,
}  # fmt: skip
DIED = 77


def quiet(line):
    pass


def open_toy():
    torch.set_num_threads(1)
    os.fsync = lambda fd: None  # a process that dies loses nothing that it has written
    spool.SPOOL_SECONDS, builder._POLL_SECONDS = 0.0, 0.01
    build_module.probe = lambda *a: (1e9, 1.0)
    return open_source(BuildConfig(**SETTINGS), quiet)


SOURCE = open_toy()
KEY = SOURCE.identity.key


class Commands:
    """What people do, on the machine `who`, whose home lies below `root`."""

    def __init__(self, root, who):
        self.root, self.who = Path(root), who
        self.registry = str(self.root / "shared")

    def cache(self, place):
        return self.root / place / "caches" / KEY

    def packed(self, who, kind):
        return self.root / who / ("c.h5" if kind == "hdf5" else "c.beton")

    def build(self, views, to):
        shared = None if to == "home" else share.open_shared(self.registry, to == "shared")
        share.build_shared(plan_build(BuildConfig(**SETTINGS, views=views), SOURCE), shared, to == "shared", quiet)

    def push(self):
        share.push(str(self.cache(self.who)), self.registry, name="best", say=quiet)

    def pull(self):
        share.pull(KEY, self.registry, say=quiet)

    def pack(self, kind):
        data = SOURCE.train if kind == "ffcv" else None
        pack(str(self.cache(self.who)), kind, str(self.packed(self.who, kind)), None, data, quiet)

    def unpack(self, of):
        unpack(str(self.packed(of, "hdf5")), None, quiet)

    def gc(self):
        care.gc([*care.leavings(30.0, self.registry), *spool.leavings(30.0)], True)

    def rm(self):
        care.remove(*care.find(str(self.cache(self.who))))

    def verify(self, place):
        if not (self.cache(place) / "identity.json").exists():
            return {}
        return {"problems": verify(Cache(self.cache(place))).problems}

    def read(self, place):
        """A digest of every view that is complete there, and of every view in each packed file there."""
        found, there = {}, self.cache(place)
        if (there / "identity.json").exists():
            found |= of_cache(Cache(there), "")
        if (h5 := self.packed(place, "hdf5")).exists():
            found |= of_cache(Cache(h5), f" in {h5.name}")
        if (beton := self.packed(place, "ffcv")).exists():
            found |= of_cache(FFCVFile(beton), f" in {beton.name}")
        return found


def of_cache(cache, where):
    found = {f"key{where}": cache.key} | {f"{view}{where}": digest(cache.read(view)) for view in cache.views}
    return found | ({f"evaluation{where}": digest(cache.read_evaluation())} if cache.views else {})


def digest(records):
    fields = ("classes", "gaps", "target_gap", "tail", "labels", "prior")
    parts = [getattr(records, field) for field in fields]
    return hashlib.sha256(b"".join(p.contiguous().numpy().tobytes() for p in parts if p is not None)).hexdigest()


def answer(asked):
    commands = Commands(asked.pop("root"), asked.pop("who"))
    os.environ["KDCACHE_HOME"] = str(commands.root / commands.who)
    name, step = asked.pop("command"), asked.pop("step")
    if step:
        return survives(lambda: getattr(commands, name)(**asked), step)
    try:
        return getattr(commands, name)(**asked) or {}
    except KdcacheError as error:
        return {"error": str(error), "kind": "KdcacheError"}
    except Exception as error:
        return {"error": str(error), "kind": type(error).__name__}


def survives(work, step):
    """Do the work in a child that dies at a step, if it has not come to its end before."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return {"died": True} if code == DIED else {} if code == 0 else {"error": "see above", "kind": f"status {code}"}
    counted = itertools.count(1)

    def audit(event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in ("os.link", "os.rename", "os.remove", "os.mkdir")) and next(counted) == step:
            os._exit(DIED)

    sys.addaudithook(audit)
    try:
        work()
    except KdcacheError:
        pass
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main():
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what kdcache prints is no answer
    for line in sys.stdin:
        out.write(json.dumps(answer(json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
