"""What every operation on pixels must do. A new operation gets a subclass with its digests."""

import dataclasses
import hashlib
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from kdcache.pipeline.views.operations.operation import Operation

COUNT = 64


def words_of(operation, n=COUNT, seed=0):
    """The random words of n samples in one view."""
    philox = np.random.Philox(key=np.array([seed, operation.stream], np.uint64))
    return philox.random_raw(n * operation.words).reshape(n, operation.words)


def pictures(n=COUNT, height=13, width=17, seed=0):
    """Images uint8 [n, 3, height, width]: one half noise, the other half slopes of few colours as photographs have."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (n, 3, height, width))
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)
    corners = rng.integers(0, 256, (4, n, 3, 1, 1))
    top, bottom = (corners[i] * (1 - x) + corners[i + 1] * x for i in (0, 2))
    slopes = np.rint(top * (1 - y) + bottom * y)
    return torch.from_numpy(np.where(np.arange(n)[:, None, None, None] % 2, slopes, noise).astype(np.uint8))


def digest(arrays):
    h = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        h.update(f"{name} {array.dtype.str} {array.shape}\0".encode())
        h.update(np.ascontiguousarray(array).tobytes())
    return h.hexdigest()[:16]


def fakes_cuda():
    """Whether torch lets tensors without values be on a GPU that is not there; torch 2.6 does not."""
    try:
        with FakeTensorMode():
            return torch.zeros(1).to("cuda").is_cuda
    except RuntimeError:
        return False


class OperationContract:
    """operation: one with arguments of which all take effect.

    drawn_digest, pixels_digest: of what is drawn from fixed words, and of what fixed images become. size: of these
    images. apart: by how many levels, on average, an image may differ from itself if it is halved before the operation
    instead of after.
    """

    operation: Operation
    drawn_digest: str
    pixels_digest: str
    size = (13, 17)
    apart = 1.0

    def drawn(self, n=COUNT):
        return self.operation.draw(words_of(self.operation, n))

    def applied(self, images, drawn):
        """What the images become; they themselves stay as they are."""
        return self.operation.apply(images.clone(), drawn)

    def pictures(self):
        return pictures(COUNT, *self.size)

    def alone(self, images, drawn, i):
        return self.applied(images[i : i + 1], {name: array[i : i + 1] for name, array in drawn.items()})

    def test_it_is_a_frozen_dataclass_whose_arguments_have_bounds(self):
        assert self.operation.stage in ("geometry", "colour", "erase") and self.operation.stream > 1
        for argument in dataclasses.fields(self.operation):
            least, most = (argument.metadata[bound] for bound in ("least", "most"))
            assert least <= argument.default <= most and least <= getattr(self.operation, argument.name) <= most
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(self.operation, argument.name, least)

    def test_what_is_drawn_never_changes(self):
        assert digest(self.drawn()) == self.drawn_digest

    def test_what_images_become_never_changes(self):
        assert (
            digest({"images": self.applied(self.pictures(), self.drawn()).contiguous().numpy()}) == self.pixels_digest
        )

    def test_only_integers_are_drawn_and_each_row_from_its_own_words(self):
        words = words_of(self.operation)
        whole = self.operation.draw(words)
        order = np.random.default_rng(1).permutation(COUNT)[:20]
        part = self.operation.draw(words[order])
        assert whole.keys() == part.keys() and whole
        for name, array in whole.items():
            assert array.dtype.kind in "iu" and len(array) == COUNT and array.dtype == part[name].dtype, name
            assert np.array_equal(part[name], array[order]), name
        none = self.operation.draw(words[:0])
        assert {name: (array.dtype, array.shape[1:]) for name, array in none.items()} == {
            name: (array.dtype, array.shape[1:]) for name, array in whole.items()
        }

    def test_it_is_pure_and_leaves_other_random_numbers_alone(self):
        words, images = words_of(self.operation), self.pictures()
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        results = []
        for _ in range(2):
            drawn = self.operation.draw(words)
            for array in drawn.values():
                array.flags.writeable = False
            results.append(self.applied(images, drawn))
        assert torch.equal(*results) and np.array_equal(words, words_of(self.operation))
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())

    def test_it_changes_images(self):
        images = self.pictures()
        assert not torch.equal(self.applied(images, self.drawn()), images)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_a_batch_is_its_images_in_any_order_and_one_by_one(self, memory_format):
        images, drawn = self.pictures().contiguous(memory_format=memory_format), self.drawn()
        whole = self.applied(images, drawn)
        assert whole.is_contiguous(memory_format=memory_format) and whole.shape == images.shape
        assert whole.dtype == torch.uint8
        order = np.random.default_rng(1).permutation(COUNT)
        shuffled = self.applied(images[order], {name: array[order] for name, array in drawn.items()})
        assert torch.equal(shuffled, whole[order])
        for i in range(COUNT):
            assert torch.equal(self.alone(images, drawn, i), whole[i : i + 1])

    def test_memory_formats_and_gaps_make_no_difference(self):
        images, drawn = self.pictures(), self.drawn()
        expected = self.applied(images, drawn)
        assert torch.equal(self.applied(images.contiguous(memory_format=torch.channels_last), drawn), expected)
        wide = F.pad(images, (2, 3, 1, 4))
        assert torch.equal(self.operation.apply(wide[:, :, 1:-4, 2:-3], drawn), expected)

    def test_threads_make_no_difference(self):
        images, drawn, before = self.pictures(), self.drawn(), torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(self.applied(images, drawn))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(*results)

    def test_it_never_waits_for_the_device(self):
        """Tensors on torch's device "meta" have no values: whatever had to read one would fail."""
        images = self.pictures().contiguous(memory_format=torch.channels_last).to("meta")
        result = self.operation.apply(images, self.drawn())
        assert result.is_meta and result.shape == images.shape
        assert result.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_a_gpu_gives_the_same_bits(self, memory_format):
        images, drawn = self.pictures().contiguous(memory_format=memory_format), self.drawn()
        there = self.operation.apply(images.cuda(), drawn)
        assert there.is_cuda and there.is_contiguous(memory_format=memory_format)
        assert torch.equal(there.cpu(), self.applied(images, drawn))

    @pytest.mark.skipif(not fakes_cuda(), reason="this version of torch needs a GPU to make believe that there is one")
    def test_a_gpu_is_never_waited_for(self):
        """On tensors without values, as if on a GPU: asking for a value fails, and so do tensors left on the CPU."""
        drawn = self.drawn()
        with FakeTensorMode():
            images = torch.empty((COUNT, 3, *self.size), dtype=torch.uint8, device="cuda")
            there = self.operation.apply(images.contiguous(memory_format=torch.channels_last), drawn)
            assert there.is_cuda and there.is_contiguous(memory_format=torch.channels_last)

    def test_students_of_another_size_see_the_same_view(self):
        coarse = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (COUNT, 3, 4, 4))).float()
        large = F.interpolate(coarse, size=64, mode="bicubic").clamp(0, 255).round().to(torch.uint8)
        drawn = self.drawn()
        halved_after = halved(self.applied(large, drawn))
        halved_before = self.applied(halved(large), drawn)
        assert (halved_after.int() - halved_before.int()).abs().float().mean() <= self.apart

    @pytest.mark.parametrize("word", [0, 2**64 - 1])
    def test_extreme_words_are_drawn_and_applied(self, word):
        drawn = self.operation.draw(np.full((4, self.operation.words), word, np.uint64))
        images = pictures(4)
        assert self.applied(images, drawn).shape == images.shape

    @pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 1), (3, 3), (5, 2), (33, 9)])
    def test_images_of_any_size(self, size):
        images, drawn = pictures(COUNT, *size), self.drawn()
        for memory_format in (torch.contiguous_format, torch.channels_last):
            assert self.applied(images.contiguous(memory_format=memory_format), drawn).shape == images.shape


def halved(images):
    return F.avg_pool2d(images.float(), 2).round().to(torch.uint8)
