"""Ways in which a file of a cache can be damaged, each by itself, and how the damaged cache looks to people."""

import json
import os
import random
import shutil


def flipped(path, rng, other):
    """One bit of a file; the same bits for the same numbers of `rng`."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(8 * len(content))
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(bytes(content))


def truncated(path, rng, other):
    os.truncate(path, rng.randrange(path.stat().st_size))


def emptied(path, rng, other):
    path.write_bytes(b"")


def lengthened(path, rng, other):
    with path.open("ab") as f:
        f.write(rng.randbytes(rng.randint(1, 40)))


def deleted(path, rng, other):
    path.unlink()


def a_folder(path, rng, other):
    path.unlink()
    path.mkdir()
    (path / "more").write_bytes(b"more")


def a_link_elsewhere(path, rng, other):
    """To another cache's file of that name, or to one that is not there."""
    path.unlink()
    path.symlink_to(other)


def a_loop(path, rng, other):
    path.unlink()
    path.symlink_to(path.name)


def a_pipe(path, rng, other):
    path.unlink()
    os.mkfifo(path)


def another_caches(path, rng, other):
    path.write_bytes(other.read_bytes() if other.is_file() else b"of another cache")


FILE = (
    flipped, truncated, emptied, lengthened, deleted, a_folder, a_link_elsewhere, a_loop, a_pipe, another_caches,
)  # fmt: skip


def folder_deleted(path, rng, other):
    shutil.rmtree(path)


def folder_a_file(path, rng, other):
    shutil.rmtree(path)
    path.write_bytes(b"no folder")


def folder_linked(path, rng, other):
    """To another cache's folder of that name."""
    shutil.rmtree(path)
    path.symlink_to(other)


def folder_a_loop(path, rng, other):
    shutil.rmtree(path)
    path.symlink_to(path.name)


def folder_another_caches(path, rng, other):
    shutil.rmtree(path)
    shutil.copytree(other, path)


FOLDER = (folder_deleted, folder_a_file, folder_linked, folder_a_loop, folder_another_caches)


def files_of(path):
    """The names of all files of a cache in a folder."""
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def folders_of(path):
    """The names of its folders but for those of builders, the outer ones first."""
    found = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_dir())
    return [name for name in found if name.split("/")[0] not in ("leases", "scratch")]


def do(how, path, name, other):
    """Damage a file or folder of the cache in `path`; `other` is the folder of another cache."""
    how(path / name, random.Random(f"{how.__name__} {name}"), other / name)


def without_writer(content):
    """A commit's bytes but for who wrote it, which is for people; other bytes as they are."""
    try:
        about = json.loads(content)
    except (TypeError, ValueError):
        return content
    return {k: v for k, v in about.items() if k != "writer"} if isinstance(about, dict) else content


def is_harmless(path, good, name):
    """Whether a damaged file of a cache still says what the good one does, but for who wrote a commit."""
    at = path / name
    if at.is_symlink() or not at.is_file():
        return False
    found, want = at.read_bytes(), (good / name).read_bytes()
    return found == want or ("commits/" in name and without_writer(found) == without_writer(want))
