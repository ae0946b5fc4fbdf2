"""FFCV's file: read back as packed, refused when damaged or forged, and trained from like the cache itself."""

import gc
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdcache.cache import KdcacheError
from kdcache.cache import errors as e
from kdcache.cache.encoding import tail_distribution
from kdcache.cache.identity import canonical
from kdcache.cache.store.chunks import as_arrays
from kdcache.cli import main
from kdcache.pipeline.build.source import describe_data
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.ffcv import beton as module
from kdcache.pipeline.ffcv.beton import Beton, pack_beton
from kdcache.pipeline.views.policy import draw
from kdcache.pipeline.views.render import RENDERER
from kdcache.tests.helpers.caches import WRITER, Filled, identity, same
from kdcache.tests.helpers.images import arrays_data
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.ffcv import BetonLoader

# `make` installs FFCV where it can. There a missing one is a failure, elsewhere these tests are out of reach.
INSTALLABLE = os.geteuid() == 0 and shutil.which("apt-get") is not None
needs_ffcv = pytest.mark.skipif(
    importlib.util.find_spec("ffcv") is None and not INSTALLABLE,
    reason="FFCV is not installed, and its system libraries can only be installed by root",
)


def quiet(line):
    pass


class Drawn(Filled):
    """A cache of random logits for real pixels: its commits hold the digests of the views' parameters."""

    def __init__(self, path, data, policy, views=2, part=64, **record):
        about = identity(len(data), part=part, labels=data.labels.shape[1], **record)
        views_identity = about.views.model_copy(update={"policy": policy, "renderer": RENDERER})
        about = about.model_copy(update={"data": describe_data(data, False), "views": views_identity})
        self.data, self.views = data, about.views
        super().__init__(path, about, views)

    def sizes(self, store):
        return self.data.sizes if store.split == "train" else super().sizes(store)

    def write(self, store, view, part):
        rows = store.rows(part)
        records, z = self.encode(store, view, slice(rows.start, rows.stop))
        sums = tail_distribution(z, records).numpy() if store.carries_tail_sums(view) else None
        digest = "of the evaluation split"
        if store.split == "train":
            drawn = draw(self.views.policy, self.views.seed, view, rows, self.data.sizes[rows.start : rows.stop])
            digest = drawn.digest()
        store.write_shard(view, part, as_arrays(records), digest, WRITER, sums)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A small cache, its images, and the file packed from it: not to be changed."""
    place = tmp_path_factory.mktemp("packed")
    data = arrays_data(50, 6, 9)
    cache = Drawn(place / "c", data, "crop,flip", part=16).cache
    return cache, data, pack_beton(cache, data, place / "x.beton", None, quiet)


@pytest.fixture
def copy(packed, tmp_path):
    return Path(shutil.copy(packed[2], tmp_path / "copy.beton"))


def everything(path):
    """All that a file holds, read and checked."""
    beton = Beton(path)
    beton.check_pixels()
    images = [beton.image(i) for i in range(len(beton))]
    return images, beton.labels, [beton.read(v) for v in beton.views], beton.read_evaluation(), beton.identity


def equal(a, b):
    return (
        all(x.equal(y) for x, y in zip(a[0], b[0], strict=True))
        and np.array_equal(a[1], b[1])
        and all(same(x, y) for x, y in zip([*a[2], a[3]], [*b[2], b[3]], strict=True))
        and a[4] == b[4]
    )


# ---- what is packed is read back (records of every shape: test_stores.py) ----


def test_images_labels_and_chosen_views_come_back(packed, tmp_path):
    cache, data, _ = packed
    lines = []
    path = pack_beton(cache, data, tmp_path / "one.beton", [1], lines.append)
    beton = Beton(path)
    assert beton.views == (1,) and beton.raw and beton.renderer == RENDERER
    assert same(beton.read(1), cache.read(1)) and beton.read(1).prior.equal(cache.prior)
    assert np.array_equal(beton.labels, cache.train.labels) and (beton.mean, beton.std) == (data.mean, data.std)
    assert all(beton.image(i).equal(data.decode(i)) for i in range(len(data)))
    assert same(beton.read_evaluation(), cache.read_evaluation())
    assert np.array_equal(beton.evaluation.labels, cache.evaluation.labels)
    assert "50 images (raw pixels) and 1 views" in lines[0] and " about " in lines[0]
    with pytest.raises(e.NotFoundError, match=r"view 0 is not packed in .*one.beton \(packed: 1\)"):
        beton.read(0)
    drawn, want = beton.parameters(1), draw("crop,flip", 0, 1, range(50), data.sizes)
    assert np.array_equal(drawn.boxes, want.boxes) and np.array_equal(drawn.flips, want.flips)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**31), st.binary(min_size=1, max_size=40))
def test_the_checksum_is_zlibs_seeded_with_the_place(first, view, content):
    rows = np.frombuffer(content * 2, np.uint8).reshape(2, -1)
    got = module._checksums(rows, first, view)
    assert [zlib.crc32(content, module.checksum_seed(first + i, view)) for i in range(2)] == got.tolist()


def test_a_pack_refuses_what_it_cannot_do(packed, tmp_path, monkeypatch):
    cache, data, path = packed
    with pytest.raises(e.InputError, match=r"ends in \.beton"):
        pack_beton(cache, data, tmp_path / "x.ffcv", None, quiet)
    with pytest.raises(e.NotFoundError, match="no complete view 7"):
        pack_beton(cache, data, tmp_path / "x.beton", [0, 7], quiet)
    with pytest.raises(e.MismatchError, match="other data than toy: fingerprint"):
        pack_beton(cache, arrays_data(50, 6, 8), tmp_path / "x.beton", None, quiet)
    lines = []
    before = path.read_bytes()
    assert pack_beton(cache, data, path, None, lines.append) == path and "holds these views already" in lines[0]
    with pytest.raises(e.InputError, match="other records and is never overwritten"):
        pack_beton(cache, data, path, [0], quiet)
    assert path.read_bytes() == before
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(e.InputError, match=r"would take .* and 1 B are free"):
        pack_beton(cache, data, tmp_path / "x.beton", None, quiet)
    assert not list(tmp_path.iterdir())


def test_a_file_made_meanwhile_is_kept(packed, tmp_path, monkeypatch):
    cache, data, _ = packed
    out = tmp_path / "x.beton"
    write = module._Writer.write
    monkeypatch.setattr(module._Writer, "write", lambda self, *a: (write(self, *a), out.write_text("theirs")))
    with pytest.raises(e.InputError, match="made meanwhile"):
        pack_beton(cache, data, out, None, quiet)
    assert out.read_text() == "theirs" and [p.name for p in tmp_path.iterdir()] == ["x.beton"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_pack_that_is_stopped_leaves_no_file(packed, tmp_path, how):
    cache, data, path = packed
    script = f"""
        import time
        from pathlib import Path
        from kdcache.cache.store.cache import Cache
        from kdcache.pipeline.ffcv import beton
        from kdcache.tests.helpers.images import arrays_data
        image = beton._Writer._image
        def slowly(self, i):
            if i == 5:
                print("there", flush=True)
                time.sleep(60)
            return image(self, i)
        beton._Writer._image = slowly
        beton.pack_beton(Cache(Path({str(cache.path)!r})), arrays_data(50, 6, 9), Path("x.beton"))
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while process.stdout.readline() not in (b"there\n", b""):
            pass
        with pytest.raises(e.BusyError, match="another process is packing"):
            pack_beton(cache, data, tmp_path / "x.beton", None, quiet)
        process.send_signal(how)
        _, errors = process.communicate()
    left = [p.name for p in tmp_path.iterdir()]
    if how == signal.SIGINT:
        assert errors.strip().endswith(b"KeyboardInterrupt") and not left
    else:
        assert left == [".x.beton.packing"]
        pack_beton(cache, data, tmp_path / "x.beton", None, quiet)
        assert [p.name for p in tmp_path.iterdir()] == ["x.beton"]
        assert (tmp_path / "x.beton").read_bytes() == path.read_bytes()  # nothing in it but what it is made from


# ---- damage and forgery ----


def test_every_flipped_bit_is_refused_or_harmless(packed, copy):
    whole = everything(packed[2])
    content = copy.read_bytes()
    places = random.Random(0).sample(range(len(content)), 150)
    used = len(content.rstrip(b"\0"))
    # Pages are mostly padding here: every part of the file gets its share.
    table = Beton(copy).table
    inside = [int(table["image"]["pointer"][7]) + 3, int(table["records"][7]) + 5, *range(0, 24), 24, 30, 60, 5300]
    inside += [used - k for k in range(1, 2600, 23)]
    said, harmless = [], 0
    for at in places + inside:
        damaged = bytearray(content)
        damaged[at] ^= 1 << (at % 8)
        copy.write_bytes(damaged)
        try:
            found = everything(copy)
        except (e.CorruptError, e.InputError, e.MismatchError) as problem:
            said.append(str(problem))
        else:
            assert equal(found, whole), at
            harmless += 1
    assert all(str(copy) in line and "\n" not in line for line in said)
    assert len(said) >= len(inside) - 5 and harmless > 50  # CRCs of records are the loader's; padding is nobody's


def test_cut_and_foreign_files_are_refused(packed, tmp_path):
    content = packed[2].read_bytes()
    path = tmp_path / "x.beton"
    rng = random.Random(1)
    tries = [content[: rng.randrange(len(content))] for _ in range(60)] + [
        b"",
        content[:24],
        content[:-1],
        content[:-24],
    ]
    tries += [rng.randbytes(rng.randrange(3000)) for _ in range(40)] + [content + b"\0" * 24]
    for attempt in tries:
        path.write_bytes(attempt)
        with pytest.raises(KdcacheError, match=r"x\.beton"):
            everything(path)
    end = int(np.frombuffer(content[:24], module._HEADER)[0]["allocations"])
    path.write_bytes(content[: end - 8] + b"theirs!\n" + content[end:])
    with pytest.raises(e.InputError, match="not packed by kdcache"):
        Beton(path)
    os.mkfifo(tmp_path / "pipe.beton")
    with pytest.raises(e.InputError, match="not a plain file"):
        Beton(tmp_path / "pipe.beton")
    with pytest.raises(e.NotFoundError, match="there is no file"):
        Beton(tmp_path / "none.beton")


def forge(path, change_table=None, change_notes=None, change_header=None, version=1):
    """Rewrite parts of a file with digests that fit."""
    content = path.read_bytes()
    header = np.frombuffer(content[:24], module._HEADER).copy()
    beton = Beton(path)
    start = 24 + beton.layout.descriptors.nbytes
    end = int(header[0]["allocations"])
    table = np.frombuffer(bytearray(content[start : start + beton.table.nbytes]), beton.layout.table)
    allocations = np.frombuffer(content[end:], module._ALLOCATION).copy().reshape(-1, 2)
    descriptors = beton.layout.descriptors.copy()
    if change_table:
        change_table(table, allocations)
    if change_header:
        change_header(header[0], descriptors)
    head = header.tobytes() + descriptors.tobytes() + table.tobytes()
    notes = json.loads(canonical(beton._notes))
    notes["table"] = hashlib.sha256(head + allocations.tobytes()).hexdigest()
    if change_notes:
        change_notes(notes)
    text = json.dumps(notes, sort_keys=True, separators=(",", ":")).encode()
    notes_at = end - module._TRAILER.size - len(canonical(beton._notes))
    assert notes_at + len(text) + module._TRAILER.size == end, "keep the length"
    trailer = module._TRAILER.pack(hashlib.sha256(text).digest(), len(text), version, b"kdcache\n")
    body = content[start + table.nbytes : notes_at]
    path.write_bytes(head + body + text + trailer + allocations.tobytes())


def _far_image(table, allocations):
    table["image"]["pointer"][3] = allocations["pointer"][3, 0] = 2**63


def _far_records(table, allocations):
    table["records"][3] = allocations["pointer"][3, 1] = 2**64 - 5


def _long_image(table, allocations):
    allocations["size"][0, 0] = 2**63


def _other_size(table, allocations):
    table["image"]["height"][4] = 7
    allocations["size"][4, 0] = 7 * 9 * 3


def _label(table, allocations):
    table["label"][2] = 12


def _order(table, allocations):
    table["index"][[0, 1]] = 1, 0


def _mode(table, allocations):
    table["image"]["mode"][9] = 3


def test_forged_files_with_fitting_digests_are_refused(packed, copy):
    forge(copy)  # changes nothing
    assert copy.read_bytes() == packed[2].read_bytes()
    for change in (_far_image, _far_records, _long_image, _other_size, _label, _order, _mode):
        shutil.copy(packed[2], copy)
        forge(copy, change_table=change)
        with pytest.raises(e.CorruptError, match="table does not fit its identity"):
            Beton(copy)
    for change in (
        lambda h, d: h.__setitem__("page_size", 3 << 20),
        lambda h, d: d[0].__setitem__("name", b"../image"),
        lambda h, d: d[-1].__setitem__("arguments", np.void(b"\xff" * 1024)),
    ):
        shutil.copy(packed[2], copy)
        forge(copy, change_header=change)
        with pytest.raises(e.CorruptError, match="table does not fit its identity"):
            Beton(copy)
    for change, problem in (
        (lambda n: n["identity"]["data"].update(samples=51), "header does not fit its identity"),
        (lambda n: n["views"][0].update(view=1), "table does not fit"),
        (lambda n: n["evaluation"].update(offset=9 * 10 ** (len(str(n["evaluation"]["offset"])) - 1)), "evaluation"),
    ):
        shutil.copy(packed[2], copy)
        forge(copy, change_notes=change)
        with pytest.raises(e.CorruptError, match=problem):
            everything(copy)
    shutil.copy(packed[2], copy)
    forge(copy, version=2)
    with pytest.raises(e.MismatchError, match="has version 2, this kdcache reads up to 1: update kdcache"):
        Beton(copy)


def test_other_view_parameters_are_refused(packed, monkeypatch):
    beton = Beton(packed[2])
    monkeypatch.setattr(module, "draw", lambda policy, seed, view, *rest: draw(policy, seed, view + 1, *rest))
    with pytest.raises(e.MismatchError, match=r"view 0 of .* other view parameters than this kdcache draws"):
        beton.parameters(0)


# ---- training from it ----


def test_without_ffcv_one_line_says_what_to_install(packed, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "kdcache.train.loaders.ffcv_decoders", raising=False)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(
        e.UnservedError, match=r"^training from a \.beton needs FFCV .*apt-get install .*pip install ffcv=="
    ):
        BetonLoader(Beton(packed[2]), 8)


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
        assert images.equal(data.pixels[rows]) and labels.flatten().tolist() == Beton(path).labels[rows, 0].tolist()
        assert index.flatten().tolist() == list(range(at, at + len(images)))
        assert records.shape[1:] == (2, Beton(path).layout.record_bytes + 4)
        at += len(images)
    assert at == 50


def assert_same_epochs(cache, data, path, batch, epochs=3, world=1, **options):
    for rank in range(world):
        ours = BetonLoader(Beton(path), batch, rank, world, workers=2, **options)
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
    ],
)
def test_batches_are_those_of_the_cache(tmp_path, policy, size, labelled, record):
    data = arrays_data(90, *size, labelled=labelled)
    cache = Drawn(tmp_path / "c", data, policy, views=3, part=32, **record).cache
    path = pack_beton(cache, data, tmp_path / "x.beton", None, quiet)
    assert_same_epochs(cache, data, path, 16, epochs=4, seed=5)


@needs_ffcv
def test_ranks_share_each_batch(packed):
    assert_same_epochs(*packed, 7, epochs=2, world=2, views=1)


@needs_ffcv
def test_what_ffcv_cannot_render_is_refused(packed, tmp_path):
    beton = Beton(packed[2])
    with pytest.raises(e.InputError, match="raw pixels of 6x9, which are cut and never resized"):
        BetonLoader(beton, 8, image_size=16)
    with pytest.raises(e.NotFoundError, match="has 2 views, not 3"):
        BetonLoader(beton, 8, views=3)
    with pytest.raises(e.InputError, match="a batch of 60 does not fit"):
        BetonLoader(beton, 60)
    data = arrays_data(20, 8, 8)
    cache = Drawn(tmp_path / "c", data, "rrc,flip").cache
    with pytest.raises(e.InputError, match=r"never resized: train from the cache itself for rrc,flip at 8x8"):
        BetonLoader(Beton(pack_beton(cache, data, tmp_path / "x.beton", None, quiet)), 8)


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
    loader = BetonLoader(Beton(packed[2]), 5)
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
def test_damage_while_the_file_is_open(packed, copy):
    loader = BetonLoader(Beton(copy), 10)
    table = loader.beton.table
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
        loader.beton.read(0)
    os.truncate(copy, copy.stat().st_size - 1)
    with pytest.raises(e.CorruptError, match="has changed while it was open"):
        list(loader.steps())
    assert not ffcv_threads()
    copy.unlink()
    with pytest.raises(e.CorruptError, match="cannot be read any more"):
        list(loader.steps())


@needs_ffcv
def test_a_view_that_could_not_be_drawn_is_drawn_again(packed, monkeypatch):
    loader = BetonLoader(Beton(packed[2]), 2)
    with monkeypatch.context() as patch:
        patch.setattr(Beton, "parameters", lambda *_: {}["no"])
        with pytest.raises(KeyError):
            next(loader.steps())
    assert len(list(loader.steps())) == len(loader)


@needs_ffcv
def test_it_goes_on_to_the_next_epoch_by_itself(packed):
    own, told = BetonLoader(Beton(packed[2]), 10), BetonLoader(Beton(packed[2]), 10)
    for epoch in range(3):
        told.set_epoch(epoch)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(own.steps(), told.steps(), strict=True))
        assert own.epoch == epoch and own.view == told.view == own.beton.views[epoch % len(own.beton.views)]
    own.sampler.set_epoch(0)
    told.set_epoch(0)
    assert torch.equal(next(own.steps())[0], next(told.steps())[0])


@needs_ffcv
def test_no_thread_outlives_its_epoch(packed):
    loader = BetonLoader(Beton(packed[2]), 2)
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
        from kdcache.pipeline.ffcv.beton import Beton
        from kdcache.train.loaders.ffcv import BetonLoader
        steps = BetonLoader(Beton({str(packed[2])!r}), 2).steps()
        next(steps)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# ---- image files ----


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A cache of image files of four kinds, and the file packed from it."""
    place = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for i in range(24):
        height, width = (int(v) for v in rng.integers(30, 60, 2))
        pixels = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height), Image.BICUBIC)
        folder = place / "images" / ("train" if i < 16 else "val") / "abcd"[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        kind = i // 4 % 4
        image = pixels.convert(["RGB", "L", "CMYK", "RGB"][kind])
        image.save(folder / f"{i:02d}.{'png' if kind == 3 else 'jpg'}")
    data = open_data(f"imagefolder:{place / 'images'}", "train", home=place)
    assert data.pixels is None
    cache = Drawn(place / "c", data, "rrc,flip", k=3).cache
    return cache, data, pack_beton(cache, data, place / "x.beton", None, quiet)


def test_jpeg_is_stored_as_it_is(files):
    _, data, path = files
    beton = Beton(path)
    for i in range(len(data)):
        file, row = data.root / data.paths[i], beton.table["image"][i]
        assert beton.image(i).equal(data.decode(i))
        as_it_is = int(file.stem) // 4 % 4 < 2
        assert row["mode"] == (module.JPEG if as_it_is else module.RAW)
        if as_it_is:
            at = int(row["pointer"])
            assert beton.content[at : at + beton.image_bytes[i]].tobytes() == file.read_bytes()


@needs_ffcv
def test_ffcvs_rendering_of_files_must_be_allowed_and_is_measured(files, tmp_path):
    cache, data, path = files
    beton = Beton(shutil.copy(path, tmp_path / "copy.beton"))
    assert (beton.raw, beton.renderer) == (False, "ffcv-area-1")
    with pytest.raises(e.MismatchError, match=r"renders by ffcv-area-1 and .* torch-uint8-1: give --allow-renderer"):
        BetonLoader(beton, 8)
    ours = BetonLoader(beton, 8, image_size=20, allow_renderer=True, seed=2)
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
    assert beton.table["image"]["mode"][0] == module.JPEG
    with beton.path.open("r+b") as f:
        f.seek(int(beton.table["image"]["pointer"][0]))
        f.write(bytes(40))
    with pytest.raises(e.CorruptError, match="the image of sample 0 is damaged"):
        list(ours.steps())
    crop = Drawn(tmp_path / "c", data, "crop,flip").cache
    with pytest.raises(e.InputError, match="reach beyond the image's edge"):
        BetonLoader(Beton(pack_beton(crop, data, tmp_path / "x.beton", None, quiet)), 8, allow_renderer=True)


def test_a_file_that_has_gone_is_named(files, tmp_path):
    cache, data, _ = files
    other = tmp_path / "images"
    shutil.copytree(data.root, other)
    (other / data.paths[5]).unlink()
    moved = replace(data, root=other)
    moved._fingerprints[False] = data.fingerprint()
    with pytest.raises(e.InputError, match=f"{data.paths[5]} cannot be read"):
        pack_beton(cache, moved, tmp_path / "x.beton", None, quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


# ---- the command line ----


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
    evaluated = json.loads(run("eval", "run-c.beton", "--json").output)
    assert evaluated["top1"] == metrics["c"][evaluated_epoch(metrics["c"])]["top1"]
    assert "give the cache that it was packed from" in run("info", "c.beton", status=2).output
    assert "give the cache itself" in run(*common, "--cache", "c.beton", "--online", status=2).output
    Path("c.beton").write_bytes(b"nothing")
    assert run(*common, "--cache", "c.beton", status=2).output.startswith("Error: c.beton is not an FFCV file")


def evaluated_epoch(lines):
    return max(range(len(lines)), key=lambda i: (lines[i]["top1"], i))
