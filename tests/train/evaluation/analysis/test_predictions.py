"""The table of predictions: what it says, in both formats, and what is refused."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.cache import KdcacheError, open_cache
from kdcache.cache.records.encoding import encode
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.teachers.weights import read_weights
from kdcache.tests.helpers.commands import invoke, works
from kdcache.tests.helpers.training import quiet
from kdcache.train.config import TrainConfig
from kdcache.train.evaluate import evaluate_run, examine_run, student_of
from kdcache.train.evaluation.analysis.predictions import columns, require_format, write_predictions
from kdcache.train.evaluation.judge import Answers
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.run import train

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train(TrainConfig("nkd", str(home / "exact"), epochs=2, out=str(out)), quiet)
    return out


def test_both_tables_say_what_student_and_teacher_answer(home, run, tmp_path):
    found = json.loads(works(["eval", str(run), "--predictions", str(tmp_path / "a.csv"), "--json"]).stdout)
    text = works(["eval", str(run), "--predictions", str(tmp_path / "a.parquet")]).stdout
    assert "worst classes" in text and "analysis" not in text and len(text.splitlines()) < 20
    table = parquet.read_table(tmp_path / "a.parquet").to_pydict()
    evaluation = open_data("digits", "eval")
    model = student_of(run, *read_weights(run / "last.safetensors")).eval()
    with torch.no_grad():
        p = model(evaluation.pixels.permute(0, 3, 1, 2)).double().softmax(1).numpy()
    labels, rows = evaluation.labels[:, 0], np.arange(355)
    assert table["index"] == rows.tolist() and table["label"] == labels.tolist()
    assert table["prediction"] == p.argmax(1).tolist() == table["class_1"]
    assert table["prediction_name"] == [str(c) for c in p.argmax(1)] and table["name"] == [None] * 355
    assert table["label_probability"] == pytest.approx(p[rows, labels], abs=1e-6)
    order = np.argsort(-p, 1)
    for place in range(5):
        assert table[f"class_{place + 1}"] == order[:, place].tolist()
        assert table[f"probability_{place + 1}"] == pytest.approx(p[rows, order[:, place]], abs=1e-6)
    assert np.mean(table["correct"]) == pytest.approx(found["top1"])
    teacher = open_cache(home / "exact").read_evaluation().logits().double().softmax(1).numpy()
    assert table["teacher_prediction"] == teacher.argmax(1).tolist()
    assert table["teacher_probability"] == pytest.approx(teacher.max(1), abs=1e-6)
    assert table["teacher_label_probability"] == pytest.approx(teacher[rows, labels], abs=1e-6)
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as f:
        lines = list(csv.DictReader(f))
    assert list(lines[0]) == list(table)
    for name, column in table.items():
        text = [line[name] for line in lines]
        kind = type(column[0])
        if kind is bool:
            assert text == [str(v).lower() for v in column]
        elif column[0] is None:
            assert text == [""] * 355
        else:
            assert list(map(kind, text)) == column


def test_the_analysis_is_that_of_the_cache_and_of_its_first_view(home, run):
    found = evaluate_run(str(run))
    analysis = found["analysis"]
    assert analysis["evaluation"]["top1"] == found["agreement"] and analysis["evaluation"]["kl"] == found["kl"]
    assert analysis["calibration"]["before"]["nll"] == found["nll"]
    assert sum(analysis["per_class"]["correct"]) / 355 == pytest.approx(found["top1"])
    # By the loader that trains: its first epoch takes the first view.
    model = student_of(run, *read_weights(run / "last.safetensors")).eval()
    loader = CachedLoader(open_cache(home / "exact"), "digits", 1442)
    same = right = 0
    with torch.no_grad():
        for images, labels, records in loader.steps():
            answers = model(images).argmax(1)
            same, right = same + int((answers == records.predictions()).sum()), right + int((answers == labels).sum())
    assert analysis["training"]["images"] == 1442
    assert analysis["training"]["top1"] == pytest.approx(same / 1442)
    assert analysis["training"]["accuracy"] == pytest.approx(right / 1442)
    some = examine_run(str(run), train_images=100).analysis.training
    assert some.images == 100 and examine_run(str(run), train_images=0).analysis.training is None


def test_without_the_training_images_the_rest_is_told_and_why(home, run, monkeypatch):
    lines = []

    def missing(spec, split, **options):
        raise KdcacheError("they are away")

    monkeypatch.setattr("kdcache.train.evaluation.judge.open_data", missing)
    assert examine_run(str(run), say=lines.append).analysis.training is None
    assert lines == ["note: not compared with the teacher on training images: they are away"]
    with pytest.raises(KdcacheError, match="they are away"):
        examine_run(str(run), train_images=10)


def answers(k=None, labelled=True):
    z = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 9.0]])
    y = torch.tensor([1, 2, 3]) if labelled else torch.empty(0, dtype=torch.int64)
    return Answers(z, y, encode(z.flip(0), y if labelled else None, k))


NAMES = ['a,"b"', "=SUM(A1)", "a\nb", "naïve"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_names_are_kept_as_they_are(tmp_path, suffix):
    file, images = tmp_path / "sub" / f"p{suffix}", ["x/=1+1.png", "ü, y.png", "bad\udcff.png"]
    write_predictions(str(file), answers(), images, NAMES)
    if suffix == ".csv":
        with file.open(newline="", encoding="utf-8") as f:
            table = list(csv.DictReader(f))
    else:
        table = parquet.read_table(file).to_pylist()
    assert [row["name"] for row in table] == [*images[:2], "bad\\udcff.png"]
    assert [row["label_name"] for row in table] == ["=SUM(A1)", "a\nb", "naïve"]
    assert [row["prediction_name"] for row in table] == ["=SUM(A1)", 'a,"b"', "naïve"]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(("k", "labelled"), [(2, True), (2, False), (None, False)])
def test_what_is_not_known_is_left_out(tmp_path, k, labelled):
    found = columns(answers(k, labelled), (), NAMES)
    assert len({len(column) for column in found.values()}) == 1
    assert "class_4" in found and "class_5" not in found
    assert ("teacher_label_probability" in found) == labelled
    if labelled:
        want = torch.softmax(answers().logits.flip(0), 1)[torch.arange(3), torch.tensor([1, 2, 3])]
        assert found["teacher_label_probability"] == pytest.approx(want.tolist(), abs=2e-2)  # from 8-bit records
    else:
        assert found["label"] == found["correct"] == [None] * 3
    write_predictions(str(tmp_path / "p.parquet"), answers(k, labelled), (), NAMES)
    assert parquet.read_table(tmp_path / "p.parquet").to_pydict().keys() == found.keys()


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_done(home, run, tmp_path, monkeypatch):
    for name, reason in (("p.xlsx", "the name has to end in .csv or .parquet"), (".", "has to end in")):
        result = invoke(["eval", str(run), "--predictions", str(tmp_path / name)])
        assert result.exit_code == 2 and reason in result.stderr and len(result.stderr.splitlines()) == 1
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(KdcacheError, match="is a folder"):
        require_format(str(tmp_path / "d.csv"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(KdcacheError, match=r"pip install pyarrow|cannot be imported"):
        require_format("p.parquet")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Not a directory|exists"):
        write_predictions(str(tmp_path / "file" / "p.csv"), answers(), (), NAMES)
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["d.csv", "file"]
