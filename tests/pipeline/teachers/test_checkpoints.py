"""Checkpoints in the forms in which people save them give the network that they were saved from, and run no code."""

import argparse
import collections
import copy
import pathlib
import shlex
import sys
import warnings
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdcache.cache.errors import InputError
from kdcache.cache.identity import TeacherIdentity
from kdcache.pipeline.teachers import checkpoints
from kdcache.pipeline.teachers.checkpoints import open_checkpoint
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.sources.files import start_from
from kdcache.pipeline.teachers.teacher import Classifier, Teacher, load_teacher
from kdcache.pipeline.teachers.weights import read_weights, write_weights
from kdcache.tests.helpers import warm
from kdcache.tests.helpers.images import arrays_data

CPU = torch.device("cpu")
NAME = "resnet8"
CLASSES = 12


def network_of(seed):
    """A network whose norms have statistics, so that each tensor counts."""
    torch.manual_seed(seed)
    network = build_network(NAME, CLASSES, 8)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


class Wrapper(nn.Module):
    """What training code makes of a network: it is one attribute among others."""

    def __init__(self, attribute, network):
        super().__init__()
        setattr(self, attribute, network)
        self.criterion = nn.Linear(2, 2)


def averaged(network):
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average.update_parameters(network)
    return average


def lightning(state):
    """The dictionary of Lightning's ModelCheckpoint and save_hyperparameters."""
    return {
        "epoch": 3, "global_step": 40, "pytorch-lightning_version": "2.5.0", "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.3)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}], "lr_schedulers": [],
        "hyper_parameters": {"lr": 0.1, "root": pathlib.PurePosixPath("/data")}, "hparams_name": "kwargs",
    }  # fmt: skip


def timms(network, **more):
    """The dictionary of timm's CheckpointSaver."""
    return {
        "epoch": 7, "arch": "resnet8", "state_dict": network.state_dict(),
        "optimizer": torch.optim.AdamW(network.parameters()).state_dict(),
        "version": 2, "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("out"), data=None),
        "amp_scaler": {"scale": 65536.0}, "metric": np.float64(71.5), **more,
    }  # fmt: skip


def with_prefix(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


@dataclass(frozen=True)
class Form:
    """make: what is saved, given a network and another one. place: what is said of it. file: its name."""

    make: object
    place: str = ""
    file: str = "saved.pth"


FORMS = {
    "the state dict": Form(lambda n, _: n.state_dict()),
    "without counts of batches": Form(lambda n, _: {k: v for k, v in n.state_dict().items() if "num_batches" not in k}),
    "parameters": Form(lambda n, _: dict(n.state_dict(keep_vars=True))),
    **{
        name: Form(lambda n, _, name=name: {name: n.state_dict(), "epoch": 1}, f"#{name}")
        for name in ("state_dict", "model", "net", "model_state_dict", "model_ema", "state_dict_ema", "anything")
    },
    "nested": Form(lambda n, _: {"model": {"net": {"state_dict": n.state_dict()}}}, "#model.net.state_dict"),
    "DataParallel": Form(lambda n, _: nn.DataParallel(n).state_dict(), "#module"),
    "compiled": Form(lambda n, _: torch.compile(n).state_dict(), "#_orig_mod"),
    "DataParallel of compiled": Form(lambda n, _: nn.DataParallel(torch.compile(n)).state_dict(), "#module._orig_mod"),
    "compiled DataParallel": Form(lambda n, _: torch.compile(nn.DataParallel(n)).state_dict(), "#_orig_mod.module"),
    **{
        f"in {name}": Form(lambda n, _, name=name: Wrapper(name, n).state_dict(), f"#{name}")
        for name in ("model", "student", "backbone", "encoder_q")
    },
    "averaged": Form(lambda n, _: averaged(n).state_dict(), "#module"),
    "average of compiled DataParallel": Form(
        lambda n, _: {"model": averaged(torch.compile(nn.DataParallel(n))).state_dict()},
        "#model.module._orig_mod.module",
    ),
    "Lightning": Form(
        lambda n, _: lightning(Wrapper("model", torch.compile(n)).state_dict()), "#state_dict.model._orig_mod", "e.ckpt"
    ),
    "Lightning, two names of one network": Form(
        lambda n, _: lightning({**with_prefix("model.", n.state_dict()), **with_prefix("net.", n.state_dict())}),
        "#state_dict.model",
        "e.ckpt",
    ),
    "timm": Form(lambda n, _: timms(n), "#state_dict", "last.pth.tar"),
    "timm with an average": Form(
        lambda n, other: timms(other, state_dict_ema=n.state_dict()),
        "#state_dict_ema (the average; others in it are #state_dict)",
        "last.pth.tar",
    ),
    "torchvision's references": Form(
        lambda n, other: {
            "model": other.state_dict(),
            "model_ema": averaged(n).state_dict(),
            "epoch": 2,
            "lr_scheduler": {"a": [1.0]},
            "args": argparse.Namespace(lr=0.1),
            "optimizer": {},
        },
        "#model_ema.module (the average; others in it are #model)",
    ),
    "a Lightning module with an average": Form(
        lambda n, other: lightning(
            {**with_prefix("model.", other.state_dict()), **with_prefix("ema_model.module.", n.state_dict())}
        ),
        "#state_dict.ema_model.module (the average; others in it are #state_dict.model)",
        "last.ckpt",
    ),
    "NumPy and collections": Form(
        lambda n, _: {
            "model": n.state_dict(),
            "best_acc": np.float64(0.7),
            "step": np.int64(3),
            "seen": np.arange(3),
            "acc32": np.float32(0.5),
            "log": collections.defaultdict(list, a=[1.0]),
            "count": collections.Counter("ab"),
            "order": collections.OrderedDict(a=1),
            "ok": np.bool_(True),
            "set": {1, 2},
            "path": pathlib.Path("x"),
        },
        "#model",
    ),
    "in a defaultdict": Form(lambda n, _: collections.defaultdict(dict, model=n.state_dict()), "#model"),
    "the old format of torch.save": Form(lambda n, _: n.state_dict(), file="old.pth"),
    "DeepSpeed": Form(lambda n, _: {"module": n.state_dict(), "optimizer": None, "lr_scheduler": None}, "#module"),
}


def save(form, folder, network, other):
    torch.save(
        form.make(network, other), folder / form.file, _use_new_zipfile_serialization=not form.file.startswith("old")
    )
    return folder / form.file


@pytest.fixture
def data():
    return arrays_data(6, 8, 8)


@pytest.fixture(scope="module")
def network():
    return network_of(1)


def answers(network, data):
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (data.mean, data.std))
    with torch.inference_mode():
        return images, network((images.float() - mean) / std)


@pytest.fixture(scope="module")
def reference(network):
    """A teacher that nothing but the network itself went into."""
    data = arrays_data(6, 8, 8)
    found = Classifier(copy.deepcopy(network), data.mean, data.std).eval().to(memory_format=torch.channels_last)
    identity = TeacherIdentity(
        architecture=NAME, weights="0" * 64, mean=data.mean, std=data.std, input_size=8, numeric="float32"
    )
    return Teacher(identity, found, CLASSES, None, CPU)


class TestForms:
    """What every form of checkpoint must do."""

    @pytest.fixture(params=FORMS)
    def form(self, request):
        return FORMS[request.param]

    @pytest.fixture
    def file(self, form, tmp_path, network):
        return save(form, tmp_path, network, network_of(2))

    def test_a_teacher_has_every_tensor_of_the_network(self, form, file, network, data, reference):
        teacher = load_teacher(NAME, data, CPU, weights=str(file))
        found, saved = teacher.model.network.state_dict(), network.state_dict()
        assert all(torch.equal(found[k], saved[k]) for k in saved if "num_batches" not in k)
        images, _ = answers(network, data)
        assert torch.equal(teacher.logits(images), reference.logits(images))
        assert teacher.about.startswith(f"{NAME} {file.name}{form.place}, 8 px")

    def test_a_student_starts_as_the_network(self, form, file, network, data):
        student = network_of(3)
        said = start_from(student, NAME, str(file), 8)
        assert torch.equal(answers(student, data)[1], answers(network, data)[1])
        assert said == f"{NAME} starts from {file}{form.place}"


def test_safetensors_are_searched_too(tmp_path, network, data):
    save_file(with_prefix("model.", network.state_dict()), tmp_path / "m.safetensors")
    teacher = load_teacher(NAME, data, CPU, weights=str(tmp_path / "m.safetensors"))
    assert teacher.about.startswith(f"{NAME} m.safetensors#model, ")
    assert torch.equal(teacher.model.network.state_dict()["fc.weight"], network.state_dict()["fc.weight"])


def test_the_place_after_the_file_decides(tmp_path, network, data):
    form, other = FORMS["torchvision's references"], network_of(2)
    file = save(form, tmp_path, network, other)
    for place, wanted in (("model", other), ("model_ema", network), ("model_ema.module", network)):
        teacher = load_teacher(NAME, data, CPU, weights=f"{file}#{place}")
        assert torch.equal(teacher.model.network.state_dict()["fc.weight"], wanted.state_dict()["fc.weight"])
    with pytest.raises(InputError, match=r"holds nothing at #modle: it has model, model_ema"):
        load_teacher(NAME, data, CPU, weights=f"{file}#modle")
    (tmp_path / "a#b.pth").write_bytes(file.read_bytes())
    assert "a#b.pth#model_ema.module" in load_teacher(NAME, data, CPU, weights=str(tmp_path / "a#b.pth")).about


def test_of_two_networks_one_must_be_named(tmp_path, network, data):
    other = network_of(2)
    torch.save(
        {**with_prefix("student.", other.state_dict()), **with_prefix("teacher.", network.state_dict())}, "a.pth"
    )
    with pytest.raises(InputError, match=r"^a.pth holds several .*say which, as one of a.pth#student, a.pth#teacher$"):
        load_teacher(NAME, data, CPU, weights="a.pth")
    assert "a.pth#teacher, " in load_teacher(NAME, data, CPU, weights="a.pth#teacher").about
    # A larger network beside it is another one.
    torch.save(
        {
            **with_prefix("student.", other.state_dict()),
            **with_prefix("teacher.", build_network("resnet14", 12, 8).state_dict()),
        },
        "b.pth",
    )
    assert "b.pth#student, " in load_teacher(NAME, data, CPU, weights="b.pth").about
    assert "b.pth#teacher, " in load_teacher("resnet14", data, CPU, weights="b.pth").about


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_what_does_not_fit_is_said_of_the_likely_place(data, network):
    torch.save(timms(network), "a.pth.tar")
    with pytest.raises(
        InputError, match=r"^the weights in a.pth.tar#state_dict and resnet14 do not fit: 30 missing \(stages.0.1"
    ):
        load_teacher("resnet14", data, CPU, weights="a.pth.tar")
    torch.save({"epoch": 3}, "b.pth")
    with pytest.raises(InputError, match=r"^b.pth holds no tensors$"):
        load_teacher(NAME, data, CPU, weights="b.pth")
    torch.save([network.state_dict()], "c.pth")
    with pytest.raises(InputError, match=r"^c.pth holds no tensors$"):
        load_teacher(NAME, data, CPU, weights="c.pth")


def test_a_dictionary_that_contains_itself_is_no_endless_one(network, monkeypatch):
    monkeypatch.setattr(checkpoints, "_MOST", 10_000)
    content = {"state_dict": network.state_dict()}
    content["again"] = content
    torch.save(content, "a.pth")
    assert set(open_checkpoint("a.pth").find(network.state_dict()).state) == set(network.state_dict())
    content |= {str(i): content for i in range(20)}
    torch.save(content, "b.pth")
    with pytest.raises(InputError, match=r"^b.pth holds more than 10,000 tensors and dictionaries"):
        open_checkpoint("b.pth")


class _Evil:
    def __reduce__(self):
        return pathlib.Path.mkdir, (pathlib.Path("proof"),)


class Settings:
    pass


@pytest.mark.parametrize("form", ["whole", "beside", "flat", "script"])
def test_a_file_that_needs_code_is_refused_with_the_line_that_converts_it(form, data, network, tmp_path):
    file = tmp_path / "it's mine.pth"
    if form == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, and there are such files
            torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 8, 8)), file)
    else:
        settings = Settings()
        content = {
            "whole": network,
            "beside": {"model": network, "settings": settings, "optimizer": {"a": 1}},
            "flat": {**network.state_dict(), "settings": settings},
        }
        torch.save(content[form], file)
    with pytest.raises(InputError) as caught:
        load_teacher(NAME, data, CPU, weights=str(file))
    message = str(caught.value)
    assert "\n" not in message and "could be any code" in message
    line = shlex.split(message.partition("convert it with ")[2])
    assert line[:2] == ["python", "-c"]
    if form == "whole":  # the rest in this process, which is quicker
        warm.run([sys.executable, "-W", "ignore", *line[1:]], check=True)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(line[2], {})
    teacher = load_teacher(NAME, data, CPU, weights=str(tmp_path / "it's mine-tensors.pth"))
    found = teacher.model.network.state_dict()
    assert all(torch.equal(found[k], v) for k, v in network.state_dict().items())


def test_no_code_is_run(data, network):
    torch.save({"model": network.state_dict(), "more": _Evil()}, "evil.pth")
    with pytest.raises(InputError, match=r"^evil.pth holds \S+ besides tensors, which could be any code"):
        load_teacher(NAME, data, CPU, weights="evil.pth")
    assert not pathlib.Path("proof").exists()


def test_harmless_classes_are_not_imported_and_not_called(network):
    """Others stand in for them, so that a file cannot call even those with arguments of its own."""
    for name in ("argparse.Namespace", "numpy.dtype", "lightning.fabric.utilities.data.AttributeDict"):
        module, _, kind = name.rpartition(".")
        call = f"c{module}\n{kind}\n".encode() + b"(X\x01\x00\x00\x00atR"  # kind("a")
        torch.save({"model": network.state_dict()}, "plain.pth")
        _with_pickle("plain.pth", "called.pth", call)
        assert open_checkpoint("called.pth").find(network.state_dict()) is not None
    assert "lightning" not in sys.modules


def _with_pickle(source, target, call):
    """Copy a file of torch.save, with one more value in its dictionary: the result of a call."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("data.pkl"):
                assert content.endswith(b"s.")
                content = content[:-1] + b"X\x04\x00\x00\x00more" + call + b"s."
            new.writestr(item.filename, content)


def test_kdcaches_own_files_are_taken_as_they_are(tmp_path):
    """A student of one's own may have nothing but a `model`, whose name belongs to it."""
    state = {"model.weight": torch.ones(3)}
    notes = {"input_size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3, "class_names": ["a"]}
    write_weights(tmp_path / "own.safetensors", state, notes)
    assert list(read_weights(tmp_path / "own.safetensors")[0]) == ["model.weight"]
    save_file(state, tmp_path / "foreign.safetensors")
    assert list(read_weights(tmp_path / "foreign.safetensors")[0]) == ["weight"]
