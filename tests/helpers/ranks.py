"""Ranks as torchrun starts them, but without its agent and all imports anew, which take most of a short test."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from kdcache.tests.helpers import warm


def run_ranks(count: int, line: str | list[Any], cwd: Path | None = None, **env: str) -> tuple[set[int], str, str]:
    """Run `python ...` in so many ranks. Their exit statuses, and what all have written: standard output and error."""
    words = shlex.split(line) if isinstance(line, str) else line
    # What torchrun's agent keeps for its ranks.
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=100), wait_for_workers=False)  # type: ignore[attr-defined]
    known = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "OMP_NUM_THREADS": 1, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0,
    }  # fmt: skip
    shared = {**os.environ, **{name: str(value) for name, value in known.items()}, **env}
    started = [
        warm.Popen(
            [sys.executable, *words],
            cwd=cwd, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        said = [one.communicate(timeout=200) for one in started]
    finally:
        for one in started:
            one.kill()
            one.wait()
    return {one.returncode for one in started}, "".join(out for out, _ in said), "".join(err for _, err in said)
