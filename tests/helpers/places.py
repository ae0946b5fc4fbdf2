"""Where things lie in the repository."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
BENCH = ROOT / "bench"


def bench_script(name: str) -> ModuleType:
    """The script bench/NAME.py as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"kdcache_bench_{name}", BENCH / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
