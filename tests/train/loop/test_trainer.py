"""The training loop on small networks: each setting against a loop written plainly, and stopped at any step."""

import functools
import json
import math
import signal
import warnings

import pytest
import torch
from torch import nn

from kdcache.cache import KdcacheError
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.teachers.weights import read_weights
from kdcache.tests.helpers.training import Drawn
from kdcache.train.loop import optimisers, trainer
from kdcache.train.loop.interrupts import Interrupts
from kdcache.train.loop.optimisers import Recipe, Updater, require_autocast
from kdcache.train.loop.runfolder import RunFolder
from kdcache.train.loop.trainer import Training, fit, seeded
from kdcache.train.losses import CE

BATCHES, EPOCHS = 7, 3


class Batches(Drawn):
    """Seven batches of random images, in another order every epoch; `then` is called before each is given."""

    def __init__(self, *then):
        rng = torch.Generator().manual_seed(1)
        images = torch.randint(0, 256, (BATCHES, 16, 3, 4, 4), generator=rng, dtype=torch.uint8)
        labels = torch.randint(0, 5, (BATCHES, 16), generator=rng)

        def draw(epoch, i):
            at = (i + 3 * epoch) % BATCHES
            return images[at], labels[at], None

        super().__init__(BATCHES, draw, *then)


def network():
    # A bias before the norm would have rounding alone for its gradient.
    maps = [nn.Conv2d(3, 6, 3, bias=False), nn.Flatten(), nn.Linear(24, 8, bias=False)]
    return nn.Sequential(*maps, nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 5))


def classifier():
    return Classifier(seeded(0, network), (0.5,) * 3, (0.25,) * 3)


def quiet(_):
    pass


def loss_of(model):
    model.eval()
    images, labels, _ = next(Batches().steps())
    return {"top1": float(CE()(model(images), labels).detach())}


def settings(**changes):
    return Recipe(**{"epochs": EPOCHS, "lr": 0.05, "decay": 0.01, "sgd_lr": 0.03, "sgd_decay": 0.001, **changes})


HAS_MUON = hasattr(torch.optim, "Muon")
needs_muon = pytest.mark.skipif(not HAS_MUON, reason="torch has Muon since 2.9; what kdcache says before is tested")
OPTIMISERS = ["sgd", "adamw", pytest.param("muon", marks=needs_muon)]


# Each setting


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize(("accumulate", "clip", "ema"), [(1, None, None), (3, 0.1, 0.8)])
def test_as_a_plain_loop(name, accumulate, clip, ema):
    """Seven batches by threes leave one over, whose mean is its own."""
    recipe = settings(optimiser=name, accumulate=accumulate, clip=clip, ema=ema)
    got = classifier()
    seen = []
    fit(got, CE(), Batches(), recipe, lambda m: seen.append(m) or {}, say=quiet)

    want = classifier()
    everything = list(want.parameters())
    if name == "sgd":
        made = [torch.optim.SGD(everything, 0.05, 0.9, weight_decay=0.01, nesterov=True)]
    elif name == "adamw":
        made = [torch.optim.AdamW(everything, 0.05, weight_decay=0.01)]
    else:
        flat, others = ([p for p in everything if (p.ndim == 2) is two] for two in (True, False))
        made = [torch.optim.Muon(flat, 0.05, weight_decay=0.01)]
        made.append(torch.optim.SGD(others, 0.03, 0.9, weight_decay=0.001, nesterov=True))
    peaks = [o.param_groups[0]["lr"] for o in made]
    average = {k: v.clone() for k, v in want.state_dict().items()}
    loader, step, steps = Batches(), 0, math.ceil(BATCHES / accumulate)
    want.train()
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        batches = list(loader.steps())
        for start in range(0, BATCHES, accumulate):
            group = batches[start : start + accumulate]
            torch.stack([nn.functional.cross_entropy(want(x), y) for x, y, _ in group]).mean().backward()
            if clip:
                nn.utils.clip_grad_norm_(everything, clip)
            share = (step + 1) / steps if step < steps else 0.5 * (1 + math.cos(math.pi * (step / steps - 1) / 2))
            for optimiser, peak in zip(made, peaks, strict=True):
                optimiser.param_groups[0]["lr"] = peak * share
                optimiser.step()
                optimiser.zero_grad()
            d = min(ema or 0, (1 + step) / (10 + step))
            for k, v in want.state_dict().items():
                average[k] = d * average[k] + (1 - d) * v if v.is_floating_point() else v.clone()
            step += 1
    for k, v in got.state_dict().items():
        torch.testing.assert_close(v, want.state_dict()[k], rtol=1e-4, atol=1e-5)
    assert all((m is got) == (ema is None) for m in seen) and len(seen) == EPOCHS
    for k, v in seen[-1].state_dict().items():
        torch.testing.assert_close(v, average[k], rtol=1e-4, atol=1e-5)


def test_an_overflow_in_fp16_leaves_the_weights_and_lowers_the_scale():
    class Large(CE):
        def terms(self, batch):
            return super().terms(batch).times(1e4)

    model = classifier()
    training = Training(model, Large(), settings(amp="fp16"), BATCHES)
    before = [p.detach().clone() for p in model.parameters()]
    batch = next(Batches().steps())
    training.learn(*batch)
    training.update()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert training.state_dict()["updater"]["scaler"]["scale"] == 2**15
    for _ in range(12):
        training.learn(*batch)
        training.update()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.fixture
def memory_as_it_is_found():
    """Empty tensors hold nan, so that a value that nobody has set shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize(("clip", "accumulate"), [(None, 1), (0.5, 1), (None, 2)])
def test_a_first_step_that_overflows_leaves_no_trace(memory_as_it_is_found, name, clip, accumulate, resumed):
    """The steps after it are those of a plain loop in float64 that never had it, resumed before them or not."""
    torch.manual_seed(0)
    start = [torch.randn(3, 3), torch.randn(3)]
    slopes = [[torch.randn_like(w) for w in start] for _ in range(4)]
    recipe = settings(optimiser=name, amp="fp16", clip=clip)
    weights = [nn.Parameter(w.clone()) for w in start]
    updater = Updater(weights, recipe, torch.device("cpu"))
    if resumed:  # before it had taken any step, by a version that fills nothing
        state = updater.state_dict()
        updater.load_state_dict({**state, "optimisers": [{**o, "state": {}} for o in state["optimisers"]]})
    for step, slope in enumerate([[w * float("inf") for w in start], *slopes]):
        for _ in range(accumulate):
            updater.backward(sum((w * s).sum() for w, s in zip(weights, slope, strict=True)), accumulate)
        updater.update(step, 5)

    want = [nn.Parameter(w.double()) for w in start]
    if name == "adamw":
        made = [torch.optim.AdamW(want, 0.05, weight_decay=0.01)]
    elif name == "sgd":
        made = [torch.optim.SGD(want, 0.05, 0.9, weight_decay=0.01, nesterov=True)]
    else:
        made = [torch.optim.Muon(want[:1], 0.05, weight_decay=0.01)]
        made.append(torch.optim.SGD(want[1:], 0.03, 0.9, weight_decay=0.001, nesterov=True))
    peaks = [o.param_groups[0]["lr"] for o in made]
    for step, slope in enumerate(slopes, start=1):
        for w, s in zip(want, slope, strict=True):
            w.grad = s.double()
        if clip:
            nn.utils.clip_grad_norm_(want, clip)
        for optimiser, peak in zip(made, peaks, strict=True):
            optimiser.param_groups[0]["lr"] = recipe.rate(step, 5, peak)
            optimiser.step()
    for got, expected in zip(weights, want, strict=True):
        # Muon orthogonalises in bfloat16.
        torch.testing.assert_close(got.double(), expected, **({"rtol": 1e-5, "atol": 1e-6} if name != "muon" else MUON))


MUON = {"rtol": 2e-2, "atol": 2e-2}


@needs_muon
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("overflows", [0, 1])
def test_an_overflow_in_one_of_muons_optimisers_stops_both(overflows, clip):
    """Of the matrix, which Muon has, or of the vector, which SGD has."""
    weights = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))]
    updater = Updater(weights, settings(optimiser="muon", amp="fp16", clip=clip), torch.device("cpu"))
    for step, factor in enumerate((float("inf"), 1.0)):
        before = [w.detach().clone() for w in weights]
        updater.backward(sum((w * (factor if i == overflows else 1.0)).sum() for i, w in enumerate(weights)))
        updater.update(step, 2)
        assert [torch.equal(a, b) for a, b in zip(before, weights, strict=True)] == [step == 0] * 2
        assert all(w.isfinite().all() and w.grad is None for w in weights)
    assert updater.state_dict()["scaler"]["scale"] == 2**15


def test_compiled_it_keeps_its_names_and_weights(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    states = []
    for on in (False, True):
        model = classifier()
        fit(model, CE(), Batches(), settings(compile=on, ema=0.9), loss_of, say=quiet)
        states.append(model.state_dict())
    plain, compiled = states
    assert list(plain) == list(compiled) and all(torch.equal(plain[k], compiled[k]) for k in plain)


def test_what_cannot_be_compiled_is_one_line(monkeypatch):
    def broken(graph, inputs):
        raise OSError("no compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    with pytest.raises(KdcacheError, match=r"cannot be compiled here \(.*no compiler.*\): give --no-compile"):
        fit(classifier(), CE(), Batches(), settings(compile=True), loss_of, say=quiet)


# Stopped and resumed

RECIPES = [
    {},
    {"optimiser": "adamw", "ema": 0.9, "clip": 1.0},
    {"optimiser": "muon" if HAS_MUON else "sgd", "accumulate": 3},
    {"amp": "fp16", "accumulate": 2, "ema": 0.9},
]


def run(path, recipe, resume=False, loader=None, evaluate=loss_of, **options):
    """The evaluated weights, the history and all that was said."""
    said, model = [], classifier()
    folder = RunFolder(path, {}, resume)
    lines = fit(model, CE(), loader or Batches(), recipe, evaluate, folder, NOTES, said.append, **options)
    weights = torch.cat([v.flatten().double() for v in model.state_dict().values()])
    return weights, [{k: v for k, v in line.items() if k != "seconds"} for line in lines], said


NOTES = {"input_size": 4, "mean": [0.5] * 3, "std": [0.25] * 3, "class_names": []}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return [run(tmp_path_factory.mktemp("whole") / "run", settings(**changes)) for changes in RECIPES]


@pytest.mark.parametrize(
    ("which", "number"), [(i, (signal.SIGINT, signal.SIGTERM)[i % 2]) for i in range(len(RECIPES))]
)
@pytest.mark.parametrize("at", [(0, 4), (1, 0), (1, 3), (1, 6), (2, 5)])
def test_stopped_at_any_batch_it_goes_on_there(tmp_path, whole, which, number, at):
    recipe, given = settings(**RECIPES[which]), []

    def stop(epoch, batch):
        if (epoch, batch) == at:
            signal.raise_signal(number)

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, recipe, loader=Batches(stop))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    weights, lines, said = run(tmp_path, recipe, True, Batches(lambda *batch: given.append(batch)))
    # The step in which it was stopped ended whole.
    done = min(BATCHES, (at[1] // recipe.accumulate + 1) * recipe.accumulate)
    assert said[0] == f"resuming {tmp_path} after epoch {at[0]} and {done} batches of {EPOCHS}"
    assert given[0] == ((at[0], done) if done < BATCHES else (at[0] + 1, 0))
    assert torch.equal(weights, whole[which][0]) and lines == whole[which][1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == EPOCHS


def test_stopped_in_its_evaluation_it_trains_nothing_twice(tmp_path, whole):
    def stopped(model):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, settings(), evaluate=stopped)
    weights, lines, said = run(tmp_path, settings(), True)
    assert f"after epoch 0 and {BATCHES} batches" in said[0]
    assert torch.equal(weights, whole[0][0]) and lines == whole[0][1]


@pytest.mark.parametrize(("call", "kept"), [(1, f"epoch 0 and {BATCHES} batches"), (2, "epoch 1 and 1 batches")])
def test_a_signal_while_it_hears_the_other_ranks_is_not_lost(tmp_path, whole, monkeypatch, call, kept):
    calls = []

    def heard(asked):
        calls.append(asked)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return asked

    with monkeypatch.context() as patch:
        patch.setattr(trainer.group, "anyones", heard)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, settings())
    weights, lines, said = run(tmp_path, settings(), True)
    assert kept in said[0] and torch.equal(weights, whole[0][0]) and lines == whole[0][1]


def test_between_saves_it_loses_what_came_after_the_last(tmp_path, whole):
    class Killed(BaseException):
        pass

    def kill(epoch, batch):
        if (epoch, batch) == (1, 5):
            raise Killed

    for every, kept in ((0.0, "epoch 1 and 5 batches"), (300.0, "epoch 1 of")):
        path = tmp_path / str(every)
        with pytest.raises(Killed):
            run(path, settings(), loader=Batches(kill), save_every=every)
        weights, _, said = run(path, settings(), True)
        assert kept in said[0] and torch.equal(weights, whole[0][0])


@pytest.mark.parametrize("at", [None, (1, 3), (2, 5)])
def test_evaluated_every_second_epoch_and_after_the_last(tmp_path, whole, at):
    """Five epochs: the best weights are of one that was evaluated, and go by the part held out alone."""
    recipe, scores, best = settings(epochs=5), iter([(0.9, 0.2), (0.5, 0.9), (0.7, 0.5)]), []

    def evaluate(model):
        return dict(zip(("validation_top1", "top1"), next(scores), strict=True))

    def look(epoch, batch):
        if batch == 0 and epoch:
            file = tmp_path / "best.safetensors"
            best.append(read_weights(file)[1]["metrics"]["epoch"] if file.exists() else None)
        if (epoch, batch) == at:
            signal.raise_signal(signal.SIGTERM)

    options = {"evaluate": evaluate, "evaluate_every": 2}
    if at:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, recipe, loader=Batches(look), **options)
    _, lines, _ = run(tmp_path, recipe, bool(at), Batches(look), **options)
    assert [line.get("validation_top1") for line in lines] == [None, 0.9, None, 0.5, 0.7]
    assert best == [None, 2, 2, 2]
    assert read_weights(tmp_path / "best.safetensors")[1]["metrics"]["epoch"] == 2
    assert read_weights(tmp_path / "last.safetensors")[1]["metrics"]["epoch"] == 5


def test_the_second_signal_does_not_wait():
    with Interrupts() as interrupts:
        interrupts.waiting = True
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_signals_that_were_ignored_stay_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


# Refused


@needs_muon
def test_what_muon_cannot_do():
    flat = [nn.Parameter(torch.zeros(3))]
    with pytest.raises(KdcacheError, match="two dimensions, and this network has none: take sgd or adamw"):
        Updater(flat, settings(optimiser="muon"), torch.device("cpu"))


def test_a_torch_without_muon_says_so(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(KdcacheError, match=r"torch .* has no Muon: install torch 2.9 or later, or take sgd or adamw"):
        Updater(classifier().parameters(), settings(optimiser="muon"), torch.device("cpu"))


def test_what_autocast_cannot_do(monkeypatch):
    class Warns:
        def __init__(self, *_):
            warnings.warn("the target dtype is not supported. Disabling autocast.", stacklevel=1)

    with pytest.raises(KdcacheError, match="--amp bf16 cannot be used on meta: "):
        require_autocast(torch.device("meta"), "bf16")
    monkeypatch.setattr(optimisers.torch, "autocast", Warns)
    with pytest.raises(KdcacheError, match="--amp fp16 cannot be used on cpu: the target dtype is not supported"):
        require_autocast(torch.device("cpu"), "fp16")


def test_a_state_of_another_kind_is_one_line(tmp_path):
    run(tmp_path, settings())
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save({**state["training"], "history": state["history"]}, tmp_path / "state.pt")
    with pytest.raises(KdcacheError, match=r"state.pt is not what this kdcache writes: remove it to start"):
        run(tmp_path, settings(), True)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(KdcacheError, match=r"state.pt belongs to another network: remove it to start"):
        run(tmp_path, settings(ema=0.9), True)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["epoch"] == 1
