"""Names that are stored in caches, run folders and weights files.

Others may have written such a file, so a `module:function` in it is never imported: only a function that the user names
is called.
"""

from __future__ import annotations

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.dataset import KINDS, is_function
from kdcache.pipeline.process.functions import names_code


def stored_network(name: str, where: object, flag: str) -> str:
    """Return the network's name, which was read from `where`. InputError names the flag to give for a function."""
    if names_code(name):
        raise _refused("network", name, where, flag)
    return name


def stored_data(spec: str, where: object, flag: str = "--data") -> str:
    """Return the dataset's spec, which was read from `where`. InputError names the flag to give for a function."""
    if is_function(spec):
        raise _refused("dataset", spec, where, flag)
    return spec


def images_of(name: str, given: str | None, where: object, otherwise: str = "") -> str:
    """The spec of the images that a cache was built from: `given`, or else the name in the cache at `where`.

    InputError where the name says nothing of the folder that holds the images, and for a function. Its text ends in
    `otherwise`, which tells how to do without the images.
    """
    if given:
        return given
    kind = KINDS.get(name)
    if kind and kind.takes_path == "must":
        raise InputError(f"where are the images? give --data {name}:PATH{otherwise}")
    return stored_data(name, where)


def _refused(kind: str, name: str, where: object, flag: str) -> InputError:
    return InputError(
        f"{where} names the {kind} {name!r}, a function in a module, and what a file names is never called: "
        f"if you know that function, give {flag} {name}"
    )
