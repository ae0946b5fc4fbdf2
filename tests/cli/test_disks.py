"""Disks that are full, read-only or small, and readers of the output that go away."""

import errno
import os
from pathlib import Path

import click
import pytest
import torch

from kdcache.cache import open_cache
from kdcache.tests.helpers.commands import Place, invoke, on_small_places, works


def test_a_full_disk(place: Place, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says where, and the same command goes on afterwards."""

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    line = f"build --teacher resnet8 {data} --views 1 --out {place.work}/cache"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = invoke(line)
    assert result.exit_code == 2 and "No space left" in result.stderr.splitlines()[-1]
    assert f"{place.work}/cache" in result.stderr.splitlines()[-1] and "free some space" in result.stderr
    works(line)


def test_a_reader_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """kdcache ls | head -1: no error is printed."""

    def gone(*args: object, **options: object) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr(click, "echo", gone)
    result = invoke("ls")
    assert result.exit_code == 1 and not result.output


@pytest.mark.parametrize(("mount", "reason"), [("size=120k", "No space left"), ("ro", "Read-only file system")])
def test_a_run_on_a_full_or_read_only_disk_is_one_line(place: Place, quick: str, mount: str, reason: str) -> None:
    done = on_small_places(
        f"mkdir disk && mount -t tmpfs -o {mount} tmpfs disk",
        f"{quick} --loss kd --cache {place.cache} --out disk/run",
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: disk/run/") and reason in last and "Traceback" not in done.stderr


def little_shared_memory(kept: Path) -> str:
    """A shell script that mounts it; a folder that lies in what it hides stays where it was."""
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if not kept.is_relative_to("/dev/shm"):
        return mount
    return (
        f"mount --bind /dev/shm /mnt; {mount}; mkdir -p {kept}; mount --bind /mnt/{kept.relative_to('/dev/shm')} {kept}"
    )


def test_image_files_where_shared_memory_is_short(place: Place, large: Path) -> None:
    """As in a container, whose /dev/shm has 64 MB: here 1 MB, for small images. The records are the same."""
    data = f"--data imagefolder:{large}/pics --workers 2"
    for line in (
        f"build --teacher resnet8 --weights {large}/teacher.safetensors {data} --views 1 --allow-low-accuracy "
        "--out cache",
        f"train {data} --cache cache --student resnet8 --loss kd --epochs 1 --out run",
    ):
        done = on_small_places(little_shared_memory(place.root), line)
        assert done.returncode == 0, done.stderr
    built = open_cache(place.work / "cache"), open_cache(large / "cache")
    assert torch.equal(*(cache.read(0).gaps for cache in built))
