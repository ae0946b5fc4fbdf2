"""`kdcache bench`: what training costs on this machine with the teacher in every step, from a cache, and without one.

What is compared takes turns in one run, so that a noisy machine is noisy to all alike; figures are medians with
quartiles, ratios those of each round's pairs. The teacher is untrained and a part of the data stands for all of them:
time depends on neither.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from kdcache import __version__
from kdcache.cache.errors import InputError
from kdcache.cache.files import replace_file
from kdcache.cache.home import home_at
from kdcache.pipeline.process.device import pick_device
from kdcache.train.bench.config import BenchConfig
from kdcache.train.bench.measure import Bench
from kdcache.train.bench.subject import make_source


def bench(config: BenchConfig, say: Callable[[str], None] = print, out: str | None = None) -> dict[str, Any]:
    """All figures, with hardware, versions and settings; `table` shows them. out: a file for them, as JSON.

    Its caches leave nothing in KDCACHE_HOME; data are opened as ever, which may download them there.
    """
    if out and Path(out).is_dir():
        raise InputError(f"--out {out} is a folder, not a file")
    device = pick_device(config.device)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as name:
        folder = Path(name)
        source, whole = make_source(config, folder, device)
        with home_at(folder / "home"):
            found = Bench(config, source, whole, folder, device, say).run()
    found = {"machine": machine(), "threads": torch.get_num_threads(), "command": _command(config), **found,
             "seconds": time.monotonic() - started}  # fmt: skip
    if out:
        replace_file(Path(out), (json.dumps(found, indent=2) + "\n").encode())
    return found


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return {
        "processor": next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor()),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": str(torch.__version__),
        "kdcache": __version__,
        "python": platform.python_version(),
    }


def _command(config: BenchConfig) -> str:
    words = ["kdcache", "bench"]
    for f in fields(config):
        if (value := getattr(config, f.name)) != f.default:
            words += [f"--{f.name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(words)
