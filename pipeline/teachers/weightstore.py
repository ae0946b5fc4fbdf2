"""Keeps teachers' weights by their hash: filed when a cache is built, published with it, fetched where they are needed.

Each file is safetensors and is named by the `weights_hash` of its tensors, which the identity of every cache by that
teacher holds. Its notes tell how the teacher wants its pixels and what its classes are called. It holds no code, and no
name in it is imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import safetensors.torch
from filelock import FileLock
from safetensors import SafetensorError

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, InputError, NotFoundError
from kdcache.cache.home import home, open_registry, registry_beside, teachers_folder, weights_file
from kdcache.cache.identity import Identity, TeacherIdentity
from kdcache.cache.registry.registry import DIGITS, Registry
from kdcache.cache.registry.teachers import MOST_TEACHER_BYTES, weights_among
from kdcache.pipeline.process.progress import size
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.pipeline.teachers.weights import read_weights, saved, weights_hash

Say = Callable[[str], None]
Published = Literal["published", "there", "kept back", "not here", "too large"]


def keep(teacher: Teacher, say: Say) -> None:
    """File the teacher's weights here, so that a later push, verify or build finds them."""
    path = weights_file(teacher.identity.weights)
    if path.exists():
        with suppress(PermissionError):  # the home may be read-only
            os.utime(path)  # marks the file as used, since gc goes by this time
        return
    about = teacher.identity.model_dump(mode="json", exclude={"weights", "numeric"})
    notes = {**about, "class_names": teacher.class_names or ()}
    try:
        content = saved(teacher.model.network.state_dict(), notes)
    except KeyError as e:
        say(f"note: the teacher's weights are not filed, safetensors has no {e.args[0]}")
        return
    folder = next(p for p in path.parents if p.exists())
    if not os.access(folder, os.W_OK):
        say(f"note: the teacher's weights are not filed, {folder} cannot be written")
        return
    files.replace_file(path, content)


def find_weights(teacher: TeacherIdentity, registries: Sequence[Registry], say: Say) -> Path | None:
    """Find the file of a teacher's weights here, or fetch it from the first registry that has it; None if none has.

    CorruptError where the content of a file does not fit its name.
    """
    if path := _here(teacher):
        return path
    for shared in registries:
        if shared.teachers.has(teacher.weights):
            return _fetch(teacher.weights, shared, say)
    return None


def _here(teacher: TeacherIdentity) -> Path | None:
    """The file under KDCACHE_HOME, named by the hash; or, from earlier versions, where the teacher was taught."""
    if weights_file(teacher.weights).exists():
        return _checked(teacher.weights)
    name = f"{teacher.network.replace('/', '-').replace(':', '-')}.safetensors"
    for folder in files.names(teachers_folder()):
        place = teachers_folder() / folder
        there = name in files.names(place) if place.is_dir() else False
        if there and weights_hash(read_weights(place / name)[0]) == teacher.weights:
            return place / name
    return None


def _checked(weights: str) -> Path:
    path = weights_file(weights)
    _require(files.read_bounded(path, MOST_TEACHER_BYTES), weights, str(path), "remove it")
    return path


def _fetch(weights: str, shared: Registry, say: Say) -> Path:
    path = weights_file(weights)
    (home() / "remote").mkdir(parents=True, exist_ok=True)
    with FileLock(home() / "remote" / f"{weights}.lock"):  # only one of several processes fetches
        if not path.exists():
            advice = "ask whoever keeps the registry to remove it, then kdcache push publishes it again"
            where = shared.teachers.url(weights)
            content = shared.teachers.read(weights, lambda came: _require(came, weights, where, advice))
            files.replace_file(path, content)
            say(f"weights {weights[:12]} come from {shared.url}: {size(len(content))}")
    return path


def _require(content: bytes, weights: str, where: str, advice: str) -> None:
    """Raise CorruptError unless the bytes are a file of the weights with that hash, and its notes are undamaged."""
    try:
        state = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, KeyError, ValueError) as e:
        raise CorruptError(f"{where} is damaged, or no safetensors file ({type(e).__name__}: {e}); {advice}") from e
    if (found := weights_hash(state)) != weights:
        raise CorruptError(f"{where} holds the weights {found[:12]}, not those that it is named by; {advice}")
    about, named = header.get("__metadata__", {}), {"weights_sha256": weights}
    notes = files.sha256(about.get("kdcache", "").encode())
    # Files of earlier versions do not name their weights. Any other name is one that damage has changed.
    if about not in ({"kdcache": about.get("kdcache"), "notes_sha256": notes, **more} for more in (named, {})):
        raise CorruptError(f"{where} has notes that are damaged; {advice}")


def publish(teacher: TeacherIdentity, cache: str, shared: Registry, say: Say) -> Published:
    """Publish the weights of a cache's teacher in a registry, once for all caches by that teacher.

    They are looked for here, and in the registry that holds the cache. cache: its path or address.
    """
    what = f"the weights {teacher.weights[:12]} of {teacher.architecture}"
    if shared.teachers.has(teacher.weights):
        return "there"
    near = registry_beside(cache)
    path = find_weights(teacher, [near] if near else [], say)
    if path is None:
        say(
            f"note: {what} are not here and not published, so that others cannot replay the cache: the command that "
            "built it files them, if it is run again"
        )
        return "not here"
    content = files.read_bounded(path, MOST_TEACHER_BYTES) if path.parent == teachers_folder() else _refiled(path)
    if len(content) > MOST_TEACHER_BYTES:
        say(f"note: {what} are not published: {size(len(content))} are more than {size(MOST_TEACHER_BYTES)}")
        return "too large"
    new = shared.teachers.add(teacher.weights, content)
    say(f"{what} are published too ({size(len(content))}): {shared.teachers.url(teacher.weights)}")
    return "published" if new else "there"


def _refiled(taught: Path) -> bytes:
    return saved(*read_weights(taught))


def named_weights(text: str, registries: Sequence[Registry], say: Say) -> str:
    """Resolve what --weights says: the first digits of a hash become the file of those weights; all else stays.

    InputError where no weights' hash begins with these digits, or where several do.
    """
    if not _is_hash(text):
        return text
    here = weights_among(dict.fromkeys(files.names(teachers_folder()), 0))
    found: dict[str, Registry | None] = {weights: None for weights in here if weights.startswith(text)}
    for shared in registries:
        for weights in shared.teachers.sizes():
            if weights.startswith(text):
                found.setdefault(weights, shared)
        if not shared.objects.listable and len(text) == 64 and shared.teachers.has(text):
            found.setdefault(text, shared)
    if len(found) != 1:
        places = ", ".join([str(teachers_folder()), *(shared.url for shared in registries)])
        which = f"several begin so: {', '.join(w[:16] for w in sorted(found))}" if found else "none begin so"
        raise InputError(f"--weights {text}: no file has that name, and of the teachers' weights in {places} {which}")
    ((weights, place),) = found.items()
    return str(_checked(weights) if place is None else _fetch(weights, place, say))


def _is_hash(text: str) -> bool:
    return bool(DIGITS.fullmatch(text)) and not files.is_there(Path(text))


def weights_of(identity: Identity, where: str, given: str | None, registry: str | None) -> str | None:
    """Find the file of the weights of a cache's teacher: here, in the registry that holds the cache, or in `registry`.

    where: the cache's path or address. given: what --weights says, which goes before all else. None where there is no
    such file; the weights may still have a public name.
    """
    if given is not None and not _is_hash(given):
        return given
    if given is None and (here := _here(identity.teacher)):
        return str(here)
    near = registry_beside(where)
    registries = [*([near] if near else ()), *([open_registry(registry, store_bytes=0)] if registry else ())]
    if given is not None:
        return named_weights(given, registries, _quiet)
    found = find_weights(identity.teacher, registries, _quiet)
    return None if found is None else str(found)


def _quiet(line: str) -> None:
    pass


def not_to_be_had(teacher: TeacherIdentity, registry: str | None) -> NotFoundError:
    """The error for weights that `weights_of` has not found and that have no public name."""
    where = f"neither here nor in {registry}" if registry else "not here"
    return NotFoundError(
        f"the weights {teacher.weights[:12]} of the cache's teacher, {teacher.architecture}, are {where}: give "
        f"--weights FILE{'' if registry else ', or --registry URL where they are published'}, or ask whoever built the "
        "cache to run kdcache push, which publishes them"
    )
