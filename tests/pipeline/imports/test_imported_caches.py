"""Imported caches serve like others: training, judging, packing and sharing, within what they hold."""

import io
import json
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from kdcache.cache import KdcacheError, open_cache
from kdcache.cache.errors import UnservedError
from kdcache.cli import main
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.imports.imports import import_logits
from kdcache.pipeline.info import facts, one_line
from kdcache.pipeline.pack import pack, unpack
from kdcache.pipeline.share import pull, push
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.verify import source_of, verify
from kdcache.pipeline.views.render import render
from kdcache.tests.helpers import warm
from kdcache.tests.helpers.pages import blocks
from kdcache.tests.helpers.places import ROOT
from kdcache.tests.helpers.storedlogits import (
    CLASSES,
    RNG,
    VIEWS,
    K,
    quiet,
    same_files,
    softmax64,
)
from kdcache.train.config import TrainConfig
from kdcache.train.evaluate import evaluate_run
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.losses.options import LOSSES, make_loss
from kdcache.train.losses.prepare import require_served
from kdcache.train.run import train


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
    with pytest.raises(KdcacheError, match="was imported without the teacher's answers on the evaluation split"):
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
    with pytest.raises(KdcacheError, match="was imported, and FFCV's loader cannot make such views"):
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
    (example,) = (block.text for block in blocks(ROOT / "docs/stores.md") if "transform(" in block.text)
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
        "from kdcache.pipeline.imports import fkd, imports\n"
        "from kdcache.pipeline.imports.config import ImportConfig\n"
        "fkd.PART, write, count = 8, SplitStore.write_shard, 0\n"
        "def killed(*args):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 6:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(*args)\n"
        "SplitStore.write_shard = killed\n"
        "imports.import_logits(ImportConfig('fkd', sys.argv[1], sys.argv[2], teacher='effL2', image_size=32,\n"
        "                                           out=sys.argv[3]))\n"
    )
    out = tmp_path / "c"
    run = warm.run([sys.executable, "-c", script, fkd[1].path, fkd[1].data, out])
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(list((out / "commits").glob("v*.json"))) == 5
    result = import_logits(replace(fkd[1], out=str(out)), quiet)
    assert result.records == VIEWS * 30 - (3 * 8 + 2 * 8) and result.key == fkd[0].key
    assert same_files(out / "views", fkd[0].path / "views") and verify(open_cache(out)).passed


def test_the_command(place, fkd, tmp_path):
    args = ["import", "fkd", fkd[1].path, "--data", fkd[1].data, "--teacher", "effL2", "--image-size", "32", "--json"]
    run = CliRunner().invoke(main, args)
    assert run.exit_code == 0 and json.loads(run.stdout)["key"] == fkd[0].key
    run = CliRunner().invoke(main, ["import", "fkd", str(tmp_path), "--data", fkd[1].data])
    assert run.exit_code == 2 and run.output.startswith("Error: ") and io.StringIO(run.output).readlines()[1:] == []
