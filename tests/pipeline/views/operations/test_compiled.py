"""Compiled loops are kept for the next process where they can be, and made anew where they cannot."""

import subprocess
import sys

import numpy as np
import pytest

from kdcache.cache.errors import InputError
from kdcache.pipeline.views.operations.compiled import compiled, kept
from kdcache.tests.helpers.lazily import Lazily

numba = Lazily("numba")
SIGNATURE = "i8(u1[::1])"


def total(values):
    summed = 0
    for value in values:
        summed += value
    return summed


def works():
    return compiled(SIGNATURE)(total)(np.full(1000, 200, np.uint8)) == 200_000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where machine code is kept."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_machine_code_is_kept_for_the_next_process(folder):
    assert works()
    kept = sorted(path.name for path in folder.rglob("*.nb*"))
    assert len(kept) == 2
    assert works() and sorted(path.name for path in folder.rglob("*.nb*")) == kept


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("size", [0, 1, 50])
def test_damaged_machine_code_is_made_anew(folder, kind, size):
    assert works()
    (path,) = folder.rglob(f"*.{kind}")
    path.write_bytes(path.read_bytes()[:size])
    assert works()


def test_where_nothing_can_be_kept_every_process_compiles(monkeypatch):
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    assert works() and kept(nogil=True)(total)(np.full(1000, 200, np.uint8)) == 200_000


def test_a_full_disk_keeps_nothing(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "save", full)
    assert works() and not list(folder.rglob("*.nb*"))


def test_numba_that_compiles_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(InputError, match=r"is set.*: unset NUMBA_DISABLE_JIT"):
        compiled(SIGNATURE)


def test_only_who_changes_pixels_imports_numba(tmp_path):
    code = "import sys, kdcache.pipeline.views.render; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
