"""What gives a teacher away whose cache would be silently wrong, and what must not."""

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.cache.errors import InputError
from kdcache.pipeline.build.suspicions import (
    agreement,
    choose,
    count_of,
    examine,
    mapped_answers,
    moved_classes,
    require_logits,
    require_order,
    require_steady,
    require_use,
)

NATURAL = [str(i) for i in range(1, 101)]  # as timm orders class folders
IN_BYTES = sorted(NATURAL)  # as torchvision and kdcache do


def few(each: int, p: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Labels and answers of `each` images a class, drawn from the rows of a confusion matrix [D, D]."""
    labels = np.repeat(np.arange(len(p)), each)
    return labels, (rng.random(len(labels))[:, None] > p.cumsum(1)[labels]).sum(1).clip(max=len(p) - 1)


def confusion(classes: int, accuracy: float, rng: np.random.Generator) -> np.ndarray:
    """A teacher that has a class right about so often, and takes it for three others else."""
    p = np.zeros((classes, classes))
    for c in range(classes):
        others = rng.choice(np.delete(np.arange(classes), c), min(3, classes - 1), replace=False)
        right = rng.beta(8 * accuracy, 8 * (1 - accuracy))
        p[c, others] = (1 - right) * rng.dirichlet(np.ones(len(others)))
        p[c, c] = right
    return p


def weak(classes: int, rng: np.random.Generator) -> np.ndarray:
    """A poor teacher, for which each class's commonest answer is the class itself, or is no other's own."""
    p = rng.dirichlet(np.full(classes, 0.5), classes)
    p[np.arange(classes), p.argmax(1)], p[np.arange(classes), np.arange(classes)] = np.diag(p).copy(), p.max(1)
    return p


def twins(classes: int, rng: np.random.Generator) -> np.ndarray:
    """Pairs of classes that it cannot tell apart."""
    p = np.zeros((classes, classes))
    for c in range(classes):
        p[c, c], p[c, c ^ 1] = 0.5, 0.5
    return p


def collapsed(classes: int, rng: np.random.Generator) -> np.ndarray:
    """A fifth of the classes takes most of the images of all others, and has its own right."""
    p, few = np.zeros((classes, classes)), max(1, classes // 5)
    p[:, :few] = 0.9 * rng.dirichlet(np.ones(few), classes)
    p[np.arange(classes), np.arange(classes)] += 0.1
    p[:few] = np.eye(classes)[:few]
    return p


@pytest.mark.parametrize("kind", [weak, twins, collapsed])
@pytest.mark.parametrize(("classes", "each", "teachers"), [(2, 64, 300), (10, 16, 300), (100, 4, 60), (100, 16, 60)])
def test_honest_teachers_are_not_stopped(kind, classes, each, teachers):
    """1 of 1,000 may be: of so many here none is likely to be, and two are a mistake."""
    rng = np.random.default_rng([classes, each])
    alarms = sum(moved_classes(*few(each, kind(classes, rng), rng)) is not None for _ in range(teachers))
    assert alarms <= 1


@pytest.mark.parametrize(
    ("classes", "moved", "each", "accuracy", "found"),
    [
        (100, 31, 4, 0.8, 0.9),
        (100, 31, 16, 0.7, 0.95),
        (100, 2, 16, 0.9, 0.9),
        (10, 2, 16, 0.9, 0.75),
        (10, 3, 16, 0.8, 0.75),
        (2, 2, 64, 0.9, 0.9),
    ],
)
def test_permuted_classes_are_found(classes, moved, each, accuracy, found):
    rng = np.random.default_rng(5)
    teachers, alarms, right, named = 20 if classes == 100 else 100, 0, 0, 0
    for _ in range(teachers):
        to = np.arange(classes)
        places = rng.choice(classes, moved, replace=False)
        to[places] = np.roll(places, 1)
        labels, answers = few(each, confusion(classes, accuracy, rng), rng)
        if moves := moved_classes(labels, to[answers]):
            alarms += 1
            named += len(moves.pairs)
            right += sum(to[c] == d for c, d in moves.pairs)
    assert alarms >= found * teachers and right >= 0.8 * named


def test_natural_order_beside_byte_order_is_named():
    """A teacher that is right on 85% in its own order, of 1, 2, ..., 100, and data in that of 1, 10, 100, 11, ..."""
    rng = np.random.default_rng(3)
    labels, right = few(8, confusion(100, 0.85, rng), rng)
    answers = np.array([NATURAL.index(IN_BYTES[c]) for c in right])
    names = dict(enumerate(IN_BYTES))
    with pytest.raises(InputError) as caught:
        require_order(labels, answers, names, "the teacher's", "give --class-map FILE")
    text = str(caught.value)
    assert "give --class-map FILE" in text and "more classes" in text and "\n" not in text
    for pair in text.split(": ")[1].split(" and so on")[0].split(", "):
        own, other = pair.removeprefix("images of ").split(" are answered as ")
        assert names[NATURAL.index(own)] == other


def test_only_some_of_the_classes_permuted_pass_the_check_for_chance_and_not_this_one():
    """31 of 100, as for FGVC-Aircraft."""
    rng = np.random.default_rng(4)
    labels, answers = few(8, confusion(100, 0.9, rng), rng)
    to = np.arange(100)
    to[:31] = np.roll(to[:31], 5)
    found = agreement(labels, to[answers])
    assert 0.5 < found.accuracy < 0.75 and not found.near_chance
    logits = torch.full((len(labels), 100), -5.0).scatter(1, torch.from_numpy(to[answers])[:, None], 5.0)
    names = {c: f"plane {c}" for c in range(100)}
    with pytest.raises(InputError, match=r"images of plane \d+ are answered as plane \d+, .*--allow-low-accuracy"):
        examine(logits, np.arange(len(labels)), labels, names, allow=False)
    assert examine(logits, np.arange(len(labels)), labels, names, allow=True) == []


# ---- chance ----


def test_chance_is_that_of_random_pairings():
    rng = np.random.default_rng(0)
    labels, answers = rng.choice(5, 200, p=[0.6, 0.2, 0.1, 0.05, 0.05]), rng.choice(5, 200, p=[0.1, 0.4, 0.3, 0.1, 0.1])
    hits = [int((rng.permutation(answers) == labels).sum()) for _ in range(20_000)]
    found = agreement(labels, answers)
    assert abs(200 * found.expected - np.mean(hits)) < 0.15
    deviation = (200 * found.limit - 200 * found.expected - 1) / 4
    assert abs(deviation / np.std(hits) - 1) < 0.03


@pytest.mark.parametrize(("classes", "images"), [(2, 128), (10, 128), (100, 512), (1000, 512), (1000, 4096)])
def test_guesses_are_near_chance(classes, images):
    rng = np.random.default_rng(classes)
    passed = 0
    for _ in range(1000):
        labels = rng.integers(0, classes, images)
        passed += not agreement(labels, rng.integers(0, classes, images)).near_chance
    assert passed <= 3


def test_constant_answers_are_at_chance_on_unbalanced_data_and_a_weak_teacher_is_not():
    labels = np.repeat([0, 1, 2], [750, 150, 100])
    constant = agreement(labels, np.zeros(1000, int))
    assert constant.accuracy == constant.expected == 0.75 and constant.near_chance
    rng = np.random.default_rng(0)
    weak = np.where(rng.random(1000) < 0.4, labels, rng.permutation(labels))
    assert agreement(labels, weak).accuracy < 0.8 and not agreement(labels, weak).near_chance


@pytest.mark.parametrize(("classes", "each"), [(2, 4), (6, 2), (4, 6)])
def test_a_perfect_teacher_passes_on_a_few_images(classes, each):
    labels = np.repeat(np.arange(classes), each)
    assert not agreement(labels, labels).near_chance
    assert agreement(labels, np.roll(labels, each)).near_chance


def test_the_mapped_classes_alone_are_compared():
    """Six classes of a teacher's thousand: right among the six on nine in ten, and hardly ever its first choice."""
    rng = np.random.default_rng(0)
    ids = np.array([7, 30, 111, 500, 808, 999])
    labels = np.repeat(ids, 20)
    logits = torch.randn((120, 1000), generator=torch.Generator().manual_seed(0))
    logits[:, 600] += 20
    right = np.where(rng.random(120) < 0.9, labels, rng.choice(ids, 120))
    logits[torch.arange(120), torch.from_numpy(right)] += 10
    assert (mapped_answers(logits, ids) == right).all()
    names = {int(i): f"class {i}" for i in ids}
    (note,) = examine(logits, np.arange(120), labels, names, allow=False)
    assert note.startswith("for 100% of the images the teacher's first choice is none of the 6 classes")
    with pytest.raises(InputError, match=r"among 6 classes the teacher is right on .* of 120 training images"):
        examine(logits, np.arange(120), rng.permutation(labels), names, allow=False)


# ---- what is no answer ----

GOOD = torch.randn((40, 12), generator=torch.Generator().manual_seed(2)) * 5
SAMPLES = np.arange(100, 140)


def test_probabilities_are_refused_and_log_probabilities_are_noted():
    assert require_logits(GOOD, SAMPLES) == []
    for probabilities in (GOOD.softmax(1), GOOD.half().softmax(1).float(), torch.eye(12)):
        with pytest.raises(InputError, match=r"answers with probabilities .* give the network without its softmax"):
            require_logits(probabilities, SAMPLES)
    (note,) = require_logits(GOOD.log_softmax(1), SAMPLES)
    assert "log-probabilities" in note
    assert require_logits(GOOD.relu(), SAMPLES) == require_logits(GOOD.softmax(1) - 1 / 12, SAMPLES) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_refused(value):
    logits = GOOD.clone()
    logits[[5, 7], 3] = value
    with pytest.raises(InputError, match="not finite for 2 of 40 training images, such as sample 105"):
        require_logits(logits, SAMPLES)


def test_answers_that_no_image_changes_and_gaps_beyond_float16_are_refused():
    require_use(GOOD)
    constant = GOOD[:1].expand(40, 12)
    for same in (constant, constant + 1e-6 * GOOD, constant + torch.arange(40.0)[:, None]):
        with pytest.raises(InputError, match="answers alike to all of 40 training images"):
            require_use(same)
    require_use(GOOD * 2000)
    with pytest.raises(InputError, match="records hold 65,504"):
        require_use(GOOD * 3000)


def test_flat_answers_are_noted():
    labels = np.arange(120) % 12
    logits = torch.eye(12)[torch.from_numpy(labels)]
    names = {c: str(c) for c in range(12)}
    assert examine(10 * logits, np.arange(120), labels, names, allow=False) == []
    (note,) = examine(0.5 * logits, np.arange(120), labels, names, allow=False)
    assert "right on 100% of the images and gives its first choice 13.0% on average" in note


# ---- a network that does not stay as it is ----


class Careless(nn.Module):
    """Sets a part of itself to training mode whenever it answers."""

    def __init__(self, part):
        super().__init__()
        self.first, self.part, self.last = nn.Flatten(), part, nn.Linear(48, 5)

    def forward(self, images):
        self.part.train()
        return self.last(self.part(self.first(images)))


def batch(size=16):
    return torch.randn((size, 3, 4, 4), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("part", "what"),
    [
        (nn.Dropout(0.1), r"answers the same image differently each time, as in training mode \(part\)"),
        (nn.BatchNorm1d(48), r"answers an image differently beside other images, as in training mode \(part\)"),
        (nn.BatchNorm1d(48, track_running_stats=False), "answers an image differently beside other images"),
    ],
)
@torch.inference_mode()
def test_a_network_in_training_mode_is_refused(part, what):
    network = Careless(part).eval()
    with pytest.raises(InputError, match=what):
        require_steady(network, network, batch(), "float32")


@torch.inference_mode()
def test_statistics_that_move_are_noticed_where_the_answers_do_not_show_it():
    network = Careless(nn.BatchNorm1d(48)).eval()
    nn.init.zeros_(network.last.weight)
    with pytest.raises(InputError, match=r"changes part.running_mean as it answers"):
        require_steady(network, network, batch(), "float32")


@pytest.mark.parametrize("size", [1, 2, 7, 16])
@torch.inference_mode()
def test_a_network_in_eval_mode_passes_with_parts_that_only_say_training(size):
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 9), nn.BatchNorm1d(9), nn.Dropout(), nn.ReLU()).eval()
    network[4].train()
    require_steady(network, network, batch(size), "float32")


@torch.inference_mode()
def test_statistics_that_are_not_finite_are_not_taken_for_changes():
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 9), nn.BatchNorm1d(9)).eval()
    network[2].running_var.fill_(torch.nan)
    require_steady(network, network, batch(), "float32")
    with pytest.raises(InputError, match="not finite for 16 of 16"):
        require_logits(network(batch()), np.arange(16))


# ---- which images ----


def test_each_class_is_seen_a_few_times_and_a_rare_one_as_often():
    labels = np.repeat([0, 1, 2], [3000, 40, 3])
    order = np.random.default_rng(0).permutation(len(labels))
    index = choose(labels[order], len(labels), 128)
    counts = np.bincount(labels[order][index])
    assert len(set(index.tolist())) == 128 and (np.diff(index) > 0).all()
    assert counts[2] == 3 and counts[1] == 40 and counts[0] == 85
    assert np.bincount(labels[order][choose(labels[order], len(labels), 23)]).tolist() in ([12, 8, 3], [8, 12, 3])


def test_where_there_is_no_room_for_all_classes_some_are_seen_four_times():
    labels = np.arange(10_000) % 1000
    found = np.bincount(labels[choose(labels, 10_000, 400)], minlength=1000)
    assert sorted(set(found.tolist())) == [0, 4] and (found == 4).sum() == 100
    assert (choose(labels, 10_000, 400) == choose(labels, 10_000, 400)).all()
    assert len(choose(np.empty(0, np.int64), 50, 128)) == 50


@pytest.mark.parametrize(
    ("classes", "images", "count"),
    [
        (10, 2_000, 128),
        (40, 2_000, 320),
        (10, 10**6, 512),
        (100, 10_000, 512),
        (100, 110_000, 1600),
        (1000, 10**7, 4096),
    ],
)
def test_how_many_images_are_probed(classes, images, count):
    assert count_of(classes, images) == count
