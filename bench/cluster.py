"""Four builders with homes of their own and nothing in common but a bucket: what the teacher is asked; writes JSON.

    python bench/cluster.py [--views 160]

Each builder is a process of `kdcache build --registry s3://... --push` of the embedded digits, in as many shards as
there are views. Once the first shards are there, one builder is killed (SIGKILL) and another is frozen (SIGSTOP) until
the others have done all of the work, which is long after its leases have expired; then it goes on. The bucket is moto's
server on loopback, behind a proxy that answers a twentieth of the requests with 503, resets their connections, or does
what was asked and loses the answer.

images_at_most counts all that the teachers answered for: what the three that ended say themselves, and for the killed
one its commits and two shards more, as it can have had one at the teacher and one on its way. The cache that was made
is compared, byte for byte, with that of a single process.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kdcache.cache import open_cache
from kdcache.cache.errors import NotFoundError
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import shard_name
from kdcache.tests.helpers.building import content
from kdcache.tests.helpers.servers import Faulty, s3_server
from kdcache.train.bench.bench import machine

NAMES = "killed", "frozen", "third", "fourth"
SHARE = 0.05


def kdcache(line: str, home: Path, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kdcache.cli", *shlex.split(line)]
    environment = {**os.environ, "KDCACHE_HOME": str(home), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=(home.parent / f"{home.name}.log").open("w")
    )


def ended(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=1200)
    if process.returncode:
        raise SystemExit(f"{process.args} ended with {process.returncode}")
    return out


def commits(cache: Cache, views: int) -> Counter[str]:
    """How many shards each process has committed."""
    names = [shard_name(view, 0) for view in range(views)]
    there = cache.train.committed()
    return Counter(cache.train.commit(name).writer["process"] for view, name in enumerate(names) if view in there)


def share(place: Path, views: int) -> dict[str, Any]:
    """The four build together."""
    ended(kdcache("teach --teacher resnet8 --data digits --epochs 4", place / "teacher"))
    (weights,) = (place / "teacher").glob("teachers/*/*.safetensors")
    what = f"build --teacher resnet8 --weights {weights} --data digits --views {views} --json"
    alone = json.loads(ended(kdcache(what, place / "alone")))
    with s3_server() as server:
        proxy, bucket = Faulty(server, SHARE, content=False), "s3://shared/kd"
        start = time.perf_counter()
        builders = {
            name: kdcache(f"{what} --registry {bucket} --push", place / name, AWS_ENDPOINT_URL=proxy.address)
            for name in NAMES
        }
        pids, done = {name: str(one.pid) for name, one in builders.items()}, Counter[str]()
        while not (done[pids["killed"]] >= 2 and done[pids["frozen"]] >= 2):
            time.sleep(1)
            try:
                done = commits(open_cache(f"{bucket}/caches/{alone['key']}"), views)
            except NotFoundError:  # nothing is there yet
                continue
        builders["killed"].send_signal(signal.SIGKILL)
        builders["frozen"].send_signal(signal.SIGSTOP)
        results = {name: json.loads(ended(builders[name])) for name in ("third", "fourth")}
        seconds = time.perf_counter() - start
        builders["frozen"].send_signal(signal.SIGCONT)
        results["frozen"] = json.loads(ended(builders["frozen"]))
        faults = dict(proxy.kinds)
        proxy.close()
        cache = open_cache(f"{bucket}/caches/{alone['key']}")
        by = commits(cache, views)
        ended(kdcache(f"pull {alone['key']} --registry {bucket} --out {place / 'pulled'}", place / "fifth"))
    shard = cache.train.samples
    least = alone["teacher_images"]
    images = {name: result["teacher_images"] for name, result in results.items()}
    images["killed"] = (by[pids["killed"]] + 2) * shard
    return {
        "shards": views,
        "shards_committed_by": {name: by[pid] for name, pid in pids.items()},
        "images": images,
        "images_at_least": least,
        "images_at_most": sum(images.values()),
        "more_than_needed": round(sum(images.values()) / least - 1, 4),
        "faults": faults,
        "seconds": round(seconds, 1),
        "equal_to_one_process": content(place / "pulled") == content(Path(alone["path"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=160)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/cluster.json")
    a = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # the server's line for each request
    with tempfile.TemporaryDirectory() as place:
        found = share(Path(place), a.views)
    result = {"machine": machine(), "command": f"python bench/cluster.py --views {a.views}", **found}
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
