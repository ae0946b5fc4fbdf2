"""A machine that invents what happens to a cache in folders: those of two machines and a registry that they share."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kdcache.pipeline.verify import verify
from kdcache.tests.machines.processes import LIVES, Fate
from kdcache.tests.machines.world import HOMES, MEMORY, VIEWS, Cache, Toy, World, content, signature

PLACES = (*HOMES, "shared")
WHO, PLACE, COUNT = st.sampled_from(HOMES), st.sampled_from(PLACES), st.integers(1, VIEWS)
TO, KIND = st.sampled_from(["home", "home", "looked", "shared"]), st.sampled_from(["hdf5", "ffcv"])
STEP = st.one_of(st.integers(1, 40), st.integers(1, 300))
FATE = st.one_of(
    st.just(LIVES), st.builds(Fate, st.sampled_from(["killed", "killed", "power", "full", "interrupted"]), STEP)
)
DAMAGE = st.sampled_from(["flip", "truncate", "delete", "foreign", "moved", "folder"])
SECONDS = st.sampled_from([-7200.0, -90.0, 30.0, 61.0, 3700.0, 86400.0 * 40])


def damaged(data: bytes, kind: str, number: int) -> bytes:
    """The bytes with one bit flipped, or without their end, or as they are where that is another kind of damage."""
    if kind == "flip" and data:
        at = number % (8 * len(data))
        return data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :]
    return data[: number % (len(data) or 1)] if kind == "truncate" else data


def damage(path: Path, kind: str, number: int, others: list[Path], foreign: bytes | None) -> None:
    """Damage a file. number: which bit, byte or file."""
    data = damaged(path.read_bytes(), kind, number)
    if kind == "foreign" and foreign is not None:
        data = foreign
    elif kind == "moved":
        data = others[number % len(others)].read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "delete":
        path.write_bytes(data)


class Machine(RuleBasedStateMachine):
    """tally: how often each rule was called, and how that ended, in all sequences. lengths: the steps of each."""

    toy: Toy
    tally: ClassVar[Counter[str]]
    lengths: ClassVar[list[int]]
    world: World

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.folder = Path(tempfile.mkdtemp(prefix="machine", dir=MEMORY)).resolve()

    def teardown(self) -> None:
        self.lengths.append(self.steps)
        shutil.rmtree(self.folder)

    def did(self, what: str, outcome: str) -> str:
        self.tally[what] += 1
        self.tally[f"{what}: {outcome.partition(':')[0]}"] += 1
        return outcome

    @rule(seconds=SECONDS)
    def pass_time(self, seconds):
        self.world.pass_time(seconds)
        self.did("clock", "forwards" if seconds > 0 else "backwards")


class Folders(Machine):
    tally: ClassVar[Counter[str]] = Counter()
    lengths: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.toy, self.folder)
        self.hurt = dict.fromkeys(PLACES, False)
        self.removed = False  # whether a cache was removed from the registry, of which others know what it held
        self.seen: dict[str, tuple] = {}
        self.views = dict.fromkeys(PLACES, ())

    def there(self, *places):
        return any((self.world.cache(place) / "identity.json").exists() for place in places)

    # What people do

    @initialize(views=COUNT)
    def begin(self, views):
        self.build("a", views, "home", LIVES)

    @rule(who=WHO, views=COUNT, to=TO, fate=FATE)
    def build(self, who, views, to, fate):
        outcome = self.did("build", self.world.run(who, partial(self.world.build, views, to), fate))
        if fate is LIVES and to == "home" and not self.hurt[who]:
            assert outcome == "done"
            assert set(range(views)) <= set(Cache(self.world.cache(who)).views)
            self.require_whole(who)

    @rule(
        who=WHO,
        other=WHO,
        views=COUNT,
        to=TO,
        step=STEP,
        then=st.sampled_from(["build", "collect", "pull", "push", "remove", "repair", "pack"]),
    )
    def overtaken(self, who, other, views, to, step, then):
        world = self.world
        commands = {
            "build": partial(world.build, VIEWS, to), "collect": world.collect, "pull": world.pull,
            "push": partial(world.push, other), "remove": partial(world.remove, other),
            "repair": partial(world.repair, other), "pack": partial(world.pack, other, "hdf5"),
        }  # fmt: skip
        fate = Fate("overtaken", step, lambda: self.did(then, world.run(other, commands[then])))
        self.did("overtaken", world.run(who, partial(world.build, views, to), fate))
        if then == "remove":
            self.views[other] = ()

    @precondition(lambda self: self.there(*HOMES))
    @rule(who=WHO, kind=KIND, fate=FATE)
    def pack(self, who, kind, fate):
        self.did("pack", self.world.run(who, partial(self.world.pack, who, kind), fate))

    @precondition(lambda self: any(self.world.packed(who, "hdf5").exists() for who in HOMES))
    @rule(who=WHO, of=WHO, fate=FATE)
    def unpack(self, who, of, fate):
        self.did("unpack", self.world.run(who, partial(self.world.unpack, of), fate))

    @precondition(lambda self: self.there(*HOMES))
    @rule(who=WHO, fate=FATE)
    def push(self, who, fate):
        self.did("push", self.world.run(who, partial(self.world.push, who), fate))

    @precondition(lambda self: self.there("shared"))
    @rule(who=WHO, fate=FATE, what=st.sampled_from([None, "best"]))
    def pull(self, who, fate, what):
        self.did("pull", self.world.run(who, partial(self.world.pull, what), fate))

    @precondition(lambda self: self.there(*PLACES))
    @rule(who=WHO, place=PLACE, fate=FATE)
    def remove(self, who, place, fate):
        work = self.world.remove_shared if place == "shared" else partial(self.world.remove, place)
        self.did("rm", self.world.run(who if place == "shared" else place, work, fate))
        self.views[place] = ()
        self.removed |= place == "shared"

    @rule(who=WHO, fate=FATE, there=st.booleans())
    def collect(self, who, fate, there):
        kept = [self.world.packed(home, kind) for home in HOMES for kind in ("hdf5", "ffcv")]
        kept = [path for path in [*kept, *self.folder.glob("?/teachers/*.safetensors")] if path.exists()]
        names = sorted(self.folder.glob("shared/names/best"))
        before = self.world.look("shared", True)
        self.did("gc", self.world.run(who, partial(self.world.collect, there=there), fate))
        needed = [home for home in HOMES if self.world.cache(home).exists()]
        for path in kept:
            lost = not path.exists() and (path.suffix != ".safetensors" or path.parent.parent.name in needed)
            assert not lost, f"gc has removed {path}"
        assert all(path.exists() for path in names), "gc has removed a name"
        if not names and before:  # without a name it may go
            self.views["shared"] = ()

    @precondition(lambda self: self.there(*PLACES))
    @rule(place=PLACE, who=WHO)
    def repair(self, place, who):
        outcome = self.did("repair", self.world.run(who, partial(self.world.repair, place)))
        if not self.hurt[place] and (self.world.cache(place) / "identity.json").exists():
            assert outcome == "done"

    @precondition(lambda self: any(self.hurt[who] for who in HOMES))
    @rule(place=WHO, who=WHO)
    def heal(self, place, who):
        """What a user does with a damaged cache ends with the original, byte for byte."""
        self.did("heal", "done")
        if not self.world.cache(place).exists():
            return
        self.world.heal(place, place)
        self.hurt[place] = any(self.broken(place))
        self.views[place] = ()

    def broken(self, place):
        """Packed files cannot be mended: their user removes them."""
        for kind in ("hdf5", "ffcv"):
            self.world.packed(place, kind).unlink(missing_ok=True)
        for name in ("teachers", "remote", "spool"):
            shutil.rmtree(self.folder / place / name, ignore_errors=True)
        yield False

    # What else happens

    @rule(place=PLACE, number=st.integers(0, 1 << 30), kind=DAMAGE, inside=st.booleans())
    def damage(self, place, number, kind, inside):
        top = self.world.cache(place) if inside else self.folder / place
        there = sorted(p for p in top.rglob("*") if p.is_file()) if top.exists() else []
        if not there:
            return
        path = there[number % len(there)]
        foreign = None
        if path.is_relative_to(self.world.cache(place)):
            foreign = self.toy.other.get(path.relative_to(self.world.cache(place)).as_posix())
        damage(path, kind, number // len(there), there, foreign)
        self.hurt[place] = True
        self.did("damage", kind)

    # What has to be true

    @invariant()
    def only_right_records(self):
        self.steps += 1
        for place in PLACES:
            path, hurt = self.world.cache(place), self.hurt[place]
            if self.seen.get(place) != (now := (signature(path), hurt)):
                views = self.world.look(place, hurt)
                lost = set(self.views[place]) - set(views)
                assert hurt or not lost, f"{place} has lost the views {lost}"
                self.seen[place], self.views[place] = now, views
        for home in HOMES:
            for kind in ("hdf5", "ffcv"):
                path = self.world.packed(home, kind)
                if self.seen.get(str(path)) != (now := (signature(path), self.hurt[home])):
                    if path.exists():
                        self.world.look_into(kind, path, self.hurt[home])
                    self.seen[str(path)] = now

    def require_whole(self, place):
        """Every file that belongs to the views there is that of the uninterrupted build, and verify finds nothing."""
        path, views = self.world.cache(place), Cache(self.world.cache(place)).views
        found = content(path)
        wanted = {n: d for n, d in self.toy.whole.items() if not _later(n, max(views))}
        assert {n: d for n, d in found.items() if not _later(n, max(views))} == wanted
        report = verify(Cache(path))
        assert all("run kdcache build again" in problem for problem in report.problems), report.problems


def _later(name: str, view: int) -> bool:
    """Whether a file is one of a later view's."""
    return any(part.startswith("v") and part[1:6].isdecimal() and int(part[1:6]) > view for part in name.split("/"))
