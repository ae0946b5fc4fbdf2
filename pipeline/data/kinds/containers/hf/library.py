"""What a dataset `hf:...` names, and how the library `datasets` finds or fetches it."""

from __future__ import annotations

import json
import logging
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from kdcache.cache.errors import InputError, first_sentence
from kdcache.cache.files import expanded, is_there
from kdcache.pipeline.process.functions import did_you_mean
from kdcache.pipeline.process.rank import this_rank

_OPTIONS = re.compile(r"\?(\w+=[^?]*)$")
_SPLITS = re.compile(r":([^/:,?]+(?:,[^/:,?]+)?)$")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_PATIENCE = 5.0  # seconds for the hub to answer at all
_FORMS = {".parquet": "parquet", ".arrow": "arrow"}  # of single files, by the names that `datasets` has for them


@dataclass(frozen=True)
class Named:
    """What a spec names. text: without the splits and the options. files: a folder or files; empty for a hub's name.

    splits: none, the one that is there, or those to train and to evaluate on. options: config, image and label.
    """

    text: str
    files: tuple[Path, ...]
    splits: tuple[str, ...]
    options: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """The folder that relative paths in rows are relative to."""
        first = self.files[0] if self.files else Path.cwd()
        return first if first.is_dir() else first.parent


def read_spec(text: str) -> Named:
    """Take apart what stands behind `hf:`. InputError for what is neither on this disk nor a name on the hub.

    What is on this disk goes before what the hub has of that name.
    """
    if not text:
        raise InputError("hf needs a data set: hf:PATH of a folder or of parquet files, or hf:NAME on the hub")
    options: dict[str, str] = {}
    splits: tuple[str, ...] = ()
    place = text
    if not _files(place) and (found := _OPTIONS.search(place)):
        options, place = dict(parse_qsl(found[1])), place[: found.start()]
        known = ("config", "image", "label")
        if unknown := [name for name in options if name not in known]:
            hint = did_you_mean(unknown[0], known)
            raise InputError(f"hf:{text}: there is no option {unknown[0]!r}, but config, image and label{hint}")
    if not _files(place) and (found := _SPLITS.search(place)):
        splits, place = tuple(found[1].split(",")), place[: found.start()]
    files = _files(place)
    if not files and (not HUB_NAME.fullmatch(place) or place.startswith((".", "~")) or Path(place).suffix in _FORMS):
        path = expanded(place)
        near = did_you_mean(path.name, (one.name for one in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise InputError(f"{place}: there is no such file or folder{near}")
    return Named(place, files, splits, options)


def _files(place: str) -> tuple[Path, ...]:
    """The folder or the files at a place on this disk."""
    path = expanded(place).absolute()
    if not place or is_there(path):
        return (path,) if place else ()
    if not has_magic(place):
        return ()
    return tuple(map(Path, sorted(glob(str(path), recursive=True))))  # noqa: PTH207  the pattern is a whole path


def load_splits(named: Named) -> dict[str, Any]:
    """The splits by name, each a `datasets.Dataset`, or None where it has no rows.

    InputError where the data set cannot be found or read.
    """
    try:
        import datasets
    except ImportError as e:
        raise InputError("hf: needs the package datasets: pip install datasets") from e
    with _quiet(datasets):
        try:
            splits = _on_disk(datasets, named) if named.files else _from_hub(datasets, named)
        except InputError:
            raise
        except Exception as e:  # the library may raise anything
            reason = first_sentence(e.__cause__ or e)  # what went wrong with a file, and not only that something did
            raise InputError(f"hf:{named.text}: cannot be opened: {reason}{_hint(named, e)}") from e
    if not isinstance(splits, dict):
        splits = {str(splits.split): splits}
    return dict(splits)


def _hint(named: Named, error: Exception) -> str:
    """What helps with an error of `datasets`: the names of configurations, which stand at the end of its message."""
    if isinstance(error, ValueError) and (names := re.search(r"\[('[^\]]*')\]", str(error))):
        return f": hf:{named.text}?config=NAME takes one of {' '.join(names[1].replace(chr(39), '').split())}"
    return ""


def _on_disk(datasets: Any, named: Named) -> Any:
    place, config = named.files[0], named.options.get("config")
    if place.is_dir():
        if not any((place / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return datasets.load_dataset(str(place), name=config, keep_in_memory=False)
        if config:
            raise InputError(f"hf:{named.text}: was saved by save_to_disk, which knows no configurations: leave it out")
        if (place / "state.json").is_file():
            return {"all": _saved(datasets, place)}
        names = json.loads((place / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return {name: _saved(datasets, place / name) for name in names}
    form = _FORMS.get(place.suffix.lower())
    if odd := [file for file in named.files if _FORMS.get(file.suffix.lower()) != form or form is None]:
        raise InputError(f"{odd[0]}: is neither a folder nor a .parquet file")
    files = [str(file) for file in named.files]
    return datasets.load_dataset(form, data_files=files, split="train", keep_in_memory=False)


def _saved(datasets: Any, folder: Path) -> Any:
    """A split that save_to_disk wrote; None for one without rows, which `datasets` does not open."""
    if not json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
        return None
    return datasets.load_from_disk(str(folder), keep_in_memory=False)


def _from_hub(datasets: Any, named: Named) -> Any:
    """A data set of the hub, or what the library has kept of it where the hub cannot be reached."""
    config = named.options.get("config")
    offline = bool(datasets.config.HF_HUB_OFFLINE)
    if offline or _answers(datasets.config.HF_ENDPOINT):
        reason = "HF_HUB_OFFLINE is set"
    else:
        offline, reason = True, f"{datasets.config.HF_ENDPOINT} does not answer"
    with _without_network(datasets, offline):
        try:
            return datasets.load_dataset(named.text, name=config, keep_in_memory=False)
        except Exception as e:
            if not offline:
                raise
            raise InputError(
                f"hf:{named.text}: {reason}, there is no such folder here, and {datasets.config.HF_DATASETS_CACHE} has "
                "no copy: fetch it where there is a network, and give the folder that save_to_disk writes"
            ) from e


def _answers(address: str) -> bool:
    """Whether a server answers soon, whatever it says. The libraries would go on trying for half a minute."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_PATIENCE).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def _without_network(datasets: Any, offline: bool) -> Iterator[None]:
    """What HF_HUB_OFFLINE does, which the libraries read when they are imported."""
    from huggingface_hub import constants

    was = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if offline:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = was


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No lines of the library's own, and bars only on a terminal, where a long copy should be seen."""
    from huggingface_hub.utils import logging as hub

    own = datasets.utils.logging
    was, hubs, bars = own.get_verbosity(), hub.get_verbosity(), datasets.is_progress_bar_enabled()
    own.set_verbosity(logging.ERROR)
    hub.set_verbosity(logging.ERROR)
    if not sys.stderr.isatty() or this_rank().rank:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        own.set_verbosity(was)
        hub.set_verbosity(hubs)
        if bars:
            datasets.enable_progress_bars()
