"""`module:function`, a function of the user's own: imported and called, with every mistake in one clear line."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kdcache.cache.errors import InputError, KdcacheError, kind_and_message


def names_code(network: str) -> bool:
    """Whether a network's name is a `module:function`. What follows the colon in timm/NAME:KEY=VALUE are arguments."""
    return ":" in network and not network.startswith("timm/")


def import_function(name: str, what: str, otherwise: str = "") -> Callable[..., Any]:
    """The function that `name`, written as module:function, stands for.

    Modules in the working directory are found after the installed ones. The directory stays on sys.path, since worker
    processes look for the function there too. InputError, which calls the function a `what` and ends with `otherwise`,
    for a module that cannot be imported or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as e:  # a user's module may raise anything
        raise InputError(f"{what} {name!r}: cannot import {module_name!r}: {kind_and_message(e)}{otherwise}") from e
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if function is None or not callable(function):
        hint = did_you_mean(function_name, (key for key, value in vars(module).items() if callable(value)))
        raise InputError(f"{what} {name!r}: {module_name!r} has no function {function_name!r}{hint}{otherwise}")
    return function


def call_function(function: Callable[..., Any], arguments: tuple[object, ...], name: str, what: str) -> Any:
    """Call the function of that name. InputError for whatever it raises; a KdcacheError goes through."""
    try:
        return function(*arguments)
    except KdcacheError:
        raise
    except Exception as e:
        given = ", ".join(map(repr, arguments))
        raise InputError(f"{what} {name!r}: {name.partition(':')[2]}({given}) failed: {kind_and_message(e)}") from e


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message that names what is written almost like `name`, each after `prefix`; empty if nothing is."""
    spelling = {key.lower(): key for key in sorted(known)}
    near = [prefix + spelling[key] for key in difflib.get_close_matches(name.lower(), spelling, n=3)]
    return f": did you mean {', '.join(near)}?" if near else ""
