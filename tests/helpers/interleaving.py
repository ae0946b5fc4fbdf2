"""Every order in which the steps of several processes can fall, one after the other."""

import json
import os
import secrets
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from kdcache.cache import files
from kdcache.cache.store import chunks
from kdcache.cache.store.layout import ArraySpec, Chunk
from kdcache.cache.store.leases import FolderLeases
from kdcache.cache.store.place import Folder
from kdcache.cache.store.publish import SplitStore

SPEC = ArraySpec("toy", (2, 1), 1, "uint8", ("sample", "value"))


NAME = "v00000-p0001"


FILE = f"{SPEC.chunk_file(1)}"


VALUES = {"a": 1, "b": 2, "c": 3}


IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # for thousands of small files


NAMED = {}  # how many random names each actor has drawn


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

    def gate(owner, name, below=""):
        operation = getattr(owner, name)

        def gated(*args, **kwargs):
            actor = threading.current_thread()
            if not isinstance(actor, Actor) or below not in str(args[0]):
                return operation(*args, **kwargs)
            actor.pause()
            try:
                result = operation(*args, **kwargs)
            except Exception as error:
                actor.seen.append((name, type(error).__name__))
                raise
            actor.seen.append((name, result if isinstance(result, bool | bytes | list) else None))
            return result

        monkeypatch.setattr(owner, name, gated)

    for owner, name in (
        (os, "link"),
        (os, "replace"),
        (os, "rename"),
        (files, "read_bounded"),
        (files, "write"),
        (files, "names"),
        (SplitStore, "has"),
    ):
        gate(owner, name)
    for name in ("unlink", "utime", "stat"):
        gate(os, name, "/leases/")
    monkeypatch.setattr(os, "fsync", lambda fd: None)

    def name_of_its_own(size):
        who = threading.current_thread().name
        NAMED[who] = NAMED.get(who, 0) + 1
        return f"{who}{NAMED[who]}"

    monkeypatch.setattr(secrets, "token_hex", name_of_its_own)
    encode, kept = chunks.encode_part, {}

    def encoded(spec, part, rows):
        key = spec.name, part, rows.tobytes()
        if key not in kept:
            kept[key] = encode(spec, part, rows)
        return kept[key]

    monkeypatch.setattr(chunks, "encode_part", encoded)


def tree(root):
    """All files and what they hold; of folders in scratch/ also the empty ones."""
    found = {}
    for folder, _, names in os.walk(root):
        found[folder[len(str(root)) :]] = None
        for name in names:
            found[f"{folder[len(str(root)) :]}/{name}"] = Path(folder, name).read_bytes()
    return found


def explore(folder, works, check):
    """Run `works(root)`, functions by name, in every interleaving of their steps, from the files in folder/start.

    Depth first; states that are reached twice are followed once. check(root, state, results) is called in each, with
    the files as text and what those have returned who have. How many states there are.
    """
    visited, todo = set(), [()]
    while todo:
        schedule, root, steps = todo.pop(), folder / "world", []
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(folder / "start", root)
        NAMED.clear()
        actors = {name: Actor(name, work) for name, work in works(root).items()}
        for actor in actors.values():
            actor.start()
        for turn in schedule:
            steps.append(turn)
            actors[turn].step()
        while True:
            state = str(sorted(tree(root).items()))
            key = state, str([(steps.count(name), actor.seen) for name, actor in actors.items()])
            if key in visited:
                break
            visited.add(key)
            check(root, state, {name: actor.seen[-1][1] for name, actor in actors.items() if actor.done})
            able = [name for name, actor in actors.items() if not actor.done]
            if not able:
                break
            turn, *others = able
            todo += [(*steps, other) for other in others]
            steps.append(turn)
            actors[turn].step()
        for actor in actors.values():
            actor.stop()
    return len(visited)


class World:
    """A folder with one store a builder; all write the same shard, each its own value unless they `agree`."""

    def __init__(self, root, identity, agree=False):
        self.root, self.identity, self.agree = root, identity, agree

    def store(self, who):
        return SplitStore(Folder(self.root), "train", self.identity, token=who)

    def write(self, who):
        rows = np.array([[0 if self.agree else VALUES[who]]], "uint8")
        return self.store(who).write(NAME, [(Chunk("", SPEC, 1), rows)], {"host": who})

    def clear(self, who, of):
        """As a builder that takes `of` for dead."""
        self.store(who).finish(NAME)
        files.remove_folder(self.root / "scratch" / of, self.root / "scratch" / who)

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


CASES = ("two writers", "two that agree", "over leavings", "a decision of the dead", "taken for dead")


# Minutes each: bench/faults.py runs them.
LONG_CASES = ("taken over", "taken over by both", "a decision of the dead, two helpers and a late writer")


def writers(case, world):
    def over(who, of):
        return lambda: (world.clear(who, of), world.write(who))[1]

    a, b = lambda: world.write("a"), lambda: world.write("b")
    if "helpers" in case:
        return {"a": a, "h": lambda: world.store("h").finish(NAME), "i": lambda: world.store("i").finish(NAME)}
    if case == "taken for dead":
        return {"a": a, "b": lambda: world.clear("b", "a")}
    if case == "taken over":
        return {"a": a, "b": over("b", "a")}
    if case == "taken over by both":
        return {"a": over("a", "b"), "b": over("b", "a")}
    return {"a": a, "b": b}


def every_interleaving(case, folder, identity):
    """The numbers of states that two writers can reach, and of those in which both were let die.

    In each, what is committed is whole; who has returned has told the truth; and were both to die there, a third one
    comes to a good end.
    """
    prepare(case, folder / "start", identity)
    revived, winners, agree = set(), set(), case == "two that agree"

    def check(root, state, results):
        world = World(root, identity, agree)
        winner = world.committed()
        for name, result in results.items():
            if result is not None:  # not who only helped
                assert winner is not None
                assert result == (agree or winner == name)
        if state not in revived:
            revived.add(state)
            revive(root, folder / "revived", world)
        if len(results) == len(writers(case, world)):
            winners.add(winner)
            assert world.store("c").decided() == []

    states = explore(folder, lambda root: writers(case, World(root, identity, agree)), check)
    expected = {"c"} if "decision" in case else {"a"} if case == "taken for dead" else {"a", "b"}
    assert winners == expected
    return states, len(revived)


def prepare(case, root, identity):
    world = World(root, identity, agree=case == "two that agree")
    world.store("x").write("v00000-p0000", [(Chunk("", SPEC, 0), np.array([[9]], "uint8"))], {"host": "x"})
    if case == "over leavings":
        (root / FILE).parent.mkdir()
        (root / FILE).write_bytes(b"left by someone")
    if "decision" in case:
        dead = world.store("c")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SplitStore, "finish", lambda *a: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                world.write("c")
        assert dead.decided() == [NAME]
    return world


def revive(root, copy, world):
    """From the files that two dead builders left: a third finishes, and who was committed stays so."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy)
    after = World(copy, world.identity, world.agree)
    before, third = after.committed(), after.store("c")
    decided = [json.loads(p.read_bytes())["writer"]["host"] for p in copy.glob("scratch/decided/train/*/commit.json")]
    for name in third.decided():
        third.finish(name)
    assert after.write("c") == (world.agree or after.committed() == "c")
    assert after.committed() == (before or [*decided, "c"][0])
    assert third.decided() == []


def builder(root, token, say=None):
    (root / "scratch").mkdir(parents=True, exist_ok=True)
    (root / "leases").mkdir(exist_ok=True)
    return FolderLeases(root, token, say or (lambda line: None))
