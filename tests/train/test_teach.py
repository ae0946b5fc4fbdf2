"""Teaching a teacher for data that have none."""

import json
import shutil
import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from kdcache.cache import KdcacheError
from kdcache.cli import main
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.data.defaults import defaults_for
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.teachers.weights import weights_hash
from kdcache.tests.helpers.training import quiet
from kdcache.train import teach as module
from kdcache.train.config import TeachConfig
from kdcache.train.teach import multiply_adds, teach


def test_a_teacher_that_was_half_taught_on_them_is_not_gone_on_with(home):
    def stop(text):
        if text.startswith("epoch 2/"):
            raise KeyboardInterrupt

    config = TeachConfig("resnet14", epochs=2)
    with pytest.raises(KeyboardInterrupt):
        teach(config, stop)
    (file,) = home.glob("teachers/*/resnet14.run/config.json")
    now = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in now.items() if k not in ("stream", "sha256")}))
    with pytest.raises(KdcacheError, match=r"stream: the run has views, asked for teaching \(--force teaches it from"):
        teach(config, quiet)
    shutil.rmtree(file.parent)


def test_the_multiply_adds_of_a_network_are_those_of_its_sums():
    layers = nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4 * 4, 10)
    model = Classifier(nn.Sequential(*layers), (0.3,) * 3, (0.4,) * 3).train()
    assert multiply_adds(model, 8) == 4 * 4 * 5 * 3 * 3 * 3 + 5 * 4 * 4 * 10
    assert model.training


@pytest.mark.parametrize(
    ("work", "epochs", "lr"), [(40_000_000, 20, 0.05), (80_000_000, 10, 0.01), (10**9, 5, 0.01), (1, 20, 0.05)]
)
def test_large_networks_are_taught_the_digits_in_fewer_epochs(work, epochs, lr):
    usual = defaults_for(open_data("digits", "train"))
    found = usual.to_teach(work)
    assert (found.epochs, found.lr) == (epochs, lr) and found.views == usual.views


@pytest.mark.parametrize(("name", "epochs", "lr"), [("resnet20", 20, 0.05), ("resnet34", 7, 0.01)])
def test_what_is_asked_for_counts_and_the_size_of_the_network_otherwise(home, name, epochs, lr):
    device = torch.device("cpu")
    plan, _ = module._plan(TeachConfig(name), device, quiet)
    assert (plan.recipe.epochs, plan.recipe.lr) == (epochs, lr)
    plan, _ = module._plan(TeachConfig(name, epochs=3, lr=0.3), device, quiet)
    assert (plan.recipe.epochs, plan.recipe.lr) == (3, 0.3)


def test_how_long_it_takes_is_said_first_and_changes_nothing_of_what_is_taught(home, monkeypatch):
    """The network draws random numbers in every step, for its dropout."""
    config, said = TeachConfig("mobilenet_v3_small", epochs=1, batch_size=512, force=True), []
    taught = []
    for foretell in (module._foretell, lambda *a: None):
        monkeypatch.setattr(module, "_foretell", foretell)
        monkeypatch.setattr(module, "file_classifier", lambda path, model, notes: taught.append(model))
        teach(config, said.append)
    one, other = (weights_hash(model.network.state_dict()) for model in taught)
    assert one == other
    told = [i for i, line in enumerate(said) if line.startswith("this takes about ")]
    assert told == [1] and said[0].startswith("teaching mobilenet_v3_small")


@pytest.mark.parametrize(("seconds", "is_long"), [(0.01, False), (5.0, True)])
def test_views_are_foretold_too_and_where_it_takes_long_a_smaller_teacher_is_named(home, monkeypatch, seconds, is_long):
    monkeypatch.setattr(module, "_seconds", lambda run, device: seconds)
    plan, model = module._plan(TeachConfig("resnet14"), torch.device("cpu"), quiet)
    said = []
    module._foretell(plan, model, 22, 8, said.append)
    assert "to build 8 views of them about " in said[0]
    assert [line for line in said if "--teacher resnet20" in line] == said[1:] and len(said) == 1 + is_long


@pytest.mark.parametrize("name", ["vit_b_16", "densenet121"])
@pytest.mark.parametrize("command", ["build", "teach"])
def test_a_network_that_cannot_see_the_digits_is_refused_with_one_that_can(home, name, command):
    found = CliRunner().invoke(main, [command, "--teacher", name])
    assert found.exit_code == 2 and "on digits take a network for small images, such as resnet20" in found.output
    assert "Traceback" not in found.output and "teaching" not in found.output


@pytest.mark.parametrize("line", ["build --teacher resnet8", "teach --teacher resnet8", "plan --teacher resnet8"])
def test_the_first_line_is_there_before_torch_is(home, monkeypatch, line):
    for name in ("teach", "forecast.forecast"):
        monkeypatch.setitem(sys.modules, f"kdcache.train.{name}", None)
    found = CliRunner().invoke(main, line.split())
    assert isinstance(found.exception, ImportError)
    assert found.output.startswith("data: digits, scikit-learn's 8x8 images, to try things out")
