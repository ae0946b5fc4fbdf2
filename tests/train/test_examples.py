"""The examples run as a user runs them, are short, and learn what the trainer learns from the same cache."""

import ast
import importlib.util
import re
import sys

import pytest

from kdcache.tests.helpers import warm
from kdcache.tests.helpers.places import ROOT
from kdcache.tests.helpers.ranks import run_ranks
from kdcache.tests.helpers.training import quiet
from kdcache.train.config import TrainConfig
from kdcache.train.run import train

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"lightning_module.py": "lightning", "with_accelerate.py": "accelerate", "with_timm.py": "timm"}
EPOCHS = 4


@pytest.fixture(scope="module")
def trainers(home):
    """The trainer's top-1 after so many epochs."""
    return train(TrainConfig("kd", str(home / "default"), epochs=EPOCHS, out=str(home / "run")), quiet)["top1"]


# All in one process, since importing torch takes longer than the trainings. Each prints its views in turn, too.
IN_TURN = """
import itertools, runpy, sys
from kdcache.train import CachedDataset

paths, sys.argv = sys.argv[3:], sys.argv[:3]
fetch, seen = CachedDataset.__getitems__, []

def noted(dataset, indices):
    seen.extend([dataset.view] * (dataset.data.split == "train"))
    return fetch(dataset, indices)

CachedDataset.__getitems__ = noted
for path in paths:
    seen.clear()
    runpy.run_path(path, run_name="__main__")
    print([view for view, _ in itertools.groupby(seen)])
"""


def printed_by(home, code, paths):
    """What several trainings have printed: metrics and views."""
    done = warm.run([sys.executable, "-c", code, home / "default", EPOCHS, *paths])
    assert done.returncode == 0, done.stderr
    lines = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith(("{", "["))]
    return [line["top1"] for line in lines if isinstance(line, dict)], [x for x in lines if isinstance(x, list)]


def test_there_are_four_and_each_is_under_60_lines():
    assert [path.name for path in EXAMPLES] == sorted(["plain.py", *NEEDS])
    assert all(len(path.read_text().splitlines()) < 60 for path in EXAMPLES)


def test_each_learns_what_the_trainer_learns_from_one_view_after_the_other(home, trainers):
    """In so few epochs seeds differ by some percent: bench/own_loops.py compares whole trainings."""
    paths = [path for path in EXAMPLES if path.name not in NEEDS or importlib.util.find_spec(NEEDS[path.name])]
    found, views = printed_by(home, IN_TURN, paths)
    assert len(found) == len(paths) and all(top1 > 0.8 and abs(top1 - trainers) < 0.1 for top1 in found), found
    by_dataset = ["CachedLoader" not in path.read_text() for path in paths]
    assert views == [[0, 1, 2, 0] if own else [] for own in by_dataset]


def test_two_ranks_learn_together(home, trainers):
    codes, printed, said = run_ranks(2, [ROOT / "examples" / "plain.py", home / "default", EPOCHS])
    assert codes == {0}, said
    (top1,) = [ast.literal_eval(line)["top1"] for line in printed.splitlines() if line.startswith("{")]
    assert top1 > 0.8 and abs(top1 - trainers) < 0.1


def test_the_page_shows_every_example_and_its_code_runs(home):
    page = (ROOT / "docs" / "own-loops.md").read_text()
    assert all(f"../examples/{path.name}" in page for path in EXAMPLES)
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        exec(code.replace('"CACHE"', repr(str(home / "default"))), {})
