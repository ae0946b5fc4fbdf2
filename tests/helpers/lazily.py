"""Modules that are imported when they are first used: each process that runs tests collects all of them, and forks
the faster the less it holds."""

import importlib
import importlib.util
from typing import Any

import pytest


class Lazily:
    """A module that is imported once something of it is asked for.

    optional: where it is not installed, the tests of the file that asks for it are skipped.
    """

    def __init__(self, name: str, *, optional: bool = False) -> None:
        if optional and importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed", allow_module_level=True)
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # such as pytest looks for in all that it collects
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)
