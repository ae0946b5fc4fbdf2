"""A student on other data than it was trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdcache.cache import KdcacheError
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.data.kinds.named import digits
from kdcache.pipeline.teachers.weights import read_weights
from kdcache.tests.helpers.training import quiet
from kdcache.train.config import TrainConfig
from kdcache.train.evaluate import evaluate_run, student_of
from kdcache.train.run import train

OTHER = """
import numpy as np
from kdcache.pipeline.data.kinds.named import digits

def reversed_names(split):
    images, labels, names = digits(split == "train")
    return images, 9 - labels, names[::-1]

def some(split):
    images, labels, names = digits(split == "train")
    chosen = (labels == 7) | (labels == 2)
    return images[chosen], (labels[chosen] == 2).astype(int), ("7", "2")

def foreign(split):
    images, labels, names = digits(split == "train")
    return images, labels, tuple("012345678") + ("nine",)
"""


def test_a_student_is_evaluated_on_other_data_with_its_classes(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("other_digits.py").write_text(OTHER)
    train(TrainConfig("nkd", str(home / "default"), epochs=2, out="run"), quiet)
    own, reordered = evaluate_run("run"), evaluate_run("run", data="other_digits:reversed_names")
    measured = ("top1", "top5", "nll", "brier", "ece")
    assert {k: reordered[k] for k in measured} == {k: own[k] for k in measured}
    assert reordered["images"] == 355 and reordered["data"] == "other_digits:reversed_names"
    assert "agreement" in own and "agreement" not in reordered
    evaluation = open_data("digits", "eval")
    chosen = np.isin(evaluation.labels[:, 0], (2, 7))
    model = student_of(Path("run"), *read_weights(Path("run/last.safetensors"))).eval()
    with torch.no_grad():
        answers = model(evaluation.pixels[torch.from_numpy(chosen)].permute(0, 3, 1, 2)).argmax(1)
    right = (answers == torch.from_numpy(evaluation.labels[chosen, 0])).float().mean()
    assert evaluate_run("run", data="other_digits:some")["top1"] == pytest.approx(float(right))
    with pytest.raises(KdcacheError, match=r"not trained on other_digits:foreign's classes 'nine': its own are '0', "):
        evaluate_run("run", data="other_digits:foreign")


@pytest.mark.parametrize("splits", [True, False])
def test_a_folder_of_other_images_is_evaluated_whole_unless_it_has_splits(home, tmp_path, splits):
    """Twelve images of each of three classes; where they are split, a third of them is the evaluation split."""
    train(TrainConfig("ce", str(home / "default"), epochs=1, batch_size=512, out=str(tmp_path / "run")), quiet)
    images, labels, _ = digits(True)
    for c in (8, 1, 3):
        for i, image in enumerate(images[labels == c][:12]):
            folder = tmp_path / "pics" / (("val" if i % 3 == 0 else "train") if splits else "") / str(c)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    found = evaluate_run(str(tmp_path / "run"), data=f"imagefolder:{tmp_path / 'pics'}", workers=0)
    assert found["images"] == (12 if splits else 36)
