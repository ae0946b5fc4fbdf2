"""Several processes train one student: the same as one does, and what happens when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

from kdcache.cache import KdcacheError, encode
from kdcache.cache.errors import RANK_ENDED, InputError
from kdcache.cli import main
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.tests.helpers import warm
from kdcache.tests.helpers.ranks import run_ranks
from kdcache.tests.helpers.training import Same
from kdcache.train import group
from kdcache.train.config import TrainConfig
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.runfolder import RunFolder
from kdcache.train.loop.trainer import fit
from kdcache.train.losses.options import LOSSES, make_loss
from kdcache.train.run import train
from kdcache.train.sweep import sweep

RANKS = 2

# Losses


TRUE_FLOAT = torch.Tensor.float, torch.float32


def in_float64():
    """The losses compute in float32, whose rounding would hide mistakes."""
    torch.Tensor.float, torch.float32 = torch.Tensor.double, torch.float64


def value_and_gradients(loss, rows, batch):
    """The loss of some rows, weighted by their share, its gradient for their logits, and those of uskd's head."""
    logits, labels, records, weights, features = batch
    s = logits[rows].clone().requires_grad_()
    more = {"features": features[rows]} if loss.needs.features else {}
    value = loss(s, labels[rows], records[rows], None if weights is None else weights[rows], **more)
    value = value * group.weight(len(rows), len(logits))
    head = list(loss.parameters()) if loss.needs.features else []
    gradient, *of_head = torch.autograd.grad(value, [s, *head])
    return value.detach(), gradient, of_head


def loss_cases():
    """Of every loss, with one label and with two: the loss and its arguments, in float64."""
    in_float64()
    torch.manual_seed(0)
    count, classes = 12, 10
    logits, teacher = 3 * torch.randn(2, count, classes, dtype=torch.float64)
    features = torch.randn(count, 6, dtype=torch.float64)
    y = torch.randint(0, classes, (count, 2))
    share = torch.rand(count, 1, dtype=torch.float64)
    share = torch.cat([share, 1 - share], 1)
    cases = {}
    for name in LOSSES:
        for labels, weights in ((y[:, 0], None), (y, share)):
            loss = make_loss(name, 100)
            if weights is not None and not loss.needs.mixed:
                continue
            if loss.needs.features:
                loss.make_head(6, classes)
                loss.head.double()
            records = encode(teacher, labels, precision="float32")
            cases[f"{name}, {labels.dim()}"] = loss, (logits, labels, records, weights, features)
    return cases


def loss_errors(cases, alone):
    """For every case and split, how far value and gradients are from one process's, relative to the largest."""
    found = {}
    for first in (6, 9):
        for case, (loss, batch) in cases.items():
            mine = torch.arange(12).split([first, 12 - first])[group.rank()]
            value, gradient, of_head = value_and_gradients(loss, mine, batch)
            want, want_gradient, want_of_head = alone[case]
            # As DDP does: the mean over ranks.
            pairs = [(group.total(value) / RANKS, want), (gradient / RANKS, want_gradient[mine])]
            pairs += [(group.total(g) / RANKS, w) for g, w in zip(of_head, want_of_head, strict=True)]
            errors = [float((g - w).abs().max() / w.abs().max()) for g, w in pairs]
            found[f"{case}, {first}"] = max(max(e) for e in group.everyones(errors))
    return found


def test_losses_of_ranks_are_those_of_the_whole_batch(joined):
    found = joined["losses"]
    assert {case.split(",")[0] for case in found} == set(LOSSES)
    assert {case: error for case, error in found.items() if not error < 1e-12} == {}


# What ranks tell each other


def messages():
    rank = group.rank()
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(rank)
    group.average_statistics(norm)
    wishes = group.Wishes()
    heard = [wishes(rank == 1 and step == 1, False) for step in range(4)]
    rows = group.rows_of_all(torch.full((3 * (1 - rank), 2), rank), [3, 0]).tolist()
    more = group.rows_of_all(torch.full((1 + rank, 1), rank), [1, 2]).tolist()

    def refuse():
        assert group.rank() == 0
        raise InputError("no")

    with pytest.raises(KdcacheError, match="no"):
        group.from_first(refuse)
    with group.one_first():
        pass
    said = {"mean": norm.running_mean.tolist(), "heard": heard, "rows": rows, "more": more}
    return group.everyones({**said, "any": group.anyones(rank == 1)})


class Killed(BaseException):
    pass


def kept_in_an_evaluation(path):
    """How many batches are kept of a training whose ranks are killed in their first evaluation."""

    def killed(model):
        raise Killed

    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), (0.5,) * 3, (0.25,) * 3)
    loader = Same([(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), None)] * 3)
    folder = group.from_first(lambda: RunFolder(path, {}, False))
    with pytest.raises(Killed):
        fit(model, make_loss("ce", 10), loader, Recipe(1, 0.1), killed, folder, say=lambda _: None)
    return group.from_first(folder.load_state)["training"]["batch"]


def test_ranks_keep_an_epoch_before_they_evaluate(joined):
    assert joined["kept"] == 3


def test_messages_reach_all_ranks(joined):
    first, second = joined["messages"]
    for rank in (first, second):
        assert rank["mean"] == [0.5, 0.5] and rank["any"]
        assert rank["heard"] == [[False, False], [False, False], [True, False], [False, False]]
    assert first["rows"] == [[0, 0]] * 3 and first["more"] == [[0], [1], [1]]


def in_ranks(out):
    """Runs in processes of its own."""
    cases = loss_cases()
    everything = torch.arange(12)
    alone = {case: value_and_gradients(loss, everything, batch) for case, (loss, batch) in cases.items()}
    torch.Tensor.float, torch.float32 = TRUE_FLOAT
    with group.joined("cpu"):
        found = {"messages": messages(), "kept": kept_in_an_evaluation(Path(out).with_name("run"))}
        in_float64()
        found["losses"] = loss_errors(cases, alone)
        if group.rank() == 0:
            Path(out).write_text(json.dumps(found))


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """What in_ranks found."""
    out = tmp_path_factory.mktemp("joined") / "found.json"
    codes, _, said = run_ranks(RANKS, [__file__, out])
    assert codes == {0}, said
    return json.loads(out.read_text())


# torchrun

NETWORK = """
from torch import nn

def small():  # without batch norm, whose statistics are each rank's own
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, 2, 1), nn.GELU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(128, 10))
"""
EPOCHS = 6


@pytest.fixture(scope="module")
def home(tmp_path_factory, no_fsync):
    """A folder to work in, with a network, its weights as a teacher's, and a cache."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("KDCACHE_HOME", str(folder))
        (folder / "rankstudent.py").write_text(NETWORK)
        torch.manual_seed(0)
        # Large enough that its answers vary: a correlation with what hardly does is mostly rounding.
        state = {name: 4 * weight for name, weight in build_network("rankstudent:small", 10, 8).state_dict().items()}
        save_file(state, folder / "teacher.safetensors")
        weights = str(folder / "teacher.safetensors")
        config = BuildConfig("rankstudent:small", weights, views=2, allow_low_accuracy=True, out=str(folder / "cache"))
        build(config, lambda _: None)
        yield folder


def settings(home, out, **more):
    """15 unequal batches an epoch, so that each rank has its own count of rows."""
    of = {"cache": str(home / "cache"), "student": "rankstudent:small", "out": str(home / out)}
    return TrainConfig("dist", batch_size=95, lr=0.01, **of, **more)


def line_of(home, out, *flags, batch=95):
    """A training as `settings` says."""
    of = ["--cache", str(home / "cache"), "--student", "rankstudent:small", "--lr", "0.01", "--out", str(home / out)]
    return ["-m", "kdcache.cli", "train", *of, "--batch-size", str(batch), *flags]


def running(home, line):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return warm.Popen(
        [sys.executable, *line], cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def torchrun(home, out, *flags):
    """As a user starts it, on a free port, which several can have at once."""
    how = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    return running(home, [*how, *line_of(home, out, *flags)])


def agent(home, out, *flags, restarts=0):
    """torchrun's agent, whose ranks are forked and write their pids to files."""
    pids = home / f"{out}-ranks"
    pids.mkdir()
    words = [RANKS, restarts, pids, *line_of(home, out, *flags)[2:]]
    return running(home, ["-m", "kdcache.tests.helpers.elastic", *words])


def require_same_weights(one, other):
    one, other = (load_file(path / "last.safetensors") for path in (one, other))
    for name, weight in one.items():
        assert float((other[name] - weight).abs().max() / weight.abs().max()) < 3e-5, name


def test_ranks_train_what_one_process_trains(home):
    """From the live teacher, which learns too in one of them; and as a sweep."""
    losses = "dist", "uskd", "bdkd:start=taught"
    weights = str(home / "teacher.safetensors")
    flags = [f for loss in losses for f in ("--loss", loss)]
    flags += ["--epochs", "2", "--online", "--weights", weights, "--teacher", "rankstudent:small"]
    live = {"online": True, "weights": weights, "teacher": "rankstudent:small"}
    alone = sweep(settings(home, "one", epochs=2, **live), losses, [0], lambda _: None)
    codes, output, said = run_ranks(RANKS, line_of(home, "two", *flags), home)
    assert codes == {0}, said
    together = json.loads((home / "two" / "sweep.json").read_text())
    for one, two in zip(alone["runs"], together["runs"], strict=True):
        assert two["summary"]["ranks"] == RANKS
        assert two["summary"]["loss"] == pytest.approx(one["summary"]["loss"], 1e-5)
        parts = {name: value for name, value in one["summary"].items() if name.startswith("loss_")}
        assert len(parts) > 1 and {name: two["summary"][name] for name in parts} == pytest.approx(parts, rel=1e-4)
        require_same_weights(Path(one["run"]), Path(two["run"]))
    assert said.count("epoch 2/2") == len(losses) and output.count("agreement") == 1


def rank_process(pids, started, rank):
    """The pid of a rank, once it is there."""
    while started.poll() is None:
        if (pids / str(rank)).exists():
            return int((pids / str(rank)).read_text())
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = stat.read_text().rpartition(")")[2].split()[1]
                mine = parent == str(started.pid) and f"\0RANK={rank}\0" in stat.with_name("environ").read_text()
            except OSError:  # it ended meanwhile
                continue
            if mine:
                return int(stat.parent.name)
        time.sleep(0.05)
    raise AssertionError(started.communicate()[1])


def in_training(home, out, started):
    """Waits until something is kept; the pids of the ranks."""
    both = [rank_process(home / f"{out}-ranks", started, rank) for rank in range(RANKS)]
    while not (home / out / "state.pt").exists() and started.poll() is None:
        time.sleep(0.01)
    return both


def kill_rank(home, out, started):
    """Rank 1, within the training; the pids of both."""
    both = in_training(home, out, started)
    os.kill(both[1], signal.SIGKILL)
    return both


@pytest.fixture(scope="module")
def whole(home):
    """One process, uninterrupted."""
    train(settings(home, "whole", epochs=EPOCHS), lambda _: None)
    return home / "whole"


def test_ranks_that_torchrun_restarts_go_on(home, whole):
    started = agent(home, "restarted", "--loss", "dist", "--epochs", str(EPOCHS), restarts=1)
    kill_rank(home, "restarted", started)
    _, said = started.communicate(timeout=120)
    assert started.returncode == 0, said
    assert said.count("resuming ") == 1
    require_same_weights(whole, home / "restarted")


def test_a_rank_that_dies_ends_the_others_and_one_process_goes_on(home, whole):
    started = agent(home, "dead", "--loss", "dist", "--epochs", str(EPOCHS))
    both = kill_rank(home, "dead", started)
    at = time.monotonic()
    _, said = started.communicate(timeout=60)
    assert started.returncode != 0 and time.monotonic() - at < 20
    assert not any(Path(f"/proc/{pid}").exists() for pid in both)
    # torchrun says which one died; the other may have had the time to notice.
    assert {line for line in said.splitlines() if line.startswith("Error: ")} <= {f"Error: {RANK_ENDED}"}
    train(settings(home, "dead", epochs=EPOCHS, resume=True), lambda _: None)
    require_same_weights(whole, home / "dead")


def test_torchrun_that_is_stopped_ends_its_ranks_and_one_process_goes_on(home, whole):
    started = torchrun(home, "stopped", "--loss", "dist", "--epochs", str(EPOCHS))
    both = in_training(home, "stopped", started)
    started.terminate()
    _, said = started.communicate(timeout=60)
    assert started.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in both)
    assert said.count("stopped; nothing is lost") == 1 and "Error: " not in said, said
    train(settings(home, "stopped", epochs=EPOCHS, resume=True), lambda _: None)
    require_same_weights(whole, home / "stopped")


def test_what_all_ranks_refuse_is_said_once(home):
    codes, _, said = run_ranks(3, line_of(home, "refused", "--loss", "kd", "--epochs", "1", batch=2), home)
    assert codes == {2}
    lines = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert lines == ["Error: a batch of 2 cannot be split over 3 ranks"]
    assert not (home / "refused").exists()


@pytest.mark.parametrize(
    ("known", "named"),
    [({}, "MASTER_ADDR"), ({"MASTER_ADDR": "localhost"}, "MASTER_PORT")],
)
def test_ranks_that_do_not_know_where_to_meet(home, monkeypatch, known, named):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    started = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**started, "TORCHELASTIC_USE_AGENT_STORE": "True", **known}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, ["train", "--cache", str(home / "cache"), "--loss", "kd"])
    assert result.exit_code == 2 and len(result.output.splitlines()) == 1
    assert result.output.startswith("Error: RANK and WORLD_SIZE are set as for one of 2 ranks")
    assert named in result.output


if __name__ == "__main__":
    in_ranks(*sys.argv[1:])
