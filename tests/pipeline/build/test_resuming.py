"""A build that is stopped at any moment, or finds no room, goes on where it was."""

import contextlib
import errno
import json
import resource
import shutil
import subprocess
from dataclasses import replace

import pytest

from kdcache.cache import Cache
from kdcache.cache import errors as e
from kdcache.cache.store.layout import shard_name
from kdcache.pipeline.build import build as build_module
from kdcache.pipeline.build import spool as spool_module
from kdcache.pipeline.build.build import build
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.tests.helpers.building import (
    BATCH,
    MIXED,
    PART,
    PARTS,
    as_json,
    content,
    ended_well,
    equal,
    quiet,
    settings,
    spooled,
    start_build,
)

pytestmark = pytest.mark.usefixtures("home")


def images_left(path, home, views):
    """What a build that was killed has neither committed nor spooled, from the files that it left."""
    left = 0
    for root, prefix, samples, count in ((path / "eval", "eval-", 40, 1), (path, "", 150, views)):
        for view in range(count):
            for part in range(-(-samples // PART)):
                rows = min(PART, samples - part * PART)
                if (root / "commits" / f"{shard_name(view, part)}.json").exists():
                    continue
                blocks = (home / "spool").glob(f"*/{prefix}{shard_name(view, part)}-b{BATCH}-cpu-0/*.block")
                left += rows - max((int(b.stem.split("-")[1]) for b in blocks), default=0)
    return left


@pytest.mark.timeout(280)
@pytest.mark.parametrize(("changes", "every"), [({}, 1), (MIXED, 8)], ids=["format-1", "mixed-and-spread"])
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(toy, tmp_path, changes, every):
    """SIGKILL at chosen steps and, in the last rounds, at random times; then at a second one; then to the end.

    every: of these moments, only so many are tried.
    """
    script = """
folder, rng = Path(sys.argv[2]), random.Random(4)
assert ended(in_child(lambda: run(folder / "whole"))) == 0
def count():
    left = killed_at(10**9)
    run(folder / "counted")
    (folder / "events").write_text(str(10**9 - left[0]))
assert ended(in_child(count)) == 0
events = int((folder / "events").read_text())
first = sorted({0, 3, 6, 9, events - 1, events - 3, *(rng.randrange(events) for _ in range(int(sys.argv[3])))})
for n in [*first, -1, -2, -3][:: int(sys.argv[4])]:
    place = folder / str(n)
    os.environ["KDCACHE_HOME"] = str(place / "home")
    for attempt in (0, 1):
        def victim():
            if n >= 0:
                killed_at(n if attempt == 0 else rng.randrange(events // 2))
            else:
                slow = Teacher.logits
                def logits(*args):
                    time.sleep(0.004)
                    return slow(*args)
                Teacher.logits = logits
            run(place / "cache")
        child = in_child(victim)
        if n < 0:
            time.sleep(rng.uniform(0.05, 0.6))
            os.kill(child, signal.SIGKILL)
        assert ended(child) in (-signal.SIGKILL, 0)
    rng.random()
    for name in ("cache", "home"):
        if (place / name).exists():
            shutil.copytree(place / name, place / f"{name}-killed")
    assert ended(in_child(lambda: run(place / "cache", place / "facts"))) == 0
    print(n)
"""
    env = {"KDCACHE_HOME": tmp_path / "home"}
    killed = ended_well(start_build(toy, script, as_json(settings(**changes)), tmp_path, 10, every, **env)).split()
    want = content(tmp_path / "whole")
    assert content(tmp_path / "counted") == want and len(killed) > 15 // every
    saved = 0
    for n in killed:
        place = tmp_path / n
        assert content(place / "cache") == want, n
        assert not list(place.glob("home/spool/*")), n
        left = images_left(place / "cache-killed", place / "home-killed", 2)
        assert json.loads((place / "facts").read_text()) == left, n
        saved += 340 - left
        # What was readable when it was killed was right.
        with contextlib.suppress(e.NotFoundError):
            early = Cache(place / "cache-killed")
            for view in early.views:
                assert equal(early.train.read(view, None), replace(Cache(place / "cache").read(view), prior=None))
    assert saved > 340 // every


def test_a_shard_is_not_gone_on_with_by_a_teacher_that_is_compiled(tmp_path, source, monkeypatch):
    """Nor does the other way mix: what one has spooled is not in the other's shard, and commits say which it was."""
    monkeypatch.setattr(build_module, "probe", lambda *a: (1.0, 1.0))
    monkeypatch.setattr(spool_module, "SPOOL_SECONDS", -1.0)
    answer, asked = Teacher.logits, []

    def stop(self, images):
        asked.append(len(images))
        if len(asked) == stop.at:
            raise ZeroDivisionError
        return answer(self, images)

    monkeypatch.setattr(Teacher, "logits", stop)
    monkeypatch.setattr(Teacher, "compile", lambda self, batch: replace(self, compiled=self.model))
    config, stop.at = settings(views=1, out=str(tmp_path / "c")), 5  # after 2 of the evaluation split's 3 batches ...
    with pytest.raises(ZeroDivisionError):
        build(config, quiet, source)
    assert len(spooled(tmp_path)) == 1
    stop.at = None
    again = build(replace(config, compile=True), quiet, source)
    assert again.teacher_images == 150  # ... 3 of them are committed, and of view 0 all is computed anew
    commits = Cache(tmp_path / "c")
    assert commits.evaluation.commit(shard_name(0, 0)).writer["compiled"] == "no"
    assert {commits.train.commit(shard_name(0, part)).writer["compiled"] for part in range(PARTS)} == {"yes"}


@contextlib.contextmanager
def little_room(kind, folder, size):
    """Room for `size` bytes: on a disk of its own or, where none can be mounted, in each file. Gives a way to more."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if kind == "disk" and shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode:
        try:
            yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size if kind == "file" else 900, hard))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("disk", 30_000),
        ("disk", 120_000),
        ("disk", 220_000),
        ("file", 20),
        ("file", 500),
        ("file", 800),
        ("file", 1150),
    ],
)
@pytest.mark.parametrize("spool", [False, True])
def test_a_full_disk_is_an_error_that_names_it_and_the_build_goes_on(
    tmp_path, reference, source, monkeypatch, kind, size, spool
):
    monkeypatch.setattr(spool_module, "SPOOL_SECONDS", -1.0)
    monkeypatch.setattr(build_module, "probe", lambda *a: (1.0, 1.0))
    small = tmp_path / "small"
    small.mkdir()
    if spool:
        monkeypatch.setenv("KDCACHE_HOME", str(small / "home"))
    path = small / "c"
    with little_room(kind, small, size) as more:
        with pytest.raises(OSError, match=r"No space left|File too large") as caught:
            build(settings(out=str(path)), quiet, source)
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert str(caught.value.filename).startswith(str(tmp_path))
        with contextlib.suppress(e.NotFoundError):
            for view in Cache(path).views:
                assert equal(Cache(path).train.read(view, None), replace(Cache(reference).read(view), prior=None))
        more()
        assert build(settings(out=str(path)), quiet, source).teacher_images <= 340
        assert content(path) == content(reference)
