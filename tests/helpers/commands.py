"""Commands run as a user runs them, and the place that they are run in."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from kdcache.cli import main
from kdcache.tests.helpers import warm

COLOURS = ((220, 40, 40), (40, 200, 60), (50, 60, 220), (200, 200, 50))


def paint(top: Path, classes: int = 4, each: int = 40, side: int = 16, seed: int = 0) -> Path:
    """Noisy images, one colour a class; every fifth goes to the evaluation split."""
    rng = np.random.default_rng(seed)
    for c in range(classes):
        for i in range(each):
            pixels = np.clip(COLOURS[c] + rng.normal(0, 60, (side, side, 3)), 0, 255).astype(np.uint8)
            path = top / ("train" if i % 5 else "val") / f"c{c}" / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return top


@dataclass(frozen=True)
class Place:
    """Everything lies below root: images, a teacher taught on them, two caches by it, one in KDCACHE_HOME."""

    root: Path
    home: Path
    work: Path  # the current directory
    pics: Path
    weights: Path
    cache: Path
    top2: Path

    def files(self) -> dict[str, tuple[int, int]]:
        """Sizes and times of change by path, without what was learnt from image headers, which is no result."""
        found = (p for p in self.root.rglob("*") if p.is_file() and p.parent.name != "datasets")
        return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


def invoke(line: str | list[str], **env: str) -> Result:
    """Run a command; what follows in the line replaces what it repeats, so that tests can vary one (--loss adds up)."""
    args: list[str] = []
    for word in shlex.split(line) if isinstance(line, str) else line:
        if word.startswith("--") and word != "--loss" and word in args:
            del args[args.index(word) : args.index(word) + 2]
        args.append(word)
    return CliRunner().invoke(main, args, env=dict(env), catch_exceptions=False)


def works(line: str | list[str], **env: str) -> Result:
    """Run a command that must succeed."""
    result = invoke(line, **env)
    assert result.exit_code == 0, result.output
    return result


def is_refused(place: Place, line: str | list[str], *parts: str, **env: str) -> str:
    """Run a command that must be refused, without a change to any file; its one line, which holds all `parts`."""
    before = place.files()
    result = invoke(line, **env)
    lines = result.stderr.splitlines()
    assert result.exit_code == 2, result.output
    assert [text.startswith("Error: ") for text in lines].count(True) == 1, result.stderr
    assert lines[-1].startswith("Error: ") and len(lines[-1]) < 2000
    assert "Traceback" not in result.output and not result.stdout
    for part in parts:
        assert part in lines[-1]
    assert place.files() == before
    return lines[-1]


def start(line: str, fresh: bool = False, **env: str) -> subprocess.Popen[str]:
    """`python -m kdcache.cli` in a process group of its own, as a shell starts it; fresh: it imports all anew."""
    return (subprocess.Popen if fresh else warm.Popen)(
        [sys.executable, "-m", "kdcache.cli", *shlex.split(line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def is_there(group: int) -> bool:
    """Whether a process group still has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def commands_of(group: int) -> set[str]:
    """The names of the programs that the processes of a group run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
        except OSError:  # it ended meanwhile
            continue
        if int(rest.split()[2]) == group:
            found.add(name)
    return found


_ON_SMALL_PLACES = """
import ctypes, os, runpy, subprocess, sys
from pathlib import Path
user, group = os.getuid(), os.getgid()
assert ctypes.CDLL(None, use_errno=True).unshare(0x10000000 | 0x00020000) == 0, ctypes.get_errno()  # NEWUSER, NEWNS
for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
    Path(f"/proc/self/{name}").write_text(text)
subprocess.run(["bash", "-c", sys.argv[1]], check=True)
sys.argv[:2] = ["kdcache"]
runpy.run_module("kdcache.cli", run_name="__main__", alter_sys=True)
"""


def on_small_places(mounts: str, line: str) -> subprocess.CompletedProcess[str]:
    """Run a command after a shell script that may mount: what that mounts is the command's, and gone with it."""
    words = [sys.executable, "-c", _ON_SMALL_PLACES, f"mount --make-rprivate /; {mounts}", *shlex.split(line)]
    found: subprocess.CompletedProcess[str] = warm.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return found
