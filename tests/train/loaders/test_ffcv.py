"""Training from an FFCV file is training from the cache that it was packed from."""

import gc
import json
import os
import shutil
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kdcache.cache import KdcacheError
from kdcache.cache import errors as e
from kdcache.cli import main
from kdcache.pipeline.ffcv import format
from kdcache.pipeline.ffcv.pack import pack_ffcv
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.tests.helpers import warm
from kdcache.tests.helpers.caches import same
from kdcache.tests.helpers.ffcv import Drawn, needs_ffcv, packed_arrays, packed_files, quiet
from kdcache.tests.helpers.images import arrays_data
from kdcache.tests.helpers.oddthings import ODD, put_in_place
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.ffcv import FFCVLoader

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Not to be changed: see copy."""
    return packed_arrays(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def copy(packed, tmp_path):
    return Path(shutil.copy(packed[2], tmp_path / "copy.beton"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return packed_files(tmp_path_factory.mktemp("files"))


def test_without_ffcv_one_line_says_what_to_install(packed, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "kdcache.train.loaders.ffcv_decoders", raising=False)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(
        e.UnservedError, match=r"^training from a \.beton needs FFCV .*apt-get install .*pip install ffcv=="
    ):
        FFCVLoader(FFCVFile(packed[2]), 8)


@needs_ffcv
def test_ffcv_itself_reads_the_file_as_one_of_its_own(packed):
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.loader import Loader

    _, data, path = packed
    loader = Loader(str(path), 10, num_workers=1, os_cache=False, drop_last=False)
    kinds = {"image": RGBImageField, "label": IntField, "index": IntField, "records": NDArrayField}
    assert {name: type(field) for name, field in loader.reader.handlers.items()} == kinds
    at = 0
    for images, labels, index, records in loader:
        rows = slice(at, at + len(images))
        assert images.equal(data.pixels[rows]) and labels.flatten().tolist() == FFCVFile(path).labels[rows, 0].tolist()
        assert index.flatten().tolist() == list(range(at, at + len(images)))
        assert records.shape[1:] == (2, FFCVFile(path).layout.record_bytes + 4)
        at += len(images)
    assert at == 50


def assert_same_epochs(cache, data, path, batch, epochs=3, world=1, **options):
    for rank in range(world):
        ours = FFCVLoader(FFCVFile(path), batch, rank, world, workers=2, **options)
        theirs = CachedLoader(cache, data, batch, rank, world, **options)
        assert len(ours) == len(theirs)
        for epoch in range(epochs):
            ours.set_epoch(epoch)
            theirs.set_epoch(epoch)
            # As lists: what was given out must not change while the loader goes on.
            for (a, y, r), (b, z, s) in zip(list(ours.steps()), list(theirs.steps()), strict=True):
                assert a.equal(b) and a.stride() == b.stride() and a.dtype == torch.uint8
                assert y.equal(z) and same(r, s) and r.labels.equal(s.labels)
                assert (r.prior is None and s.prior is None) or r.prior.equal(s.prior)
    for (a, y, _), (b, z, _) in zip(ours, theirs, strict=True):
        assert a.equal(b) and y.equal(z)


@needs_ffcv
@pytest.mark.parametrize(
    ("policy", "size", "labelled", "record"),
    [
        ("crop,flip", (32, 32), True, {"k": 4}),
        ("crop,flip", (7, 12), False, {"k": None}),
        ("crop", (9, 5), True, {"k": None, "precision": "float32"}),
        ("flip", (8, 8), True, {"k": 3, "precision": "uint8", "tail_std": True}),
        ("none", (1, 1), True, {"k": 1, "temperatures": (2.0,)}),
        ("crop,flip,three,randaugment(2,9),erase(0.5)", (32, 32), True, {"k": 4}),
    ],
)
def test_batches_are_those_of_the_cache(tmp_path, policy, size, labelled, record):
    data = arrays_data(90, *size, labelled=labelled)
    cache = Drawn(tmp_path / "c", data, policy, views=3, part=32, **record).cache
    path = pack_ffcv(cache, data, tmp_path / "x.beton", None, quiet)
    assert_same_epochs(cache, data, path, 16, epochs=4, seed=5)


@needs_ffcv
def test_ranks_share_each_batch(packed):
    assert_same_epochs(*packed, 7, epochs=2, world=2, views=1)


@needs_ffcv
def test_what_ffcv_cannot_render_is_refused(packed, tmp_path):
    file = FFCVFile(packed[2])
    with pytest.raises(e.InputError, match="raw pixels of 6x9, which are cut and never resized"):
        FFCVLoader(file, 8, image_size=16)
    with pytest.raises(e.NotFoundError, match="has 2 views, not 3"):
        FFCVLoader(file, 8, views=3)
    with pytest.raises(e.InputError, match="a batch of 60 does not fit"):
        FFCVLoader(file, 60)
    data = arrays_data(20, 8, 8)
    cache = Drawn(tmp_path / "c", data, "rrc,flip").cache
    with pytest.raises(e.InputError, match=r"never resized: train from the cache itself for rrc,flip at 8x8"):
        FFCVLoader(FFCVFile(pack_ffcv(cache, data, tmp_path / "x.beton", None, quiet)), 8)


def ffcv_threads():
    from ffcv.loader.epoch_iterator import EpochIterator

    return [t for t in threading.enumerate() if isinstance(t, EpochIterator)]


@needs_ffcv
@pytest.mark.timeout(60, method="thread")
def test_an_error_in_ffcvs_thread_reaches_the_reader(packed, monkeypatch):
    from kdcache.train.loaders.ffcv_decoders import Epoch

    run_pipeline = Epoch.run_pipeline

    def fails(self, batch, *rest):
        if batch == failing:
            raise ValueError("a decoder\nfailed")
        return run_pipeline(self, batch, *rest)

    monkeypatch.setattr(Epoch, "run_pipeline", fails)
    loader = FFCVLoader(FFCVFile(packed[2]), 5)
    for failing in (0, 2, 9):
        steps = loader.steps()
        for _ in range(failing):
            next(steps)
            time.sleep(0.01)  # FFCV runs ahead, so that its queue is full
        with pytest.raises(KdcacheError, match=r"FFCV failed while it read .*x\.beton: ValueError: a decoder failed$"):
            next(steps)
        assert not ffcv_threads()
    failing = 99
    assert len(list(loader.steps())) == len(loader)


@needs_ffcv
@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("other", ODD)
def test_another_thing_in_the_files_place_while_it_is_open(copy, other):
    file = FFCVFile(copy)
    loader = FFCVLoader(file, 25)
    steps = loader.steps()
    next(steps)
    put_in_place(copy, other)
    assert len(list(steps)) == 1  # the epoch that has begun has the file itself
    for again in (lambda: next(loader.steps()), loader.difference, lambda: FFCVLoader(file, 25)):
        with pytest.raises(e.CorruptError, match=r"copy\.beton.*(cannot be read any more|changed while it was open)"):
            again()


@needs_ffcv
@pytest.mark.timeout(60, method="thread")
def test_damage_while_the_file_is_open(packed, copy):
    loader = FFCVLoader(FFCVFile(copy), 10)
    table = loader.file.table
    assert len(list(loader.steps())) == 5
    with copy.open("r+b") as f:
        f.seek(int(table["records"][17]) + 2)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 16]))
    loader.set_epoch(0)
    with pytest.raises(e.CorruptError, match="the record of view 0 of sample 17 is damaged; remove it"):
        list(loader.steps())
    loader.set_epoch(1)
    assert len(list(loader.steps())) == 5  # another view, which is sound
    with pytest.raises(e.CorruptError, match="records of view 0 are not what was packed"):
        loader.file.read(0)
    os.truncate(copy, copy.stat().st_size - 1)
    with pytest.raises(e.CorruptError, match="has changed while it was open"):
        list(loader.steps())
    assert not ffcv_threads()
    copy.unlink()
    with pytest.raises(e.CorruptError, match="cannot be read any more"):
        list(loader.steps())


@needs_ffcv
def test_a_view_that_could_not_be_drawn_is_drawn_again(packed, monkeypatch):
    loader = FFCVLoader(FFCVFile(packed[2]), 2)
    with monkeypatch.context() as patch:
        patch.setattr(FFCVFile, "parameters", lambda *_: {}["no"])
        with pytest.raises(KeyError):
            next(loader.steps())
    assert len(list(loader.steps())) == len(loader)


@needs_ffcv
def test_it_goes_on_to_the_next_epoch_by_itself(packed):
    own, told = FFCVLoader(FFCVFile(packed[2]), 10), FFCVLoader(FFCVFile(packed[2]), 10)
    for epoch in range(3):
        told.set_epoch(epoch)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(own.steps(), told.steps(), strict=True))
        assert own.epoch == epoch and own.view == told.view == own.file.views[epoch % len(own.file.views)]
    own.sampler.set_epoch(0)
    told.set_epoch(0)
    assert torch.equal(next(own.steps())[0], next(told.steps())[0])


@needs_ffcv
def test_no_thread_outlives_its_epoch(packed):
    loader = FFCVLoader(FFCVFile(packed[2]), 2)
    threads = torch.get_num_threads()
    a, b = loader.steps(), loader.steps()
    first = next(a)[0]
    loader.set_epoch(0)
    assert first.equal(next(b)[0]) and next(a)[0].equal(next(b)[0])  # two at once do not disturb each other
    assert len(ffcv_threads()) == 2
    a.close()
    del b
    gc.collect()
    assert not ffcv_threads() and torch.get_num_threads() == threads
    del loader
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name.startswith("kdcache-view") and t.is_alive() and not _ends(t)]


def _ends(thread):
    thread.join(5)
    return not thread.is_alive()


@needs_ffcv
def test_a_process_that_stops_in_an_epoch_ends(packed):
    script = f"""
        from kdcache.pipeline.ffcv.read import FFCVFile
        from kdcache.train.loaders.ffcv import FFCVLoader
        steps = FFCVLoader(FFCVFile({str(packed[2])!r}), 2).steps()
        next(steps)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    run = warm.run(command, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@needs_ffcv
def test_ffcvs_rendering_of_files_must_be_allowed_and_is_measured(files, tmp_path):
    cache, data, path = files
    file = FFCVFile(shutil.copy(path, tmp_path / "copy.beton"))
    assert (file.raw, file.renderer) == (False, "ffcv-area-1")
    with pytest.raises(e.MismatchError, match=r"renders by ffcv-area-1 and .* torch-uint8-1: give --allow-renderer"):
        FFCVLoader(file, 8)
    ours = FFCVLoader(file, 8, image_size=20, allow_renderer=True, seed=2)
    theirs = CachedLoader(cache, data, 8, image_size=20, seed=2, workers=0)
    apart = []
    for epoch in range(2):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        for (a, y, r), (b, z, s) in zip(ours.steps(), theirs.steps(), strict=True):
            assert y.equal(z) and same(r, s) and a.shape == b.shape == (8, 3, 20, 20)
            apart.append((a.float() - b.float()).abs().mean().item())
            assert (a.flip(3).float() - b.float()).abs().mean() > 5 * apart[-1]  # mirrored where it should be
    assert max(apart) < 3 and 0 < ours.difference() < 3
    assert file.table["image"]["mode"][0] == format.JPEG
    with file.path.open("r+b") as f:
        f.seek(int(file.table["image"]["pointer"][0]))
        f.write(bytes(40))
    with pytest.raises(e.CorruptError, match="the image of sample 0 is damaged"):
        list(ours.steps())
    crop = Drawn(tmp_path / "c", data, "crop,flip").cache
    with pytest.raises(e.InputError, match="reach beyond the image's edge"):
        FFCVLoader(FFCVFile(pack_ffcv(crop, data, tmp_path / "x.beton", None, quiet)), 8, allow_renderer=True)


@needs_ffcv
def test_training_from_the_file_is_training_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def run(*command, status=0):
        result = CliRunner().invoke(main, list(command))
        assert result.exit_code == status, result.output
        return result

    run("teach", "--teacher", "resnet8", "--epochs", "1")
    run("build", "--teacher", "resnet8", "--views", "2", "--out", "c", "--store", "ffcv", "--allow-low-accuracy")
    assert Path("c.beton").exists()
    assert "holds these views already" in run("pack", "c", "--to", "ffcv").output
    common = ["train", "--loss", "nkd", "--student", "resnet8", "--epochs", "2", "--batch-size", "256", "--json"]
    metrics = {}
    for name in ("c", "c.beton"):
        run(*common, "--cache", name, "--out", f"run-{name}")
        lines = Path(f"run-{name}/metrics.jsonl").read_text().splitlines()
        metrics[name] = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    assert metrics["c"] == metrics["c.beton"] and len(metrics["c"]) == 2
    shutil.rmtree("c")
    evaluated = json.loads(run("eval", "run-c.beton", "--json").stdout)
    assert evaluated["top1"] == metrics["c"][evaluated_epoch(metrics["c"])]["top1"]
    assert "give the cache that it was packed from" in run("info", "c.beton", status=2).output
    assert "give the cache itself" in run(*common, "--cache", "c.beton", "--online", status=2).output
    Path("c.beton").write_bytes(b"nothing")
    assert run(*common, "--cache", "c.beton", status=2).output.startswith("Error: c.beton is not an FFCV file")


def evaluated_epoch(lines):
    return max(range(len(lines)), key=lambda i: (lines[i]["top1"], i))
