"""Names that stand in caches, run folders and weights files.

Others may have written such a file, so a `module:function` in it is never imported. Only what the user names is.
"""

from __future__ import annotations

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.dataset import is_function


def stored_network(name: str, where: object, flag: str) -> str:
    """The network's name that was read from `where`; InputError, which names the flag to give, for a function."""
    if ":" in name:
        raise _refused("network", name, where, flag)
    return name


def stored_data(spec: str, where: object, flag: str = "--data") -> str:
    """The dataset's spec that was read from `where`; InputError, which names the flag to give, for a function."""
    if is_function(spec):
        raise _refused("dataset", spec, where, flag)
    return spec


def _refused(kind: str, name: str, where: object, flag: str) -> InputError:
    return InputError(
        f"{where} names the {kind} {name!r}, a function in a module, and what a file names is never called: "
        f"if you know that function, give {flag} {name}"
    )
