"""What readers do with flipped bits in the files of a run and of a filed teacher; writes JSON.

    python bench/fuzz_runs.py

In each kind of file single bits are flipped, drawn evenly over all bytes. Each must be refused in one line, or change
nothing of what its reader gets: the state of a training, a student and its notes, settings, lines of metrics, or the
teacher whose hash is in a cache's key.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdcache.cache import KdcacheError, open_cache
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier, file_classifier, load_teacher
from kdcache.pipeline.teachers.weights import taught_file, weights_hash
from kdcache.pipeline.teachers.weightstore import keep, weights_of
from kdcache.train.bench.bench import machine
from kdcache.train.config import TrainConfig
from kdcache.train.evaluate import open_trained
from kdcache.train.loop.runfolder import RunFolder, config_of, read_config
from kdcache.train.report.facts.runs import read_run
from kdcache.train.sweep import asked_before, sweep


def _quiet(line: str) -> None:
    pass


def made(home: Path) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """Build, train and file all that is damaged: the file and what its reader gives, by the kind of file."""
    os.environ["KDCACHE_HOME"] = str(home)
    torch.manual_seed(0)
    data = open_data("digits", "train")
    teacher = taught_file("resnet8", data)
    notes = {"input_size": 8, "mean": data.mean, "std": data.std, "class_names": data.class_names}
    file_classifier(teacher, Classifier(build_network("resnet8", 10, 8), data.mean, data.std), notes)
    build(BuildConfig("resnet8", data="digits", views=1, out=str(home / "cache"), allow_low_accuracy=True), _quiet)
    cache = open_cache(home / "cache")
    sweep(TrainConfig(cache=str(home / "cache"), student="resnet8", epochs=1, out=str(home / "s")), ["ce"], [3], _quiet)
    run = home / "s" / "ce-seed3"
    keep(load_teacher("resnet8", data, torch.device("cpu")), _quiet)
    (filed,) = (home / "teachers").glob("*.safetensors")

    def state() -> str:
        kept = io.BytesIO()
        torch.save(RunFolder(run, config_of(run), True).load_state(), kept)
        return hashlib.sha256(kept.getvalue()).hexdigest()

    def student() -> object:
        trained = open_trained(str(run), say=_quiet)
        return weights_hash(trained.state), trained.notes

    def run_as_read() -> object:
        found = read_run(run)
        return found.lines, found.summary, found.settings

    def resumed() -> object:
        RunFolder(run, wanted, True)
        return config_of(run)

    def at_home() -> object:
        return weights_of(cache.identity, cache.where, None, None)

    wanted = read_config(run)
    return {
        "state.pt": (run / "state.pt", state),
        "last.safetensors": (run / "last.safetensors", student),
        "config.json": (run / "config.json", resumed),
        "summary.json": (run / "summary.json", run_as_read),
        "metrics.jsonl": (run / "metrics.jsonl", run_as_read),
        "sweep.json": (home / "s" / "sweep.json", lambda: asked_before(str(home / "s"))),
        "a taught teacher": (teacher, lambda: load_teacher("resnet8", data, torch.device("cpu")).identity),
        "a filed teacher": (filed, at_home),
        "a filed teacher, given by --weights": (
            filed, lambda: load_teacher("resnet8", data, torch.device("cpu"), weights=str(filed)).identity,
        ),
    }  # fmt: skip


def flips(file: Path, read: Callable[[], Any], count: int, seed: int) -> dict[str, int]:
    """How many flipped bits were refused, changed nothing, changed something silently, or ended in another error."""
    sound, want, rng = file.read_bytes(), read(), random.Random(seed)
    found: collections.Counter[str] = collections.Counter()
    for _ in range(count):
        at = rng.randrange(8 * len(sound))
        damaged = bytearray(sound)
        damaged[at // 8] ^= 1 << at % 8
        file.write_bytes(damaged)
        try:
            found["harmless" if read() == want else "SILENT"] += 1
        except KdcacheError as e:
            found["SEVERAL LINES" if "\n" in str(e) else "refused"] += 1
        except Exception as e:
            found[f"{type(e).__name__}: {e}"[:200]] += 1
    file.write_bytes(sound)
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200, help="of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/fuzz_runs.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": machine(), "command": f"python bench/fuzz_runs.py --flips {a.flips} --seed {a.seed}", "flips": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as top:
        for kind, (file, read) in made(Path(top)).items():
            result["flips"][kind] = flips(file, read, a.flips, a.seed)
            print(f"{kind:36} {result['flips'][kind]}")
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
