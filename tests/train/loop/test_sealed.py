"""What a run's folder holds is checked when it is read: a flipped bit is found, or changes nothing."""

import io
import json
import random
import shutil
from functools import partial

import pytest
import torch
from torch import nn

from kdcache.cache.errors import CorruptError, InputError, KdcacheError, NotFoundError
from kdcache.cache.sealed import read_sealed, sealed
from kdcache.pipeline.teachers.checkpoints import weights_hash
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.teachers.weights import read_weights, saved, write_weights
from kdcache.tests.helpers.oddthings import put_in_place
from kdcache.tests.helpers.training import Same
from kdcache.train.evaluate import _beside
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.runfolder import RunFolder, config_of, read_config
from kdcache.train.loop.trainer import fit
from kdcache.train.losses import CE
from kdcache.train.report.facts.runs import read_run
from kdcache.train.sweep import asked_before

CONFIG = {"loss": "ce", "epochs": 2, "seed": 3, "lr": 0.1, "data": "digits"}
NOTES = {"input_size": 4, "mean": [0.5] * 3, "std": [0.25] * 3, "class_names": ["a", "ä"]}


def trained(folder):
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), (0.5,) * 3, (0.25,) * 3)
    loader = Same([(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), None)])
    run = RunFolder(folder, CONFIG, False)
    history = fit(model, CE(), loader, Recipe(2, 0.1), lambda m: {"top1": 0.5}, run, NOTES, lambda line: None)
    run.finish({**history[-1], "epochs": 2})
    (folder / "sweep.json").write_bytes(sealed({"asked": [["ce"], [3, 4]], "runs": []}))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Not to be changed."""
    return trained(tmp_path_factory.mktemp("sealed") / "run")


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def content(folder, name):
    """What a reader of that file gets, as something to compare."""
    if name == "state.pt":
        kept = io.BytesIO()
        torch.save(RunFolder(folder, CONFIG, True).load_state(), kept)
        return kept.getvalue()
    if name.endswith(".safetensors"):
        state, notes = read_weights(folder / name)
        return weights_hash(state), notes
    if name == "sweep.json":
        return asked_before(str(folder))
    if name == "config.json":
        RunFolder(folder, CONFIG, True)
        return config_of(folder)
    found = read_run(folder)
    return found.lines, found.summary, found.state


@pytest.mark.parametrize(
    "name", ["state.pt", "last.safetensors", "config.json", "summary.json", "metrics.jsonl", "sweep.json"]
)
def test_a_flipped_bit_is_found_or_changes_nothing(whole, run, name):
    want, sound = content(whole, name), (whole / name).read_bytes()
    assert content(run, name) == want
    rng, found = random.Random(0), 0
    for _ in range(40):
        at = rng.randrange(8 * len(sound))
        damaged = bytearray(sound)
        damaged[at // 8] ^= 1 << at % 8
        (run / name).write_bytes(damaged)
        try:
            assert content(run, name) == want, at
        except KdcacheError:
            found += 1
    assert found > 30


def test_files_of_earlier_versions_are_read_with_a_note(run):
    state = torch.load(run / "state.pt", weights_only=True)
    torch.save(state, run / "state.pt")
    said = []
    assert RunFolder(run, CONFIG, True).load_state(said.append)["history"] == state["history"]
    assert len(said) == 1 and said[0].startswith(f"note: {run}/state.pt has no checksum")
    content = bytearray((run / "state.pt").read_bytes())
    content[content.index(state["training"]["model"]["network.1.weight"].numpy().tobytes()) + 5] ^= 16
    (run / "state.pt").write_bytes(content)  # torch itself does not look at the checksums of a zip file's entries
    with pytest.raises(CorruptError, match=r"state\.pt is damaged, in \S+: remove it to start the run again"):
        RunFolder(run, CONFIG, True).load_state()
    (run / "config.json").write_text(json.dumps({**CONFIG, "seed": 5}))
    assert read_config(run)["seed"] == 5
    (run / "config.json").write_bytes(sealed(CONFIG).replace(b"0.1", b"0.3"))
    with pytest.raises(CorruptError, match=r'by the checksum in it: .*; if you changed it on purpose, remove its "sha'):
        read_config(run)


def test_weights_are_written_alike_each_time_and_are_checked_with_their_notes(tmp_path):
    state = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(3), "ü": torch.zeros(0, 2, dtype=torch.float16)}
    assert saved(state, NOTES) == saved(dict(reversed(state.items())), NOTES)
    write_weights(tmp_path / "w.safetensors", state, NOTES)
    found, notes = read_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], state[name]) for name in state) and notes["class_names"] == ("a", "ä")
    other = (tmp_path / "w.safetensors").read_bytes().replace(b"[0.5, 0.5", b"[0.6, 0.5").replace(b"[0.5", b"[0.6", 1)
    (tmp_path / "w.safetensors").write_bytes(other.replace(b'\\"mean\\": [0.5', b'\\"mean\\": [0.6'))
    with pytest.raises(CorruptError, match=r"w\.safetensors is damaged, its notes are not those that were written"):
        read_weights(tmp_path / "w.safetensors")


def test_a_teacher_beside_a_student_that_names_no_network_is_one_line(tmp_path):
    for name in ("last.safetensors", "teacher-last.safetensors"):
        write_weights(tmp_path / name, {"a": torch.zeros(1)}, NOTES)
    with pytest.raises(InputError, match=r"does not say which network it holds the weights of: give --teacher NAME"):
        _beside(tmp_path / "last.safetensors", {"beside_teacher": True, "classes": 5}, None, torch.device("cpu"))


ODD = [
    b"[" * 100_000,
    b"[]",
    b"{",
    b"\xff",
    b'{"epochs": "many"}',
    b'{"loss_options": 3}',
    b'{"data": 5}',
    b'{"lr": {}}',
]


@pytest.mark.parametrize("text", ODD)
def test_odd_settings_are_one_line(run, text):
    (run / "config.json").write_bytes(text)
    for read in (config_of, read_run):
        with pytest.raises(CorruptError, match=r"config\.json is not .*: give another --out$"):
            read(run)


def _gone(path):
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("how", [partial(put_in_place, other="a pipe"), partial(put_in_place, other="a device"), _gone])
@pytest.mark.parametrize("name", ["state.pt", "last.safetensors", "config.json", "summary.json", "metrics.jsonl"])
@pytest.mark.timeout(20)
def test_a_pipe_a_device_or_a_broken_link_in_the_place_of_a_file_is_one_line(run, name, how):
    how(run / name)
    with pytest.raises(KdcacheError, match=r"not a plain file|is missing|no weights file|no run folder|no run to res"):
        content(run, name)


def test_a_sealed_file_is_read_as_it_was_written(tmp_path):
    value = {"z": [1, 2.5, None, "ü"], "a": {"1": float("inf")}, "t": (1, 2)}
    (tmp_path / "x.json").write_bytes(sealed(value))
    assert read_sealed(tmp_path / "x.json", "") == {**value, "t": [1, 2]}
    (tmp_path / "x.json").write_bytes(sealed(value).replace(b'"sha256"', b'"shq256"'))
    with pytest.raises(CorruptError, match="is not what was written, by the checksum in it"):
        read_sealed(tmp_path / "x.json", "")
    with pytest.raises(NotFoundError):
        read_sealed(tmp_path / "y.json", "")
