"""Several builders of one cache: they share the work, and whatever happens to them, one answer becomes part of it."""

import json
import os
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kdcache.cache import Cache, files
from kdcache.cache import errors as e
from kdcache.cache.identity import Identity
from kdcache.cache.store import chunks
from kdcache.cache.store import leases as module
from kdcache.cache.store.layout import ArraySpec, Chunk
from kdcache.cache.store.leases import Leases
from kdcache.cache.store.place import Folder
from kdcache.cache.store.publish import SplitStore

# ---- what is committed: every interleaving ----

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


@pytest.fixture
def memory():
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        yield Path(folder)


@pytest.mark.parametrize("case", CASES)
def test_one_writer_wins_whole_in_every_interleaving_and_death(case, memory, identity, monkeypatch):
    stepwise(monkeypatch)
    states, deaths = every_interleaving(case, memory, identity)
    assert states > 300 and deaths > 20


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


# ---- leases ----


def builder(root, token, say=None):
    (root / "scratch").mkdir(parents=True, exist_ok=True)
    (root / "leases").mkdir(exist_ok=True)
    return Leases(root, token, say or (lambda line: None))


def leave(root, token, age=0.0, lease=NAME, **about):
    """A builder that touched its file `age` seconds ago and has a lease; `about` it may be untrue."""
    gone = builder(root, token)
    gone._touch()
    assert gone.take(lease)
    file = root / "leases" / f"{token}.json"
    if about:
        with file.open("r+") as f:  # in place: the lease is a link to it
            changed = {**json.load(f), **about}
            f.seek(0)
            f.truncate()
            json.dump(changed, f)
    os.utime(file, (file.stat().st_mtime - age,) * 2)
    return gone


@pytest.fixture
def ended():
    """The facts of a process that has ended, and of one whose parent has not noticed."""
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        zombie = {"process": child.pid}
        assert module._started(child.pid) == -1
        yield [zombie, {"started": 1}]
    assert module._started(child.pid) is None
    assert module._ended(Leases(Path(), "x", print)._owner.model_copy(update={"process": child.pid}))


def test_a_dead_builder_of_this_machine_is_succeeded_at_once_one_elsewhere_when_its_lease_expires(tmp_path, ended):
    elsewhere = {"machine": "another", "process": 2**31 - 1}
    for i, (about, age, free) in enumerate(
        [
            ({}, 0, False),
            ({}, 59, False),
            ({}, 61, True),  # stopped, perhaps
            *((facts, 0, True) for facts in ended),
            (elsewhere, 0, False),
            (elsewhere, 59, False),
            (elsewhere, 61, True),
            ({"machine": None, "process": 2**31 - 1}, 59, False),
            ({**elsewhere, "seconds": 5.0}, 6, True),
            ({**elsewhere, "seconds": 500.0}, 499, False),
        ]
    ):
        root = tmp_path / str(i)
        first = leave(root, "first", age, **about)
        with builder(root, "second") as second:
            assert second.take(NAME) == free, (about, age)
            assert second.lost(NAME) != free
            holder = second.holder(NAME)
            assert holder.token == ("second" if free else "first")
            assert bool(second.others()) != free
            assert str(holder).startswith(f"{holder.host} (process {holder.process}, since 20")
            if free:
                second.release(NAME)
                assert second.take(NAME) and (root / "leases" / f"{NAME}.0").exists()
                first.release(NAME)  # wakes up, and is in nobody's way
                assert second.holder(NAME).token == "second"
                with builder(root, "third") as third:
                    assert not third.take(NAME) and third.take("v00000-p0002")
                second.clear()
                assert [p.name for p in (root / "leases").glob("first*")] == []
        assert {p.name for p in (root / "leases").iterdir()} == (set() if free else {"first.json", f"{NAME}.0"})


@pytest.mark.parametrize("age", [0, 100])
def test_clocks_do_not_matter(tmp_path, monkeypatch, age):
    leave(tmp_path, "first", age, machine="another")
    for clock in ("time", "monotonic", "time_ns"):
        monkeypatch.setattr(time, clock, lambda: 4e9)
    with builder(tmp_path, "second") as second:
        assert second.take(NAME) == (age == 100)


@pytest.mark.parametrize("left", ["nothing", "a dead lease", "one that is given back", "nothing, a is taken for dead"])
def test_one_builder_takes_over_in_every_interleaving(memory, monkeypatch, left):
    stepwise(monkeypatch)
    monkeypatch.setattr(time, "strftime", lambda *a: "2026-01-01T00:00:00Z")
    (memory / "start").mkdir()

    def works(root):
        a, b = builder(root, "a"), builder(root, "b")
        a._touch(), b._touch()
        works = {"a": lambda: a.take(NAME), "b": lambda: b.take(NAME)}
        if not left.startswith("nothing"):
            first = leave(root, "x", 100)
        if left == "one that is given back":
            works["x"] = lambda: first.release(NAME)
        if left == "nothing, a is taken for dead":
            works["x"] = lambda: (root / "leases" / "a.json").unlink()
        return works

    ends = set()

    def check(root, state, results):
        assert sum(map(bool, results.values())) <= 1
        if set(results) >= {"a", "b"}:
            ends.add(tuple(sorted(name for name in results if results[name])))

    assert explore(memory, works, check) > 20
    # Where one gives back just then, both may find that too late, and come back for it.
    assert ends - {()} == {("a",), ("b",)}
    assert (() in ends) == (left == "one that is given back")


def test_a_lease_is_renewed_and_its_loss_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EXPIRES", 0.2)
    said = []

    def wait_until(what):
        patience = time.monotonic() + 60
        while not what():
            assert time.monotonic() < patience
            time.sleep(0.005)

    with builder(tmp_path, "first", said.append) as first:
        assert first.take(NAME) and first.take("v00000-p0002")
        link, old = tmp_path / "leases" / f"{NAME}.0", 1e9
        for _ in range(3):
            os.utime(link, (old, old))
            wait_until(lambda: link.stat().st_mtime > old)
        assert not first.lost(NAME) and said == []
        link.unlink()  # as one does that took over
        wait_until(lambda: said)
        assert first.lost(NAME) and not first.lost("v00000-p0002")
        assert said[0].startswith(f"lost the lease of {NAME} (0.2 s without a sign of life): another build may")
        # Cleared away altogether, and back when it next needs it.
        for path in (tmp_path / "leases").iterdir():
            path.unlink()
        (tmp_path / "scratch" / "first" / "half").mkdir(parents=True)
        first.clear()
        assert (tmp_path / "scratch" / "first" / "half").exists()
        wait_until(lambda: first.lost("v00000-p0002"))
        assert first.take("v00000-p0003") and first.holder("v00000-p0003").token == "first"
        shutil.rmtree(tmp_path / "leases")
        (tmp_path / "leases").write_text("no folder")
        wait_until(lambda: len(said) == 3)
        assert "Not a directory: other builds may take this one for dead" in said[2]
        (tmp_path / "leases").unlink()
        (tmp_path / "leases").mkdir()
    assert len(said) == 3 and list((tmp_path / "leases").iterdir()) == []


def test_only_what_dead_builders_left_is_cleared_away(tmp_path, identity, ended):
    root = tmp_path / "c"
    cache, scratch = Cache.create(root, identity), root / "scratch"
    leave(root, "live", lease="v00000-p0000")
    leave(root, "elsewhere", 30, "v00000-p0002", machine="another")
    leave(root, "dead", 0, "v00000-p0003", **ended[0])
    leave(root, "expired", 90, "v00000-p0004")
    for token in ("live", "elsewhere", "dead", "expired", "unknown"):
        (scratch / token / "half").mkdir(parents=True, exist_ok=True)
        (scratch / token / "half" / "gaps").write_bytes(b"..")
    for file in (scratch / ".identity.json.0.tmp", root / "leases" / ".new.json.1.tmp"):
        file.touch()
        shutil.copy(file, file.with_name(f"old{file.name}"))
        os.utime(file.with_name(f"old{file.name}"), (0, 0))
    with cache.writing() as mine:
        cache.train.write_labels(np.zeros((2, 1), "uint8"), {})
        assert {p.name for p in scratch.iterdir()} == {
            "live",
            "elsewhere",
            ".identity.json.0.tmp",
            "decided",
            cache._token,
        }
        assert {owner.token for owner in mine.others()} == {"live", "elsewhere"}
        leave(root, "later", 90)
    assert {p.name for p in scratch.iterdir()} == {"live", "elsewhere", ".identity.json.0.tmp", "decided"}
    left = {"live.json", "elsewhere.json", "v00000-p0000.0", "v00000-p0002.0", ".new.json.1.tmp"}
    assert {p.name for p in (root / "leases").iterdir()} == left
    assert (scratch / "live" / "half" / "gaps").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 9999, b"x" * 9999, None])
def test_a_lease_that_is_none_is_named(tmp_path, identity, content):
    cache = Cache.create(tmp_path, identity)
    path = tmp_path / "leases" / f"{NAME}.0"
    path.parent.mkdir()
    path.symlink_to("/dev/zero") if content is None else path.write_bytes(content)
    with pytest.raises(e.CorruptError, match=f"{path}.*"), cache.writing():
        pass
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_folder_of_leases_that_leads_elsewhere_is_refused(tmp_path, identity):
    cache = Cache.create(tmp_path / "c", identity)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "c" / "leases").symlink_to(tmp_path / "mine")
    with pytest.raises(e.CorruptError, match="leases is a symbolic link"), cache.writing():
        pass
    assert (tmp_path / "mine" / "thesis.tex").exists()


def stored(sha256):
    return {"size": 1, "sha256": sha256, "rows": "0" * 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.update(name="v00000-p0000"), "holds no commit of v00000-p0001"),
        (lambda about: about.update(key="0" * 64), "holds no commit of"),
        (lambda about: about["files"].update({"../../escaped": stored("0" * 64)}), "holds no commit of"),
        (lambda about: about["files"].update({"toy/c/7/0": stored("../../../../toy")}), "holds no commit of"),
        (lambda about: about["files"].update({"toy/c/7/0": stored("0" * 64)}), "does not hold the bytes"),
        (lambda about: about.clear(), "is not what kdcache writes"),
        (None, "lacks its commit"),
    ],
)
def test_a_decision_that_is_damaged_or_forged_is_named_and_nothing_of_it_seen(tmp_path, identity, change, message):
    root = tmp_path / "c"
    Cache.create(root, identity)
    world = prepare("a decision of the dead", root, identity)
    decided = root / "scratch" / "decided" / "train" / NAME
    file = decided / "commit.json"
    about = json.loads(file.read_bytes())
    if change:
        change(about)
        file.write_text(json.dumps(about))
    else:
        file.unlink()
    with pytest.raises(e.CorruptError, match=f"{message}.*remove {decided} and run kdcache build again"):
        world.write("a")
    assert world.committed() is None and not list(tmp_path.rglob("escaped"))
    shutil.rmtree(decided)
    assert world.write("a") and world.committed() == "a"
