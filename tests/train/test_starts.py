"""A student starts from a checkpoint: its weights, its head where the classes differ, and a run that knows of it."""

import json

import pytest
import torch

from kdcache.cache.errors import InputError
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.sources.files import start_from
from kdcache.pipeline.teachers.weights import read_weights
from kdcache.tests.helpers.registries import run
from kdcache.tests.helpers.training import metrics_of
from kdcache.train.config import TrainConfig
from kdcache.train.loop.runfolder import RunFolder
from kdcache.train.run import train


def saved(classes, seed=5):
    torch.manual_seed(seed)
    network = build_network("resnet8", classes, 8)
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}, "epoch": 3}, "start.pth")
    return network.state_dict()


class Stopped(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("classes", [10, 7])
def test_a_run_starts_from_the_file(home, classes):
    """With a learning rate of almost nothing the weights stay what they were at the start."""
    before, said = saved(classes), []
    asked = TrainConfig(
        "kd", cache=str(home / "default"), student_weights="start.pth", epochs=1, lr=1e-30, weight_decay=0, out="run"
    )
    train(asked, said.append)
    after = read_weights("run/last.safetensors")[0]
    assert all(torch.equal(after[k], before[k]) for k in before if k.startswith("stages") and k.endswith("0.weight"))
    line = "resnet8 starts from start.pth#state_dict.module"
    if classes == 10:
        assert line in said and torch.equal(after["fc.weight"], before["fc.weight"])
    else:
        assert f"{line}, with a new head (fc.weight, fc.bias): 7 classes there, 10 here" in said


def test_a_new_head_is_the_seeds():
    before = saved(7)
    networks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        networks.append(build_network("resnet8", 10, 8))
    fresh = networks[0].fc.weight.clone()
    start_from(networks[0], "resnet8", "start.pth", 8)
    assert torch.equal(networks[0].fc.weight, fresh) and torch.equal(networks[1].fc.weight, fresh)
    assert not torch.equal(networks[2].fc.weight, fresh)
    assert torch.equal(networks[0].state_dict()["stem.0.weight"], before["stem.0.weight"])


def test_a_file_without_a_head():
    state = {k: v for k, v in saved(7).items() if not k.startswith("fc.")}
    torch.save({f"backbone.{k}": v for k, v in state.items()}, "features.pth")
    network = build_network("resnet8", 10, 8)
    said = start_from(network, "resnet8", "features.pth", 8)
    assert said.endswith("features.pth#backbone, with a new head (fc.weight, fc.bias): none there, 10 here")
    assert torch.equal(network.state_dict()["stem.0.weight"], state["stem.0.weight"])


def test_what_does_not_fit_ends_in_one_line_and_no_run(home, tmp_path):
    saved(10)
    line = f"train --cache {home / 'default'} --epochs 1 --out run --student"
    for student, file, problem in (
        ("resnet8x4", "start.pth", "the weights in start.pth#state_dict.module and resnet8x4 do not fit: "),
        ("resnet14", "start.pth", "the weights in start.pth#state_dict.module and resnet14 do not fit: 30 missing ("),
        ("resnet8", "no.pth", "no weights file at no.pth"),
        ("resnet8", "start.pth#model", "start.pth holds nothing at #model: it has state_dict"),
    ):
        result = run(f"{line} {student} --student-weights {file}")
        assert result.exit_code == 2 and problem in result.output.splitlines()[-1], result.output
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_knows_its_start_and_needs_it_no_more(home, tmp_path, monkeypatch):
    saved(10)
    line = f"train --cache {home / 'default'} --epochs 2"
    assert run(f"{line} --student-weights start.pth --out whole").exit_code == 0
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["student_weights"] == str(tmp_path / "start.pth")
    keep, kept = RunFolder.save_state, []

    def stop(self, history, training):
        keep(self, history, training)
        kept.append(history)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_state", stop)
        with pytest.raises(Stopped):
            run(f"{line} --student-weights start.pth --out halved")
    assert len(kept) == 1
    (tmp_path / "start.pth").unlink()
    result = run("train --resume --out halved")
    assert result.exit_code == 0, result.output
    assert metrics_of(tmp_path / "halved") == metrics_of(tmp_path / "whole")
    torch.save({}, "other.pth")
    result = run("train --resume --out halved --student-weights other.pth")
    assert result.exit_code == 2 and "student_weights: the run has" in result.output
    older = {k: v for k, v in config.items() if k not in ("student_weights", "sha256")}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(older))
    result = run("train --resume --out whole --student-weights other.pth")
    assert result.exit_code == 2 and "student_weights: the run has None" in result.output


def test_a_function_may_start_from_a_file_too(home, tmp_path, monkeypatch):
    (tmp_path / "own_start.py").write_text(
        "from torch import nn\ndef net(classes):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    network = build_network("own_start:net", 4, 8)
    torch.save({"model": network.state_dict()}, "own.pth")
    other = build_network("own_start:net", 4, 8)
    assert start_from(other, "own_start:net", "own.pth", 8).endswith("own.pth#model")
    assert torch.equal(other[2].weight, network[2].weight)
    torch.save({"model": {"2.weight": torch.zeros(4, 5), "2.bias": torch.zeros(4)}}, "own.pth")
    with pytest.raises(InputError, match=r"do not fit: 2.weight is \(4, 5\), the network has \(4, 12\)$"):
        start_from(other, "own_start:net", "own.pth", 8)
