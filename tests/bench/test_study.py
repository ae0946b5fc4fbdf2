"""The study's pure parts (bench/study*.py): what is run and chosen, what is not run again, statistics, tables."""

import json
import math
import random
import statistics
import sys

import numpy as np
import pytest
import torch

from kdcache.tests.helpers.places import BENCH
from kdcache.train.losses.options import LOSSES


@pytest.fixture(scope="module", autouse=True)
def modules():
    """They are scripts that import each other by their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield
    for name in [name for name in sys.modules if name.split("_")[0] == "study"]:
        del sys.modules[name]


def module(name):
    return __import__(name)


def test_images_are_divided_evenly_and_nothing_is_in_two_parts():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 200))
    parts = module("study_data").rows(labels)
    held, teacher, students = (set(parts[name].tolist()) for name in ("held_out", "teacher", "students"))
    assert [len(held), len(teacher), len(students)] == [200, 1800, 100]
    assert not held & teacher and held | teacher == set(range(2000)) and students < teacher
    for name in ("held_out", "students"):
        assert len(set(np.bincount(labels[parts[name]]).tolist())) == 1
        assert (np.diff(parts[name]) > 0).all()


def test_cifar10_is_divided_as_ever(monkeypatch, tmp_path):
    """Two runs of the study on two machines must speak of the same images."""
    y = np.arange(100) % 10
    x = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    np.savez(tmp_path / "c.npz", x=x, y=y, tx=x[:20], ty=y[:20])
    monkeypatch.setenv("STUDY_DATA", str(tmp_path / "c.npz"))
    data = module("study_data")
    held = data.teacher("eval")[0][:, 0, 0, 0].tolist()
    assert held == data.rows(y)["held_out"].tolist() == [8, 23, 29, 34, 37, 55, 60, 71, 72, 76]
    images, labels = data.students("eval")
    assert len(images) == 30 and labels.tolist() == [*y[held], *y[:20]]
    assert data.parts_of_evaluation() == {"held_out": slice(0, 10), "test": slice(10, None)}


PROCESSOR = {"processor": "a processor", "torch": "2.15"}
BINS = [[0, 0.0, 0.0]] * 5 + [[100, (i + 0.5) / 15, (i + 0.5) / 15 - 0.02] for i in range(5, 15)]


def of_runs(runs, value):
    """Results of runs in their real shape, with metrics by value(run, metric)."""
    out = {}
    for run in runs:
        found = {m: value(run, m) for m in ("top1", "nll", "ece", "agreement", "kl")}
        part = {**found, "reliability": BINS}
        out[run.name] = {
            "settings": vars(run), "held_out": part, "test": part, "seconds": 300.0, "cpu_seconds": 290.0 * run.cost,
            "training_seconds": 250.0, "weights": str(value(run, "top1")), "loss_by_epoch": [value(run, "top1")],
            **PROCESSOR,
        }  # fmt: skip
    return out


def everything(seed=0):
    """Made-up results of the whole study; only for this test."""
    p, rng = module("study_protocol"), random.Random(seed)

    def value(run, metric):
        return 0.6 + 0.01 * (run.loss != "ce") + rng.gauss(0, 0.004)

    found = of_runs(p.recipe_runs(), value)
    recipe = p.best(found, p.recipe_runs())
    found |= of_runs(p.weight_runs(recipe.lr, recipe.decay), value)
    chosen = p.choose(found)
    for name in ("core", "views", "losses", "topk", "small"):
        found |= of_runs(p.group(name, chosen), value)
    head = module("study_head")
    for one in p.group("imagenet", chosen):
        names = [f"{k} {tail}" for k in head.KS for tail in head.TAILS]
        found[one.name] = {
            part: {name: 1 + rng.random() for name in ("ce", "dense", *names)} for part in ("kl", "others")
        }
    for name in ("teach", "build-dense", "build-exact", "build-top3"):
        part = {**dict.fromkeys(("top1", "nll", "ece"), 0.8), "reliability": BINS}
        found[name] = {
            "seconds": 60.0, "cpu_seconds": 110.0, "bytes": 3e6, "held_out": part, "test": part, **PROCESSOR,
            "mass": {"1.0": 0.98, "3.0": 0.8},
        }  # fmt: skip
    return found


def test_what_is_run():
    p = module("study_protocol")
    chosen = p.Chosen(0.2, 2e-3, p.KDS[1], p.NKDS[2])
    runs = {name: p.group(name, chosen) for name in p.GROUPS}
    for name, some in runs.items():
        names = [run.name for run in some]
        assert len(set(names)) == len(names), name
    every = {run.name: run for some in runs.values() for run in some}
    assert {name: run for some in runs.values() for name, run in ((r.name, r) for r in some)} == every
    assert len({run for some in runs.values() for run in some}) == len(every)  # a name for each setting

    core = runs["core"]
    assert [(run.loss, run.seed) for run in core[:6]] == [(w, s) for s in (0, 1) for w in ("ce", p.KDS[1], p.NKDS[2])]
    assert {(run.lr, run.decay) for some in ("core", "views", "losses", "topk") for run in runs[some]} == {(0.2, 2e-3)}
    assert not {run.seed for run in runs["tune"]} & {run.seed for run in core}
    kinds = {(run.views, run.online, run.records) for run in runs["views"]}
    cached = {(views, False, "dense") for views in (1, 4, 16)}
    assert kinds == cached | {(20, False, "exact"), (20, True, "dense")}
    kinds = {(run.views, run.online, run.records) for run in runs["more"]}
    assert kinds == {(4, False, "dense"), (16, False, "dense"), (20, False, "dense"), (20, False, "exact")}
    assert {run.seed for run in runs["more"]} == set(range(5, 10))
    tested = {run.loss for run in core + runs["losses"]}
    assert {loss.partition(":")[0] for loss in tested} == set(LOSSES)
    topk = [run for run in runs["topk"] if run.records == "top3"]
    assert len(topk) == 2 * 2 * 4 and all("tail=" in run.loss for run in topk)
    assert [p.with_tail(loss, "drop") for loss in ("nkd", "nkd:gamma=1")] == ["nkd:tail=drop", "nkd:gamma=1,tail=drop"]


def test_choices_are_made_on_what_is_held_out_and_in_their_order():
    p = module("study_protocol")
    assert p.todo("core", {}) == [] and p.todo("tune", {}) == p.recipe_runs()

    def value(run, metric):
        return {0.2: 0.6}.get(run.lr, 0.5) if metric == "top1" else run.decay  # equal by decay but for NLL

    found = of_runs(p.recipe_runs(), value)
    for result in found.values():
        result["test"] = {"top1": 1 - result["held_out"]["top1"]}  # would choose otherwise
    assert p.choose(found) is None and (recipe := p.best(found, p.recipe_runs()))
    assert (recipe.lr, recipe.decay) == (0.2, 5e-4)
    left = p.todo("tune", found)
    assert left == p.weight_runs(0.2, 5e-4)
    top1 = {p.KDS[1]: 0.7, p.NKDS[2]: 0.7}
    found |= of_runs(left, lambda run, metric: top1.get(run.loss, 0.6))
    chosen = p.choose(found)
    assert (chosen.kd, chosen.nkd) == (p.KDS[1], p.NKDS[2])
    assert p.todo("tune", found) == [] and p.todo("core", found) == p.group("core", chosen)


def test_what_is_done_is_not_run_again_and_a_failure_stops_nothing(tmp_path):
    study, p, study_jobs = module("study"), module("study_protocol"), module("study_jobs")
    jobs = [p.Head(seed) for seed in range(3)]

    def command(job):
        done = tmp_path / "done" / f"{job.name}.json"
        body = f"import pathlib; pathlib.Path({str(done)!r}).write_text('{{\"kl\": {{}}}}')"
        return [sys.executable, "-S", "-c", "raise SystemExit(3)" if job.seed == 1 else body]

    (tmp_path / "done").mkdir()
    told = []
    failed = study_jobs.run_all(jobs, 2, command, tmp_path, lambda job, what: told.append((job.seed, what[:6])))
    assert failed == ["head-seed1"]
    assert sorted(told) == [(0, "done"), (1, "FAILED"), (2, "done")]
    found = study.collected(tmp_path, tmp_path / "none.json", 20)
    assert [one.seed for one in p.todo("imagenet", found)] == [1, 3, 4]
    # Also what another machine did, but not another study's.
    out = tmp_path / "study.json"
    theirs = {"head-seed3": {"kl": {}}, "build-dense": {"key": "a"}}
    out.write_text(json.dumps({"protocol": p.protocol(20), "jobs": theirs}))
    found = study.collected(tmp_path, out, 20)
    assert [one.seed for one in p.todo("imagenet", found)] == [1, 4]
    with pytest.raises(SystemExit, match="another study"):
        study.collected(tmp_path, out, 21)
    (tmp_path / "done" / "build-dense.json").write_text('{"key": "b"}')
    with pytest.raises(SystemExit, match="another teacher"):
        study.collected(tmp_path, out, 20)


def test_times_of_a_job_add_up_over_its_processes(tmp_path):
    study_jobs = module("study_jobs")
    file = tmp_path / "x.json"
    file.write_text('{"seconds": 1000.0, "cpu_seconds": 2000.0}')
    with pytest.raises(KeyboardInterrupt), study_jobs.stopwatch(file):
        raise KeyboardInterrupt
    with study_jobs.stopwatch(file) as spent:
        assert 1000 < spent()["seconds"] < 1010 and 2000 < spent()["cpu_seconds"] < 2010


def test_intervals_against_the_tables_of_t():
    r = module("study_report")
    found = r.estimate([1.0, 2.0, 4.0, 7.0, 11.0])
    deviation = math.sqrt(sum((v - 5) ** 2 for v in (1, 2, 4, 7, 11)) / 4)
    # Student's t, two-sided 95%: 2.776 for 4 degrees of freedom, 12.706 for 1.
    assert found.mean == 5 and found.deviation == pytest.approx(deviation)
    assert found.half == pytest.approx(2.776 * deviation / math.sqrt(5), rel=1e-3)
    assert r.estimate([1.0, 3.0]).half == pytest.approx(12.706, rel=1e-3)
    assert r.estimate([4.0]) == r.Estimate(4.0, 1)
    assert r.plain(found, 1, 1) == "5.0 ± 4.1"
    assert (r.signed([4.0], 100, 0), r.signed([1.0, -3.0], 1, 1)) == ("+400", "+1.0, -3.0")
    assert r.signed([1.0, 2.0, 4.0, 7.0, 11.0], 1, 1) == "+5.0 (-0.0 to +10.0)"


def test_equal_is_what_lies_within_the_margin_and_not_what_merely_may():
    p, r = module("study_protocol"), module("study_report")
    section = r.sections(p.Chosen())["views"]

    def value(run, metric):
        near = 1 if run.views in (16, 20) or run.online else 20  # differences of V = 1 and 4 scatter widely about 0
        return 0.6 + 1e-3 * near * (-1) ** (run.seed + run.views)

    text = r.verdict(of_runs([run for runs in section.runs.values() for run in runs], value), section)
    same, equal = text.split("\n\n")
    assert same.startswith("With float32 records 5 of 5 students")
    assert equal == "Equal to float32 within 1 point: V = 16, V = 20. Not shown to be: V = 1, V = 4."


def test_a_heads_kl_is_its_two_parts(tmp_path):
    """Against float64: KL is that of (label, rest) and that beside the label, weighted by the rest."""
    head = module("study_head")
    rng = np.random.default_rng(0)
    z, s, y = rng.normal(0, 3, (5, 12)), rng.normal(0, 3, (5, 12)), rng.integers(0, 12, 5)
    p, q = (np.exp(v) / np.exp(v).sum(1, keepdims=True) for v in (z, s))
    rows = np.arange(5)
    a, b = p[rows, y], q[rows, y]
    label = a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))
    z, s, target = torch.tensor(z), torch.tensor(s), torch.tensor(y)[:, None]
    whole = head.kl(z, s).numpy()
    others = head.kl(*(v.scatter(1, target, head.NOTHING) for v in (z, s))).numpy()
    assert whole == pytest.approx((p * np.log(p / q)).sum(1))
    assert whole == pytest.approx(label + (1 - a) * others)

    logits = rng.normal(0, 2, (1, 100, 100)) + rng.normal(0, 1, (4, 100, 100))
    np.savez(tmp_path / "z.npz", logits=logits.astype(np.float16), labels=logits.mean(0).argmax(1))
    found = head.heads(tmp_path / "z.npz", 3)
    assert found["kl"].keys() == found["others"].keys() >= {"ce", "dense", "5 prior", "50 drop"}
    assert all(found["kl"][name] > found["others"][name] > 0 for name in found["kl"])


def test_differences_are_of_the_seeds_that_both_have():
    p, r = module("study_protocol"), module("study_report")
    a, b = ([p.Chosen().run(loss, seed) for seed in range(5)] for loss in ("kd", "ce"))
    found = of_runs(a[:4], lambda run, m: 0.7 + run.seed) | of_runs(b[1:], lambda run, m: 0.5 + 2 * run.seed)
    assert r.differences(found, a, b, "nll") == pytest.approx([0.2 - 1, 0.2 - 2, 0.2 - 3])


def test_a_bare_name_has_the_settings_that_it_had_when_the_study_ran():
    spelled = module("study_protocol").spelled
    assert spelled("nkd") == "nkd:gamma=3.5,temperature=3,tail=prior,mixed=heavier"
    assert spelled("nkd:tail=drop,gamma=1") == "nkd:gamma=1,temperature=3,tail=drop,mixed=heavier"
    assert spelled("dist") == "dist:alpha=1,beta=2,temperature=4,eps=0"


def test_the_page_is_filled_from_the_results_and_nothing_else(tmp_path):
    r = module("study_report")
    found, page = everything(), (BENCH.parent / "docs" / "study.md").read_text()
    tables = r.tables(found)
    assert not [name for name, text in tables.items() if r.NOT_YET in text]
    once = r.filled(page, tables)
    assert r.filled(once, tables) == once
    strip = r.filled(once, dict.fromkeys(tables, "x"))
    assert strip == r.filled(page, dict.fromkeys(tables, "x"))
    empty = r.tables({})
    assert all(r.NOT_YET in text for text in empty.values())
    with pytest.raises(ValueError, match="not one place for teacher"):
        r.filled(page.replace("<!-- teacher -->", ""), tables)
    # A row by hand.
    p = module("study_protocol")
    chosen = p.choose(found)
    values = [100 * found[chosen.run("ce", s).name]["test"]["top1"] for s in range(5)]
    row = next(line for line in tables["core"].splitlines() if line.startswith("| ce |"))
    assert f"| 5 | {statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} |" in row


def test_the_report_is_written_in_part_and_whole(tmp_path):
    r, p, study = module("study_report"), module("study_protocol"), module("study")
    page, out = tmp_path / "study.md", tmp_path / "results" / "study.json"
    page.write_text((BENCH.parent / "docs" / "study.md").read_text())
    found = everything()
    part = {name: result for name, result in found.items() if "head" not in name and "-views4-" not in name}
    for results in ({}, part, found):
        r.write_report(results, p.protocol(20), out, page)
        assert study.collected(tmp_path, out, 20) == json.loads(json.dumps(results))
        assert ("V = 4 - online" in page.read_text()) == (results is found)
    kept = json.loads(out.read_text())["summary"]["core"]["pairs"]["nkd - ce"]["top1"]
    assert kept["n"] == 5 and kept["half"] > 0
