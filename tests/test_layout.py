"""The order of the house: small files, functions and folders, and tests that do not import each other."""

import ast
from pathlib import Path

from kdcache.tests.helpers.places import BENCH, ROOT

# At most: the lines of a file, of a function and of a class, and the modules of a folder.
LINES, FUNCTION, CLASS, MODULES = 450, 60, 200, 8
# What is larger, and why.
LARGER = {
    "bench/cifar_losses.py: main": "options, work and table of one script",
}


def too_large(path: Path) -> list[str]:
    """The names of what is over the limits in a file, as LARGER has them."""
    name, text = path.relative_to(ROOT).as_posix(), path.read_text()
    found = [name] if len(text.splitlines()) > LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            most = CLASS if isinstance(node, ast.ClassDef) else FUNCTION
            if (node.end_lineno or 0) - node.lineno >= most:
                found.append(f"{name}: {node.name}")
    return found


def test_files_functions_classes_and_folders_are_small() -> None:
    found = []
    for folder in ("cache", "pipeline", "train", "tests", "bench", "examples"):
        found += [name for path in (ROOT / folder).rglob("*.py") for name in too_large(path)]
    found += [name for path in ROOT.glob("*.py") for name in too_large(path)]
    for top in ("cache", "pipeline", "train"):
        for init in (ROOT / top).rglob("__init__.py"):
            modules = len([path for path in init.parent.glob("*.py") if path != init])
            if modules > MODULES:
                found.append(f"{init.parent.relative_to(ROOT)}: {modules} modules")
    assert sorted(found) == sorted(LARGER)


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
