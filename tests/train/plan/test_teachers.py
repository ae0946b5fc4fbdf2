"""A teacher that learns beside its student."""

import pytest
import torch
from click.testing import CliRunner

from kdcache.cache import KdcacheError, open_cache
from kdcache.cli import main
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.teachers.weights import read_weights
from kdcache.tests.helpers.training import metrics_of, quiet, teacher_of
from kdcache.train.config import TrainConfig
from kdcache.train.evaluate import evaluate_run
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loop.trainer import seeded
from kdcache.train.run import train


@pytest.mark.parametrize(("regulariser", "start"), [(2.0, "scratch"), (0.0, "taught")])
def test_bdkd_online_trains_both_networks_as_its_formulas_say(home, data, tmp_path, regulariser, start):
    """An epoch beside a loop written from the formulas alone; without regulariser the teacher learns as if alone."""
    options = f"temperature=2,heavy=1.5,light=0.5,teacher_alpha=0.7,regulariser={regulariser},start={start}"
    config = {"cache": str(home / "default"), "epochs": 1, "batch_size": 256, "lr": 0.02, "seed": 3, "online": True}
    summary = train(TrainConfig(f"bdkd:{options}", out=str(tmp_path / "run"), **config), quiet)

    s, t = (Classifier(seeded(of, lambda: build_network("resnet8", 10, 8)), data.mean, data.std) for of in (3, -4))
    if start == "taught":
        t = teacher_of(home).teacher.model
    cache = open_cache(home / "default")
    loader = CachedLoader(cache, data, 256, seed=3)
    both = [m.to(memory_format=torch.channels_last).train() for m in (s, t)]
    before = [flat(m.parameters()) for m in both]
    sgd = [torch.optim.SGD(m.parameters(), 0.02, momentum=0.9, weight_decay=5e-4, nesterov=True) for m in both]
    for step, (images, y, _) in enumerate(loader.steps()):
        for optimiser in sgd:
            optimiser.param_groups[0]["lr"] = 0.02 * (step + 1) / len(loader)
            optimiser.zero_grad()
        z, v = (m(images) for m in both)
        p, q = torch.softmax(v / 2, 1), torch.softmax(z / 2, 1)
        forward = (p.detach() * (p.detach() / q).log()).sum(1)
        reverse = (q * (q / p.detach()).log()).sum(1)
        sure = (torch.special.entr(q).sum(1) < torch.special.entr(p).sum(1)).detach()
        student = torch.where(sure, 1.5 * forward + 0.5 * reverse, 0.5 * forward + 1.5 * reverse)
        teacher = (q.detach() * (q.detach() / p).log()).sum(1)
        ce = [torch.nn.functional.cross_entropy(x, y) for x in (z, v)]
        (ce[0] + 4 * student.mean() + 0.7 * ce[1] + 4 * regulariser * teacher.mean()).backward()
        for optimiser in sgd:
            optimiser.step()
    for name, model, at_first in zip(("last", "teacher-last"), both, before, strict=True):
        state, notes = read_weights(tmp_path / "run" / f"{name}.safetensors")
        got, want = flat(state[k] for k, _ in model.network.named_parameters()), flat(model.parameters())
        assert (got - want).norm() < 0.01 * (want - at_first).norm()
        assert notes["metrics"]["top1"] == summary["top1" if name == "last" else "teacher_top1"]


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def test_a_run_with_a_learning_teacher(home, tmp_path):
    out = tmp_path / "run"
    config = {"cache": str(home / "default"), "epochs": 3, "online": True}
    said = []
    train(TrainConfig("bdkd", out=str(out), **config), said.append)
    lines = metrics_of(out)
    measured = {"top1", "top5", "nll", "brier", "ece"}
    assert all({*measured, *(f"teacher_{m}" for m in measured), "teacher_loss"} <= set(line) for line in lines)
    assert all("ece" in text.split("teacher:")[0] and "ece" in text.split("teacher:")[1] for text in said[1:4])
    # Agreement is with the teacher of the run, not with that of the cache.
    found, figures = evaluate_run(str(out)), ("top1", "teacher_top1", "agreement", "kl", "teacher_ece")
    assert {k: found[k] for k in figures} == pytest.approx({k: lines[-1][k] for k in figures})
    # Its weights are a teacher's.
    teacher = teacher_of(home, weights=str(out / "teacher-last.safetensors")).teacher
    images = torch.as_tensor(open_data("digits", "eval").pixels).permute(0, 3, 1, 2)
    right = teacher.logits(images).argmax(1) == torch.from_numpy(open_data("digits", "eval").labels[:, 0])
    assert float(right.float().mean()) == pytest.approx(lines[-1]["teacher_top1"])
    (out / "teacher-last.safetensors").unlink()
    with pytest.raises(KdcacheError, match=r"learnt beside a teacher.*teacher-last\.safetensors"):
        evaluate_run(str(out))


@pytest.mark.parametrize("loss", [("nkd",), ("bdkd", "--online")])
def test_evaluated_now_and_then_it_learns_the_same(home, tmp_path, loss):
    command = ["train", "--cache", str(home / "default"), "--epochs", "3", "--loss", *loss, "--out"]
    for out, every in (("all", ()), ("few", ("--evaluate-every", "2"))):
        result = CliRunner().invoke(main, [*command, str(tmp_path / out), *every], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    seen, few = metrics_of(tmp_path / "all"), metrics_of(tmp_path / "few")
    assert few[1:] == seen[1:]
    assert few[0] == {k: v for k, v in seen[0].items() if k in ("epoch", "teacher_loss") or k.startswith("loss")}


def test_what_a_learning_teacher_cannot_do_is_refused(home, tmp_path):
    config = {"cache": str(home / "default"), "epochs": 1, "out": str(tmp_path / "run")}
    with pytest.raises(KdcacheError, match="teacher that learns: give --online"):
        train(TrainConfig("bdkd:regulariser=2", **config), quiet)
    with pytest.raises(KdcacheError, match="give --loss bdkd:start=taught"):
        train(TrainConfig("bdkd", online=True, weights="x.safetensors", **config), quiet)
    with pytest.raises(KdcacheError, match="not finite: lower --lr"):
        train(TrainConfig("bdkd", online=True, lr=1e12, **config), quiet)
    build(BuildConfig("resnet8", views=1, unlabelled=True, out=str(home / "none"), weights=taught(home)), quiet)
    with pytest.raises(KdcacheError, match="built with --unlabelled"):
        train(TrainConfig("bdkd:alpha=0", online=True, **{**config, "cache": str(home / "none")}), quiet)


def taught(home):
    (file,) = (home / "teachers").rglob("*.safetensors")
    return str(file)
