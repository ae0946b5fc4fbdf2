"""The same image files make the same FFCV file, whatever they lie in."""

import io
import os
from functools import partial

import numpy as np
import pytest
from PIL import Image

from kdcache.cache.errors import InputError, UnreadableError
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.ffcv.format import HEADER, JPEG, RAW
from kdcache.pipeline.ffcv.headers import read_headers
from kdcache.pipeline.ffcv.pack import pack_ffcv
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.tests.helpers import containers
from kdcache.tests.helpers.containers import Sample
from kdcache.tests.helpers.ffcv import Drawn, quiet

OF_FILES = {
    "csv": containers.write_csv,
    "tars": containers.write_tars,
    "hf": containers.write_hf,
    "bytes": partial(containers.write_module, function="contents"),
    "paths": partial(containers.write_module, function="paths"),
}
OF_PIXELS = {
    "PIL images": partial(containers.write_module, function="images"),
    "tensors": partial(containers.write_module, function="tensors"),
}


def encoded(image, **how):
    file = io.BytesIO()
    image.save(file, **how)
    return file.getvalue()


def samples():
    """Images as JPEG and PNG files; one JPEG is grey, one is CMYK, and one has its size 130 KB behind its start."""
    found = containers.pictures(train=9, val=3)
    image = Image.open(io.BytesIO(found[0].content)).resize((70, 66))
    more = {
        "x.jpg": encoded(image.convert("L"), format="JPEG"),
        "y.jpg": encoded(image.convert("CMYK"), format="JPEG"),
        "z.jpg": encoded(image, format="JPEG"),
    }
    segment = b"\xff\xee\xff\xff" + bytes(0xFFFD)  # as long as a segment can be
    more["z.jpg"] = more["z.jpg"][:2] + segment * 2 + more["z.jpg"][2:]
    added = [Sample("train", "roof", name, content) for name, content in more.items()]
    return sorted([*found, *added], key=lambda sample: sample.path.encode())


def pack(spec, place):
    """The data's train split, and the file packed from it with a cache of the same random records each time."""
    place.mkdir()
    data = open_data(spec, "train", home=place)
    assert data.pixels is None
    cache = Drawn(place / "c", data, "rrc,flip", k=1, classes=2).cache
    return data, FFCVFile(pack_ffcv(cache, data, place / "x.beton", None, quiet))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("folder")
    return pack(containers.write_folder(place / "images", samples()), place / "packed")


@pytest.mark.parametrize("kind", OF_FILES)
def test_every_container_of_files_packs_the_same_bytes(kind, folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    data, file = pack(OF_FILES[kind](tmp_path, samples()), tmp_path / "packed")
    _, other = folder
    names = [sample.name for sample in samples() if sample.split == "train"]
    as_they_are = [name.endswith(".jpg") and name != "y.jpg" for name in names]
    assert file.table["image"]["mode"].tolist() == [JPEG if kept else RAW for kept in as_they_are]
    # The pages and the blocks behind them; then come the notes, whose identity tells the data apart.
    mine, others = (read_headers(one.path).notes for one in (file, other))
    end = max(block.offset + block.size for block in (others.evaluation, others.prior) if block)
    assert np.array_equal(file.content[HEADER.itemsize : end], other.content[HEADER.itemsize : end])
    assert mine.model_copy(update={"identity": other.identity, "table": others.table}) == others
    assert file.identity.model_copy(update={"data": other.identity.data}) == other.identity
    header, theirs = (one.content[: HEADER.itemsize].view(HEADER).copy() for one in (file, other))
    regions = [one.content[int(head["allocations"][0]) :] for one, head in ((file, header), (other, theirs))]
    assert np.array_equal(*regions)
    header["allocations"] = theirs["allocations"]
    assert header == theirs
    assert all(file.image(i).equal(data.decode(i)) for i in range(len(data)))


@pytest.mark.parametrize("kind", OF_PIXELS)
def test_images_that_are_pixels_are_packed_as_pixels(kind, folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    rgb = [sample for sample in samples() if sample.name not in ("x.jpg", "y.jpg")]  # the module's tensors are RGB
    data, file = pack(OF_PIXELS[kind](tmp_path, rgb), tmp_path / "packed")
    assert set(file.table["image"]["mode"].tolist()) == {RAW}
    assert all(file.image(i).equal(data.decode(i)) for i in range(len(data)))


class OnlyInWorkers:
    """Bytes of JPEG files, as a Dataset that opens its file at the first sample, which must be in a worker process."""

    classes = ("bloom", "roof")
    parent = os.getpid()

    def __init__(self, change=None):
        self.rows = [sample for sample in samples() if sample.split == "train"]
        self.change = change

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        assert os.getpid() != self.parent, "read in the main process"
        if self.change and i == 7:
            self.change()
        return self.rows[i].content, self.rows[i].id


def own(dataset, place, monkeypatch):
    """A cache of a Dataset's samples, and these as kdcache opens them."""
    monkeypatch.setattr(containers, "own", lambda split: dataset, raising=False)
    data = open_data("kdcache.tests.helpers.containers:own", "train", home=place)
    return Drawn(place / "c", data, "rrc,flip", k=1, classes=2).cache, data


def test_only_worker_processes_read_a_dataset(tmp_path, monkeypatch):
    cache, data = own(OnlyInWorkers(), tmp_path, monkeypatch)
    file = FFCVFile(pack_ffcv(cache, data, tmp_path / "x.beton", None, quiet))
    assert file.table["image"]["mode"].tolist().count(RAW) == 4  # three PNG files, and one of CMYK


def test_a_sample_that_cannot_be_read_or_kills_its_worker_is_named(tmp_path, monkeypatch):
    dataset = OnlyInWorkers()
    cache, data = own(dataset, tmp_path, monkeypatch)

    def fail():
        raise ValueError("its file is gone")

    for change, error, message in (
        (fail, InputError, r"sample 7 of .*own: ValueError: its file is gone"),
        (lambda: os._exit(1), UnreadableError, r"sample 7 of .*own: the worker process that read it was killed"),
    ):
        dataset.change = change
        with pytest.raises(error, match=message):
            pack_ffcv(cache, data, tmp_path / "x.beton", None, quiet)
    assert not list(tmp_path.glob("*.beton*"))
