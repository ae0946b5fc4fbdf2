"""Dataset classes as the teacher's classes."""

import sys
from pathlib import Path

import numpy as np
import pytest
from torchvision.models import ResNet18_Weights

from kdcache.cache.errors import InputError
from kdcache.pipeline.classmap import map_labels

IMAGENET = tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
TEACHER = ("tench", "tiger shark", "Cardigan", "cardigan", "7")
LABELS = np.array([[1], [0], [1]])
THREE = np.array([[0], [1], [2]])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.json", '{"fish": "Tiger_Shark", "dog": 2, "other": "unknown"}'),
        ("map.csv", 'fish,"tiger shark"\n\ndog,2\nother,unknown\n'),
        ("map.tsv", "dog\tCardigan\nfish\t1\n"),
    ],
)
def test_a_file_maps_by_name_or_id(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    mapped = map_labels(LABELS, ("fish", "dog"), str(tmp_path / name), TEACHER, 5)
    assert mapped.tolist() == [[2], [1], [2]] and mapped.dtype == np.int64


def test_a_number_in_a_file_is_first_of_all_a_name(tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_text("fish,7\ndog,0\n")
    mapped = map_labels(LABELS, ("fish", "dog"), str(tmp_path / "map.csv"), TEACHER, 5)
    assert mapped.tolist() == [[0], [4], [0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"fish": 1}', r"map.json: has no line for 'dog'$"),
        ('{"fish": 1, "dog": 1}', "'fish' and 'dog' are both the teacher's class 1"),
        ('{"fish": 1, "dog": 5}', "there is no class 5: the teacher's are 0 to 4"),
        ('{"fish": 1, "dog": -1}', "there is no class -1"),
        ('{"fish": 1, "dog": true}', r"\('dog', True\) is not a dataset class and a teacher class or id"),
        ('{"fish": "tensh", "dog": 2}', r"no class 'tensh' \(nearest: 'tench'\)"),
        ('{"fish": "CARDIGAN", "dog": 2}', "no class 'CARDIGAN'"),  # two are alike
        ('{"fish": 1, "fish": 2}', "two lines for 'fish'"),
        ('["fish", 1]', "not a JSON object"),
        ('{"fish"', "cannot be read: Expecting"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_does_not_map_is_one_line(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "map.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        map_labels(LABELS, ("fish", "dog"), str(tmp_path / "map.json"), TEACHER, 5)
    assert "\n" not in str(caught.value)


def test_auto_matches_names_and_synsets() -> None:
    names = ("Great_White Shark", "Cardigan", "TENCH")
    assert map_labels(THREE, names, "auto", IMAGENET, 1000).tolist() == [[2], [264], [0]]
    synsets = ("n01440764", "n02113186", "n15075141")
    for known in (IMAGENET, None):
        assert map_labels(THREE, synsets, "auto", known, 1000).tolist() == [[0], [264], [999]]
    assert map_labels(np.array([[0]]), synsets[:1], "auto", ("x", *synsets), 4).tolist() == [[1]]


def test_auto_names_up_to_five_that_do_not_match() -> None:
    names = ("tench", "goldfich", "b4", "c4", "d4", "e4", "f4", "g4")
    with pytest.raises(InputError, match=r"'goldfich' \(nearest: .*'goldfish'\), 'b4', .*'e4' and 2 more;"):
        map_labels(np.array([[0]]), names, "auto", IMAGENET, 1000)
    with pytest.raises(InputError, match="names of the teacher's classes are not known"):
        map_labels(np.array([[0]]), names, "auto", None, 1000)


def test_auto_says_that_timm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(InputError, match="pip install timm"):
        map_labels(np.array([[0]]), ("n01440764",), "auto", IMAGENET, 1000)


def test_unlabelled_data_has_nothing_to_map() -> None:
    assert map_labels(np.empty((3, 0), np.int64), (), "auto", None, 10).shape == (3, 0)
