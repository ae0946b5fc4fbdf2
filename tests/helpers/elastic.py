"""torchrun's agent whose ranks are forked from it, which saves each of them the seconds of its imports.

`python -m kdcache.tests.helpers.elastic RANKS RESTARTS FOLDER WORD...` runs `kdcache WORD...` in so many ranks. Each
writes its pid to a file of the folder, whose name is its number.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def rank(pids: str, *words: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the agent's own is not for what it forks
    mine = Path(pids, os.environ["RANK"])
    mine.with_suffix(".new").write_text(str(os.getpid()))
    mine.with_suffix(".new").replace(mine)
    sys.argv = ["kdcache", *words]
    runpy.run_module("kdcache.cli", run_name="__main__", alter_sys=True)


def run(count: int, restarts: int, words: list[str]) -> None:
    config = LaunchConfig(
        1, 1, count, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=restarts, monitor_interval=0.1,
        start_method="fork",
    )  # fmt: skip
    elastic_launch(config, rank)(*words)


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
