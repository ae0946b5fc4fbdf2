"""The order of the house: what may import what in the tests."""

import ast
from pathlib import Path

from kdcache.tests.helpers.places import BENCH, ROOT


def imported(path: Path) -> set[str]:
    """The names of all modules that a file may import, `from a import b` read as a.b too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_nothing_imports_a_test_file_or_a_conftest() -> None:
    """What two files share lies in tests/helpers, so that a test file can be split, moved and run alone."""
    files = sorted([*(ROOT / "tests").rglob("*.py"), *BENCH.glob("*.py")])
    assert len(files) > 50
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in sorted(imported(path))
        if any(part.startswith("test_") or part == "conftest" for part in name.split("."))
    ]
    assert not wrong
