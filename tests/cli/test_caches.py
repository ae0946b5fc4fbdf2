"""Which cache a command means, and caches of other data, by other teachers, or damaged."""

import json
import re
import shutil
from collections.abc import Callable

import torch
from safetensors.torch import load_file

from kdcache.cache import open_cache
from kdcache.tests.helpers.commands import Place, invoke, paint, works


def test_several_caches_that_match_are_listed(place: Place, quick: str, refused: Callable[..., str]) -> None:
    home = place.work / "home"
    keys = [open_cache(path).key for path in (place.cache, place.top2)]
    for path, key in zip((place.cache, place.top2), keys, strict=True):
        shutil.copytree(path, home / "caches" / key)
    lines = (
        f"{keys[0][:12]}  resnet8 on imagefolder (128), crop,flip, 2 views, dense, float16, ",
        f"{keys[1][:12]}  resnet8 on imagefolder (128), crop,flip, 1 views, top 2 of 4, uint8, ",
    )
    refused(quick, "2 caches", "--cache", *lines, KDCACHE_HOME=str(home))
    works(f"{quick} --epochs 1 --cache {keys[0][:8]} --out run", KDCACHE_HOME=str(home))
    # A run keeps its cache.
    works(f"{quick} --epochs 1 --out run --resume", KDCACHE_HOME=str(home))


def test_without_a_cache_the_command_that_is_named_builds_one(place: Place, quick: str) -> None:
    home = str(place.work / "home")
    shutil.copytree(place.home / "teachers", place.work / "home" / "teachers")
    line = f"{quick} --epochs 1 --teacher resnet8 --out run"
    said = invoke(line, KDCACHE_HOME=home).stderr
    command = re.search(r"with a complete view: run kdcache (build --teacher resnet8 .*) first$", said.strip())
    assert command, said
    works(f"{command[1]} --views 1", KDCACHE_HOME=home)
    works(line, KDCACHE_HOME=home)


def test_an_ambiguous_key(place: Place, refused: Callable[..., str]) -> None:
    key, home = place.cache.name, place.work / "home"
    for name in (key, key[:20] + "0" * 44):
        shutil.copytree(place.cache, home / "caches" / name)
    refused(f"info {key[:12]}", key[:12], "several", KDCACHE_HOME=str(home))


def test_a_cache_of_other_data(place: Place, refused: Callable[..., str]) -> None:
    other = paint(place.work / "other", seed=1)
    fingerprint = open_cache(place.cache).identity.data.fingerprint
    refused(f"train --data imagefolder:{other} --cache {place.cache}", f"fingerprint: the cache has {fingerprint}")
    refused(
        f"train --data imagefolder:{other}",
        "no cache of",
        f"kdcache build --teacher resnet34 --data imagefolder:{other}",
    )
    refused(f"verify {place.cache} --data imagefolder:{other}", f"data.fingerprint: the cache has {fingerprint}")


def test_another_teacher_online(place: Place, data: str, quick: str, refused: Callable[..., str]) -> None:
    state = load_file(place.weights)
    state["fc.bias"] = state["fc.bias"] + 1
    torch.save(state, "other.pt")
    hashed = open_cache(place.cache).identity.teacher.weights
    refused(f"{quick} --online --weights other.pt", f"weights: the cache has {hashed}, found ")
    refused(
        f"build --teacher resnet8 {data} --weights other.pt --out {place.cache}",
        f"teacher.weights: the cache has {hashed}",
    )


def test_a_damaged_cache(place: Place, data: str, quick: str, refused: Callable[..., str]) -> None:
    cache = shutil.copytree(place.cache, place.work / "cache")
    chunk = next((cache / "views/v00001/gaps/c").rglob("0"))
    while chunk.is_dir():
        chunk /= "0"
    content = bytearray(chunk.read_bytes())
    content[-9] ^= 1
    chunk.write_bytes(content)
    result = invoke(f"verify {cache} --depth contents")
    assert result.exit_code == 1 and str(chunk) in result.stdout and "FAILED" in result.stdout
    result = invoke(f"verify {cache} --depth contents --json")
    assert result.exit_code == 1 and json.loads(result.stdout)["passed"] is False
    original = (cache / "identity.json").read_bytes()
    (cache / "identity.json").write_text("{}")
    for line in (f"info {cache}", f"verify {cache}", f"{quick} --cache {cache}"):
        refused(line, f"{cache}/identity.json")
    result = invoke(f"build --teacher resnet8 {data} --out {cache}")  # which knows what it says
    assert result.exit_code == 0 and f"the identity in {cache} was missing or damaged" in result.stderr
    assert (cache / "identity.json").read_bytes() == original


def test_an_absurd_identity_is_refused_by_every_reader(place: Place, data: str, refused: Callable[..., str]) -> None:
    cache = shutil.copytree(place.cache, place.work / "cache")
    identity = json.loads((cache / "identity.json").read_text())
    identity["teacher"]["input_size"] = 2**40
    (cache / "identity.json").write_text(json.dumps(identity, sort_keys=True, separators=(",", ":")))
    for line in (f"info {cache}", f"verify {cache} {data}", f"train {data} --loss kd --cache {cache}"):
        refused(line, "identity.json is not what kdcache writes: teacher.input_size")
