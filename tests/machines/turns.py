"""A machine in which two versions of kdcache take turns over the same homes and the same registry.

Each version is a process that reads one command a line (`worker.py`). A command that is to die does so in a child of
that process, by os._exit, at a step that is counted as elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kdcache.tests.machines.folders import COUNT, KIND, SECONDS, TO, WHO
from kdcache.tests.machines.world import MEMORY, age

WORKER = Path(__file__).with_name("worker.py")
VERSION = st.sampled_from(["before", "now"])
STEP = st.one_of(st.just(0), st.integers(1, 40), st.integers(1, 300))


class Version:
    """A version of kdcache at work: a process, to which one command at a time is given."""

    def __init__(self, path: Path, toy: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER)],
            env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{toy}", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, command: str, **arguments: object) -> dict:
        """The answer to a command: what it returned, or `error` and the class of the error."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process has ended at {command} {arguments}"
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Turns(RuleBasedStateMachine):
    """versions: by name. expected: what `read` tells of the uninterrupted build. tally, lengths: as there."""

    versions: dict[str, Version]
    expected: dict[str, str]
    tally: ClassVar[Counter[str]] = Counter()
    lengths: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="turns", dir=MEMORY)).resolve()
        for name in ("a", "b", "shared"):
            (self.folder / name).mkdir()
        self.steps, self.views = 0, {place: set() for place in ("a", "b", "shared")}

    def teardown(self) -> None:
        self.lengths.append(self.steps)
        shutil.rmtree(self.folder)

    def ask(self, version: str, command: str, who: str, step: int = 0, **arguments: object) -> dict:
        answer = self.versions[version].ask(command, root=str(self.folder), who=who, step=step, **arguments)
        outcome = "died" if answer.get("died") else "refused" if "error" in answer else "done"
        self.tally[f"{command} by {version}: {outcome}"] += 1
        assert answer.get("kind", "KdcacheError") == "KdcacheError", answer
        if "error" in answer:
            assert str(self.folder) in answer["error"] or self.expected["key"][:12] in answer["error"], answer
        return answer

    def there(self, *places):
        return any(list((self.folder / place / "caches").glob("*/identity.json")) for place in places)

    @initialize(version=VERSION, views=COUNT)
    def begin(self, version, views):
        self.build(version, "a", views, "home", 0)

    @rule(version=VERSION, who=WHO, views=COUNT, to=TO, step=STEP)
    def build(self, version, who, views, to, step):
        answer = self.ask(version, "build", who, step, views=views, to=to)
        if not step and to == "home":
            assert "error" not in answer, answer

    @precondition(lambda self: self.there("a", "b"))
    @rule(version=VERSION, who=WHO, step=STEP)
    def push(self, version, who, step):
        self.ask(version, "push", who, step)

    @precondition(lambda self: self.there("shared"))
    @rule(version=VERSION, who=WHO, step=STEP)
    def pull(self, version, who, step):
        self.ask(version, "pull", who, step)

    @precondition(lambda self: self.there("a", "b"))
    @rule(version=VERSION, who=WHO, kind=KIND, step=STEP)
    def pack(self, version, who, kind, step):
        self.ask(version, "pack", who, step, kind=kind)

    @precondition(lambda self: any(self.folder.glob("?/c.h5")))
    @rule(version=VERSION, who=WHO, of=WHO, step=STEP)
    def unpack(self, version, who, of, step):
        self.ask(version, "unpack", who, step, of=of)

    @rule(version=VERSION, who=WHO, place=st.sampled_from(["a", "b", "shared"]))
    def verify(self, version, who, place):
        answer = self.ask(version, "verify", who, place=place)
        assert all("run kdcache build again" in problem for problem in answer.get("problems", ())), answer

    @rule(version=VERSION, who=WHO, step=STEP)
    def collect(self, version, who, step):
        if not list(self.folder.glob("shared/names/best")):  # without a name it may go, once it is old
            self.views["shared"] = set()
        self.ask(version, "gc", who, step)

    @precondition(lambda self: self.there("a", "b"))
    @rule(version=VERSION, who=WHO, step=STEP)
    def remove(self, version, who, step):
        self.ask(version, "rm", who, step)
        self.views[who] = set()

    @rule(seconds=SECONDS)
    def pass_time(self, seconds):
        age(self.folder, seconds)
        self.tally["clock"] += 1

    @invariant()
    def both_read_the_same(self):
        """Each version reads whatever is complete anywhere, as the uninterrupted build made it, and in each file."""
        self.steps += 1
        for place in ("a", "b", "shared"):
            found = [self.ask(version, "read", "a", place=place) for version in self.versions]
            assert found[0] == found[1], found
            for what, digest in found[0].items():
                assert digest == self.expected[what.partition(" in ")[0]], (place, what)
            views = {what for what in found[0] if " in " not in what and what != "key"}
            assert views >= self.views[place], f"{place} has lost {self.views[place] - views}"
            self.views[place] = views
