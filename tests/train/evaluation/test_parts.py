"""A student of a mixed cache: how far it agrees with the mean and with each part, counted here from what they store."""

import json
import shutil

import numpy as np
import pytest
import torch

from kdcache.cache import Cache
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.ensembles.config import MixConfig
from kdcache.pipeline.ensembles.mix import mix
from kdcache.pipeline.pack import pack
from kdcache.pipeline.share import push
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.weights import read_weights
from kdcache.tests.helpers.training import metrics_of, quiet
from kdcache.train.config import TrainConfig
from kdcache.train.evaluate import evaluate_run, student_of
from kdcache.train.run import train


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """A student of the mean of two teachers, whose caches lie under KDCACHE_HOME; the run and its caches by weight."""
    folder, caches = tmp_path_factory.mktemp("parts"), {}
    for seed, weight in ((0, 3), (1, 1)):
        torch.manual_seed(seed)
        torch.save(build_network("resnet8", 10, 8).state_dict(), folder / f"{seed}.pt")
        built = build(
            BuildConfig(
                "resnet8", str(folder / f"{seed}.pt"), views=1, precision="float32", topk=4 if seed else None,
                allow_low_accuracy=True,
            ), quiet,
        )  # fmt: skip
        caches[weight] = Cache(built.path)
    mixed = mix(MixConfig(tuple(str(c.path) for c in caches.values()), weights=tuple(caches)), quiet)
    train(TrainConfig("kd", str(mixed.path), epochs=1, out=str(folder / "run")), quiet)
    return folder / "run", caches, Cache(mixed.path)


def by_hand(folder):
    """The class that the student names for each evaluation image."""
    data = open_data("digits", "eval")
    model = student_of(folder, *read_weights(folder / "last.safetensors")).eval()
    with torch.no_grad():
        return model(data.pixels.permute(0, 3, 1, 2)).numpy().argmax(1)


def test_training_and_eval_report_the_agreement_with_the_mean_and_with_each_part(run):
    folder, caches, _ = run
    said = []
    found, named = evaluate_run(str(folder), say=said.append), by_hand(folder)
    assert not said
    answers = {w: c.read_evaluation().dense(1.0).double().numpy() for w, c in caches.items()}
    want = {f"resnet8_{c.key[:6]}_agreement": np.mean(named == answers[w].argmax(1)) for w, c in caches.items()}
    assert {k: found[k] for k in want} == pytest.approx(want)
    mean = sum(w * p for w, p in answers.items()) / sum(answers)
    assert found["agreement"] == pytest.approx(np.mean(named == mean.argmax(1)), abs=1 / len(named))
    assert len({*want.values(), found["agreement"]}) > 1, "or nothing is told apart"
    (line,) = metrics_of(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert {k: line[k] for k in want} == {k: summary[k] for k in want} == pytest.approx(want)
    assert not [k for k in evaluate_run(str(folder), data="digits", cache=str(caches[3].path)) if k in want]


def test_a_part_that_cannot_be_read_is_said_in_one_line_and_found_beside_a_mix_in_a_registry(
    run, tmp_path, monkeypatch
):
    folder, caches, mixed = run
    moved = caches[1]
    want = evaluate_run(str(folder))
    push(mixed.path, str(tmp_path / "team"), say=quiet)
    push(moved.path, str(tmp_path / "team"), say=quiet)
    pack(mixed.path, "hdf5", str(tmp_path / "m.h5"), say=quiet)
    shutil.move(moved.path, tmp_path / "elsewhere")
    try:
        said = []
        found = evaluate_run(str(folder), cache=str(tmp_path / "m.h5"), say=said.append)
        (line,) = said
        assert line == (
            f"note: agreement with part {moved.key[:12]} of the mix is not measured: it is not under KDCACHE_HOME "
            "(kdcache pull gets it from a registry)"
        )
        lost = f"resnet8_{moved.key[:6]}_agreement"
        assert found == {k: v for k, v in want.items() if k != lost} and lost in want
        there = tmp_path / "team" / "caches" / mixed.key
        assert evaluate_run(str(folder), cache=str(there), say=said.append) == want
        assert evaluate_run(str(folder), registry=str(tmp_path / "team"), say=said.append) == want
        assert len(said) == 1
        for path in (tmp_path / "team" / "caches" / moved.key).glob("eval/**/c/**/*"):
            if path.is_file():
                path.chmod(0o644)
                path.write_bytes(b"damaged")
        assert lost not in evaluate_run(str(folder), cache=str(there), say=said.append)
        assert len(said) == 2 and f"{moved.key[:12]} of the mix is not measured: " in said[1]
        assert "HOME" not in said[1]
    finally:
        shutil.move(tmp_path / "elsewhere", moved.path)
