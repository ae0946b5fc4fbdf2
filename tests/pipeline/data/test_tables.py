"""Tables of files: how they may be written, their splits, and one line for each mistake."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.dataset import list_unreadable, open_data
from kdcache.pipeline.data.kinds.files import FileDataset
from kdcache.tests.helpers.images import draw
from kdcache.train.evaluation.otherdata import whole_of


@pytest.fixture(autouse=True)
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    for i in range(12):
        draw(tmp_path / f"{i}.png", 8 + i)
    return tmp_path


def opened(top: Path, text: str | bytes, split: str = "train", name: str = "t.csv") -> FileDataset:
    (top / name).write_bytes(text.encode() if isinstance(text, str) else text)
    data = open_data(f"files:{top / name}", split)
    assert isinstance(data, FileDataset) and data.name == "files"
    return data


def test_quotes_spaces_other_alphabets_and_byte_order_marks(top: Path) -> None:
    for name in ('a "b", c.png', "猫/ä ö.png"):
        draw(top / name)
    rows = [
        ["\ufeffLabel", " PATH ", "more"],
        ["Große Katze", '"a ""b"", c.png"', "1"],
        ['"dog, big"', "猫/ä ö.png", ""],
    ]
    rows.append(["Große Katze", "0.png", '"x\ny"'])
    data = opened(top, "\r\n".join(map(",".join, rows)))
    assert data.paths == ("0.png", 'a "b", c.png', "猫/ä ö.png")
    assert data.class_names == ("Große Katze", "dog, big") and data.labels.tolist() == [[0], [0], [1]]
    tabs = opened(top, "\n".join(map("\t".join, rows)), name="t.tsv")
    assert tabs.paths == data.paths and tabs.class_names == data.class_names
    lines = '{"path": "0.png", "class": "Große Katze"}\n\n{"class": "dog, big", "path": "猫/ä ö.png", "x": [1]}\n'
    assert opened(top, lines, name="t.jsonl").class_names == data.class_names


def test_absolute_paths_and_paths_above_the_table(top: Path) -> None:
    (top / "deep").mkdir()
    (top / "deep" / "t.csv").write_text(f"path,label\n{top}/0.png,a\n../1.png,b\n")
    data = open_data(f"files:{top}/deep/t.csv", "train")
    assert [data.decode(i).shape[1] for i in (0, 1)] == [9, 8]


def test_the_order_of_rows_does_not_count(top: Path) -> None:
    rows = [f"{i}.png,c{i % 2}\n" for i in range(5)]
    one, other = (opened(top, "path,label\n" + "".join(r)) for r in (rows, rows[::-1]))
    assert one.fingerprint() == other.fingerprint()


def test_without_a_split_column_every_tenth_of_a_class_is_held_out(top: Path) -> None:
    text = "path,label\n" + "".join(f"{i}.png,{'ab'[i > 10]}\n" for i in range(12))
    train, held = (opened(top, text, split) for split in ("train", "eval"))
    assert len(train) == 11 and held.paths == ("8.png",) and "held out" in str(train.note)
    assert len(whole_of(f"files:{top}/t.csv", held)) == 12


def test_splits_have_their_usual_names(top: Path) -> None:
    text = "path,label,split\n0.png,a,Training\n1.png,b,train\n2.png,b,validation\n3.png,a,dev\n4.png,a,test\n"
    train, held = (opened(top, text, split) for split in ("train", "eval"))
    assert train.paths == ("0.png", "1.png") and held.paths == ("2.png", "3.png")
    assert "; 1 rows of test are not read" in str(held.note)
    assert opened(top, text.replace("dev", "eval").replace("validation", "test"), "eval").paths == ("2.png", "4.png")
    assert len(whole_of(f"files:{top}/t.csv", held)) == 2  # the splits are no parts of one whole


def test_unreadable_files_are_listed(top: Path) -> None:
    (top / "1.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"1\.png: not a JPEG.*; 1 of 2 images"):
        opened(top, "path,label\n0.png,a\n1.png,b\n")
    assert [line.split(": ")[0] for line in list_unreadable(f"files:{top}/t.csv", "train")] == [f"{top}/1.png"]


HEAD = "path,label\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: a column path is needed .*, there is nothing"),
        ("name,label\n", "line 1: a column path is needed .*, there is 'name', 'label'"),
        ("path,file,label\n", "line 1: path and file may each be the path: keep one"),
        ("path,label,class\n", "line 1: label and class may each be the label"),
        (HEAD, r"t\.csv: has no rows"),
        (HEAD + "0.png\n", "line 2: has 1 cells, the heading 2"),
        (HEAD + "0.png,a\n\n,b\n", "line 4: '' is no path"),
        (HEAD + "0.png,\n", "line 2: label '' is neither a class name nor a whole number"),
        (HEAD + "a\0b.png,a\n", r"no path|line contains NUL|NUL"),
        (HEAD + "0.png,a\n1.png,b\n0.png,b\n", r"line 4: 0\.png stands in line 2 already"),
        (HEAD + '0.png,"a\n', "cannot be read: near row 1: unexpected end of data"),
        (HEAD + "9999.png,a\n", r"9999\.png: cannot be read: No such file"),
        (HEAD + "0.png,99999999\n", "label 99999999 is no class: ids are 0 to 1,048,575"),
        (b"path,label\n\xff.png,a\n", "is not UTF-8 near row 1"),
        ("path\n0.png\n", "line 2: label None is neither"),
        ("path,label,split\n0.png,a,train\n1.png,b,\n", "line 3: has no split"),
        ("path,label,split\n0.png,a,train\n1.png,b,other\n", "line 3: split 'other' is none of train, val, test"),
        ("path,label,split\n0.png,a,val\n", "has no row whose split is train"),
    ],
)
def test_a_mistake_is_one_line(text: str | bytes, message: str, top: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        opened(top, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "0.png", "label": 1}\nx\n', "line 2: is no JSON"),
        ("[1]\n", "line 1: is no JSON object"),
        ('{"path": "0.png", "label": true}\n', "line 1: label True is neither"),
        ('{"path": "0.png", "label": 1.5}\n', r"line 1: label 1\.5 is neither"),
        ('{"path": "0.png", "label": -1}\n', "line 1: label -1 is no class: ids begin at 0"),
        ('{"path": 3, "label": 1}\n', "line 1: 3 is no path"),
        ('{"path": "\\ud800.png", "label": 1}\n', "line 1: .* is no path"),
        ('{"path": "0.png", "label": 1}\n{"path": "1.png"}\n', "line 2: has not the same of path, label and split"),
        ("[" * 100_000 + "\n", "line 1: is no JSON"),
    ],
)
def test_a_mistake_in_json_lines_is_one_line(text: str, message: str, top: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        opened(top, text, name="t.jsonl")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_what_the_eval_split_lacks(top: Path) -> None:
    with pytest.raises(InputError, match="has rows of train, but none of val, test or eval"):
        opened(top, "path,label,split\n0.png,a,train\n", "eval")
    with pytest.raises(InputError, match="line 3: label 'b' is no class of the train split"):
        opened(top, "path,label,split\n0.png,a,train\n1.png,b,val\n", "eval")
    with pytest.raises(InputError, match="has no tenth image in any class"):
        opened(top, "path,label\n0.png,a\n", "eval")
    for name in ("t.txt", ""):
        with pytest.raises(InputError, match=r"is no table of a known kind, which are \.csv, .* and \.parquet"):
            open_data(f"files:{top / name}", "train")
    with pytest.raises(InputError, match=r"gone\.csv: cannot be read: No such file"):
        open_data(f"files:{top}/gone.csv", "train")
    with pytest.raises(InputError, match="files needs a table: files:TABLE"):
        open_data("files", "train")


def parquet(top: Path, asked: str, columns: dict[str, list[object]]) -> FileDataset:
    pq.write_table(pa.table(columns), top / "t.parquet", row_group_size=2)
    data = open_data(f"files:{top}/t.parquet", asked)
    assert isinstance(data, FileDataset)
    return data


def test_parquet_is_read_as_the_same_rows_of_csv(top: Path) -> None:
    rows = [
        ("4.png", 1, "val"),
        ("0.png", 1, "train"),
        ("11.png", 0, "train"),
        ("2.png", 2, "train"),
        ("3.png", 0, "val"),
    ]
    text = "path,label,split\n" + "".join(f"{path},{label},{split}\n" for path, label, split in rows)
    paths, labels, splits = (list(column) for column in zip(*rows, strict=True))
    for split in ("train", "eval"):
        data, same = parquet(top, split, {"file": paths, "Label": labels, "split": splits}), opened(top, text, split)
        assert data.paths == same.paths and data.labels.tolist() == same.labels.tolist()
        assert data.fingerprint() == same.fingerprint() and data.class_names == ("0", "1", "2")
    assert len(open_data(f"files:{top}/t.parquet", "train", unlabelled=True)) == 3
    held = parquet(top, "eval", {"path": [f"{i}.png" for i in range(12)], "label": ["é"] * 12})
    assert held.paths == ("7.png",) and held.class_names == ("é",)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"name": ["0.png"]}, r"t\.parquet: a column path is needed .*, there is 'name'"),
        ({"path": ["0.png"], "file": ["a"]}, r"t\.parquet: path and file may each be the path"),
        ({"path": ["0.png"], "label": [1.0]}, r"row 1: label 1\.0 is neither a class name nor a whole number"),
        ({"path": ["0.png", "1.png"], "label": [True, False]}, "row 1: label True is neither"),
        ({"path": ["0.png", "1.png"], "label": [0, None]}, "row 2: label None is neither"),
        ({"path": ["0.png", "1.png"], "label": [0, -3]}, "row 2: label -3 is no class: ids begin at 0"),
        ({"path": ["0.png", "1.png", None], "label": [0, 1, 1]}, "row 3: None is no path"),
        ({"path": [1, 2], "label": [0, 1]}, "row 1: 1 is no path"),
        ({"path": ["0.png", "1.png", "0.png"], "label": [0, 1, 1]}, r"row 3: 0\.png stands in row 1 already"),
        ({"path": ["0.png"], "label": [0], "split": [None]}, "row 1: has no split"),
        ({"path": ["0.png"], "label": [0], "split": ["x"]}, "row 1: split 'x' is none of train"),
        ({"path": [], "label": []}, r"t\.parquet: has no rows"),
    ],
)
def test_a_mistake_in_parquet_is_one_line(columns: dict[str, list[object]], message: str, top: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parquet(top, "train", columns)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_parquet_or_cannot_be_read(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"t\.parquet: cannot be read as parquet: ArrowInvalid: "):
        opened(top, b"path,label", name="t.parquet")
    with pytest.raises(InputError, match=r"gone\.parquet: cannot be read: "):
        open_data(f"files:{top}/gone.parquet", "train")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"t\.parquet: needs the package pyarrow: pip install pyarrow"):
        open_data(f"files:{top}/t.parquet", "train")


def test_numbers_that_python_takes_for_equal_are_labels_of_their_own(top: Path) -> None:
    with pytest.raises(InputError, match="line 2: label True is neither"):
        opened(top, '{"path": "0.png", "label": 1}\n{"path": "1.png", "label": true}\n', name="t.jsonl")
    with pytest.raises(InputError, match=r"line 2: label 1\.0 is neither"):
        opened(top, '{"path": "0.png", "label": 1}\n{"path": "1.png", "label": 1.0}\n', name="t.jsonl")
