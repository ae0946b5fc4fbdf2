"""Does a change alter results? Both versions of the code do the same work here, and all they wrote is compared.

    python bench/same.py BASE [NEW] [--cifar DIR] [--work DIR] [--out FILE]

BASE and NEW are commits; without NEW it is the working tree. Both build, train, pack, unpack, push and pull on the
digits, on image files and, with --cifar, on a folder that get-cifar10 wrote. Compared are keys, the bytes of all files
of caches, commits without the part that says who wrote them, the metrics of each epoch, and students' weights.

Teachers are taught by BASE and used by both, so that a change to teaching shows in its own row alone. Exit status 1 if
anything differs. Mixed and spread views are left out where BASE does not know them, which is said. Who changes numerics
owes a measurement of what it does to students; who does not owes equal results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_digits

from kdcache.train.bench.bench import machine

ROOT = Path(__file__).parent.parent
TEACHER = "resnet8"
# Caches that came later, each with the options of a training from it.
LATER = {
    "mixed": (
        "--views 5 --topk 3 --augment crop,flip,randaugment(2,9),erase(0.25),mixup(0.2),cutmix(1)",
        "--loss nkd:gamma=1.5,temperature=1",
    ),
    "spread": (
        "--views 3 --sequence spread --augment rrc,flip,three,color(0.3,0.3,0.3,0)",
        "--loss kd:alpha=0.5,beta=1,temperature=4",
    ),
    "both": (
        "--views 2 --sequence spread --augment flip,trivial,gray(0.2),blur(0.5),solarize(0.2),mixup(0.8)",
        "--loss ce --online --fresh-views",
    ),
}
_UNKNOWN = ("unknown view policy", "unknown operation", "No such option")
_TIMES = {"seconds", "images_per_second", "cache_path"}  # of metrics and settings: nothing that is computed


class Version:
    """One version of the code, which works in a folder of its own."""

    def __init__(self, commit: str | None, place: Path) -> None:
        self.place, self.home, self.code = place, place / "home", place / "code"
        place.mkdir(parents=True)
        if commit:
            self.code.mkdir()
            archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
            subprocess.run(["tar", "-x", "-C", str(self.code)], input=archive, check=True)
        else:
            self.code.symlink_to(ROOT)
        (place / "path").mkdir()
        (place / "path" / "kdcache").symlink_to(self.code)

    def run(self, line: str) -> str:
        """Run one kdcache command; what it printed. Its errors stop everything."""
        done = self._try(line)
        if done.returncode:
            sys.exit(f"{self.place.name}: kdcache {line}\n{done.stderr[-2000:]}")
        return done.stdout

    def knows(self, line: str) -> bool:
        """Whether this version knows the view policies and options of a command, which is run to find out."""
        done = self._try(line)
        if done.returncode == 2 and any(words in done.stderr for words in _UNKNOWN):
            return False
        if done.returncode:
            sys.exit(f"{self.place.name}: kdcache {line}\n{done.stderr[-2000:]}")
        return True

    def _try(self, line: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("KDCACHE_")}
        env = {**kept, "KDCACHE_HOME": str(self.home), "PYTHONPATH": str(self.place / "path")}
        command = [sys.executable, "-m", "kdcache.cli", *line.split()]
        return subprocess.run(command, cwd=self.place, env=env, capture_output=True, text=True)

    def teach(self, data: str, epochs: int) -> Path:
        """The file of a taught teacher."""
        line = f"teach --teacher {TEACHER} --data {data} --epochs {epochs} --json"
        return Path(json.loads(self.run(line))["weights"])


def image_files(top: Path) -> str:
    """Digits as JPEG files of several shapes, 12 of each class for training; the spec of these data."""
    digits = load_digits()
    for label in range(4):
        for i, pixels in enumerate(digits.images[digits.target == label][:16]):
            path = top / ("train" if i < 12 else "val") / f"digit{label}" / f"{i:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            size = (240 + 8 * i, 300 - 4 * i)
            Image.fromarray((pixels * 15).astype(np.uint8)).convert("RGB").resize(size).save(path, quality=90)
    return f"imagefolder:{top}"


def work(version: Version, data: str, teacher: Path, name: str, size: str) -> dict[str, str]:
    """Do the main jobs on a dataset; everything that came of it by name."""
    given = _given(data, teacher)
    caches = {
        "dense": "--views 3",
        "float32": "--views 1 --precision float32 --augment crop,flip --seed 5",
        "top": "--views 2 --topk 3 --tail-std --augment rrc,flip",
    }
    found: dict[str, str] = {}
    for kind, options in caches.items():
        built = json.loads(version.run(f"build {given} {options} --out {name}-{kind}"))
        found[f"{name}/{kind}/key"] = built["key"]
        found |= cache_facts(version.place / f"{name}-{kind}", f"{name}/{kind}")
    version.run(f"pack {name}-top --to hdf5 --out {name}.h5 --json")
    version.run(f"unpack {name}.h5 --out {name}-unpacked --json")
    version.run(f"push {name}-top --registry registry --json")
    version.run(f"pull {built['key']} --registry registry --out {name}-pulled --json")
    for kind in ("unpacked", "pulled"):
        found |= cache_facts(version.place / f"{name}-{kind}", f"{name}/{kind}")
    train = f"train --data {data} --student {TEACHER} --epochs 2 {size} --json"
    runs = {  # options spelled out, since presets may change on purpose
        "nkd": f"--loss nkd:gamma=1.5,temperature=1 --cache {name}-dense",
        "kd": f"--loss kd:alpha=0.5,beta=1,temperature=4 --cache {name}-top --seed 1",
        "dkd": f"--loss dkd:alpha=1,beta=2,temperature=4,warmup=3 --cache {name}-float32 --ema 0.9",
        "adamw": f"--loss kd:alpha=0.5,beta=1,temperature=2 --cache {name}-dense --optimiser adamw --accumulate 2",
        "online": f"--loss kd:alpha=0.5,beta=1 --cache {name}-float32 --online --weights {teacher} --fresh-views",
    }
    for run, options in runs.items():
        version.run(f"{train} {options} --out {name}-{run}")
        found |= run_facts(version.place / f"{name}-{run}", f"{name}/{run}")
    return found


def later_work(version: Version, data: str, teacher: Path, name: str, size: str, kinds: list[str]) -> dict[str, str]:
    """Build and train as in LATER; everything that came of it by name."""
    found: dict[str, str] = {}
    for kind in kinds:
        options, run = LATER[kind]
        built = json.loads(version.run(f"build {_given(data, teacher)} {options} --out {name}-{kind}"))
        found[f"{name}/{kind}/key"] = built["key"]
        found |= cache_facts(version.place / f"{name}-{kind}", f"{name}/{kind}")
        weights = f"--weights {teacher}" if "--online" in run else ""
        train = f"train --data {data} --student {TEACHER} --epochs 2 {size} --json {run} {weights}"
        version.run(f"{train} --cache {name}-{kind} --out {name}-{kind}-run")
        found |= run_facts(version.place / f"{name}-{kind}-run", f"{name}/{kind}-run")
    return found


def _given(data: str, teacher: Path) -> str:
    return f"--teacher {TEACHER} --weights {teacher} --data {data} --allow-low-accuracy --json"


def cache_facts(cache: Path, name: str) -> dict[str, str]:
    """The bytes of all files; of commits, all but who wrote them."""
    found = {}
    for file in sorted(p for p in cache.rglob("*") if p.is_file() and "scratch" not in p.parts):
        content = file.read_bytes()
        if file.parent.name == "commits":
            commit = json.loads(content)
            content = json.dumps({k: v for k, v in commit.items() if k != "writer"}, sort_keys=True).encode()
        found[f"{name}/{file.relative_to(cache)}"] = hashlib.sha256(content).hexdigest()
    return found


def run_facts(run: Path, name: str) -> dict[str, str]:
    """Metrics of each epoch to the last digit, and the student's tensors."""
    found = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        # Earlier versions did not log the parts of a loss, which add up to it.
        for key in sorted(key for key in line.keys() - _TIMES if not key.startswith("loss_")):
            found[f"{name}/epoch {line['epoch']}/{key}"] = repr(line[key])
    found |= tensors(run / "last.safetensors", f"{name}/weights")
    return found


def tensors(file: Path, name: str) -> dict[str, str]:
    """A hash of each tensor in a file."""
    with safe_open(file, "pt") as f:
        kept = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    return {
        f"{name}/{key}": hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for key, t in kept.items()
    }


def scenarios(base: Version, new: Version, cifar: Path | None, work_place: Path) -> Iterator[dict[str, dict[str, str]]]:
    """What BASE and NEW give for each dataset."""
    data = {"digits": ("digits", ""), "files": (image_files(work_place / "images"), "--image-size 64 --batch-size 16")}
    if cifar:
        data["cifar10"] = (f"imagefolder:{cifar}", "--batch-size 128")
    for name, (spec, size) in data.items():
        print(f"{name}: teach", flush=True)
        taught = {version: version.teach(spec, 2) for version in (base, new)}
        yield {v.place.name: tensors(file, f"{name}/teach") for v, file in taught.items()}
        print(f"{name}: build, train, share", flush=True)
        yield {v.place.name: work(v, spec, taught[base], name, size) for v in (base, new)}
        given = _given(spec, taught[base])
        kinds = [kind for kind, (o, _) in LATER.items() if base.knows(f"build {given} {o} --out {name}-{kind}")]
        if unknown := sorted(LATER.keys() - kinds):
            print(f"{name}: BASE does not know {', '.join(unknown)}", flush=True)
        yield {v.place.name: later_work(v, spec, taught[base], name, size, kinds) for v in (base, new)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--cifar", type=Path, help="a folder with train and test, written by get-cifar10")
    parser.add_argument("--work", type=Path, help="keep everything in this new folder")
    parser.add_argument("--out", type=Path, help="write the comparison as JSON")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = (a.work or Path(scratch) / "same").absolute()
        base, new = Version(a.base, place / "base"), Version(a.new, place / "new")
        rows: dict[str, dict[str, object]] = {}
        for both in scenarios(base, new, a.cifar and a.cifar.absolute(), place):
            compare(both["base"], both["new"], rows)
    for name, row in rows.items():
        different = row["different"]
        assert isinstance(different, list)
        more = f", such as {', '.join(map(str, different[:3]))}" if different else ""
        print(f"{name:20} {row['equal']:5} equal {len(different):5} different{more}")
    if a.out:
        a.out.write_text(
            json.dumps({"base": a.base, "new": a.new, "rows": rows, "machine": machine()}, indent=2) + "\n"
        )
    sys.exit(1 if any(row["different"] for row in rows.values()) else 0)


def compare(base: dict[str, str], new: dict[str, str], rows: dict[str, dict[str, object]]) -> None:
    """Add, by the first two parts of the names, how many are equal and which are not."""
    for name in sorted({*base, *new}):
        section = "/".join(name.split("/")[:2])
        row = rows.setdefault(section, {"equal": 0, "different": []})
        if base.get(name) == new.get(name):
            row["equal"] = int(str(row["equal"])) + 1
        else:
            different = row["different"]
            assert isinstance(different, list)
            different.append(name.removeprefix(section + "/"))


if __name__ == "__main__":
    main()
