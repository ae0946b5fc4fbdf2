"""What a GPU does in every step, run on one that is not there: no device is mixed with another, and no host waits."""

from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from kdcache.cache.records.encoding import encode, require_std, tail_distribution
from kdcache.cache.records.records import Records
from kdcache.pipeline.build.answers import Answer, Copy
from kdcache.pipeline.data.kinds.arrays import from_arrays
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier, Teacher
from kdcache.tests.contracts.losses import CASES
from kdcache.tests.helpers.fakecuda import HostWaitError, fake_cuda, fakes_cuda
from kdcache.tests.helpers.losses import FEATURES, B, C
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.live import PlainLoader
from kdcache.train.loaders.order import gathered
from kdcache.train.loaders.slabs import Held
from kdcache.train.loop.cotrain import LearningTeacher
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.trainer import Training
from kdcache.train.losses import BDKD, CE, NKD, USKD
from kdcache.train.losses.features import FeatureLoss

pytestmark = pytest.mark.skipif(
    not fakes_cuda(), reason="this version of torch needs a GPU to make believe that there is one"
)

GPU = torch.device("cuda")
DEVICE_MISMATCH = "same device|two devices|mixes"


@pytest.fixture
def gpu(monkeypatch):
    def make_head(self, channels, classes, *_):  # where it belongs, for modules without values cannot be moved
        self.head = nn.Linear(channels, classes, device=GPU)

    monkeypatch.setattr(USKD, "make_head", make_head)
    with fake_cuda() as watch:
        yield watch


# The watch itself

WAITS = {
    "item": lambda x, y: x.sum().item(),
    "float": lambda x, y: float(x.mean()),
    "bool": lambda x, y: bool((x > 0).any()),
    "tolist": lambda x, y: y.tolist(),
    "nonzero": lambda x, y: x.nonzero(),
    "mask": lambda x, y: x[x > 0],
    "put by a mask": lambda x, y: x.index_put_((y > 0,), x[0]),
    "where's places": lambda x, y: torch.where(x > 0),
    "unique": lambda x, y: y.unique(),
    "bincount": lambda x, y: y.bincount(),
    "repeated": lambda x, y: x.repeat_interleave(y, 0),
    "equal": lambda x, y: torch.equal(x, x),
    "to the host": lambda x, y: x.cpu(),
    "to the host, read too early": lambda x, y: x.to("cpu", non_blocking=True),
    "from the host": lambda x, y: torch.ones(3).to(x.device),
    "made of numbers": lambda x, y: torch.tensor([1.0, 2.0], device=x.device),
    "copied into": lambda x, y: x.copy_(torch.ones(4, 5)),
}
GOES_ON = {
    "from the host": lambda x, y: torch.ones(3).to(x.device, non_blocking=True),
    "a number": lambda x, y: torch.where(x > 0, 2.0, 1.0) + torch.full((), 2.0, device=x.device),
    "a number of the host": lambda x, y: x * torch.ones(()),
    "places": lambda x, y: x[y] + x.index_select(0, y),
    "masked": lambda x, y: x.masked_fill(x > 0, 1.0),
    "into pinned memory": lambda x, y: torch.empty((4, 5), pin_memory=True).copy_(x, non_blocking=True),
}


def some():
    return torch.empty(4, 5, device=GPU), torch.zeros(4, dtype=torch.long, device=GPU)


@pytest.mark.parametrize("name", WAITS)
def test_a_planted_wait_is_found(gpu, name):
    x, y = some()
    with gpu.steps(), pytest.raises(HostWaitError):
        WAITS[name](x, y)


@pytest.mark.parametrize("name", GOES_ON)
def test_what_does_not_wait_is_let_through(gpu, name):
    x, y = some()
    with gpu.steps():
        GOES_ON[name](x, y)


def test_planted_tensors_of_two_devices_are_found(gpu):
    x, _ = some()
    for mixed in (lambda: x + torch.ones(4, 5), lambda: torch.cat([x, torch.ones(4, 5)])):
        with pytest.raises(RuntimeError, match=DEVICE_MISMATCH):
            mixed()


def test_a_planted_wait_in_a_loss_is_found(gpu):
    @dataclass(frozen=True)
    class Waiting(CE):
        def terms(self, batch):
            assert batch.logits.sum() > 0
            return super().terms(batch)

    training = Training(network(), Waiting(), Recipe(1, 0.1), 4)
    with gpu.steps(), pytest.raises(HostWaitError):
        training.learn(pixels(), labels(), None)


# Records


def labels(columns=0, rows=B, classes=C):
    shape = (rows, columns) if columns else (rows,)
    return torch.zeros(shape, dtype=torch.long, device=GPU)


def answered(k=None, columns=0, tail_std=True, precision=None):
    z = torch.empty(B, C, device=GPU)
    return encode(z, labels(columns), k, (1.0, 2.0, 3.0, 4.0), precision, tail_std, check=False)


@pytest.mark.parametrize("columns", [0, 2])
@pytest.mark.parametrize("k", [None, 1, 10])
@pytest.mark.parametrize("precision", [None, "float16", "float32"])
def test_answers_are_encoded_and_sent_to_the_host(gpu, k, precision, columns):
    with gpu.steps():
        z = torch.empty(B, C, device=GPU)
        records = answered(k, columns, precision=precision)
        sums = None if records.classes is None else tail_distribution(z, records)
        copy = Copy(Answer(0, range(B), records, z), sums)
    assert {t.device.type for t in copy._host.values()} == {"cpu"} and gpu.operations > 10


def test_the_std_of_logits_is_checked_on_the_host():
    with pytest.raises(Exception, match="standard deviation"):
        require_std(torch.tensor([[torch.inf, 0.0]]), C)


def test_records_are_gathered_and_moved(gpu):
    records = replace(answered(10, 2), prior=torch.empty(5, C, device=GPU), label_weights=torch.empty(B, 2, device=GPU))
    batches = [np.arange(8), np.arange(8, 16), np.arange(16, 24)]
    steps = gathered(records, batches)
    next(steps)
    with gpu.steps():
        for y, answers in steps:
            assert y.is_cuda and answers.gaps.is_cuda and len(answers) == 8
        host = encode(torch.empty(4, C), torch.zeros(4, dtype=torch.long), 10, check=False)
        assert replace(host, prior=torch.ones(3, C)).to(GPU).prior.is_cuda
    with gpu.steps(), pytest.raises(HostWaitError, match="is waited for"):  # and not read too early
        records.to("cpu")


@pytest.mark.parametrize("tail", ["prior", "uniform", "renorm", "drop"])
def test_records_are_read_as_distributions(gpu, tail):
    records = replace(answered(10), prior=torch.empty(5, C, device=GPU))
    q = torch.empty(B, C, device=GPU)
    with gpu.steps():
        for soft in (records.softened(2.0, tail), records.standardised(2.0, tail)):
            results = [soft.head_mass, soft.target(), soft.rest(), soft.cross(q), soft.cross_others(q), soft.dense()]
            results += [soft.entropy(), soft.entropy_others(), *soft.ranked(), records.predictions()]
            results += [soft.cross_of(q)] if tail in ("prior", "uniform") else []
            assert all(result.is_cuda for result in results)


# Losses


@pytest.mark.parametrize("name", CASES)
def test_losses(gpu, name):
    case = CASES[name]
    needs = case.loss.needs
    with torch.device(GPU):
        loss = case.ready(first=answered(), features=torch.empty(B, FEATURES.shape[1]))
    for k in (None,) if needs.dense else (None, 10):
        records = replace(answered(k), prior=None if k is None else torch.empty(5, C, device=GPU))
        both = answered(k, 2)
        s = torch.empty(B, C, device=GPU, requires_grad=True)
        with gpu.steps():
            loss(s, labels(), records).backward()
            if needs.mixed:
                loss(s, labels(2), both, torch.empty(B, 2, device=GPU)).backward()
            parts = loss.parts(s, labels(), records)
        assert s.grad is not None and all(value.is_cuda for value in parts.named.values())


def test_the_loss_of_a_teacher_that_learns(gpu):
    teacher, student = (torch.empty(B, C, device=GPU, requires_grad=i == 0) for i in range(2))
    with gpu.steps():
        BDKD().of_teacher(teacher, labels(), student).backward()


# Training


def network(name="resnet8", size=16, classes=C):
    with torch.device(GPU):
        model = Classifier(build_network(name, classes, size), (0.5,) * 3, (0.2,) * 3)
    return model.train()


def pixels(size=16):
    return torch.empty((B, 3, size, size), dtype=torch.uint8, device=GPU).contiguous(memory_format=torch.channels_last)


RECIPES = {
    "sgd, fp16, clipped": Recipe(1, 0.1, amp="fp16", clip=1.0),
    "sgd, bf16, averaged": Recipe(1, 0.1, amp="bf16", ema=0.99),
    "adamw, fp16, accumulated": Recipe(1, 0.1, optimiser="adamw", amp="fp16", accumulate=2),
    "muon, bf16, clipped": Recipe(1, 0.1, optimiser="muon", amp="bf16", clip=1.0, ema=0.9),
}


@pytest.mark.parametrize("name", RECIPES)
def test_steps(gpu, name, monkeypatch):
    monkeypatch.setattr("kdcache.train.loop.ema.deepcopy", lambda model: network())  # torch cannot copy without values
    recipe = RECIPES[name]
    model = network()
    training = Training(model, NKD(), recipe, 4)
    records, images, y = answered(10), pixels(), labels()
    training.learn(images, y, records)
    training.update()  # the first one makes the optimisers' state
    training.glance()
    with gpu.steps():
        for _ in range(2):
            training.learn(images, y, records)
            if training.step_is_whole:
                training.update()
            assert "loss" in training.glance()
    assert gpu.operations > 100


def test_steps_of_two_networks_that_learn_together(gpu):
    recipe = Recipe(1, 0.1, amp="bf16")
    teacher = LearningTeacher(network("resnet14"), 16, BDKD(), recipe, {})
    training = Training(network(), BDKD(), recipe, 3, teacher)

    def step():
        answers = encode(teacher.logits(pixels()), labels(), precision="float32", check=False)
        training.learn(pixels(), labels(), answers)
        training.update()

    step()
    with gpu.steps():
        step()


def test_steps_with_features(gpu):
    model = network()
    with torch.device(GPU):
        loss = FeatureLoss(USKD(), model, 16, C)
    training = Training(model, loss, Recipe(1, 0.1, amp="fp16"), 3)
    training.learn(pixels(), labels(), None)
    training.update()
    with gpu.steps():
        training.learn(pixels(), labels(), None)
        training.update()


# Views

# The contract of operations (tests/contracts/operations.py) looks at each of them alone.
POLICIES = ["none", "crop,flip,gray,erase(1)", "crop,flip,mixup(0.2)", "crop,mixup(0.2),cutmix(1)"]


def images_of(count=16, side=16):
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (count, side, side, 3), np.uint8), np.arange(count) % C, tuple(map(str, range(C)))
    return from_arrays("toy", "train", lambda train: arrays)


@pytest.mark.parametrize("policy", POLICIES)
def test_views_of_images_in_memory(policy):
    data = images_of()
    with fake_cuda() as gpu:
        loader = PlainLoader(data, policy, 8, 16, seed=0, device=GPU)
        training = Training(network(), CE(), Recipe(1, 0.1), 3)
        steps = loader.steps()
        training.learn(*next(steps))  # what is made once an epoch
        training.update()
        with gpu.steps():
            for images, y, records in steps:
                assert images.is_cuda and images.is_contiguous(memory_format=torch.channels_last)
                training.learn(images, y, records)
                training.update()


class AtOnce:
    """In the place of threads: reads a slab without pretending, and then takes its records to the GPU."""

    def __init__(self, *args, **kwargs):
        pass

    def submit(self, work):
        found: Future = Future()
        with _disable_current_modes(), patch.object(Records, "to", lambda self, device: self):
            result = work()
        found.set_result(result._replace(records=result.records.to(GPU)) if isinstance(result, Held) else result)
        return found


@pytest.mark.parametrize(("views", "crops"), [("made", 1), ("made", 2), ("made_of_mixed_views", 1)])
def test_batches_of_a_cache(views, crops, request, monkeypatch):
    _, cache, source = request.getfixturevalue(views)
    monkeypatch.setattr("kdcache.train.loaders.slabs.ThreadPoolExecutor", AtOnce)
    with fake_cuda() as gpu:
        loader = CachedLoader(cache, source.train, 32, device=GPU, workers=0, crops_per_decode=crops)
        training = Training(network(size=32, classes=10), NKD(), Recipe(1, 0.1), len(loader))
        steps = loader.steps()
        training.learn(*next(steps))
        training.update()
        with gpu.steps():
            for images, y, records in steps:
                assert images.is_cuda and y.is_cuda and len(records) == len(images) == 32
                training.learn(images, y, records)
                training.update()


@pytest.mark.parametrize("policy", ["flip", "rrc,flip,three,mixup(0.2)"])
def test_views_of_another_size_come_from_pinned_memory(policy, monkeypatch):
    """Of whole images by this process; of boxes from workers, in whose place stands one that cuts nothing."""
    data = images_of()

    class Cut:
        def __init__(self, data, cut, change, size, workers, ahead, pin, batch):
            assert pin
            self.size = size

        def run(self, tasks, *_):
            return (torch.empty((*task.flips.shape, *self.size, 3), dtype=torch.uint8) for task in tasks)

        def place(self, cuts):
            return None

        def next(self, done):
            return next(done)

    monkeypatch.setattr("kdcache.pipeline.views.render.Workers", Cut)
    resize = "kdcache.pipeline.views.render.tv.resize"
    monkeypatch.setattr(resize, lambda images, size, *_, **__: images.new_empty((*images.shape[:2], *size)))
    with fake_cuda() as gpu:
        steps = PlainLoader(data, policy, 8, 24, seed=0, device=GPU).steps()
        next(steps)
        with gpu.steps():
            for images, *_ in steps:
                assert images.is_cuda and images.shape[2:] == (24, 24)


# The teacher's answers


def answering(forward):
    """A teacher on the CPU whose compiled network is this function."""
    identity = SimpleNamespace(numeric="float32", input_size=4)
    return Teacher(identity, nn.Identity().eval(), C, None, torch.device("cpu"), compiled=forward)


def test_answers_are_in_float32_whatever_is_set_around_them():
    def forward(images):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        if len(seen) > 1:
            raise ValueError
        return images.flatten(1)

    seen, before = [], torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        teacher, images = answering(forward), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
        assert teacher.logits(images).dtype == torch.float32
        with pytest.raises(ValueError):
            teacher.logits(images)
        assert seen == [("highest", False)] * 2 and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_compiled_teacher_gets_images_in_one_form():
    """Views that are cut together lie between each other; a CUDA graph is made for one layout."""
    strides = []
    teacher = answering(lambda images: (strides.append(images.stride()), images.flatten(1))[1])
    together = torch.zeros(2, 3, 4, 4, 3, dtype=torch.uint8)
    for images in (*(together[:, j].permute(0, 3, 1, 2) for j in range(3)), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)):
        teacher.logits(images)
    assert set(strides) == {(48, 1, 12, 3)}
