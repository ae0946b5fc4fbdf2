"""Pixels are the same wherever and however they are rendered."""

import gc
import weakref
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as tv

from kdcache.cache import KdcacheError
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.data.kinds.arrays import ArrayDataset
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.views.operations.kinds.mix import mixed
from kdcache.pipeline.views.operations.operation import of_rows
from kdcache.pipeline.views.parameters import ViewParameters, draw, evaluation_view
from kdcache.pipeline.views.policy import parse_policy
from kdcache.pipeline.views.render import Renderer, render
from kdcache.pipeline.views.table import Table
from kdcache.pipeline.views.workers import _unless_left
from kdcache.train.evaluation.metrics import predict

CPU = torch.device("cpu")


def image(seed, height, width):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(-70, 50), st.integers(-70, 50), st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_cutting_is_by_pixel_and_outside_is_black(top, left, height, width, flip):
    source = image(0, 30, 40)
    want = np.zeros((3, height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            if 0 <= top + y < 30 and 0 <= left + x < 40:
                want[:, y, x] = source[:, top + y, left + x]
    if flip:
        want = want[:, :, ::-1]
    got = render(source, (top, left, height, width), flip, (height, width))
    assert np.array_equal(got.numpy(), want)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 120), st.integers(1, 90), st.integers(1, 100), st.booleans(), st.booleans())
def test_resizing_is_torchvisions_antialiased_bilinear_on_uint8(height, width, side, flip, as_decoded):
    source = image(1, 120, 90)
    if as_decoded:  # colour by colour in memory, as images come from files
        source = source.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    top, left = (120 - height) // 2, 90 - width
    got = render(source, (top, left, height, width), flip, (side, side))
    want = tv.resized_crop(source.contiguous(), top, left, height, width, [side, side], antialias=True)
    assert torch.equal(got, want.flip(2) if flip else want)


@pytest.mark.parametrize("policy", ["none", "flip", "crop", "crop,flip"])
def test_batched_crops_in_memory_equal_single_ones(policy):
    data = open_data("digits", "train")
    parameters = draw(policy, 1, 4, range(len(data)), data.sizes)
    index = np.array([5, 0, 1000, 5, 77])
    got = next(iter(Renderer(data, None, CPU, policy).batches(parameters, [index])))
    assert got.dtype == torch.uint8 and got.is_contiguous(memory_format=torch.channels_last)
    for pixels, i in zip(got, index, strict=True):
        want = render(data.decode(int(i)), parameters.boxes[i], bool(parameters.flips[i]), (8, 8))
        assert torch.equal(pixels, want)


@pytest.mark.parametrize("size", [5, 8, 16, 40])
@pytest.mark.parametrize("policy", ["none", "flip", "crop", "rrc,flip"])
def test_in_memory_images_can_be_resized_too(policy, size):
    data = open_data("digits", "train")
    parameters = draw(policy, 1, 4, range(len(data)), data.sizes)
    batches = [np.array([3, 3, 1200]), np.arange(100, 150)]
    renderer = Renderer(data, size, CPU, policy, workers=2 if size == 16 else 0)
    for batch, got in zip(batches, renderer.batches(parameters, batches), strict=True):
        assert got.dtype == torch.uint8 and got.is_contiguous(memory_format=torch.channels_last)
        for pixels, i in zip(got, batch, strict=True):
            want = render(data.decode(int(i)), parameters.boxes[i], bool(parameters.flips[i]), (size, size))
            assert torch.equal(pixels, want)


def test_whole_images_in_memory_are_resized_together(monkeypatch):
    data = open_data("digits", "train")
    monkeypatch.setattr(ArrayDataset, "decode", None)
    whole = evaluation_view(data.sizes, whole=True)
    assert [len(images) for images in Renderer(data, 20, CPU).batches(whole, [np.arange(9)])] == [9]


def test_renderers_hold_the_pixels_of_a_dataset_once():
    data = open_data("digits", "train")
    assert data.pixels is not None
    one, two, bare = (Renderer(data, None, CPU, policy) for policy in ("crop", "crop,flip", "none"))
    assert one._pixels is two._pixels and one._pixels is not bare._pixels
    assert bare._pixels._flat.data_ptr() == data.pixels.data_ptr()
    assert Renderer(data, 16, CPU, "crop")._pixels is None
    held = weakref.ref(one._pixels)
    del one, two
    gc.collect()
    assert held() is None


def test_worker_processes_end_with_close_and_evaluation_closes(folder, tmp_path):
    data = open_data(f"imagefolder:{folder}", "train", home=tmp_path)
    renderer = Renderer(data, 32, CPU, workers=2)
    before, batches = set(active_children()), [np.arange(18)]
    for _ in range(2):
        list(renderer.batches(evaluation_view(data.sizes, whole=False), batches))
        assert len(kept := set(active_children()) - before) == 1
        assert renderer.close() is None and not any(process.is_alive() for process in kept)
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), (0.5,) * 3, (0.5,) * 3)
    assert predict(model, data, renderer).shape == (18, 2) and set(active_children()) == before


@pytest.fixture
def folder(tmp_path):
    for i in range(24):
        path = tmp_path / "images" / ("train" if i < 18 else "val") / f"c{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image(i, 70 + 3 * i, 110 - 2 * i).permute(1, 2, 0).numpy()).save(path)
    return tmp_path / "images"


def test_workers_of_a_call_that_is_given_up_end_at_once(folder, tmp_path):
    """Not seconds later, when Python collects cycles and torch waits in vain for each of them."""
    data, batches = open_data(f"imagefolder:{folder}", "train", home=tmp_path), [np.arange(i, i + 2) for i in range(16)]
    before, renderer = set(active_children()), Renderer(data, 32, CPU, workers=2)
    gc.disable()
    try:
        rendered = renderer.batches(evaluation_view(data.sizes, whole=False), batches)
        next(rendered)
        assert len(set(active_children()) - before) == 2
        rendered.close()
        assert set(active_children()) == before
    finally:
        gc.enable()
    assert len(list(renderer.batches(evaluation_view(data.sizes, whole=False), batches))) == 16


def test_files_render_alike_with_any_number_of_workers_and_threads(folder, tmp_path):
    data = open_data(f"imagefolder:{folder}", "train", home=tmp_path)
    parameters = draw("rrc,flip", 0, 1, range(len(data)), data.sizes)
    batches = [np.arange(i, i + 6) for i in (0, 6, 12)]
    threads = torch.get_num_threads()
    rendered = []
    for workers, count in ((0, 1), (0, 2), (1, 1), (2, 2)):
        torch.set_num_threads(count)
        rendered.append(torch.cat(list(Renderer(data, 48, CPU, workers=workers).batches(parameters, batches))))
    torch.set_num_threads(threads)
    for i in range(18):
        want = render(data.decode(i), parameters.boxes[i], bool(parameters.flips[i]), (48, 48))
        assert torch.equal(rendered[0][i], want)
    for other in rendered[1:]:
        assert torch.equal(rendered[0], other)


STRONG = "rrc,flip,randaugment(2,9),erase(0.5),mixup(0.8),cutmix(1)"


@pytest.mark.parametrize("workers", [0, 2])
def test_files_in_strong_and_mixed_views_are_what_their_steps_give_one_by_one(folder, tmp_path, workers):
    data, policy = open_data(f"imagefolder:{folder}", "train", home=tmp_path), parse_policy(STRONG)
    drawn = [draw(policy, 3, view, range(len(data)), data.sizes) for view in (4, 5)]
    batches = [np.array([3, 17, 4, 3]), np.arange(7)]
    renderer = Renderer(data, 40, CPU, STRONG, workers)
    cut = list(renderer.views(drawn, [(batch, (0, 1)) for batch in batches]))
    assert [(number, place) for number, place, _ in cut] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for number, place, got in cut:
        assert torch.equal(got, next(iter(renderer.batches(drawn[place], [batches[number]]))))
        assert torch.equal(got, one_by_one(data, policy, drawn[place], batches[number]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("policy", ["rrc,flip", STRONG])
def test_crops_of_several_views_are_those_of_each_view_and_a_file_is_decoded_once(
    folder, tmp_path, monkeypatch, policy, workers
):
    data = open_data(f"imagefolder:{folder}", "train", home=tmp_path)
    tables = [Table(draw(policy, 3, view, range(len(data)), data.sizes), 0) for view in (4, 5, 6)]
    mixing = draw(policy, 3, 4, range(len(data)), data.sizes).mixing
    theirs = np.arange(18)[::-1] if mixing is None else mixing.partners
    batches = [np.unique([some, theirs[some]])[::-1] for some in (np.array([3, 9, 16]), np.array([0]))]
    renderer = Renderer(data, 40, CPU, policy, workers)
    want = [list(renderer.batches(table, batches)) for table in tables]
    decode, decoded = type(data).decode, []
    monkeypatch.setattr(type(data), "decode", lambda self, i: decoded.append(i) or decode(self, i))
    for number, got in enumerate(renderer.crops(tables, batches)):
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got, torch.stack([of[number] for of in want], 1).flatten(0, 1))
    assert sorted(decoded) == ([] if workers else sorted(np.concatenate(batches).tolist()))


@pytest.mark.parametrize("size", [None, 12])
@pytest.mark.parametrize("policy", ["none", "crop,flip", "rrc,flip,mixup(0.8)"])
def test_crops_of_images_in_memory_are_those_of_each_view(policy, size):
    data = open_data("digits", "train")
    drawn = [draw(policy, 3, view, range(len(data)), data.sizes) for view in (0, 1)]
    first = np.array([5, 77, 1000])
    batch = first if drawn[0].mixing is None else np.concatenate([first, drawn[0].mixing.partners[first]])
    renderer = Renderer(data, size, CPU, policy, workers=0)
    (got,) = renderer.crops([Table(of, 0) for of in drawn], [batch])
    want = [next(renderer.batches(of, [batch])) for of in drawn]
    assert torch.equal(got, torch.stack(want, 1).flatten(0, 1))


def one_by_one(data, policy, parameters, batch):
    def single(i):
        pixels = render(data.decode(i), parameters.boxes[i], bool(parameters.flips[i]), (40, 40))
        return policy.apply(pixels[None].clone(), parameters.drawn, np.array([i]))

    def pair(i):
        drawn = of_rows(parameters.mixing.drawn, slice(i, i + 1))
        return mixed(single(i), single(int(parameters.mixing.partners[i])), drawn)

    return torch.cat([pair(int(i)) for i in batch])


@pytest.mark.parametrize("total", [12, 13])
def test_a_batch_needs_the_partners_that_it_lacks_once(total):
    sizes = np.full((total, 2), 32, np.int32)
    parameters = draw("flip,mixup(0.8)", 0, 0, range(total), sizes)
    theirs, table = parameters.mixing.partners, Table(parameters, 0)
    for batch in (np.arange(total), np.array([5, 2, 5, 9]), np.array([0, theirs[0]]), np.array([1])):
        at = table.batch(batch)
        assert np.array_equal(at.rows[: len(batch)], batch)
        assert np.array_equal(table.samples[at.rows][at.partners], theirs[batch])
        lacking = at.rows[len(batch) :]
        assert len(np.unique(lacking)) == len(lacking) and not np.isin(lacking, batch).any()


def test_parameters_may_begin_at_a_later_sample(folder, tmp_path):
    data = open_data(f"imagefolder:{folder}", "train", home=tmp_path)
    parameters = draw("rrc,flip", 0, 1, range(len(data)), data.sizes)
    renderer = Renderer(data, 32, CPU, workers=0)
    whole = next(iter(renderer.batches(parameters, [np.arange(6, 12)])))
    later = ViewParameters(parameters.boxes[6:], parameters.flips[6:])
    assert torch.equal(next(iter(renderer.batches(later, [np.arange(6, 12)], first=6))), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_damaged_after_opening_is_named_in_one_line(folder, tmp_path, workers):
    data = open_data(f"imagefolder:{folder}", "train", home=tmp_path)
    broken = data.root / data.paths[7]
    broken.write_bytes(broken.read_bytes()[:60])
    parameters = draw("rrc", 0, 0, range(len(data)), data.sizes)
    with pytest.raises(KdcacheError) as caught:
        list(Renderer(data, 32, CPU, workers=workers).batches(parameters, [np.arange(18)]))
    assert broken.name in str(caught.value) and "\n" not in str(caught.value)


def test_files_need_a_size(folder, tmp_path):
    with pytest.raises(KdcacheError, match="input size"):
        Renderer(open_data(f"imagefolder:{folder}", "train", home=tmp_path), None, CPU)


def test_a_worker_says_nothing_of_a_parent_that_has_left_and_tells_other_errors(capsys):
    for error in (ConnectionResetError("gone"), EOFError()):
        _unless_left(type(error), error, None)
    assert not capsys.readouterr().err
    _unless_left(ValueError, ValueError("of its own"), None)
    assert "ValueError: of its own" in capsys.readouterr().err
