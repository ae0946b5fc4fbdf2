"""Records of imported caches are those that TinyViT's and FKD's files hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from kdcache.cache import KdcacheError, open_cache
from kdcache.cache.identity import canonical
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.imports import imports as importing
from kdcache.pipeline.imports import tinyvit as tinyvit_format
from kdcache.pipeline.imports.config import ImportConfig, Kind
from kdcache.pipeline.imports.fkd import FKD
from kdcache.pipeline.imports.imports import import_logits
from kdcache.pipeline.imports.tinyvit import TinyViT
from kdcache.tests.helpers.places import DATA
from kdcache.tests.helpers.storedlogits import (
    RNG,
    VIEWS,
    K,
    quiet,
    require_records,
    same_files,
    softmax64,
    top,
    write_fkd,
    write_tinyvit,
)


def test_records_of_fkd_are_those_that_were_stored(fkd, truth, data):
    cache = open_cache(fkd[0].path)
    assert cache.views == (0, 1, 2) and fkd[0].records == VIEWS * len(data) and cache.train.parts == 4
    assert cache.key == fkd[0].key == cache.path.name
    for view in cache.views:
        records = cache.read(view)
        require_records(records, truth["p"][view], np.float32)
        assert np.array_equal(records.labels.numpy(), data.labels)
        made = cache.train.view_arrays(view)
        assert np.array_equal(made["boxes"], truth["boxes"][view])
        assert np.array_equal(made["flips"], truth["flips"][view])
    assert float(cache.read(0).gaps[0, 0]) == pytest.approx(49.6, abs=0.05)
    assert float(cache.read(0).tail[0, 0]) == -np.inf


def test_records_of_tinyvit_are_those_that_were_stored(tinyvit, truth, data):
    cache = open_cache(tinyvit[0].path)
    assert cache.views == (0, 1, 2) and cache.identity.views.policy == "foreign"
    for view in cache.views:
        require_records(cache.read(view), truth["p"][view], np.float16)
        assert np.array_equal(cache.train.view_arrays(view)["seeds"], truth["seeds"][view])
    # Half of float16's smallest number stands for what was rounded to 0.
    assert float(cache.read(0).gaps[0, 0]) == pytest.approx(25 * np.log(2), abs=0.01)


def test_tinyvit_goes_by_names_too_and_by_torchvisions_order(place, tmp_path, data, truth, tinyvit):
    """ImageNet-22k's keys are file names. Places are those of ImageFolder, which has files before folders' files."""
    from torchvision.datasets import ImageFolder

    named = write_tinyvit(tmp_path / "named", [Path(p).stem for p in data.paths], truth["p"], truth["seeds"], ranks=3)
    result = import_logits(replace(tinyvit[1], path=str(named)), quiet)
    assert result.key == tinyvit[0].key and result.records == 0
    for name in ("train/ant/b/1.png", "train/ant/a.png", "train/ant/z.png", "train/ant-x/0.png", "val/ant/0.png"):
        (tmp_path / "deep" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((70, 80, 3), 9, np.uint8)).save(tmp_path / "deep" / name)
    deep = open_data(f"imagenet:{tmp_path}/deep", "train")
    root = tmp_path / "deep/train"
    theirs = [str(Path(path).relative_to(root)) for path, _ in ImageFolder(root).samples]
    assert theirs != list(deep.paths)
    p = truth["p"][:1, : len(theirs)]
    reader = TinyViT(write_tinyvit(tmp_path / "t", list("0123"), p, truth["seeds"][:1, :4], ranks=1), deep)
    answers = reader.read(range(1), range(4), quiet)
    assert answers.made["seeds"][0].tolist() == [truth["seeds"][0, theirs.index(path)] for path in deep.paths]


def test_datasets_in_memory_go_by_place(tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tinyvit_format, "PART", 1000)
    digits = open_data("digits", "train")
    p = softmax64(3 * np.eye(10)[digits.labels[:, 0]] + RNG(2).normal(0, 1, (len(digits), 10)))[None]
    folder = write_tinyvit(tmp_path / "t", [str(i) for i in range(len(digits))], p, np.ones((1, len(digits)), int))
    cache = open_cache(import_logits(ImportConfig("tinyvit", str(folder), "digits"), quiet).path)
    require_records(cache.read(0), p[0], np.float16)
    with pytest.raises(KdcacheError, match="digits has no files, and these records go by file names"):
        import_logits(ImportConfig("fkd", str(folder), "digits"), quiet)


@pytest.mark.parametrize("form", ["float16", "tensors", "smoothing"])
def test_forms_of_fkd(tmp_path, data, truth, form):
    """--use_fp16, as tensors in place of arrays, and the label type that holds one class."""
    k, dtype = (1 if form == "smoothing" else K), (np.float16 if form == "float16" else np.float32)
    kind = "tensors" if form == "tensors" else "arrays"
    write_fkd(tmp_path, data, truth["p"], truth["boxes"], truth["flips"], k, dtype, kind)
    if form == "smoothing":
        for tar in tmp_path.rglob("*.tar"):
            crops, flips, output = torch.load(tar, weights_only=False)
            torch.save([crops, flips, output[:, :, 0]], tar)
    answers = FKD(tmp_path, data).read(range(VIEWS), range(len(data)), quiet)
    ids, p = top(truth["p"], k, np.float32)
    assert np.array_equal(answers.ids, ids) and np.array_equal(answers.p, p.astype(dtype))
    assert np.array_equal(answers.made["boxes"], truth["boxes"])
    assert np.array_equal(answers.made["flips"], truth["flips"])


def test_a_temperature_is_that_of_the_stored_softmax(tmp_path, fkd, data, truth):
    result = import_logits(replace(fkd[1], temperature=2.0, out=str(tmp_path / "c")), quiet)
    one, two = open_cache(fkd[0].path).read(1), open_cache(result.path).read(1)
    torch.testing.assert_close(two.gaps.float(), 2 * one.gaps.float(), rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(two.dense(2.0), one.dense(1.0), rtol=5e-3, atol=1e-5)


def test_the_key_is_that_of_the_contents(tmp_path, fkd, data, truth):
    """The same, imported elsewhere: the same key and bytes. One answer, box or flip less the same: another key."""
    cache = open_cache(fkd[0].path)
    again = open_cache(import_logits(replace(fkd[1], out=str(tmp_path / "again")), quiet).path)
    assert again.key == cache.key and same_files(again.path / "views", cache.path / "views")
    assert import_logits(fkd[1], quiet).records == 0
    for what in ("p", "boxes", "flips"):
        other = {name: rows.copy() for name, rows in truth.items()}
        if what == "flips":
            other["flips"][2, 7] ^= True
        elif what == "boxes":
            other["boxes"][2, 7] = truth["boxes"][2, 7] * (1, 1, 1, 0) + (0, 0, 0, 1)
        else:
            other["p"][2, 7] = other["p"][2, 7, ::-1]
        folder = write_fkd(tmp_path / what, data, other["p"], other["boxes"], other["flips"])
        assert import_logits(replace(fkd[1], path=str(folder)), quiet).key != cache.key


def test_identities_that_lack_nothing_are_what_they_were(fkd):
    old = open_cache(DATA / "format-1/cache")
    assert b"lacks" not in canonical(old.identity)
    assert old.key == json.loads((old.path / "commits/labels.json").read_bytes())["key"]
    new = open_cache(fkd[0].path).identity
    assert canonical(new).count(b'"lacks":["evaluation","target_gap"]') == 1
    for a, b in ((old.identity, new), (new, old.identity)):
        assert any(line.startswith("record.lacks: ") for line in a.differences(b))


# What can be done with it


def test_each_kind_that_can_be_asked_for_stands_in_the_table():
    assert list(importing.KINDS) == list(get_args(Kind))
