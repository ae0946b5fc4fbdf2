"""Real CIFAR-10 as the study divides it, for --data study_data:teacher and study_data:students.

STUDY_DATA names an .npz of x, tx (uint8 [N, 32, 32, 3]) and y, ty (labels): training and test images in their original
order. A tenth of each class's training images is held out for every choice that is made; the teacher learns from all
others, students from a fixed twentieth of each class. The evaluation split of the students is what is held out and then
the test images, so that one cache serves both.
"""

from __future__ import annotations

import functools
import os

import numpy as np

HELD_OUT, STUDENTS, SEED = 10, 20, 7  # the held out are one in HELD_OUT of each class, the students' one in STUDENTS
Images = tuple[np.ndarray, np.ndarray]


def rows(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Which of the training images are held out, which are the teacher's and which the students', each in order."""
    drawn = np.random.Philox(key=SEED).random_raw(len(labels))  # raw bits, which stay the same over versions of numpy
    held: list[np.ndarray] = []
    students: list[np.ndarray] = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(drawn[mine], kind="stable")]
        first, count = len(mine) // HELD_OUT, len(mine) // STUDENTS
        held.append(mine[:first])
        students.append(mine[first : first + count])
    held_out = np.sort(np.concatenate(held))
    teacher = np.setdiff1d(np.arange(len(labels)), held_out)
    return {"held_out": held_out, "teacher": teacher, "students": np.sort(np.concatenate(students))}


@functools.cache
def _parts() -> dict[str, Images]:
    with np.load(os.environ["STUDY_DATA"]) as f:
        x, y = f["x"], f["y"].astype(np.int64)
        test = f["tx"], f["ty"].astype(np.int64)
    return {**{name: (x[chosen], y[chosen]) for name, chosen in rows(y).items()}, "test": test}


def teacher(split: str) -> Images:
    """The teacher's training images; what is held out."""
    return _parts()["teacher" if split == "train" else "held_out"]


def students(split: str) -> Images:
    """The students' training images; what is held out and the test images."""
    if split == "train":
        return _parts()["students"]
    both = _parts()["held_out"], _parts()["test"]
    return np.concatenate([images for images, _ in both]), np.concatenate([labels for _, labels in both])


def parts_of_evaluation() -> dict[str, slice]:
    """Where the held-out and the test images lie in the students' evaluation split."""
    first = len(_parts()["held_out"][1])
    return {"held_out": slice(0, first), "test": slice(first, None)}
