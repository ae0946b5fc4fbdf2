"""The named parts of a loss: as a sum, and as the trainer logs their means."""

import json
import signal

import pytest
import torch
from torch import nn

from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.tests.helpers.training import Drawn
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.runfolder import RunFolder
from kdcache.train.loop.trainer import fit, seeded
from kdcache.train.losses import CE, TFNKD, part
from kdcache.train.losses.options import make_loss

BATCHES, EPOCHS = 5, 2
NOTES = {"input_size": 4, "mean": [0.5] * 3, "std": [0.25] * 3, "class_names": []}


def test_a_sum_of_parts_goes_on_calculating_with_each():
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 5.0])
    both = (part("a", a) + part("b", -b)).times(2.0) + part("a", b)
    torch.testing.assert_close(both.total, 2 * (a - b) + b)
    assert both.total.requires_grad and not any(x.requires_grad for x in both.named.values())
    assert {name: value.tolist() for name, value in both.mean().named.items()} == {"a": 7.0, "b": -8.0}
    assert both.mean().mean() == both.mean()


def drawn(epoch, i):
    """A batch of random images and labels."""
    rng = torch.Generator().manual_seed(i + BATCHES * epoch)
    images = torch.randint(0, 256, (8, 3, 4, 4), generator=rng, dtype=torch.uint8)
    return images, torch.randint(0, 5, (8,), generator=rng), None


def trained(path, loss, resume=False, loader=None):
    """The lines of metrics."""
    network = seeded(0, lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 5)))
    model = Classifier(network, (0.5,) * 3, (0.25,) * 3)
    recipe, folder = Recipe(EPOCHS, 0.05, accumulate=2), RunFolder(path, {}, resume)
    lines = fit(model, loss, loader or Drawn(BATCHES, drawn), recipe, lambda _: {}, folder, NOTES, lambda _: None)
    assert [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] == lines
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_the_mean_of_each_part_is_logged_beside_the_loss(tmp_path):
    seen = []

    class Watched(TFNKD):
        def terms(self, batch):
            found = super().terms(batch)
            seen.append({name: float(value.mean()) for name, value in found.named.items()})
            return found

    lines = trained(tmp_path / "run", Watched())
    for epoch, line in enumerate(lines):
        assert set(line) == {"epoch", "loss", "loss_ce", "loss_target"}
        batches = seen[epoch * BATCHES :][:BATCHES]
        for name in ("ce", "target"):
            assert line[f"loss_{name}"] == pytest.approx(sum(b[name] for b in batches) / BATCHES, rel=1e-5)
        assert line["loss_ce"] + line["loss_target"] == pytest.approx(line["loss"], rel=1e-5)
    events = b"".join(file.read_bytes() for file in (tmp_path / "run" / "tensorboard").iterdir())
    assert b"loss_target" in events


def test_a_loss_of_one_part_is_logged_once(tmp_path):
    for loss in (CE(), make_loss("ce:label_smoothing=0.1", 5)):
        assert set(trained(tmp_path / f"{loss.label_smoothing}", loss)[0]) == {"epoch", "loss"}


def stopped(path):
    """A run that is stopped after four batches of its second epoch."""

    def stop(epoch, batch):
        if (epoch, batch) == (1, 3):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trained(path, TFNKD(), loader=Drawn(BATCHES, drawn, stop))


def test_a_resumed_epoch_logs_the_parts_of_all_its_batches(tmp_path):
    stopped(tmp_path / "run")
    assert trained(tmp_path / "run", TFNKD(), resume=True) == trained(tmp_path / "whole", TFNKD())


def test_a_state_without_parts_goes_on_and_does_not_log_those_of_half_an_epoch(tmp_path):
    """Such a state is of a version that did not count them."""
    stopped(tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    del state["training"]["parts"]
    torch.save(state, tmp_path / "run" / "state.pt")
    whole = trained(tmp_path / "whole", TFNKD())
    want = [whole[0], {k: v for k, v in whole[1].items() if not k.startswith("loss_")}]
    assert trained(tmp_path / "run", TFNKD(), resume=True) == want
