"""What holds on a real GPU: the CPU's pixels, records, losses and steps, and no host that waits within a step.

`make gpu` runs this. KDCACHE_GPU_TESTS=cpu runs it on the CPU, which shows that the tests themselves are sound.
"""

import copy
import os
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdcache.cache import encode
from kdcache.cache.identity import STEP
from kdcache.cache.records.encoding import tail_distribution
from kdcache.pipeline.build.answers import Answer, Copy
from kdcache.pipeline.build.source import open_source
from kdcache.pipeline.verify import verify
from kdcache.pipeline.views.parameters import draw
from kdcache.pipeline.views.render import Renderer
from kdcache.tests.contracts.losses import CASES
from kdcache.tests.contracts.operations import pictures
from kdcache.tests.helpers.losses import FEATURES, errors, logits, sample
from kdcache.tests.helpers.training import quiet, student
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.trainer import Training
from kdcache.train.losses import NKD

NAME = os.environ.get("KDCACHE_GPU_TESTS") or ("cuda" if torch.cuda.is_available() else "")
pytestmark = pytest.mark.skipif(not NAME, reason="needs a GPU")
DEVICE, CPU = torch.device(NAME or "cpu"), torch.device("cpu")
REAL = DEVICE.type == "cuda"
FIELDS = ("classes", "gaps", "target_gap", "tail", "tail_std", "labels")


@contextmanager
def no_waiting():
    """An operation for which the host would wait raises an error."""
    if REAL:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if REAL:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def exact():
    """Products of matrices and convolutions in float32 are not rounded to TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def source_on(config, amp=None):
    return open_source(replace(config, device=NAME, amp=amp), quiet)


# Pixels

POLICIES = ["crop,flip", "crop,flip,color(0.3,0.3,0.3,0.1),gray,solarize,blur(1)", "flip,three,erase(1)",
            "crop,trivial", "flip,randaugment(4,9)", "crop,mixup(0.2),cutmix(1)", "rrc,flip",
            "rrc,flip,three,color,mixup(0.8)"]  # fmt: skip


@pytest.mark.parametrize("size", [None, 24])
@pytest.mark.parametrize("policy", POLICIES)
def test_pixels_are_those_of_the_cpu(made, policy, size):
    data = made[2].train
    drawn = draw(policy, 0, 1, range(len(data)), data.sizes)
    batches = np.split(np.random.default_rng(0).permutation(len(data)), 4)
    there, here = (Renderer(data, size, on, policy, workers=0).batches(drawn, batches) for on in (DEVICE, CPU))
    for mine, theirs in zip(there, here, strict=True):
        assert mine.device.type == DEVICE.type and mine.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(mine.cpu(), theirs)


# Records


@pytest.mark.parametrize("k", [None, 1, 10])
@pytest.mark.parametrize("columns", [1, 2])
def test_records_are_those_of_the_cpu(k, columns):
    z = logits(0, rows=256, classes=300)
    y = torch.randint(0, 300, (256, columns), generator=torch.Generator().manual_seed(0))
    mine, theirs = (encode(z.to(on), y.to(on), k, tail_std=True) for on in (DEVICE, CPU))
    back = mine.to("cpu")  # at once, which must not be too early
    for name in FIELDS:
        a, b = getattr(back, name), getattr(theirs, name)
        if b is None or name in ("tail", "tail_std"):
            continue
        assert torch.equal(a, b), name
    if k is not None:
        assert (back.tail.int() - theirs.tail.int()).abs().max() <= 1  # a sum of exponentials, rounded to steps
        torch.testing.assert_close(back.tail_std, theirs.tail_std, rtol=2e-3, atol=2e-3)
    apart = (back.dense(1.0) - theirs.dense(1.0)).abs().sum(1) / 2
    assert apart.mean() <= 0.002 and apart.max() <= STEP


def test_a_cache_of_the_cpu_is_what_a_gpu_answers(made):
    config, cache, _ = made
    report = verify(cache, source_on(config), replay=64)
    assert report.passed, report


def test_bf16_answers_are_near(made):
    config, _, source = made
    seen = pictures(32, 32, 32).to(DEVICE)
    p, q = (source_on(config, amp).teacher.logits(seen).softmax(1) for amp in (None, "bf16"))
    assert ((p - q).abs().sum(1) / 2).mean() <= 0.02
    torch.testing.assert_close(source.teacher.logits(seen.cpu()).softmax(1), p.cpu(), rtol=1e-3, atol=1e-4)


def test_answers_reach_the_host_whole():
    """Copies of many batches are under way at once, behind work that takes the device a while."""
    work = torch.randn(1024, 1024, device=DEVICE)
    under_way = []
    for seed in range(12):
        for _ in range(20 if REAL else 1):
            work = work @ work / 32
        z, y = logits(seed, rows=128, classes=100).to(DEVICE), torch.zeros(128, 1, dtype=torch.long, device=DEVICE)
        records = encode(z + 0 * work[:128, :100].nan_to_num(0), y, 10, check=False)
        under_way.append((Copy(Answer(0, range(128), records, z), tail_distribution(z, records)), records, z))
        del z, y
    for copied, records, z in under_way:
        arrays, finite, sums = copied.arrive()
        assert finite.all() and np.array_equal(arrays["gaps"], records.gaps.cpu().numpy())
        assert np.array_equal(arrays["tail"], records.tail.cpu().numpy())
        assert np.array_equal(sums, tail_distribution(z, records).cpu().numpy())


@pytest.mark.parametrize("crops", [1, 2])
def test_batches_are_those_of_the_cpu(made, crops):
    _, cache, source = made
    mine, theirs = (
        CachedLoader(cache, source.train, 16, device=on, workers=0, crops_per_decode=crops) for on in (NAME, "cpu")
    )
    pairs = zip(mine.steps(), theirs.steps(), strict=True)
    for step in range(4):
        own_stream = torch.cuda.stream(torch.cuda.Stream()) if REAL and step == 0 else nullcontext()
        with own_stream:
            (images_, labels, records), (images, y, want) = next(pairs)
            assert torch.equal(images_.cpu(), images) and torch.equal(labels.cpu(), y)
            back = records.to("cpu")
        assert all(torch.equal(getattr(back, name), getattr(want, name)) for name in FIELDS)


# Losses and steps


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_cpu(name):
    case = CASES[name]
    s, t, y = sample()

    def found(on):
        loss = case.ready(features=FEATURES.to(on))
        if loss.needs.features:
            loss.loss.head.to(on)
        records, labels, x = (
            encode(t.to(on), y.to(on), None if loss.needs.dense else 10, tail_std=True),
            y.to(on),
            s.to(on),
        )
        loss(x, labels, records)  # what is moved once
        x.requires_grad_()
        with no_waiting() if on == DEVICE else nullcontext():
            value = loss(x, labels, records)
            value.backward()
        return value.detach().cpu(), x.grad.cpu()

    assert max(errors(found(DEVICE), found(CPU))) < 1e-3


RECIPES = {
    "float32": Recipe(1, 0.01),
    "fp16": Recipe(1, 0.01, amp="fp16", clip=1.0),
    "bf16": Recipe(1, 0.01, amp="bf16", ema=0.9, accumulate=2),
    "adamw": Recipe(1, 0.01, optimiser="adamw", amp="bf16"),
    "compiled": Recipe(1, 0.01, amp="bf16", compile=True),
}


@pytest.fixture
def compiles(monkeypatch):
    if not REAL:  # it takes long there, and it is no GPU that is tested
        monkeypatch.setattr(torch, "compile", lambda model, **_: model)


@pytest.mark.parametrize("name", RECIPES)
def test_steps_do_not_wait_and_learn_what_they_do_on_the_cpu(made, name, compiles):
    _, cache, source = made
    recipe = RECIPES[name]

    def losses(on, recipe):
        loader = CachedLoader(cache, source.train, 16, device=on, workers=0)
        training = Training(student().to(on), NKD(), recipe, len(loader))
        found = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            training.model.train()
            steps = loader.steps()
            for step in range(len(loader)):
                with no_waiting() if epoch and step and on == DEVICE else nullcontext():
                    training.learn(*next(steps))
                    if training.step_is_whole:
                        training.update()
            found.append(training.losses()["loss"])
            training.end_epoch()
        return found

    want = losses(CPU, Recipe(1, 0.01, clip=recipe.clip, optimiser=recipe.optimiser, accumulate=recipe.accumulate))
    assert losses(DEVICE, recipe) == pytest.approx(want, rel=0.002 if recipe.amp is None else 0.05)


def test_a_compiled_teacher_answers_alike_and_no_answer_overwrites_another(made, compiles):
    teacher = source_on(made[0]).teacher
    compiled = teacher.compile(16)
    seen = [pictures(16, 32, 32, seed=i).to(DEVICE).to(memory_format=torch.channels_last) for i in range(3)]
    answers = [compiled.logits(one) for one in seen]
    for one, answer in zip(seen, answers, strict=True):
        torch.testing.assert_close(answer, teacher.logits(one), rtol=1e-3, atol=1e-3)


def test_a_step_can_be_captured_as_a_cuda_graph():
    """Student, loss, backward pass and optimiser; replayed on other images it does what a usual step does."""
    y = torch.arange(16, device=DEVICE) % 10
    records = encode(logits(3, rows=16, classes=10).to(DEVICE), y, 5)
    first, second = (pictures(16, 32, 32, seed=i).to(DEVICE).to(memory_format=torch.channels_last) for i in (1, 2))
    seen = first.clone(memory_format=torch.preserve_format)
    model = student().to(DEVICE).train()
    twin = copy.deepcopy(model)

    def stepper(network):
        optimiser = torch.optim.SGD(network.parameters(), 0.01, 0.9, fused=True)

        def step():
            NKD()(network(seen), y, records).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        return step

    step, usual = stepper(model), stepper(twin)
    if REAL:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
        again = graph.replay
    else:
        for _ in range(3):
            step()
        again = step
    for _ in range(3):
        usual()
    seen.copy_(second)
    for _ in range(2):
        again()
        usual()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
