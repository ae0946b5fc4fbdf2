"""What a build starts from: class maps, and teachers and settings that are refused before anything is built."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdcache.cache import Cache, KdcacheError
from kdcache.cache import errors as e
from kdcache.cache.store import chunks
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.source import open_source
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.data.defaults import defaults_for
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers.building import (
    BATCH,
    content,
    quiet,
    settings,
)

pytestmark = pytest.mark.usefixtures("home")


def test_another_class_map_is_another_cache(tmp_path, reference, source):
    mapping = tmp_path / "map.csv"
    mapping.write_text("".join(f"{a},{(i + 1) % 12}\n" for i, a in enumerate("abcdefghijkl")))
    other = open_source(settings(class_map=str(mapping)), quiet)
    assert other.identity.key != source.identity.key
    before = content(reference)
    with pytest.raises(e.MismatchError, match="class_map: the cache has None, asked for"):
        build(settings(class_map=str(mapping), out=str(reference)), quiet, other)
    assert content(reference) == before
    (problem,) = verify(Cache(reference), other).problems
    assert "class_map: the cache has None" in problem
    mapping.write_text("".join(f"{a},{i}\n" for i, a in enumerate("abcdefghijkl")))
    assert open_source(settings(class_map=str(mapping)), quiet).identity == source.identity


def test_one_class_of_several_has_the_sum_of_their_probabilities(tmp_path, source):
    """Two of the toy's twelve classes to one class of the data each, and the rest left out."""
    import kd_toy

    mapping = tmp_path / "map.json"
    groups = [[i, (5 * i + 3) % 24 + 12] for i in range(12)]
    mapping.write_text(json.dumps(dict(zip("abcdefghijkl", groups, strict=True))))
    config = settings(teacher="kd_toy:forty", class_map=str(mapping), topk=None, precision="float32", views=1)
    said = []
    merging = open_source(config, said.append)
    assert any("makes one class of several of the teacher's, so students have the data's 12" in line for line in said)
    build(replace(config, out=str(tmp_path / "c")), quiet, merging)
    cache = Cache(tmp_path / "c")
    assert cache.identity.record.classes == 12 and cache.identity.class_map not in (None, source.identity.class_map)
    assert (cache.train.labels == source.train.labels).all()
    assert verify(cache, open_source(config, quiet)).passed
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (source.train.mean, source.train.std))
    images = source.evaluation.pixels.permute(0, 3, 1, 2)
    with torch.inference_mode():
        p = kd_toy.forty().eval()((images - mean) / std).double().exp()
    sums = torch.stack([p[:, group].sum(1) for group in groups], 1)
    want = sums / sums.sum(1, keepdim=True)
    np.testing.assert_allclose(cache.read_evaluation().dense(1.0), want, rtol=1e-4, atol=1e-7)
    compiled = torch.compile(merging.teacher.model, backend="eager")
    with torch.inference_mode():
        assert compiled(images[:BATCH]).equal(merging.teacher.logits(images[:BATCH]))


def test_two_classes_of_the_data_may_be_one_of_the_teachers_where_a_file_says_so(tmp_path):
    mapping = tmp_path / "map.csv"
    mapping.write_text("".join(f"{a},{i % 11}\n" for i, a in enumerate("abcdefghijkl")))
    said = []
    config = settings(class_map=str(mapping), views=1, out=str(tmp_path / "c"))
    source = open_source(config, said.append)
    assert any("'a' and 'l' are one class of the teacher's" in line for line in said)
    build(config, quiet, source)
    assert (Cache(tmp_path / "c").train.labels == source.train.labels % 11).all()
    assert verify(Cache(tmp_path / "c"), source).passed


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("probabilities", "answers with probabilities"),
        ("constant", "answers alike to all of 128 training images"),
        ("careless", r"answers the same image differently each time, as in training mode \(network\.8\)"),
        ("huge", "records hold 65,504"),
        ("net", r"among 12 classes the teacher is right on .*chance is 7\.8%"),
    ],
)
def test_a_teacher_that_is_not_what_it_seems_is_refused(tmp_path, toy, teacher, message):
    config = settings(teacher=f"kd_toy:{teacher}", allow_low_accuracy=False, out=str(tmp_path / "c"))
    with pytest.raises(e.InputError, match=message) as caught:
        build(config, quiet)
    assert "\n" not in str(caught.value) and not (tmp_path / "c").exists()


def test_a_teacher_whose_classes_change_places_is_refused_and_named(taught, tmp_path):
    source, *_ = taught
    said, config = [], settings(weights=str(taught[2].parent / "4.pt"), allow_low_accuracy=False, views=1)
    build(replace(config, out=str(tmp_path / "good")), said.append, source)
    rolled = {name: value.clone() for name, value in source.teacher.model.network.state_dict().items()}
    for name in ("8.weight", "8.bias"):
        rolled[name][:4] = rolled[name][:4].roll(1, 0)
    torch.save(rolled, tmp_path / "rolled.pt")
    config = replace(config, weights=str(tmp_path / "rolled.pt"), out=str(tmp_path / "c"))
    with pytest.raises(e.InputError, match=r"images of [abcd] are answered as [abcd], .*--class-map FILE") as caught:
        build(config, quiet)
    shown = str(caught.value).split(": ")[1].split(" (")[0].split(", ")
    assert sorted(shown) == [f"images of {a} are answered as {b}" for a, b in ("ab", "bc", "cd", "da")]
    assert build(replace(config, allow_low_accuracy=True), quiet).teacher_images == 190


def test_a_record_too_large_for_a_shard_is_refused_before_the_teacher_works(source, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 300)
    with pytest.raises(e.InputError, match=r"a shard would hold 384 B .*4 classes a record are too many, lower --topk"):
        open_source(settings(precision="float16"), quiet)


def test_uint8_is_refused_below_temperature_one():
    with pytest.raises(
        KdcacheError, match=r"temperature 0.5 asks for finer gaps than uint8 has: give --precision float16"
    ):
        open_source(settings(temperatures=(0.5, 1.0)), quiet)
    open_source(settings(temperatures=(0.5, 1.0), precision="float16"), quiet)


@pytest.mark.parametrize(
    ("kind", "device", "size", "samples", "batch"),
    [
        ("files", "cpu", 224, 10**6, 8),
        ("files", "cpu", 129, 10**6, 8),
        ("files", "cpu", 128, 10**6, 32),
        ("files", "cpu", 32, 10**6, 128),
        ("files", "cuda", 224, 10**6, 128),
        ("files", "cpu", 224, 5, 5),
        ("images", "cpu", 32, 10**6, 256),
        ("images", "cpu", 64, 10**6, 32),
        ("images", "cuda", 64, 10**6, 256),
        ("images", "cuda", 32, 40, 40),
    ],
)
def test_the_batch_of_a_build_goes_by_device_and_input_size(source, photos, kind, device, size, samples, batch):
    data = source.train if kind == "images" else open_data(f"imagefolder:{photos}", "train")
    assert defaults_for(data).batch_for(device, size, samples) == batch
