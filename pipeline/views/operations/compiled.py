"""Loops over pixels that numba compiles for a CPU, where they take a fraction of the time of torch's operations.

A loop is compiled when its module is imported, so such a module is imported only where pixels are changed. That takes
seconds once on a machine: numba keeps the machine code beside the module or, where nothing may be written there, in the
user's cache folder (NUMBA_CACHE_DIR names another one).
"""

from __future__ import annotations

from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any, TypeVar

from numba import config, njit

from kdcache.cache.errors import InputError

Loop = TypeVar("Loop", bound=Callable[..., Any])

_NOWHERE = "no locator available"  # what numba says where no folder for machine code can be written
# Without checks for divisions by zero, of which there are none.
_OPTIONS = {"nogil": True, "error_model": "numpy"}

inner = njit(**_OPTIONS)  # for what compiled loops of the same module call, with which it is kept


def compiled(signature: str) -> Callable[[Loop], Loop]:
    """Compile a loop for arguments of these types, as numba writes them: u1[:,::1] are dense rows of uint8.

    InputError where numba is told to compile nothing: Python's own loops would give other numbers.
    """
    if config.DISABLE_JIT:
        raise InputError("NUMBA_DISABLE_JIT is set, but pixels are changed by compiled loops: unset NUMBA_DISABLE_JIT")

    def compile_now(loop: Loop) -> Loop:
        made: Loop
        try:
            made = njit(signature, cache=True, **_OPTIONS)(loop)
        except (RuntimeError, OSError, EOFError, UnpicklingError) as e:
            if isinstance(e, RuntimeError) and _NOWHERE not in str(e):
                raise
            # No folder for it can be written, the disk is full, or what was kept is damaged: every process compiles.
            made = njit(signature, **_OPTIONS)(loop)
        return made

    return compile_now


def kept(**options: bool) -> Callable[[Callable[..., Any]], Any]:
    """Compile a loop when it is first called, for whatever types it gets, and keep it where that can be done."""

    def prepare(loop: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(loop)
        except RuntimeError as e:
            if _NOWHERE not in str(e):
                raise
            return njit(**options)(loop)

    return prepare
