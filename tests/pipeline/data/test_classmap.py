"""Dataset classes as the teacher's classes."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import ResNet18_Weights

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.classmap import digest, map_classes, merged, shared

IMAGENET = tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
TEACHER = ("tench", "tiger shark", "Cardigan", "cardigan", "7")


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
    assert map_classes(("fish", "dog"), str(tmp_path / name), TEACHER, 5) == [(1,), (2,)]


def test_a_number_in_a_file_is_first_of_all_a_name(tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_text("fish,7\ndog,0\n")
    assert map_classes(("fish", "dog"), str(tmp_path / "map.csv"), TEACHER, 5) == [(4,), (0,)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.json", '{"fish": [1, "tench"], "dog": ["Cardigan", 3], "seven": ["7"]}'),
        ("map.csv", "fish,tiger shark,0\ndog,2,cardigan\nseven,7\n"),
        ("map.tsv", "seven\t4\ndog\t2\t3\nfish\t1\ttench\n"),
    ],
)
def test_a_file_makes_one_class_of_several(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert map_classes(("fish", "dog", "seven"), str(tmp_path / name), TEACHER, 5) == [(1, 0), (2, 3), (4,)]


def test_a_merged_class_has_the_sum_of_its_classes_probabilities() -> None:
    logits = np.random.default_rng(0).normal(0, 4, (50, 5))
    groups = [(1, 0), (3,), (4,)]
    found = torch.softmax(merged(torch.from_numpy(logits).float(), groups), 1).numpy()
    p = np.exp(logits)
    sums = np.stack([p[:, [0, 1]].sum(1), p[:, 3], p[:, 4]], 1)
    np.testing.assert_allclose(found, sums / sums.sum(1, keepdims=True), rtol=2e-5)


def test_a_file_gives_several_classes_one_of_the_teachers(tmp_path: Path) -> None:
    names = ("fish", "dog", "shark", "cat")
    (tmp_path / "map.csv").write_text("fish,1\ndog,2\nshark,1\ncat,2\n")
    groups = map_classes(names, str(tmp_path / "map.csv"), TEACHER, 5)
    assert groups == [(1,), (2,), (1,), (2,)]
    assert shared(names, groups) == ["'fish' and 'shark'", "'dog' and 'cat'"]


def test_the_digest_of_a_map() -> None:
    assert digest([(0,), (1,), (2,)]) is None
    # As it always was for maps of one to one.
    ids = np.array([2, 0, 1], "<i8")
    assert digest([(2,), (0,), (1,)]) == hashlib.sha256(ids.tobytes()).hexdigest()
    maps = ([(0, 1), (2,)], [(0,), (1, 2)], [(0,), (2, 1)], [(0, 1, 2)], [(0,), (2,)])
    assert len({digest(groups) for groups in maps}) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"fish": 1}', r"map.json: has no line for 'dog'$"),
        ('{"fish": [1, 2], "dog": 1}', "'fish' and 'dog' are both the teacher's class 1"),
        ('{"fish": [1, 1], "dog": 2}', "'fish' is twice the teacher's class 1"),
        ('{"fish": [], "dog": 2}', r"\('fish',\) is not a dataset class and teacher classes or ids"),
        ('{"fish": [1, [2]], "dog": 2}', r"\('fish', 1, \[2\]\) is not a dataset class and teacher classes"),
        ('{"fish": {"a": 1}, "dog": 2}', "is not a dataset class and teacher classes or ids"),
        ('{"fish": 1, "dog": 5}', "there is no class 5: the teacher's are 0 to 4"),
        ('{"fish": 1, "dog": -1}', "there is no class -1"),
        ('{"fish": 1, "dog": true}', r"\('dog', True\) is not a dataset class and teacher classes or ids"),
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
        map_classes(("fish", "dog"), str(tmp_path / "map.json"), TEACHER, 5)
    assert "\n" not in str(caught.value)


def test_auto_matches_names_and_synsets() -> None:
    names = ("Great_White Shark", "Cardigan", "TENCH")
    assert map_classes(names, "auto", IMAGENET, 1000) == [(2,), (264,), (0,)]
    synsets = ("n01440764", "n02113186", "n15075141")
    for known in (IMAGENET, None):
        assert map_classes(synsets, "auto", known, 1000) == [(0,), (264,), (999,)]
    assert map_classes(synsets[:1], "auto", ("x", *synsets), 4) == [(1,)]
    with pytest.raises(InputError, match="class map auto: 'TENCH' and 'tench' are both the teacher's class 0"):
        map_classes(("TENCH", "tench"), "auto", IMAGENET, 1000)


def test_auto_names_up_to_five_that_do_not_match() -> None:
    names = ("tench", "goldfich", "b4", "c4", "d4", "e4", "f4", "g4")
    with pytest.raises(InputError, match=r"'goldfich' \(nearest: .*'goldfish'\), 'b4', .*'e4' and 2 more;"):
        map_classes(names, "auto", IMAGENET, 1000)
    with pytest.raises(InputError, match="names of the teacher's classes are not known"):
        map_classes(names, "auto", None, 1000)


def test_auto_says_that_timm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(InputError, match="pip install timm"):
        map_classes(("n01440764",), "auto", IMAGENET, 1000)
