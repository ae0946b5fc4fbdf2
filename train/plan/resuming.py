"""What a resumed run takes from its folder, so that `--resume --out RUN` is all that has to be given."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pydantic

from kdcache.cache.errors import CorruptError
from kdcache.cache.files import expanded, is_there
from kdcache.cache.identity import first_problem
from kdcache.pipeline.data.dataset import KINDS, is_function
from kdcache.pipeline.trust import stored_data, stored_network
from kdcache.pipeline.views.render import RENDERER
from kdcache.train.config import TrainConfig

# Fields of TrainConfig that stand in config.json under their own names.
_NAMED = (
    "student", "epochs", "batch_size", "lr", "weight_decay", "warmup", "seed", "views", "image_size",
    "crops_per_decode", "online", "fresh_views", "teacher", "weights", "amp", "sync_bn", "optimiser", "accumulate",
    "clip", "ema", "compile", "validation", "save_every", "evaluate_every", "student_weights", "log",
)  # fmt: skip


def given_by(config: TrainConfig) -> set[str]:
    """The fields that are not at their defaults. They count as typed by the user where nothing says which were."""
    return {f.name for f in fields(config) if getattr(config, f.name) != f.default}


def resumed(
    config: TrainConfig, had: dict[str, Any], given: Collection[str], folder: Path, say: Callable[[str], None]
) -> TrainConfig:
    """The run's settings, `had`, in all fields that were not given; those are compared later, by RunFolder.

    Fields at other values that were not given come from the environment or from kdcache.toml: one line says which of
    them are not used. InputError for a function that only the folder names; CorruptError for values that cannot be.
    """
    before = _fields_of(type(config), had, folder)
    for name, check in (("data", stored_data), ("student", stored_network), ("teacher", stored_network)):
        if before.get(name) and name not in given and getattr(config, name) != before[name]:
            check(before[name], folder, f"--{name}")
    taken = {name: value for name, value in before.items() if name not in given}
    unused = [name for name in taken if name in given_by(config) and not _same(config, name, before, had)]
    if unused:
        values = ", ".join(f"{name} {taken[name]}" for name in unused)
        say(f"note: {folder} goes on with its own {values}, not with what the settings say")
    return replace(config, **taken)


def _fields_of(kind: type[TrainConfig], had: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings as fields of TrainConfig. CorruptError where they cannot be."""
    try:
        before = {name: had[name] for name in _NAMED if name in had}
        before["allow_renderer"] = had["renderer"] != RENDERER
        place = had.get("cache_path")
        before |= {"cache": place if place and exists(place) else had["cache"], "data": had["data"]}
        if "loss" in had:
            before["loss"] = _spec(had["loss"], had["loss_options"])
        pydantic.TypeAdapter(kind).validate_python(before)
    except (KeyError, TypeError, AttributeError, pydantic.ValidationError) as e:
        reason = f"no {e}" if isinstance(e, KeyError) else str(e)
        if isinstance(e, pydantic.ValidationError):
            reason = first_problem(e)
        raise CorruptError(f"{folder / 'config.json'} is not what kdcache writes ({reason}): give another --out") from e
    return before


def _same(config: TrainConfig, name: str, before: dict[str, Any], had: dict[str, Any]) -> bool:
    """Whether a setting is that of the run, even if it is written differently."""
    value = getattr(config, name)
    if name == "cache":
        return str(had.get("cache")).startswith(value) or place_of(value) == before["cache"]
    if name == "data":
        return bool(placed(value) == before["data"])
    if name in ("weights", "student_weights"):
        return before[name] in (value, place_of(value))
    if name == "loss":
        return bool(value.partition(":")[0] == had["loss"])
    return bool(value == before[name])


def _spec(name: str, options: dict[str, Any]) -> str:
    """A loss as make_loss takes it, each option spelled out, so that it does not go by the presets of this version."""
    spelled = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in options.items()]
    return f"{name}:{','.join(spelled)}" if spelled else name


def placed(data: str) -> str:
    """The dataset's spec with an absolute path, so that it holds in any working directory."""
    name, _, path = data.partition(":")
    if not path or is_function(data):
        return data
    kind = KINDS.get(name)
    if kind and not kind.is_place(path):
        return data
    between = kind.between if kind else ""
    return f"{name}:{between.join(map(place_of, path.split(between))) if between else place_of(path)}"


def place_of(path: str) -> str:
    """The place as it can be found from any folder: an absolute path, or the address that it is."""
    return path if "://" in path else str(expanded(path).absolute())


def exists(place: str) -> bool:
    """Whether there is such a file or folder; an address counts as there."""
    return "://" in place or is_there(Path(place))
