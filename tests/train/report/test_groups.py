"""Runs in groups: what tells them apart, which is best, and by how much, against scipy's own intervals."""

import json

import pytest

from kdcache.cache.errors import CorruptError
from kdcache.tests.helpers.lazily import Lazily
from kdcache.tests.helpers.reports import write_run
from kdcache.train.report.facts.compared import difference, estimate
from kdcache.train.report.facts.groups import LOGGED, differing, labels_of, runs_facts, thinned
from kdcache.train.report.facts.runs import read_run, runs_in

stats = Lazily("scipy.stats")
HOW = {"data": None, "registry": None, "device": None, "workers": None}


def quiet(_):
    pass


def facts(*runs):
    return runs_facts(runs, 0, HOW, quiet)


def sweep(place, **top1):
    """Runs of some losses with the seeds 0, 1, 2, ... that reach these."""
    return [
        read_run(write_run(place / f"{loss}-{seed}", loss, seed, top1=value))
        for loss, values in top1.items()
        for seed, value in enumerate(values)
    ]


def test_an_interval_is_scipys():
    values = [0.51, 0.53, 0.5, 0.56]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 3, loc=found.mean, scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((0.525, low, high))
    assert estimate([1.0, 2.0]).low is None and estimate([1.0]).deviation is None


def test_differences_are_of_the_seeds_that_both_have():
    found = difference({0: 0.6, 1: 0.7, 2: 0.65, 9: 0.1}, {2: 0.6, 0: 0.5, 1: 0.62, 5: 0.9})
    assert found.values == pytest.approx((0.1, 0.08, 0.05))
    interval = stats.ttest_rel([0.6, 0.7, 0.65], [0.5, 0.62, 0.6]).confidence_interval(0.95)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((interval.low, interval.high))
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_the_best_group_comes_first_and_is_compared_with_the_others(tmp_path):
    found = facts(*sweep(tmp_path, ce=[0.5, 0.52, 0.51], nkd=[0.6, 0.61, 0.59], kd=[0.55]))
    assert [one["group"] for one in found["groups"]] == ["nkd", "kd", "ce"]
    assert found["by"]["key"] == "top1" and found["groups"][0]["figures"]["top1"]["mean"] == pytest.approx(0.6)
    assert [(one["first"], one["other"]) for one in found["differences"]] == [("nkd", "kd"), ("nkd", "ce")]
    apart = found["differences"][1]["figures"]["top1"]
    assert apart["values"] == pytest.approx((0.1, 0.09, 0.08)) and apart["estimate"]["n"] == 3
    assert [one["n"] for one in (found["groups"][i]["figures"]["top1"] for i in range(3))] == [3, 1, 3]


def test_a_group_is_named_by_what_differs(tmp_path):
    settings = [
        {"loss": "nkd", "loss_options": {"gamma": 1.0, "tail": "prior"}, "lr": 0.1, "seed": 0, "data": "a"},
        {"loss": "nkd", "loss_options": {"gamma": 2.0, "tail": "prior"}, "lr": 0.1, "seed": 1, "data": "b"},
        {"loss": "kd", "loss_options": {"alpha": 0.1}, "lr": 0.1, "seed": 1, "cache_path": "/c"},
    ]
    assert differing(settings) == ["loss", "nkd: gamma"]
    assert labels_of(settings) == ["nkd, gamma 1.0", "nkd, gamma 2.0", "kd"]
    assert labels_of([*settings, {**settings[2], "lr": 0.2}])[2:] == ["kd, lr 0.1", "kd, lr 0.2"]
    runs = [read_run(write_run(tmp_path / str(lr), lr=lr, seed=seed)) for seed, lr in enumerate((0.1, 0.1001, 0.2))]
    rows = facts(*runs)["settings"]
    assert rows["differing"] == [{"name": "lr", "values": [0.1, 0.1001, 0.2]}]
    assert rows["common"]["batch_size"] == 8 and rows["common"]["nkd: gamma"] == 1.5


def test_runs_that_are_not_finished_are_told_as_they_are(tmp_path):
    write_run(tmp_path / "s" / "a", summary=False)
    write_run(tmp_path / "s" / "b", seed=1, done=1)
    write_run(tmp_path / "s" / "c", seed=2, done=0)
    write_run(tmp_path / "s" / "d", seed=3, done=0)
    failed = {"runs": [{"loss": "nkd", "seed": 3, "run": "elsewhere/s/d", "error": "no <b>memory</b>"}]}
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(failed))
    found = facts(*runs_in(tmp_path / "s"))
    states = [run["state"] for run in found["runs"]]
    assert states == ["3 of 3 epochs", "1 of 3 epochs", "no epoch is finished", "failed: no <b>memory</b>"]
    assert found["groups"][0]["runs"] == 4 and found["groups"][0]["failed"] == 1
    alone = facts(*runs_in(tmp_path / "s" / "c"))
    assert alone["by"] is None and alone["judged"] == [] and alone["groups"][0]["figures"] == {}


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "[" * 10_000, '{"top1": 1}'])
def test_a_file_that_kdcache_has_not_written_is_named(tmp_path, name, text):
    run = write_run(tmp_path / "run")
    (run / name).write_text(text)
    if (name, text[:2]) == ("summary.json", '{"'):
        assert read_run(run).summary == {"top1": 1}
        return
    with pytest.raises(CorruptError, match=rf"{name} (is not|names no epoch)"):
        read_run(run)


def test_long_curves_keep_their_last_epoch():
    for count in (0, 1, LOGGED, LOGGED + 1, 10 * LOGGED + 7):
        lines = [{"epoch": e} for e in range(1, count + 1)]
        kept = thinned(lines)
        assert len(kept) <= LOGGED + 1 and (not lines or kept[-1] == lines[-1])
        assert count > LOGGED or kept == lines
