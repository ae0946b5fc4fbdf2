"""Input that a parser could stumble over: each kind that bench/fuzz.py has found. All is refused in one line."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdcache.cache import Cache, KdcacheError, open_cache
from kdcache.cache.errors import CorruptError, InputError, NotFoundError
from kdcache.cache.files import read_plain
from kdcache.cache.registry.registry import Registry
from kdcache.cache.sealed import inflates, read_sealed, seal_holds, sealed_zip
from kdcache.pipeline.commandline.settings import load_settings
from kdcache.pipeline.data.classmap import map_classes
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.data.kinds.containers.tarnames import expand
from kdcache.pipeline.data.memory import memory_file, recall, remember
from kdcache.pipeline.teachers.checkpoints import open_checkpoint
from kdcache.pipeline.teachers.networks import canonical_name
from kdcache.pipeline.teachers.sources.timm import pixels_of
from kdcache.pipeline.teachers.weights import read_weights, write_weights
from kdcache.tests.helpers.caches import Filled, identity
from kdcache.tests.helpers.containers import Sample, write_hf
from kdcache.train.loop.runfolder import RunFolder, read_config
from kdcache.train.sweep import asked_before

LONG = "x" * 300  # no file may have such a name


def test_an_error_is_one_line_and_no_page_whatever_it_repeats():
    assert str(CorruptError("a\nb\r\nc\u2028d")) == "a b c d"
    text = str(InputError("begin " + "x" * 100_000 + " end"))
    assert len(text) < 4000 and text.startswith("begin") and text.endswith("end")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("x = " + "[" * 5000, id="nested lists"),
        pytest.param("x = " + "{a = " * 3000, id="nested tables"),
        pytest.param("x = " + "9" * 5000, id="a number of 5,000 digits"),
        pytest.param(".".join("a" * 20_000) + " = 1", id="a name of 20,000 words"),
        pytest.param("x = '\udcff'", id="no text"),
    ],
)
def test_settings_that_toml_s_parser_stumbles_over(tmp_path, content):
    file = tmp_path / "kdcache.toml"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(KdcacheError, match=r"kdcache\.toml is (not valid TOML|longer)"):
        load_settings({}, {}, file)


def test_json_that_can_just_be_read_and_not_be_written_again(tmp_path):
    file = tmp_path / "config.json"
    wrong = 0
    for depth in (*range(900, 1000, 5), 100_000):
        file.write_text('{"a": ' + "[" * depth + "]" * depth + "}")
        try:
            read_sealed(file, "advice")
        except CorruptError:
            wrong += 1
    assert wrong


def test_a_seed_of_a_sweep_that_is_infinite(tmp_path):
    (tmp_path / "sweep.json").write_text('{"runs": [{"loss": "kd", "seed": Infinity}]}')
    with pytest.raises(CorruptError, match="is not what kdcache writes"):
        asked_before(str(tmp_path))


def test_settings_of_a_run_that_have_a_name_that_is_no_text(tmp_path):
    (tmp_path / "config.json").write_text('{"\\udcff": 1}')
    with pytest.raises(CorruptError, match="is not what kdcache writes"):
        read_config(tmp_path)


def test_notes_of_weights_whose_class_ids_are_not_below_their_classes(tmp_path):
    notes = {"input_size": 8, "mean": [0.5] * 3, "std": [0.2] * 3, "class_names": ["a"], "classes": 2}
    for ids in ([2], [-1], [2**70]):
        write_weights(tmp_path / "w.safetensors", {"a": torch.zeros(1)}, {**notes, "class_ids": ids})
        with pytest.raises(InputError, match="its notes are not what kdcache writes"):
            read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("split", [["train"], {"a": 1}, 1.5, True])
def test_a_split_in_a_table_that_is_no_text(tmp_path, split):
    row = {"path": "a.jpg", "label": "a", "split": split}
    (tmp_path / "table.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"line 1: .*split"):
        open_data(f"files:{tmp_path}/table.jsonl", "train", home=tmp_path)


@pytest.mark.parametrize("entry", ["9" * 5000, [[[0]]], [{"a": [[1]]}]])
def test_a_class_of_a_map_that_is_none(tmp_path, entry):
    (tmp_path / "m.json").write_text(json.dumps({"a": entry}))
    with pytest.raises(InputError, match=r"the teacher has no class|is not a dataset class"):
        map_classes(["a"], str(tmp_path / "m.json"), ["b"], 1)


def test_an_entry_of_a_map_that_is_nested_deeply(tmp_path):
    (tmp_path / "m.json").write_text('{"a": ' + '{"a":' * 900 + "1" + "}" * 901)
    with pytest.raises(InputError, match=r"m\.json"):
        map_classes(["a"], str(tmp_path / "m.json"), ["b"], 1)


def test_what_is_remembered_of_data_counts_only_as_it_was_written(tmp_path):
    arrays = {"sizes": np.arange(3), "names": np.array(["a"])}
    file = memory_file(tmp_path, "k")
    remember(tmp_path, "k", arrays)
    sound = file.read_bytes()
    found = recall(tmp_path, "k")
    assert seal_holds(sound) and found.keys() == arrays.keys() and (found["sizes"] == arrays["sizes"]).all()
    for at in range(0, len(sound), 29):
        file.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        assert recall(tmp_path, "k") is None
    np.savez(file, **arrays)  # as versions without checksums did
    assert seal_holds(file.read_bytes()) is None and recall(tmp_path, "k") is None


def repacked(file: Path) -> None:
    """The same zip file, compressed."""
    with zipfile.ZipFile(file) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in entries.items():
            new.writestr(name, content)


def test_weights_and_states_that_are_compressed_could_take_all_memory(tmp_path):
    file, run = tmp_path / "w.pth", RunFolder(tmp_path / "run", {"loss": "kd"}, False)
    torch.save({"a": torch.zeros(100_000)}, file)
    run.save_state([{"epoch": 1}], {"a": torch.zeros(100_000)})
    assert open_checkpoint(file).tensors.keys() == {"a"} and run.load_state() is not None
    for one in (file, run.path / "state.pt"):
        repacked(one)
        assert inflates(one) and inflates(one.read_bytes()) and one.stat().st_size < 10_000
    with pytest.raises(InputError, match=r"is compressed, as no file of torch\.save is"):
        open_checkpoint(file)
    with pytest.raises(CorruptError, match="is compressed, as none of kdcache's is"):
        run.load_state()
    (run.path / "state.pt").write_bytes(sealed_zip((run.path / "state.pt").read_bytes()))
    with pytest.raises(CorruptError, match="is compressed, as none of kdcache's is"):
        run.load_state()


def test_a_zip_file_whose_directory_cannot_be_read(tmp_path):
    file = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(3)}, file)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match="zip"):
        inflates(file)
    with pytest.raises(InputError, match="is damaged"):
        open_checkpoint(file)
    assert not inflates(b"no zip file") and not inflates(b"")


def test_what_was_seen_of_a_cache_that_is_no_list_of_names(tmp_path):
    cache = Filled(tmp_path / "registry" / "caches" / "c", identity()).cache
    cache.path.rename(cache.path.with_name(cache.key))
    shared = Registry(str(tmp_path / "registry"), tmp_path / "local", 0)
    shared.cache(cache.key)
    (seen,) = (tmp_path / "local").rglob("seen.json")
    for content in ('["a", 1.5]', "[[1]]", "{}", "[" * 100_000, "[NaN]"):
        seen.write_text(content)
        with pytest.raises(CorruptError, match=r"seen\.json is damaged"):
            shared.cache(cache.key)


def test_arguments_and_sizes_of_timm_s_networks_that_are_no_numbers():
    with pytest.raises(InputError, match="cannot be read"):
        pixels_of({"input_size": [3, float("inf"), float("inf")]}, "timm/x")
    assert canonical_name("timm/x:a=" + "9" * 5000).startswith("timm/x:a=")
    with pytest.raises(InputError, match="img_size"):
        canonical_name("timm/x:img_size=" + "9" * 5000)


def test_names_that_no_file_can_have(tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for open_it, wrong in (
        (lambda: open_cache(LONG), NotFoundError),
        (lambda: Cache(Path(LONG)), NotFoundError),
        (lambda: open_data(f"imagefolder:{LONG}", "train"), InputError),
        (lambda: open_data(f"files:{LONG}.csv", "train"), InputError),
        (lambda: open_data(f"wds:{LONG}", "train"), InputError),
        (lambda: open_data(LONG, "train"), InputError),
        (lambda: open_data("imagefolder:~no-such-user/x", "train"), InputError),
        (lambda: open_data("files:a\0.csv", "train"), InputError),
        (lambda: open_data("files:\ud800.csv", "train"), InputError),
        (lambda: map_classes(["a"], f"{LONG}.csv", None, 2), InputError),
        (lambda: open_checkpoint(f"{LONG}.pth"), InputError),
        (lambda: read_plain(Path("a\0b")), InputError),
    ):
        with pytest.raises(wrong):
            open_it()


def test_a_pattern_of_tars_may_be_longer_than_a_file_s_name(tmp_path):
    names = [f"shard-{i:06d}" for i in range(40)]
    for name in names:
        (tmp_path / f"{name}.tar").touch()
    found = expand(f"{tmp_path}/{{{','.join(names)}}}.tar")
    assert [path.stem for path in found] == names


def test_classes_of_a_hugging_face_data_set_whose_names_are_no_text(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    spec = write_hf(tmp_path, [Sample(split, "bloom", "a.png", image.getvalue()) for split in ("train", "val")])
    for file in tmp_path.rglob("dataset_info.json"):
        file.write_text(file.read_text().replace('"bloom"', '["bloom"]'))
    with pytest.raises(InputError):
        open_data(spec, "train", home=tmp_path)


def test_a_range_of_tars_with_a_number_of_5_000_digits_is_no_such_file() -> None:
    with pytest.raises(KdcacheError, match="no such file"):
        open_data("wds:a{0.." + "9" * 5000 + "}.tar", "train")
