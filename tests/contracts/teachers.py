"""What every source of teachers must do. The tests of a source are a subclass that says what is asked of it."""

import pytest
import torch

from kdcache.pipeline.data.kinds.arrays import ArrayDataset
from kdcache.pipeline.teachers.pixels import Wanted
from kdcache.pipeline.teachers.teacher import SOURCES, Teacher, load_teacher
from kdcache.pipeline.teachers.weights import weights_hash
from kdcache.tests.helpers.images import arrays_data

CPU = torch.device("cpu")


class TeacherContract:
    """source: its name in SOURCES. side: of the images in pixels; classes: how many the teacher answers for."""

    source: str
    side = 8
    classes = 12

    def asked(self, data: ArrayDataset) -> tuple[str, str | None]:
        """The --teacher and the --weights, once what they name is there; KDCACHE_HOME is a folder of the test's own."""
        raise NotImplementedError

    @pytest.fixture
    def data(self) -> ArrayDataset:
        return arrays_data(6, 8, 8)

    @pytest.fixture(autouse=True)
    def _alone(self, tmp_path, monkeypatch):
        monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        monkeypatch.chdir(tmp_path)
        every = dict(SOURCES)
        for name in [name for name in SOURCES if name != self.source]:
            del SOURCES[name]
        yield
        SOURCES.clear()  # else those put back would stand behind this one, and be asked after it
        SOURCES.update(every)

    @pytest.fixture
    def name_and_weights(self, data) -> tuple[str, str | None]:
        torch.manual_seed(0)
        return self.asked(data)

    @pytest.fixture
    def teacher(self, data, name_and_weights) -> Teacher:
        name, weights = name_and_weights
        return load_teacher(name, data, CPU, weights=weights)

    def test_it_answers_with_logits(self, teacher, data, name_and_weights):
        shape = (5, 3, self.side, self.side)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        logits = teacher.logits(images)
        assert logits.dtype == torch.float32 and logits.shape == (5, self.classes) and logits.isfinite().all()
        assert teacher.classes == self.classes and not teacher.model.training
        again = load_teacher(name_and_weights[0], data, CPU, weights=name_and_weights[1])
        assert torch.equal(again.logits(images), logits) and again.identity == teacher.identity

    def test_its_identity_says_what_it_is_and_what_it_sees(self, teacher, name_and_weights):
        identity = teacher.identity
        assert identity.network == name_and_weights[0] and identity.input_size == self.side
        assert identity.numeric == "float32" and len(identity.mean) == len(identity.std) == 3
        assert teacher.about.startswith(name_and_weights[0]) and f"{self.side} px" in teacher.about

    def test_what_is_wanted_of_its_pixels_counts(self, data, name_and_weights):
        name, weights = name_and_weights
        wanted = Wanted(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bicubic")
        identity = load_teacher(name, data, CPU, weights=weights, wanted=wanted).identity
        assert (identity.mean, identity.std, identity.interpolation) == (wanted.mean, wanted.std, "bicubic")

    def test_one_bit_of_its_weights_changes_their_hash(self, teacher):
        state = {
            k: t.clone(memory_format=torch.contiguous_format) for k, t in teacher.model.network.state_dict().items()
        }
        assert weights_hash(state) == teacher.identity.weights
        first = next(tensor for tensor in state.values() if tensor.is_floating_point())
        first.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
        assert weights_hash(state) != teacher.identity.weights
