"""What is known of a dataset's samples is found in pieces: as it was when all of it was found at once."""

import os
import pickle
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache.errors import InputError
from kdcache.pipeline.build import suspicions
from kdcache.pipeline.data import imagefiles
from kdcache.pipeline.data.imagefiles import Paths, list_images
from kdcache.pipeline.data.kinds import base, folders
from kdcache.pipeline.data.kinds.base import drawn_places, paths_at
from kdcache.pipeline.data.kinds.files import below_one_root
from kdcache.pipeline.data.kinds.folders import held_out, places_in_classes

NAME = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=5)


@settings(max_examples=100, deadline=None)
@given(st.lists(NAME | st.just("\udcff.jpg"), max_size=20), st.integers(1, 7))
def test_paths_are_what_a_tuple_of_them_is(names: list[str], piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagefiles, "_PIECE", piece)
        patch.setattr(imagefiles, "_STATISTICS_CHUNK", piece)
        paths = Paths.of(names)
        assert paths == tuple(names) and tuple(paths) == tuple(names) and len(paths) == len(names)
        assert [paths[i] for i in range(-len(names), len(names))] == [*names, *names]
        assert paths[1:5] == names[1:5] and paths[::-2] == names[::-2]
        copy = pickle.loads(pickle.dumps(paths))
        assert copy == paths and hash(copy) == hash(paths)
        if names != [""]:  # one empty name is stored as none
            assert Paths.from_array(paths.as_array()) == paths
        assert paths_at(paths, np.arange(len(names))[::2]) == names[::2]
        assert paths != [*names, "more"] and paths != "text"
        with pytest.raises(IndexError):
            paths[len(names)]


def test_paths_take_few_bytes_more_than_their_text() -> None:
    names = [f"n{i % 1000:08d}/n{i:08d}_{i}.JPEG" for i in range(50_000)]
    text = sum(map(len, names))
    tracemalloc.start()
    paths = Paths.of(names)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(paths) == 50_000 and held < text * 1.15 + 5 * 50_000


def test_a_name_that_no_file_can_have_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="is no path of a file"):
        below_one_root("mine", ["/a/b.png", "/a/\ud800.png"])


def test_images_come_in_byte_order_of_their_whole_paths(tmp_path: Path) -> None:
    """Folders and files stand among each other: a folder a comes behind a-b and a.jpg, since / comes behind - and ."""
    rng, names = random.Random(0), set()
    letters = ["a", "b", "-", ".", "0", "é", "\udcff", "猫"]
    for _ in range(150):
        parts = ["x" + "".join(rng.choices(letters, k=rng.randint(0, 2))) for _ in range(rng.randint(1, 4))]
        names.add("/".join(parts) + rng.choice([".jpg", ".PNG"]))
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    paths, others = list_images(tmp_path)
    assert list(paths) == sorted(names, key=os.fsencode) and not others


@pytest.mark.parametrize("n", [5000, 5001, 4096 * 3])
def test_places_drawn_in_pieces_are_those_drawn_at_once(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_PIECE", 512)
    for key, most in ((0, 4096), (13, 7), (11, 1)):
        numbers = np.random.Philox(key=key).random_raw(n)
        at_once = np.sort(np.argsort(numbers, kind="stable")[:most])
        assert np.array_equal(drawn_places(n, most, key), at_once)


def test_the_first_of_equal_numbers_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Few:
        def __init__(self, key: int) -> None:
            self.numbers = iter(np.random.default_rng(key).integers(0, 3, 1000).astype(np.uint64))

        def random_raw(self, count: int) -> np.ndarray:
            return np.array([next(self.numbers) for _ in range(count)], np.uint64)

    monkeypatch.setattr(base, "_PIECE", 64)
    monkeypatch.setattr(np.random, "Philox", Few)
    numbers = Few(5).random_raw(1000)
    for most in (1, 100, 400, 999):
        assert np.array_equal(drawn_places(1000, most, 5), np.sort(np.argsort(numbers, kind="stable")[:most]))


def test_what_is_held_out_of_each_class_does_not_depend_on_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(0).integers(0, 40, 3000)
    at_once = places_in_classes(labels, np.arange(3000)) % 10 == 9
    for piece in (1, 7, 1000, 1 << 20):
        monkeypatch.setattr(folders, "_PIECE", piece)
        assert np.array_equal(held_out(labels, 10), at_once)
    assert held_out(np.empty(0, np.int64), 10).shape == (0,)


def test_drawing_places_takes_no_memory_for_each_sample() -> None:
    tracemalloc.start()
    assert len(drawn_places(8_000_000, 4096)) == 4096
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16_000_000  # a piece of 2^18 numbers and what chooses among them; at once it took 192 MB


def chosen_at_once(labels: np.ndarray, samples: int, count: int) -> np.ndarray:
    """The samples that a teacher is tried out with, as every release chose them."""
    shuffled = np.argsort(np.random.Philox(key=7).random_raw(samples), kind="stable")
    y = labels[shuffled]
    by_class = np.argsort(y, kind="stable")
    begins = np.searchsorted(y[by_class], y[by_class])
    rank, first = np.empty_like(by_class), np.empty_like(by_class)
    rank[by_class], first[by_class] = np.arange(samples) - begins, by_class[begins]
    return np.sort(shuffled[np.lexsort((rank, first, rank // 4))][:count])


@pytest.mark.parametrize(("classes", "count"), [(1, 128), (10, 128), (10, 777), (400, 128), (400, 1300), (3, 5000)])
def test_the_samples_that_a_teacher_is_tried_out_with_are_chosen_in_pieces(
    classes: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(classes)
    labels = np.minimum(rng.integers(0, classes, 3000), rng.integers(0, classes, 3000))  # some classes are rare
    for piece in (100, 1 << 18):
        monkeypatch.setattr(suspicions, "_PIECE", piece)
        assert np.array_equal(suspicions.choose(labels, 3000, count), chosen_at_once(labels, 3000, count))
        ids, first = suspicions._first_of_each(labels)
        assert all(map(np.array_equal, (ids, first), np.unique(labels, return_index=True)))
