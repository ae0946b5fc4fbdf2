"""Caches from TinyViT's and FKD's files: the records that those hold, and nothing that they lack."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from kdcache.cache import KdcacheError, open_cache
from kdcache.cache.errors import UnservedError
from kdcache.cache.identity import canonical
from kdcache.cache.records import Records
from kdcache.cli import main
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.imports import imports as module
from kdcache.pipeline.imports.config import ImportConfig
from kdcache.pipeline.imports.imports import FKD, TinyViT, import_logits
from kdcache.pipeline.info import facts, one_line
from kdcache.pipeline.pack import pack, unpack
from kdcache.pipeline.share import pull, push
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.verify import source_of, verify
from kdcache.pipeline.views.render import render
from kdcache.train.config import TrainConfig
from kdcache.train.evaluate import evaluate_run
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.losses.options import LOSSES, make_loss
from kdcache.train.losses.prepare import require_served
from kdcache.train.run import train

CLASSES, K, VIEWS = ("ant", "bee", "cat", "dog", "eel"), 3, 3
RNG = np.random.default_rng


def quiet(_):
    pass


def same_files(a, b):
    """Whether two folders hold the same files."""
    one, two = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (a, b))
    return bool(one) and one == two


# Both formats as their projects' code writes them


def softmax64(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def top(p, k, dtype):
    """ids and probabilities of the k largest, equal ones in no order of their ids, as topk and argsort leave them."""
    ids = np.argsort(-p[..., ::-1].astype(np.float32), -1, kind="stable")[..., :k]
    ids = p.shape[-1] - 1 - ids
    return ids, np.take_along_axis(p, ids, -1).astype(dtype)


def write_tinyvit(folder, keys, p, seeds, k=K, ranks=2, first_epoch=0):
    """p [V, N, C] and seeds [V, N]: an epoch's samples are shuffled, and one is there again, with other answers."""
    for v, (rows, of_rows) in enumerate(zip(p, seeds, strict=True)):
        epoch = folder / f"logits_top{k}_epoch{v + first_epoch}"
        epoch.mkdir(parents=True)
        order = RNG(v).permutation(len(keys))
        for rank in range(ranks):
            mine = order[rank::ranks]
            padding = order[:1] if rank else order[:0]
            (epoch / f"rank{rank}-keys.txt").write_text("".join(f"{keys[i]}\n" for i in [*mine, *padding]))
            with (epoch / f"rank{rank}-values.bin").open("wb") as f:
                for number, i in enumerate([*mine, *padding]):
                    ids, values = top(rows[i] if number < len(mine) else rows[i][::-1], k, np.float16)
                    f.write(np.int32(of_rows[i]).tobytes() + ids.astype(np.int16).tobytes() + values.tobytes())
    return folder


def write_fkd(folder, data, p, boxes, flips, k=K, dtype=np.float32, kind="arrays"):
    """p [V, N, C], boxes [V, N, 4], flips [V, N]."""
    for i, path in enumerate(data.paths):
        height, width = data.sizes[i].tolist()
        file = folder / "imagenet/train" / path.split("/")[0] / f"{path.split('/')[1].split('.')[0]}.tar"
        file.parent.mkdir(parents=True, exist_ok=True)
        crops = [torch.FloatTensor([b[0] / height, b[1] / width, b[2] / height, b[3] / width]) for b in boxes[:, i]]
        ids, values = (torch.from_numpy(a) for a in top(p[:, i], k, np.float32))
        output = torch.stack([torch.stack([a, b]) for a, b in zip(ids, values, strict=True)])
        state = [torch.stack(crops), torch.from_numpy(flips[:, i]), output]
        if kind == "arrays":
            state = [a.numpy().astype(dtype) if a.is_floating_point() else a.numpy() for a in state]
        torch.save(state, file)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of images, and what a teacher said of them in both formats."""
    top_folder, rng = tmp_path_factory.mktemp("imports"), RNG(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in CLASSES:
            (top_folder / f"images/{split}/{name}").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (*rng.integers(66, 120, 2), 3), np.uint8)
                Image.fromarray(pixels).save(top_folder / f"images/{split}/{name}/{name}_{i}.x.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCACHE_HOME", str(top_folder / "home"))
        patch.chdir(top_folder)
        patch.setattr(module, "PART", 8)
        patch.setattr(os, "fsync", lambda fd: None)
        yield top_folder


@pytest.fixture(scope="module")
def data(place):
    return open_data(f"imagenet:{place}/images", "train")


@pytest.fixture(scope="module")
def truth(data):
    """p [V, N, C], boxes [V, N, 4], flips [V, N], seeds [V, N]; the label is often the likeliest class."""
    rng, n = RNG(1), len(data)
    z = rng.normal(0, 2, (VIEWS, n, len(CLASSES)))
    z[:, np.arange(n), data.labels[:, 0]] += 4
    z[0, 0] = [50, 0.4, 0.3, 0.2, 0.1]  # no more of the tail than rounding may have made, and p that underflows float16
    z[1, 0, data.labels[0, 0]] = -9
    z[2, 1] = [1, 2, 2, 2, 0]  # ties
    size = data.sizes.astype(np.int64)
    extent = (1 + rng.random((VIEWS, n, 2)) * size).astype(np.int64).clip(1, size)
    corner = np.floor(rng.random((VIEWS, n, 2)) * (size - extent + 1)).astype(np.int64)
    boxes = np.concatenate([corner, extent], -1)
    return {
        "p": softmax64(z),
        "boxes": boxes.astype(np.int32),
        "flips": rng.random((VIEWS, n)) < 0.5,
        "seeds": rng.integers(0, 2**31, (VIEWS, n)),
    }


@pytest.fixture(scope="module")
def fkd(place, data, truth):
    """FKD's files, and the cache of them."""
    write_fkd(place / "fkd", data, truth["p"], truth["boxes"], truth["flips"])
    config = ImportConfig("fkd", f"{place}/fkd", f"imagenet:{place}/images", teacher="effL2", image_size=32)
    return import_logits(config, quiet), config


@pytest.fixture(scope="module")
def tinyvit(place, data, truth):
    """The same of TinyViT's, by the samples' places in the dataset."""
    write_tinyvit(place / "tinyvit", [str(i) for i in range(len(data))], truth["p"], truth["seeds"])
    config = ImportConfig("tinyvit", f"{place}/tinyvit", f"imagenet:{place}/images")
    return import_logits(config, quiet), config


# What is imported


def require_records(records: Records, p, dtype):
    """The records are the K largest of p [N, C] as stored in that type, and what remains of them as the tail."""
    order = np.lexsort((np.broadcast_to(np.arange(p.shape[1]), p.shape), -p.astype(dtype)), -1)[:, :K]
    assert np.array_equal(records.classes.long().numpy(), order)
    kept = np.take_along_axis(p, order, 1)
    got = records.dense(1.0, "uniform").double().numpy()
    bound = 1e-4 if dtype == np.float32 else 2e-3
    np.testing.assert_allclose(np.take_along_axis(got, order, 1), kept, rtol=4e-3, atol=bound)
    rest = 1 - kept.sum(1)
    np.testing.assert_allclose(1 - np.take_along_axis(got, order, 1).sum(1), rest, rtol=4e-3, atol=bound)
    # Not known is which of the other classes has it: all of them have as much.
    others = np.delete(got[5], order[5])
    assert others == pytest.approx(others[0], rel=1e-3) and records.target_gap.shape == (len(p), 0)


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
    monkeypatch.setattr(module, "PART", 1000)
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
    old = open_cache(Path(__file__).parents[2] / "data/format-1/cache")
    assert b"lacks" not in canonical(old.identity)
    assert old.key == json.loads((old.path / "commits/labels.json").read_bytes())["key"]
    new = open_cache(fkd[0].path).identity
    assert canonical(new).count(b'"lacks":["evaluation","target_gap"]') == 1
    for a, b in ((old.identity, new), (new, old.identity)):
        assert any(line.startswith("record.lacks: ") for line in a.differences(b))


# What can be done with it


def test_training_takes_the_crops_that_were_stored(fkd, data, truth):
    loader, seen = CachedLoader(open_cache(fkd[0].path), data, 10, workers=0), set()
    for view, (boxes, flips) in enumerate(zip(truth["boxes"], truth["flips"], strict=True)):
        want = [render(data.decode(i), boxes[i], flips[i], (32, 32)) for i in range(len(data))]
        loader.set_epoch(view)
        for images, _, records in loader.steps():
            for image, first in zip(images, records.classes[:, 0].tolist(), strict=True):
                (sample,) = [i for i in range(len(data)) if torch.equal(image, want[i])]
                seen.add((view, sample))
                assert first == truth["p"][view, sample].argmax()
    assert len(seen) == VIEWS * len(data)


def test_students_are_trained_and_judged(place, fkd, tmp_path):
    data = f"imagenet:{place}/images"
    config = TrainConfig(
        "kd:temperature=1", cache=str(fkd[0].path), data=data, student="resnet8", epochs=2, batch_size=10,
        image_size=32, out=str(tmp_path / "run"), workers=0,
    )  # fmt: skip
    summary = train(config, quiet)
    assert {"top1", "nll"} <= summary.keys() and not {"agreement", "kl"} & summary.keys()
    assert evaluate_run(str(tmp_path / "run"), workers=0)["top1"] == pytest.approx(summary["top1"])
    for changed, message in (
        ({"loss": "nkd"}, "nkd needs the teacher's answer for the label, which this imported cache lacks"),
        ({"online": True}, "was imported, and its teacher is not at hand: train without --online"),
        ({"loss": "kd:temperature=4"}, "kd needs the teacher at temperature 4; this cache holds 1"),
    ):
        with pytest.raises(KdcacheError, match=message):
            train(replace(config, out=str(tmp_path / "none"), **changed), quiet)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_served_need_nothing_more(fkd, data, name):
    """Each loss either refuses before training, or is finite on these very records."""
    cache, loss = open_cache(fkd[0].path), make_loss(name, 1000)
    records = cache.read(1)
    if name in ("nkd", "dkd", "wsld"):
        with pytest.raises(UnservedError, match="lacks"):
            require_served(loss, cache.identity.record)
        with pytest.raises(UnservedError, match="these imported records lack the teacher's gap to the label"):
            make_loss(f"{name}:temperature=1", 1000)(torch.zeros(30, 5), records.labels[:, 0].long(), records)
    elif loss.needs.dense or loss.needs.standardised:
        with pytest.raises(UnservedError):
            require_served(loss, cache.identity.record)
    elif name != "uskd":  # which takes the student's features, and no record
        require_served(loss, cache.identity.record)
        logits = torch.randn(30, 5, requires_grad=True)
        loss(logits, records.labels[:, 0].long(), records).backward()
        assert torch.isfinite(logits.grad).all() and logits.grad.any()


def test_kd_is_that_of_the_stored_answers_with_an_even_rest(fkd, truth):
    """FKD's own target: the stored probabilities, and what remains spread evenly."""
    records, p = open_cache(fkd[0].path).read(1), truth["p"][1]
    order = np.argsort(-p, 1)[:, :K]
    kept = np.take_along_axis(p, order, 1)
    target = np.repeat((1 - kept.sum(1, keepdims=True)) / (len(CLASSES) - K), len(CLASSES), 1)
    np.put_along_axis(target, order, kept, 1)
    z = RNG(3).normal(0, 2, p.shape)
    want = (target * (np.log(target) - np.log(softmax64(z)))).sum(1).mean()
    got = make_loss("kd:alpha=0,beta=1", 1000)(torch.tensor(z).float(), records.labels[:, 0].long(), records)
    assert float(got) == pytest.approx(want, rel=2e-3)


def test_the_rest_of_the_commands(place, fkd, tmp_path):
    cache = open_cache(fkd[0].path)
    assert cache.finished and cache.complete
    assert facts(cache)["fidelity"]["evaluation_top1"] is None
    assert "effL2 (imported from fkd)" in one_line(cache) and "lacks evaluation and target_gap" in one_line(cache)
    assert verify(cache).passed
    with pytest.raises(KdcacheError, match="was imported, and its teacher is not at hand: give --depth contents"):
        source_of(cache)
    with pytest.raises(KdcacheError, match="was imported, without the teacher's answers on the evaluation split"):
        cache.read_evaluation()
    weights = tmp_path / "w.safetensors"
    save_file(build_network("resnet8", len(CLASSES), 32).state_dict(), weights)
    with pytest.raises(KdcacheError, match=re.escape("teacher.architecture: the cache has effL2 (imported from fkd)")):
        build(
            BuildConfig("resnet8", str(weights), data=f"imagenet:{place}/images", out=str(cache.path), views=1), quiet
        )


def test_it_is_packed_and_shared_like_others(fkd, tmp_path, monkeypatch):
    path, views = fkd[0].path, range(VIEWS)
    packed = pack(path, "hdf5", str(tmp_path / "c.h5"), say=quiet).path
    with pytest.raises(KdcacheError, match="was imported, and FFCV's loader cannot make its views"):
        pack(path, "ffcv", str(tmp_path / "c.beton"), say=quiet)
    unpacked = unpack(str(packed), str(tmp_path / "c"), quiet).path
    push(path, str(tmp_path / "shared"), say=quiet)
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    pulled = Path(pull(fkd[0].key, str(tmp_path / "shared"), say=quiet).where)
    for copy in (packed, unpacked, pulled):
        cache = open_cache(copy)
        assert cache.key == fkd[0].key and verify(cache).passed
        for view in views:
            mine, theirs = open_cache(path).train.view_arrays(view), cache.train.view_arrays(view)
            assert all(np.array_equal(rows, theirs[name]) for name, rows in mine.items())
            assert torch.equal(cache.read(view).gaps, open_cache(path).read(view).gaps)


def test_boxes_that_leave_the_image_are_refused(fkd, data):
    """Also where the cache's own digests agree, as they do for who makes a cache to do harm."""
    cache = open_cache(fkd[0].path)
    hostile = cache.train.view_arrays(0)
    hostile["boxes"][3] = (0, 0, 2**31 - 1, 5)
    cache.train.view_arrays = lambda view: hostile
    with pytest.raises(KdcacheError, match="holds boxes or flips that cannot be: import it again"):
        list(CachedLoader(cache, data, 10, workers=0).steps())


def test_views_of_tinyvit_are_left_to_its_own_transforms(place, tinyvit, data, truth, tmp_path):
    with pytest.raises(KdcacheError, match="only the transforms of its project can make: in a loop of your own"):
        train(TrainConfig("kd", cache=str(tinyvit[0].path), data=f"imagenet:{place}/images", student="resnet8"), quiet)
    # As docs/stores.md has it.
    text = (Path(__file__).parents[3] / "docs/stores.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    transformed = []
    names = {
        "transform": lambda image, seed: transformed.append((image.size[::-1], seed)) or torch.zeros(3, 8, 8),
        "student": lambda images: torch.zeros(len(images), len(CLASSES), requires_grad=True),
    }
    example = example.replace("CACHE", str(tinyvit[0].path)).replace("imagenet:PATH", f"imagenet:{place}/images")
    exec(compile(example, "docs/stores.md", "exec"), names)
    assert transformed == list(zip(map(tuple, data.sizes.tolist()), truth["seeds"][0].tolist(), strict=True))


# Interruption


def test_a_killed_import_goes_on(fkd, tmp_path):
    """Killed by SIGKILL when it has written some shards."""
    script = (
        "import os, signal, sys\n"
        "from kdcache.cache.store.publish import SplitStore\n"
        "from kdcache.pipeline.imports import imports\n"
        "imports.PART, write, count = 8, SplitStore.write_shard, 0\n"
        "def killed(*args):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 6:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(*args)\n"
        "SplitStore.write_shard = killed\n"
        "imports.import_logits(imports.ImportConfig('fkd', sys.argv[1], sys.argv[2], teacher='effL2', image_size=32,\n"
        "                                           out=sys.argv[3]))\n"
    )
    out = tmp_path / "c"
    run = subprocess.run([sys.executable, "-c", script, fkd[1].path, fkd[1].data, str(out)], capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(list((out / "commits").glob("v*.json"))) == 5
    result = import_logits(replace(fkd[1], out=str(out)), quiet)
    assert result.records == VIEWS * 30 - (3 * 8 + 2 * 8) and result.key == fkd[0].key
    assert same_files(out / "views", fkd[0].path / "views") and verify(open_cache(out)).passed


# Mistakes, damage and malice: one line each


def edit_fkd(change):
    """Changes what the file of sample 3 holds."""

    def edit(folder):
        tar = sorted(folder.rglob("*.tar"))[3]
        state = torch.load(tar, weights_only=False)
        torch.save(change(*state) or state, tar)

    return edit


def set_at(what, place, value):
    def change(crops, flips, output):
        {"crops": crops, "flips": flips, "output": output}[what][place] = value

    return edit_fkd(change)


def first_tar(folder):
    return sorted(folder.rglob("*.tar"))[0]


def compressed(folder):
    with zipfile.ZipFile(first_tar(folder), "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", bytes(1 << 20))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


FKD_FAULTS = {
    "missing": (lambda f: first_tar(f).unlink(), r"1 samples without a record, ant/ant_0\.x\.png for one"),
    "foreign": (
        lambda f: shutil.copy(first_tar(f), first_tar(f).with_name("fly.tar")),
        r"1 records of no sample of the dataset, .*fly\.tar for one",
    ),
    "doubled": (
        lambda f: (f / "ant").mkdir() or shutil.copy(first_tar(f), f / "ant"),
        r"1 records of samples that have another, .*ant_0\.tar",
    ),
    "empty": (lambda f: shutil.rmtree(f / "imagenet"), "holds no CLASS/NAME.tar, as FKD's"),
    "crops differ": (
        edit_fkd(lambda crops, flips, output: [crops[:2], flips[:2], output[:2]]),
        r"ant_3\.tar holds \[2, 2, 3\] of float32, and .*ant_0\.tar \[3, 2, 3\]",
    ),
    "id": (set_at("output", (1, 0, 2), 7), r"ant_3\.tar: crop 1 has class ids above 4"),
    "id twice": (edit_fkd(lambda c, f, o: [c, f, np.concatenate([o[:, :, :1]] * 3, 2)]), "has a class twice"),
    "id of parts": (set_at("output", (1, 0, 2), 1.5), r"ant_3\.tar has class ids that are no whole numbers"),
    "id NaN": (set_at("output", (1, 0, 2), np.nan), "class ids that are no whole numbers"),
    "p above 1": (set_at("output", (1, 1, 0), 1.5), r"ant_3\.tar: crop 1 has probabilities that are none"),
    "p NaN": (set_at("output", (1, 1, 1), np.nan), "has probabilities that are none"),
    "p negative": (set_at("output", (1, 1, 2), -0.1), "has probabilities that are none"),
    "p increasing": (set_at("output", (1, 1, slice(None)), [0.2, 0.1, 0.3]), "probabilities that increase"),
    "p sums": (set_at("output", (1, 1, slice(None)), [0.5, 0.3, 0.25]), "probabilities whose sum is above 1"),
    "crops outside": (set_at("crops", (2, 0), 1), "ant_3.tar: crops that leave the image of"),
    "crops NaN": (set_at("crops", (2, 0), np.nan), "ant_3.tar: crops that do not fall on whole pixels"),
    "crops of another size": (
        edit_fkd(lambda c, f, o: [c * np.float32(0.97), f, o]),
        "crops that do not fall on whole pixels of",
    ),
    "flips": (edit_fkd(lambda c, f, o: [c, f.astype(int) + 3, o]), "holds flips that are neither 0 nor 1"),
    "hard": (edit_fkd(lambda c, f, o: [c, f, np.array([1, 2, 3])]), r"soft labels \[3\] of int64: known are"),
    "two of three": (edit_fkd(lambda c, f, o: [c, f]), "does not hold crops, flips and soft labels"),
    "a list": (edit_fkd(lambda c, f, o: [c, f, [1, 2]]), "holds no arrays"),
    "huge": (edit_fkd(lambda c, f, o: [c, f, torch.zeros(1).expand(10**6, 2, 10**6)]), "or such of more than 67.1 MB"),
    "bfloat16": (edit_fkd(lambda c, f, o: [c, f, torch.tensor(o).bfloat16()]), "holds no arrays"),
    "objects": (edit_fkd(lambda c, f, o: [c, f, o.astype(object)]), "ant_3.tar"),
    "code": (edit_fkd(lambda c, f, o: [c, f, Evil()]), "is refused: it holds more than numbers, or is damaged"),
    "no zip": (lambda f: first_tar(f).write_bytes(b"x" * 99), "ant_0.tar is no file of torch.save"),
    "cut": (lambda f: first_tar(f).write_bytes(first_tar(f).read_bytes()[:-200]), "is no file of torch.save"),
    "compressed": (compressed, "or is compressed, as no file of FKD's is"),
    "too long": (lambda f: os.truncate(first_tar(f), (1 << 26) + 1), "ant_0.tar"),
}


@pytest.mark.parametrize("fault", FKD_FAULTS)
def test_faults_of_fkd(fkd, tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(fkd[1].path, tmp_path / "fkd")
    spoil, message = FKD_FAULTS[fault]
    spoil(folder)
    with pytest.raises(KdcacheError, match=message) as e:
        import_logits(replace(fkd[1], path=str(folder), out=str(tmp_path / "c")), quiet)
    assert "\n" not in str(e.value) and not (tmp_path / "c").exists() and not (tmp_path / "ran").exists()


def edit_values(place, dtype, value):
    """In epoch 1, rank 0, record 2."""

    def edit(folder):
        path = folder / f"logits_top{K}_epoch1/rank0-values.bin"
        content = bytearray(path.read_bytes())
        at = 2 * (4 + 4 * K) + place
        new = np.array(value, dtype).tobytes()
        content[at : at + len(new)] = new
        path.write_bytes(content)

    return edit


def edit_keys(change):
    def edit(folder):
        path = folder / f"logits_top{K}_epoch1/rank0-keys.txt"
        path.write_bytes(change(path.read_bytes()))

    return edit


TINYVIT_FAULTS = {
    "cut": (
        lambda f: os.truncate(f / "logits_top3_epoch1/rank1-values.bin", 40),
        r"rank1-values\.bin has 40 bytes, and 16 keys need 16 each: one of the two is cut short",
    ),
    "keys cut": (edit_keys(lambda b: b[:-2]), "14 keys need 16 each"),
    "no values": (lambda f: [p.unlink() for p in f.glob("logits_top3_epoch1/*")], "holds no rankR-values.bin"),
    "no keys": (lambda f: (f / "logits_top3_epoch1/rank0-keys.txt").unlink(), "rank0-keys.txt is missing"),
    "a rank less": (
        lambda f: [p.unlink() for p in f.glob("logits_top3_epoch1/rank1*")],
        r"epoch1: 15 samples without a record, .*\.png for one: is --data what they were stored for",
    ),
    "foreign": (edit_keys(lambda b: b"99" + b[b.index(b"\n") :]), "1 records of no sample of the dataset, 99 for one"),
    "doubled": (
        edit_keys(lambda b: b"\n".join([b.split(b"\n")[1], *b.split(b"\n")[1:]])),
        "1 samples without a record|1 records of samples that have another",
    ),
    "no text": (edit_keys(lambda b: b"\xff" + b), "rank0-keys.txt is no text of keys"),
    "a long key": (edit_keys(lambda b: b"1" * 100_000 + b), "has more than .* bytes, too many for the 15 records"),
    "names": (edit_keys(lambda b: b"fly" + b), "15 records of no sample|samples without a record"),
    "id": (edit_values(4, "i2", 5), r"epoch1: the record of .*\.png has class ids above 4"),
    "negative id": (edit_values(6, "i2", -1), "has class ids above 4"),
    "p NaN": (edit_values(4 + 2 * K, "f2", np.nan), "has probabilities that are none"),
    "p above 1": (edit_values(4 + 2 * K, "f2", 1.001), "has probabilities that are none"),
    "p zero": (edit_values(4 + 2 * K, "f2", [0, 0, 0]), "has probabilities that are none"),
    "p increasing": (edit_values(4 + 2 * K, "f2", [0.2, 0.3, 0.1]), "probabilities that increase along a record"),
    "another K": (lambda f: (f / "logits_top5_epoch9").mkdir(), r"holds epochs with top \[3, 5\]"),
    "neither": (lambda f: [p.rename(f / f"x{p.name}") for p in f.iterdir()], "holds no folders logits_topK_epochE"),
    "no folder": (shutil.rmtree, "holds no folders logits_topK_epochE"),
}


@pytest.mark.parametrize("fault", TINYVIT_FAULTS)
def test_faults_of_tinyvit(tinyvit, tmp_path, fault):
    folder = shutil.copytree(tinyvit[1].path, tmp_path / "tinyvit")
    spoil, message = TINYVIT_FAULTS[fault]
    spoil(folder)
    with pytest.raises(KdcacheError, match=message) as e:
        import_logits(replace(tinyvit[1], path=str(folder), out=str(tmp_path / "c")), quiet)
    assert "\n" not in str(e.value) and not (tmp_path / "c").exists()


def test_classes_in_another_order_are_named(tinyvit, tmp_path, data, truth):
    p = np.eye(5)[data.labels[:, 0]] * 0.9 + 0.02
    places = [str(i) for i in range(30)]
    config = replace(tinyvit[1], out=str(tmp_path / "c"))
    right = write_tinyvit(tmp_path / "right", places, p[None], truth["seeds"][:1])
    assert import_logits(replace(config, path=str(right)), quiet).views == 1
    rolled = write_tinyvit(tmp_path / "rolled", places, np.roll(p, 1, 1)[None], truth["seeds"][:1])
    config = replace(config, path=str(rolled), out=str(tmp_path / "d"))
    with pytest.raises(KdcacheError, match=r"images of ant are answered as bee, .*images of eel are answered as ant"):
        import_logits(config, quiet)
    assert import_logits(replace(config, allow_low_accuracy=True), quiet).views == 1


def test_wrong_order_and_wrong_classes_are_noticed(place, tinyvit, tmp_path, data, truth):
    wrong = write_tinyvit(tmp_path / "w", [str((i + 13) % 30) for i in range(30)], truth["p"], truth["seeds"])
    config = replace(tinyvit[1], path=str(wrong), out=str(tmp_path / "c"))
    with pytest.raises(KdcacheError, match=r"name the label of .* with its classes in this order"):
        import_logits(config, quiet)
    assert import_logits(replace(config, allow_low_accuracy=True), quiet).views == VIEWS
    with pytest.raises(KdcacheError, match="--classes 9: imagenet has 5 classes; --unlabelled"):
        import_logits(replace(config, classes=9), quiet)
    with pytest.raises(KdcacheError, match="says nothing of classes here: give --classes"):
        import_logits(replace(config, unlabelled=True), quiet)
    with pytest.raises(KdcacheError, match="3 classes a record, so there must be more than 3"):
        import_logits(replace(config, unlabelled=True, classes=3), quiet)
    result = import_logits(replace(config, unlabelled=True, classes=9, out=str(tmp_path / "u")), quiet)
    record = open_cache(result.path).identity.record
    assert (record.labels, record.classes, record.lacks) == (0, 9, ("evaluation",))


def test_files_that_change_under_way_are_noticed(tinyvit, tmp_path):
    folder = shutil.copytree(tinyvit[1].path, tmp_path / "tinyvit")
    said = []

    def say(line):
        said.append(line)
        if line.startswith("cache "):
            edit_values(0, "i4", 5)(folder)

    with pytest.raises(KdcacheError, match="is being changed: import it again when that is over"):
        import_logits(replace(tinyvit[1], path=str(folder), out=str(tmp_path / "c")), say)
    assert open_cache(tmp_path / "c").views == ()


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_refused_or_read(place, fkd, tinyvit, data, draws):
    """Any bytes: answers, or one line. Nothing else is raised."""
    if draws.draw(st.booleans()):
        good = first_tar(Path(fkd[1].path)).read_bytes()
    else:
        good = (Path(tinyvit[1].path) / f"logits_top{K}_epoch0/rank0-values.bin").read_bytes()
    content = bytearray(good)
    for _ in range(draws.draw(st.integers(1, 4))):
        content[draws.draw(st.integers(0, len(good) - 1))] = draws.draw(st.integers(0, 255))
    content = content[: draws.draw(st.sampled_from([len(good)] * 3 + [len(good) - 1, 60]))]
    damaged = place / "damaged"
    damaged.write_bytes(content)
    try:
        if good[:2] == b"PK":
            reader, views, rows = FKD(Path(fkd[1].path), data), range(VIEWS), range(2)
            reader._files[0] = damaged
        else:
            epoch = place / f"fuzz/logits_top{K}_epoch0"
            shutil.copytree(Path(tinyvit[1].path) / epoch.name, epoch, dirs_exist_ok=True)
            shutil.copy(damaged, epoch / "rank0-values.bin")
            reader, views, rows = TinyViT(epoch, data), range(1), range(30)
        answers = reader.read(views, rows, quiet)
        module._require_sound(answers, len(CLASSES), reader, views, rows)
        encoded = module._encoded(answers.ids[0], answers.p[0], 1.0, len(CLASSES))
        assert np.isfinite(encoded["gaps"]).all() and not np.isnan(encoded["tail"]).any()
    except KdcacheError as e:
        assert "\n" not in str(e)  # noqa: PT017  either of the two


def test_the_command(place, fkd, tmp_path):
    args = ["import", "fkd", fkd[1].path, "--data", fkd[1].data, "--teacher", "effL2", "--image-size", "32", "--json"]
    run = CliRunner().invoke(main, args)
    assert run.exit_code == 0 and json.loads(run.stdout)["key"] == fkd[0].key
    run = CliRunner().invoke(main, ["import", "fkd", str(tmp_path), "--data", fkd[1].data])
    assert run.exit_code == 2 and run.output.startswith("Error: ") and io.StringIO(run.output).readlines()[1:] == []
