"""Several builders of one cache: they share the work, and whatever happens to them, one answer becomes part of it."""

import json
import os
import secrets
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from kdcache.cache import arrays, files
from kdcache.cache.arrays import ArraySpec
from kdcache.cache.identity import Identity
from kdcache.cache.store import SplitStore

# ---- what is committed: every interleaving ----

SPEC = ArraySpec("toy", (2, 1), 1, "uint8", ("sample", "value"))
NAME = "v00000-p0001"
FILE = f"{SPEC.chunk_file(1)}"
VALUES = {"a": 1, "b": 2, "c": 3}


class Stopped(BaseException):
    """The run ends here: this state was reached before in another way."""


class Actor(threading.Thread):
    """Does `work`, one step at each `step()`; a step is what lies between two operations that others can notice."""

    def __init__(self, name, work):
        super().__init__(name=name, daemon=True)
        self.work, self.seen, self.stopped, self.error = work, [], False, None
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)

    def run(self):
        self.go.acquire()
        try:
            if not self.stopped:
                self.seen.append(("done", self.work()))
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.back.release()

    def step(self):
        self.go.release()
        self.back.acquire()
        if self.error:
            raise self.error

    def pause(self):
        self.back.release()
        self.go.acquire()
        if self.stopped:
            raise Stopped

    @property
    def done(self):
        return bool(self.seen) and self.seen[-1][0] == "done"

    def stop(self):
        self.stopped = True
        while self.is_alive():
            self.go.release()
            self.join(0.0005)


def stepwise(monkeypatch):
    """Every operation on files that another builder can notice or be disturbed by waits for its turn."""

    def gate(owner, name, kind=None):
        operation = getattr(owner, name)

        def gated(*args, **kwargs):
            actor = threading.current_thread()
            if not isinstance(actor, Actor):
                return operation(*args, **kwargs)
            actor.pause()
            try:
                result = operation(*args, **kwargs)
                result = list(result) if name == "glob" else result
            except Exception as error:
                actor.seen.append((name, type(error).__name__))
                raise
            seen = [p.name for p in result] if name == "glob" else result
            actor.seen.append((name, seen if isinstance(seen, bool | bytes | list | None) else None))
            return result

        monkeypatch.setattr(owner, name, gated)

    for owner, name in (
        (os, "link"),
        (os, "replace"),
        (os, "rename"),
        (files, "read_bounded"),
        (files, "write"),
        (SplitStore, "has"),
        (Path, "glob"),
    ):
        gate(owner, name)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    count = {}

    def name_of_its_own(size):
        who = threading.current_thread().name
        count[who] = count.get(who, 0) + 1
        return f"{who}{count[who]}"

    monkeypatch.setattr(secrets, "token_hex", name_of_its_own)
    encode, kept = arrays.encode_part, {}

    def encoded(spec, part, rows):
        key = spec.name, part, rows.tobytes()
        if key not in kept:
            kept[key] = encode(spec, part, rows)
        return kept[key]

    monkeypatch.setattr(arrays, "encode_part", encoded)
    return count


def tree(root):
    """All files and what they hold; of folders in scratch/ also the empty ones."""
    found = {}
    for folder, _, names in os.walk(root):
        found[folder[len(str(root)) :]] = None
        for name in names:
            found[f"{folder[len(str(root)) :]}/{name}"] = Path(folder, name).read_bytes()
    return found


class World:
    """A folder with one store a builder; all write the same shard, each its own value unless they `agree`."""

    def __init__(self, root, identity, agree=False):
        self.root, self.identity, self.agree = root, identity, agree

    def store(self, who):
        return SplitStore(self.root, "train", self.identity, token=who)

    def write(self, who):
        rows = np.array([[0 if self.agree else VALUES[who]]], "uint8")
        return self.store(who).write(NAME, [("", SPEC, 1, rows)], {"host": who})

    def take_over(self, who, of):
        """As a builder that takes `of` for dead."""
        self.store(who).finish(NAME)
        files.remove_folder(self.root / "scratch" / of, self.root / "scratch" / who)
        return self.write(who)

    def committed(self):
        """Who is committed, from the files alone; None where nothing is. Fails where the bytes are not those."""
        commit = self.root / "commits" / f"{NAME}.json"
        if not commit.exists():
            return None
        about = json.loads(commit.read_bytes())
        ((file, stored),) = about["files"].items()
        assert file == FILE
        assert files.sha256((self.root / file).read_bytes()) == stored["sha256"]
        return about["writer"]["host"]


CASES = {
    "two writers": lambda w: {"a": lambda: w.write("a"), "b": lambda: w.write("b")},
    "two that agree": lambda w: {"a": lambda: w.write("a"), "b": lambda: w.write("b")},
    "over leavings": lambda w: {"a": lambda: w.write("a"), "b": lambda: w.write("b")},
    "a decision of the dead": lambda w: {"a": lambda: w.write("a"), "b": lambda: w.write("b")},
    "taken for dead": lambda w: {"a": lambda: w.write("a"), "b": lambda: w.take_over("b", "a")},
    "taken for dead by both": lambda w: {"a": lambda: w.take_over("a", "b"), "b": lambda: w.take_over("b", "a")},
}


def prepare(case, root, identity):
    world = World(root, identity, agree=case == "two that agree")
    world.store("x").write("v00000-p0000", [("", SPEC, 0, np.array([[9]], "uint8"))], {"host": "x"})
    if case == "over leavings":
        (root / FILE).parent.mkdir()
        (root / FILE).write_bytes(b"left by someone")
    if case == "a decision of the dead":
        dead = world.store("c")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SplitStore, "finish", lambda *a: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                world.write("c")
        assert dead.decided() == [NAME]
    return world


@pytest.fixture
def memory(tmp_path):
    """A folder, in memory where there is one: thousands of small files come and go."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize("case", CASES)
def test_one_writer_wins_whole_in_every_interleaving_and_death(case, memory, identity, monkeypatch):
    """All of them, depth first; states that are reached twice are followed once.

    In every state that two writers can reach: what is committed is whole; who has returned has told the truth; and were
    both to die there, a third one comes to a good end.
    """
    count = stepwise(monkeypatch)
    prepare(case, memory / "start", identity)
    visited, revived, winners, todo = set(), set(), set(), [()]
    while todo:
        schedule, root, steps = todo.pop(), memory / "world", []
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(memory / "start", root)
        world = World(root, identity, agree=case == "two that agree")
        count.clear()
        actors = {name: Actor(name, work) for name, work in CASES[case](world).items()}
        for actor in actors.values():
            actor.start()
        for turn in schedule:
            steps.append(turn)
            actors[turn].step()
        while True:
            at = str(sorted(tree(root).items()))
            key = at, str([(steps.count(name), actor.seen) for name, actor in actors.items()])
            if key in visited:
                break
            visited.add(key)
            winner = world.committed()
            for name, actor in actors.items():
                if actor.done:
                    assert winner is not None, steps
                    assert actor.seen[-1][1] == (world.agree or winner == name), steps
            if at not in revived:
                revived.add(at)
                revive(root, memory / "revived", world)
            able = [name for name, actor in actors.items() if not actor.done]
            if not able:
                winners.add(winner)
                assert world.store("c").decided() == [], steps
                break
            turn, *others = able
            todo += [(*steps, other) for other in others]
            steps.append(turn)
            actors[turn].step()
        for actor in actors.values():
            actor.stop()
    assert winners == ({"c"} if case == "a decision of the dead" else {"a", "b"})
    assert len(visited) > 500


def revive(root, copy, world):
    """From the files that two dead builders left: a third finishes, and who was committed stays so."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy)
    after = World(copy, world.identity, world.agree)
    before, store = after.committed(), after.store("c")
    decided = [json.loads(p.read_bytes())["writer"]["host"] for p in copy.glob("scratch/decided/train/*/commit.json")]
    for name in store.decided():
        store.finish(name)
    assert after.write("c") == (world.agree or after.committed() == "c")
    assert after.committed() == (before or [*decided, "c"][0])
    assert store.decided() == []


@pytest.fixture(scope="module")
def identity():
    data = {"name": "toy", "fingerprint": "f" * 64, "full_contents": False, "files": False, "samples": 2}
    return Identity.model_validate(
        {
            "teacher": {
                "architecture": "toy", "weights": "a" * 64, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2),
                "input_size": 8, "numeric": "float32",
            },
            "data": {**data, "split": "train"},
            "evaluation": {**data, "split": "eval"},
            "views": {"policy": "crop", "seed": 0, "renderer": "toy"},
            "record": {
                "classes": 3, "k": None, "temperatures": (), "precision": "float16", "labels": 1, "tail_std": False,
            },
            "class_map": None,
            "part": 1,
        }
    )  # fmt: skip
