"""Labels that are written as text, in tables and tars: the classes that they stand for."""

from __future__ import annotations

import re
from collections.abc import Collection

from kdcache.cache.errors import InputError

_ID = re.compile(r"0|[1-9][0-9]*")
MAX_CLASSES = 1 << 20
LABEL_COLUMNS = ("label", "class", "class_name", "target")  # what a column of labels may be called, in any case


def classes_of(labels: Collection[str], where: str) -> tuple[str, ...]:
    """The names of the classes by their ids, for the labels of the train split.

    If every label is a whole number, it is the class's id: the classes are 0 to the largest. Else labels are names, and
    ids go by the names in byte order. InputError, which names the place `where`, for an id that no class can have.
    """
    if all(_ID.fullmatch(label) for label in labels):
        largest = max(labels, key=lambda label: (len(label), label))
        if len(largest) > len(str(MAX_CLASSES)) or int(largest) >= MAX_CLASSES:
            raise InputError(f"{where}: label {largest[:20]} is no class: ids are 0 to {MAX_CLASSES - 1:,}")
        return tuple(map(str, range(int(largest) + 1)))
    return tuple(sorted(labels, key=lambda label: label.encode("utf-8", "surrogateescape")))
