"""Where the command runs, and what has to be the same on every node of the cluster."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from kdcache.cache.errors import InputError, KdcacheError, MismatchError, kind_and_message, machine_error
from kdcache.cache.home import home
from kdcache.cache.identity import Identity, SplitName
from kdcache.pipeline.data import memory
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.data.split import describe_data
from kdcache.pipeline.process import provenance

_PACKAGES = ("torch", "torchvision", "numpy", "pillow")  # whose versions decide about the bits of records
_ON = " (on the Ray node "


def versions() -> dict[str, str]:
    """The versions that have to be the same on all nodes, so that every shard is computed alike."""
    found = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"kdcache": provenance.writer()["kdcache"], **found}


@dataclass(frozen=True, eq=False)
class Place:
    """Where the command runs, which is how its words are meant: names of the user's modules, paths, versions.

    data, unlabelled: which dataset. prints: the fingerprints of its splits, from a sample of the contents. learnt: what
    was learnt at the data's first opening, so that not every node reads the header of every image.
    """

    data: str
    unlabelled: bool
    identity: Identity
    prints: Mapping[SplitName, str]
    learnt: Mapping[str, bytes]
    home: str
    folder: str
    modules: tuple[str, ...]
    versions: Mapping[str, str]

    def enter(self) -> None:
        """Make this process one in which those words mean the same. MismatchError for other versions."""
        mine = versions()
        differ = {name: theirs for name, theirs in self.versions.items() if mine.get(name) != theirs}
        if wrong := [f"{name} {mine.get(name)} instead of {theirs}" for name, theirs in differ.items()]:
            raise MismatchError(f"records differ between versions, and this node has {', '.join(wrong)}")
        os.environ["KDCACHE_HOME"] = self.home
        sys.path += [folder for folder in self.modules if folder not in sys.path]
        with suppress(OSError):  # it matters only to relative paths, and the error for those names the path
            os.chdir(self.folder)
        memory.bring(home(), self.learnt)

    def open(self, split: SplitName) -> Dataset:
        """Open a split of the data. MismatchError where this node has other data than the machine of the command."""
        data = open_data(self.data, split, unlabelled=self.unlabelled)
        has = self.identity.data if split == "train" else self.identity.evaluation
        has = has.model_copy(update={"fingerprint": self.prints[split], "full_contents": False})
        if found := has.differences(describe_data(data, False), "the command's machine has", "this node has"):
            raise MismatchError(f"{self.data} is not the same data on every node: {'; '.join(found)}")
        return data


@contextmanager
def at_this_node() -> Iterator[None]:
    """Have every error be a KdcacheError whose line ends with the node. Ray's logs have the whole of other errors."""
    try:
        yield
    except KdcacheError as e:
        if _ON in str(e):  # from a task that decodes for this worker, elsewhere
            raise
        raise type(e)(f"{e}{_ON}{socket.gethostname()})") from None
    except Exception as e:
        traceback.print_exc()
        reason = machine_error(e) or f"a worker failed: {kind_and_message(e)}"
        raise InputError(f"{reason}{_ON}{socket.gethostname()})") from None
