"""docs/architecture.md names every module once, and says what adding a member of each kind really costs."""

import ast
import re
from pathlib import Path

import pytest

from kdcache.tests.helpers.places import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
# Each kind's toy member: the file of tests that adds it to the table, and what it is made of there.
TOYS = {
    "a loss": ("train/losses/test_contract.py", "Brier"),
    "a view operation": ("pipeline/views/operations/test_toy.py", "Invert"),
    "a dataset kind": ("pipeline/data/test_kinds.py", "Compressed", "CompressedFiles"),
    "a teacher source": ("pipeline/teachers/test_sources.py", "constant"),
    "a store": ("pipeline/test_store_kinds.py", "ToyStore", "_pack_toy"),
    "a registry backend": ("cache/registry/test_backends.py", "Memory"),
    "a logger": ("train/loop/test_logs.py", "Toy"),
}


def test_every_module_of_the_package_is_on_the_map_once() -> None:
    listed = []
    for section in PAGE.partition("## The map")[2].partition("## The tests")[0].split("\n### ")[1:]:
        folder, _, rows = section.partition("\n")
        listed += [folder + name for name in re.findall(r"^\| `(\w+\.py)` \|", rows, re.MULTILINE)]
    modules = (path for top in ("cache", "pipeline", "train") for path in (ROOT / top).rglob("*.py"))
    there = sorted(str(path.relative_to(ROOT)) for path in modules if path.name != "__init__.py")
    assert sorted(listed) == there, "a new module needs a row in the map of docs/architecture.md"


@pytest.mark.parametrize("kind", TOYS)
def test_the_cost_of_an_addition_is_what_the_toy_member_took(kind: str) -> None:
    """Lines of code, without docstrings, comments and empty lines."""
    file, *names = TOYS[kind]
    path = ROOT / "tests" / file
    count = sum(lines_of(path, name) for name in names)
    (row,) = re.findall(rf"^\| {kind} \| (\d+) \|", PAGE, re.MULTILINE)
    assert int(row) == count, f"{kind} took {count} lines in {path.relative_to(ROOT)}"


def lines_of(path: Path, name: str) -> int:
    (node,) = (n for n in ast.parse(path.read_text()).body if getattr(n, "name", None) == name)
    return len(ast.unparse(without_docstrings(node)).splitlines())


def without_docstrings(node: ast.AST) -> ast.AST:
    for inner in ast.walk(node):
        body = getattr(inner, "body", None)
        if isinstance(body, list) and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            inner.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return node
