"""A machine that invents what happens to a cache in a bucket, which is all that two machines have in common."""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from kdcache.cache.home import open_registry
from kdcache.tests.machines.folders import COUNT, STEP, WHO, Machine, damaged
from kdcache.tests.machines.processes import LIVES, Fate
from kdcache.tests.machines.server import URL, Server, served
from kdcache.tests.machines.world import HOMES, VIEWS, Toy, World, content, signature

KINDS = ["killed", "killed", "power", "full", "interrupted", "lost", "lost", "busy", "away"]
FATE = st.one_of(st.just(LIVES), st.builds(Fate, st.sampled_from(KINDS), STEP))
PUTS = st.builds(Fate, st.just("killed"), st.integers(1, 80), st.none(), st.just("put"))
DAMAGE = st.sampled_from(["flip", "truncate", "delete", "foreign", "moved"])


class BucketWorld(World):
    """Two homes, and a bucket."""

    def __init__(self, toy: Toy, root: Path, server: Server) -> None:
        super().__init__(toy, root, URL)
        self.server = server
        (root / "reader").mkdir()
        self.boots["reader"] = 0

    def pass_time(self, seconds: float) -> None:
        super().pass_time(seconds)
        self.server.pass_time(seconds)

    def read(self, found: list, hurt: bool, refused: bool) -> None:
        """Read every view in the registry that is complete, by way of what this machine keeps of it."""
        found += self.look_at(lambda: open_registry(self.url).cache(self.key), self.url, hurt or refused)


class Buckets(Machine):
    tally: ClassVar[Counter[str]] = Counter()
    lengths: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.server, self.stack = Server(), ExitStack()
        self.stack.enter_context(served(self.server))
        self.world = BucketWorld(self.toy, self.folder, self.server)
        self.hurt = False
        self.removed = False
        self.views: set[int] = set()
        self.seen: dict[str, object] = {}

    def teardown(self) -> None:
        self.stack.close()
        super().teardown()

    def there(self):
        return bool(self.server.names(f"caches/{self.world.key}/identity.json"))

    # What people do

    @initialize(views=COUNT, fate=st.one_of(FATE, PUTS, PUTS))
    def begin(self, views, fate):
        """Builders that begin later are seldom killed while they hold leases: then there is less for them to do."""
        self.build("a", views, False, fate)

    @rule(who=WHO, views=COUNT, whole=st.booleans(), fate=FATE)
    def build(self, who, views, whole, fate):
        outcome = self.did("build", self.world.run(who, partial(self.world.build, views, "shared", whole), fate))
        if fate.kind in ("lives", "lost", "busy") and not self.hurt and not self.removed:
            assert outcome == "done", outcome
            self.views |= set(range(views))
            if whole:
                self.require_whole(who, views)

    @rule(who=WHO, views=COUNT, fate=FATE)
    def build_at_home(self, who, views, fate):
        outcome = self.did("build at home", self.world.run(who, partial(self.world.build, views), fate))
        assert fate is not LIVES or outcome == "done", outcome

    @rule(
        who=WHO, other=WHO, views=COUNT, step=STEP,
        then=st.sampled_from(["build", "pull", "push", "gc", "rm", "read"]),
    )  # fmt: skip
    def overtaken(self, who, other, views, step, then):
        world = self.world
        commands = {
            "build": partial(world.build, VIEWS, "shared"), "pull": world.pull, "push": partial(world.push, other),
            "gc": world.collect, "rm": world.remove_shared, "read": partial(world.read, [], self.hurt, True),
        }  # fmt: skip
        if then == "rm" or (then == "gc" and not self.server.names("names/best")):  # which takes what is old
            self.removed, self.views = True, set()
        fate = Fate("overtaken", step, lambda: self.did(then, world.run(other, commands[then])))
        self.did("overtaken", world.run(who, partial(world.build, views, "shared"), fate))

    @rule(who=WHO, fate=FATE)
    def push(self, who, fate):
        self.did("push", self.world.run(who, partial(self.world.push, who), fate))

    @precondition(lambda self: self.there())
    @rule(who=WHO, what=st.sampled_from([None, "best"]), fate=FATE)
    def pull(self, who, what, fate):
        self.did("pull", self.world.run(who, partial(self.world.pull, what), fate))

    @precondition(lambda self: self.there())
    @rule(who=WHO, fate=FATE)
    def remove(self, who, fate):
        self.did("rm", self.world.run(who, self.world.remove_shared, fate))
        self.removed, self.views = True, set()

    @rule(who=WHO, fate=FATE, days=st.sampled_from([30.0, 0.0]))
    def collect(self, who, fate, days):
        named = bool(self.server.names("names/best"))
        self.did("gc", self.world.run(who, partial(self.world.collect, days), fate))
        assert not named or self.server.names("names/best")
        if not named:
            self.removed, self.views = True, set()

    @precondition(lambda self: self.there())
    @rule(who=WHO, fate=FATE)
    def read(self, who, fate):
        found: list[int] = []
        refused = self.removed or fate is not LIVES or not self.views
        outcome = self.did("read", self.world.run(who, partial(self.world.read, found, self.hurt, refused), fate))
        if not self.hurt and not refused:
            assert outcome == "done" and self.views <= set(found), outcome

    @precondition(lambda self: self.hurt or self.removed)
    @rule(who=WHO)
    def begin_again(self, who):
        """After damage: remove the cache, by hand if it has to be, and forget what was known of it."""
        self.world.run(who, self.world.remove_shared)
        for name in self.server.names(f"caches/{self.world.key}") + self.server.names("names/"):
            self.server.write(name, None)
        for home in HOMES:
            shutil.rmtree(self.folder / home / "remote", ignore_errors=True)
        self.hurt, self.removed, self.views = False, False, set()
        self.did("begin again", "done")

    # What else happens

    @rule(number=st.integers(0, 1 << 30), kind=DAMAGE, inside=st.booleans())
    def damage(self, number, kind, inside):
        top = f"caches/{self.world.key}/"
        there = self.server.names(top if inside else "")
        if not there:
            return
        name, number = there[number % len(there)], number // len(there)
        data: bytes | None = damaged(self.server.read(name), kind, number)
        if kind == "foreign":
            data = self.toy.other.get(name.removeprefix(top), b"foreign")
        elif kind == "moved":
            data = self.server.read(there[number % len(there)])
        self.server.write(name, None if kind == "delete" else data)
        self.hurt = True
        self.did("damage", kind)

    # What has to be true

    @invariant()
    def only_right_records(self):
        self.steps += 1
        for home in HOMES:
            path = self.world.cache(home)
            if self.seen.get(home) != (now := signature(path)):
                self.seen[home] = now
                self.world.look(home, False)
        if self.seen.get("bucket") != (now := (self.server.version, self.hurt)):
            self.seen["bucket"] = now
            if self.server.names(f"caches/{self.world.key}/identity.json"):
                self.world.run("reader", self.stranger_reads)

    def stranger_reads(self):
        """Who has never seen the registry reads whatever is complete there."""
        shutil.rmtree(self.folder / "reader")
        (self.folder / "reader").mkdir()
        views = self.world.look_at(lambda: open_registry(self.world.url).cache(self.world.key), URL, self.hurt)
        assert self.hurt or self.views <= set(views)

    def require_whole(self, who, views):
        found = content(self.world.cache(who))
        wanted = self.toy.whole
        assert found.keys() <= wanted.keys()
        assert all(data == wanted[name] for name, data in found.items())
        assert set(range(views)) <= set(self.world.look(who, False))
