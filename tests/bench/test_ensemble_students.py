"""The pure parts of bench/ensemble_students.py: what is trained in which order, paired differences, the tables."""

import sys

import pytest

from kdcache.tests.helpers.places import BENCH


@pytest.fixture(scope="module")
def script():
    """It is a script that imports others by their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield __import__("ensemble_students")
    for name in [name for name in sys.modules if name.split("_")[0] in ("study", "ensemble")]:
        del sys.modules[name]


def test_what_is_stopped_early_leaves_whole_seeds_and_pairs_come_last(script):
    names = ["a", "b", "c", "a+b+c", "a+b", "a+c", "b+c"]
    assert script.jobs(names, "a+b+c", 2) == [
        *((source, seed) for seed in (0, 1) for source in ("a+b+c", "a", "b", "c", script.LABELS)),
        *((source, seed) for seed in (0, 1) for source in ("a+b", "a+c", "b+c")),
    ]
    assert len(script.jobs(names[:4], "a+b+c", 3)) == 15


def run(source, seed, top1):
    agreement = {"a": 0.5, "b": 0.25, "a+b": 0.75}
    return {"source": source, "seed": seed, "top1": top1, "nll": 1.0, "ece": 0.1, "agreement": agreement}


def test_the_tables_show_means_and_differences_of_equal_seeds(script):
    runs = [run("labels", 0, 0.40), run("a", 0, 0.50), run("a+b", 0, 0.56), run("labels", 1, 0.44), run("a", 1, 0.54),
            run("a+b", 1, 0.58), run("labels", 2, 0.9)]  # fmt: skip
    found = {
        "setting": {"taught": {"a": 1, "b": 1}},
        "teachers": {name: {**run(name, 0, 0.6), "agreement": {"a+b": 0.8}} for name in ("a", "b", "a+b")},
        "students": {f"{r['source']}-{r['seed']}": r for r in runs},
    }
    gained = script.compared(found["students"], "a+b", lambda r: r["top1"])
    assert gained == {"labels": pytest.approx([0.16, 0.14]), "a": pytest.approx([0.06, 0.04])}
    teachers, students = script.tables(found).values()
    assert "| a | 60.00 | 1.000 | 0.100 | 80.00 |" in teachers
    line = next(line for line in students.splitlines() if line.startswith("| a |"))
    assert line.split(" | ")[1:3] == ["2", "52.00 ± 2.83"] and line.endswith("| +6.00, +4.00 |")
    assert "| 50.00 ± 0.00 | 75.00 ± 0.00 |" in line
    whole = next(line for line in students.splitlines() if line.startswith("| a+b |"))
    assert whole.endswith("| 75.00 ± 0.00 | 75.00 ± 0.00 | - |")
