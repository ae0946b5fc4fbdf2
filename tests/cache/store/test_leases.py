"""Several builders of one cache: they share the work, and whatever happens to them, one answer becomes part of it."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from kdcache.cache import Cache
from kdcache.cache import errors as e
from kdcache.cache.files import sha256
from kdcache.cache.identity import Identity
from kdcache.cache.store import leases as module
from kdcache.cache.store.cache import clear_leavings, odd_leavings
from kdcache.cache.store.leases import FolderLeases, unreadable
from kdcache.tests.helpers.interleaving import (
    CASES,
    IN_MEMORY,
    NAME,
    builder,
    every_interleaving,
    explore,
    prepare,
    stepwise,
)

# ---- what is committed: every interleaving ----


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


# ---- leases ----


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
    assert module.ended(FolderLeases(Path(), "x", print)._owner.model_copy(update={"process": child.pid}))


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


@pytest.mark.parametrize("alive", [False, True])
def test_a_sign_of_life_from_the_future_counts_no_longer_than_any_other(tmp_path, alive):
    """It is one where the clock was set back since. Whoever lives gives another one, whatever its time."""
    leave(tmp_path, "first", -7200.0, machine="another", seconds=0.3)
    with builder(tmp_path, "second") as second:
        assert not second.take(NAME)
        time.sleep(0.2)
        if alive:
            os.utime(tmp_path / "leases" / "first.json", (0, time.time() + 3600))
        assert not second.take(NAME)
        time.sleep(0.2)
        assert second.take(NAME) != alive


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


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format":7}', b"[" * 9999, b"x" * 9999, None, "folder"])
def test_a_lease_that_is_none_is_nobodys_and_is_taken_over(tmp_path, identity, content):
    """As a crash leaves one. It saves work and decides nothing, so that nothing is lost with it."""
    cache = Cache.create(tmp_path, identity)
    for name in (f"{NAME}.0", "dead.json"):
        path = tmp_path / "leases" / name
        path.parent.mkdir(exist_ok=True)
        if content == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero") if content is None else path.write_bytes(content)
    assert {p.name for p in unreadable(path.parent)} == {f"{NAME}.0", "dead.json"}
    with builder(tmp_path, "first") as first:
        assert first.others() == [] and first.holder(NAME) is None
        assert first.take(NAME) and not first.lost(NAME) and first.holder(NAME).token == "first"
    with cache.writing() as leases:
        assert {p.name for p in path.parent.iterdir()} == {f"{leases._owner.token}.json"}


@pytest.mark.parametrize("folder", ["leases", "scratch", "scratch/decided", "scratch/decided/train"])
@pytest.mark.parametrize("kind", ["a file", "a loop"])
def test_what_is_no_folder_of_builders_makes_way_for_one(tmp_path, identity, folder, kind):
    root = tmp_path / "c"
    cache, path = Cache.create(root, identity), root / folder
    shutil.rmtree(root / "scratch")
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(b"x") if kind == "a file" else path.symlink_to(path.name)
    (line,) = odd_leavings(cache)
    assert line.startswith(f"{path} is no folder of builders: the next build clears it away")
    if kind == "a loop" and "/" not in folder:
        with pytest.raises(e.CorruptError, match="is a symbolic link"), cache.writing():
            pass
        clear_leavings(cache)
    with cache.writing():
        cache.train.write_labels(np.zeros((2, 1), "uint8"), {})
    assert cache.train.has("labels") and odd_leavings(cache) == []
    assert not [p for name in ("leases", "scratch") for p in (root / name).rglob("*") if p.is_file()]


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
        (lambda about: about.update(format=2), "holds no commit of"),  # that of the cache is 1
        (lambda about: about["files"].update({"../../escaped": stored("0" * 64)}), "holds no commit of"),
        (lambda about: about["files"].update({"toy/c/7/0": stored("../../../../toy")}), "holds no commit of"),
        (lambda about: about["files"].update({"toy/c/7/0": stored("0" * 64)}), "does not hold the bytes"),
        (lambda about: about.update(parameters="0" * 64), "holds another commit than was decided"),  # or a flipped bit
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
        if "another commit" not in message:  # who forges a commit forges its digest too
            (decided / "commit.sha256").write_text(sha256(file.read_bytes()))
    else:
        file.unlink()
    with pytest.raises(e.CorruptError, match=f"{message}.*remove {decided} and run kdcache build again"):
        world.write("a")
    assert world.committed() is None and not list(tmp_path.rglob("escaped"))
    # A build that begins with nobody else at work clears it away.
    (line,) = odd_leavings(Cache(root))
    assert message in line and str(decided) in line
    with Cache(root).writing():
        assert not decided.exists()
    assert world.write("a") and world.committed() == "a"
