"""Mistakes, damage and malice in stored logits are refused, in one line each."""

import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.cache import KdcacheError, open_cache
from kdcache.pipeline.imports import imports as importing
from kdcache.pipeline.imports import stored
from kdcache.pipeline.imports.fkd import FKD
from kdcache.pipeline.imports.imports import import_logits
from kdcache.pipeline.imports.tinyvit import TinyViT
from kdcache.tests.helpers.storedlogits import CLASSES, VIEWS, K, quiet, write_tinyvit


def edit_fkd(change):
    """Changes what the file of sample 3 holds."""

    def edit(folder):
        tar = sorted(folder.rglob("*.tar"))[3]
        state = torch.load(tar, weights_only=False)
        torch.save(change(*state) or state, tar)

    return edit


def set_at(what, place, value):
    def change(crops, flips, output):
        {"crops": crops, "flips": flips, "output": output}[what][place] = value

    return edit_fkd(change)


def first_tar(folder):
    return sorted(folder.rglob("*.tar"))[0]


def compressed(folder):
    with zipfile.ZipFile(first_tar(folder), "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", bytes(1 << 20))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


FKD_FAULTS = {
    "missing": (lambda f: first_tar(f).unlink(), r"1 samples without a record, ant/ant_0\.x\.png for one"),
    "foreign": (
        lambda f: shutil.copy(first_tar(f), first_tar(f).with_name("fly.tar")),
        r"1 records of no sample of the dataset, .*fly\.tar for one",
    ),
    "doubled": (
        lambda f: (f / "ant").mkdir() or shutil.copy(first_tar(f), f / "ant"),
        r"1 records of samples that have another, .*ant_0\.tar",
    ),
    "empty": (lambda f: shutil.rmtree(f / "imagenet"), "holds no CLASS/NAME.tar, as FKD's"),
    "crops differ": (
        edit_fkd(lambda crops, flips, output: [crops[:2], flips[:2], output[:2]]),
        r"ant_3\.tar holds \[2, 2, 3\] of float32, and .*ant_0\.tar \[3, 2, 3\]",
    ),
    "id": (set_at("output", (1, 0, 2), 7), r"ant_3\.tar: crop 1 has class ids above 4"),
    "id twice": (edit_fkd(lambda c, f, o: [c, f, np.concatenate([o[:, :, :1]] * 3, 2)]), "has a class twice"),
    "id of parts": (set_at("output", (1, 0, 2), 1.5), r"ant_3\.tar has class ids that are no whole numbers"),
    "id NaN": (set_at("output", (1, 0, 2), np.nan), "class ids that are no whole numbers"),
    "p above 1": (set_at("output", (1, 1, 0), 1.5), r"ant_3\.tar: crop 1 has probabilities that are none"),
    "p NaN": (set_at("output", (1, 1, 1), np.nan), "has probabilities that are none"),
    "p negative": (set_at("output", (1, 1, 2), -0.1), "has probabilities that are none"),
    "p increasing": (set_at("output", (1, 1, slice(None)), [0.2, 0.1, 0.3]), "probabilities that increase"),
    "p sums": (set_at("output", (1, 1, slice(None)), [0.5, 0.3, 0.25]), "probabilities whose sum is above 1"),
    "crops outside": (set_at("crops", (2, 0), 1), "ant_3.tar: crops that leave the image of"),
    "crops NaN": (set_at("crops", (2, 0), np.nan), "ant_3.tar: crops that do not fall on whole pixels"),
    "crops of another size": (
        edit_fkd(lambda c, f, o: [c * np.float32(0.97), f, o]),
        "crops that do not fall on whole pixels of",
    ),
    "flips": (edit_fkd(lambda c, f, o: [c, f.astype(int) + 3, o]), "holds flips that are neither 0 nor 1"),
    "hard": (edit_fkd(lambda c, f, o: [c, f, np.array([1, 2, 3])]), r"soft labels \[3\] of int64: known are"),
    "two of three": (edit_fkd(lambda c, f, o: [c, f]), "does not hold crops, flips and soft labels"),
    "a list": (edit_fkd(lambda c, f, o: [c, f, [1, 2]]), "holds no arrays"),
    "huge": (edit_fkd(lambda c, f, o: [c, f, torch.zeros(1).expand(10**6, 2, 10**6)]), "or such of more than 67.1 MB"),
    "bfloat16": (edit_fkd(lambda c, f, o: [c, f, torch.tensor(o).bfloat16()]), "holds no arrays"),
    "objects": (edit_fkd(lambda c, f, o: [c, f, o.astype(object)]), "ant_3.tar"),
    "code": (edit_fkd(lambda c, f, o: [c, f, Evil()]), "is refused: it holds more than numbers, or is damaged"),
    "no zip": (lambda f: first_tar(f).write_bytes(b"x" * 99), "ant_0.tar is no file of torch.save"),
    "cut": (lambda f: first_tar(f).write_bytes(first_tar(f).read_bytes()[:-200]), "is no file of torch.save"),
    "compressed": (compressed, "or is compressed, as no file of FKD's is"),
    "too long": (lambda f: os.truncate(first_tar(f), (1 << 26) + 1), "ant_0.tar"),
}


@pytest.mark.parametrize("fault", FKD_FAULTS)
def test_faults_of_fkd(fkd, tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(fkd[1].path, tmp_path / "fkd")
    spoil, message = FKD_FAULTS[fault]
    spoil(folder)
    with pytest.raises(KdcacheError, match=message) as e:
        import_logits(replace(fkd[1], path=str(folder), out=str(tmp_path / "c")), quiet)
    assert "\n" not in str(e.value) and not (tmp_path / "c").exists() and not (tmp_path / "ran").exists()


def edit_values(place, dtype, value):
    """In epoch 1, rank 0, record 2."""

    def edit(folder):
        path = folder / f"logits_top{K}_epoch1/rank0-values.bin"
        content = bytearray(path.read_bytes())
        at = 2 * (4 + 4 * K) + place
        new = np.array(value, dtype).tobytes()
        content[at : at + len(new)] = new
        path.write_bytes(content)

    return edit


def edit_keys(change):
    def edit(folder):
        path = folder / f"logits_top{K}_epoch1/rank0-keys.txt"
        path.write_bytes(change(path.read_bytes()))

    return edit


TINYVIT_FAULTS = {
    "cut": (
        lambda f: os.truncate(f / "logits_top3_epoch1/rank1-values.bin", 40),
        r"rank1-values\.bin has 40 bytes, and 16 keys need 16 each: one of the two is cut short",
    ),
    "keys cut": (edit_keys(lambda b: b[:-2]), "14 keys need 16 each"),
    "no values": (lambda f: [p.unlink() for p in f.glob("logits_top3_epoch1/*")], "holds no rankR-values.bin"),
    "no keys": (lambda f: (f / "logits_top3_epoch1/rank0-keys.txt").unlink(), "rank0-keys.txt is missing"),
    "a rank less": (
        lambda f: [p.unlink() for p in f.glob("logits_top3_epoch1/rank1*")],
        r"epoch1: 15 samples without a record, .*\.png for one: is --data what they were stored for",
    ),
    "foreign": (edit_keys(lambda b: b"99" + b[b.index(b"\n") :]), "1 records of no sample of the dataset, 99 for one"),
    "doubled": (
        edit_keys(lambda b: b"\n".join([b.split(b"\n")[1], *b.split(b"\n")[1:]])),
        "1 samples without a record|1 records of samples that have another",
    ),
    "no text": (edit_keys(lambda b: b"\xff" + b), "rank0-keys.txt is no text of keys"),
    "a long key": (edit_keys(lambda b: b"1" * 100_000 + b), "has more than .* bytes, too many for the 15 records"),
    "names": (edit_keys(lambda b: b"fly" + b), "15 records of no sample|samples without a record"),
    "id": (edit_values(4, "i2", 5), r"epoch1: the record of .*\.png has class ids above 4"),
    "negative id": (edit_values(6, "i2", -1), "has class ids above 4"),
    "p NaN": (edit_values(4 + 2 * K, "f2", np.nan), "has probabilities that are none"),
    "p above 1": (edit_values(4 + 2 * K, "f2", 1.001), "has probabilities that are none"),
    "p zero": (edit_values(4 + 2 * K, "f2", [0, 0, 0]), "has probabilities that are none"),
    "p increasing": (edit_values(4 + 2 * K, "f2", [0.2, 0.3, 0.1]), "probabilities that increase along a record"),
    "another K": (lambda f: (f / "logits_top5_epoch9").mkdir(), r"holds epochs with top \[3, 5\]"),
    "neither": (lambda f: [p.rename(f / f"x{p.name}") for p in f.iterdir()], "holds no folders logits_topK_epochE"),
    "no folder": (shutil.rmtree, "holds no folders logits_topK_epochE"),
}


@pytest.mark.parametrize("fault", TINYVIT_FAULTS)
def test_faults_of_tinyvit(tinyvit, tmp_path, fault):
    folder = shutil.copytree(tinyvit[1].path, tmp_path / "tinyvit")
    spoil, message = TINYVIT_FAULTS[fault]
    spoil(folder)
    with pytest.raises(KdcacheError, match=message) as e:
        import_logits(replace(tinyvit[1], path=str(folder), out=str(tmp_path / "c")), quiet)
    assert "\n" not in str(e.value) and not (tmp_path / "c").exists()


def test_classes_in_another_order_are_named(tinyvit, tmp_path, data, truth):
    p = np.eye(5)[data.labels[:, 0]] * 0.9 + 0.02
    places = [str(i) for i in range(30)]
    config = replace(tinyvit[1], out=str(tmp_path / "c"))
    right = write_tinyvit(tmp_path / "right", places, p[None], truth["seeds"][:1])
    assert import_logits(replace(config, path=str(right)), quiet).views == 1
    rolled = write_tinyvit(tmp_path / "rolled", places, np.roll(p, 1, 1)[None], truth["seeds"][:1])
    config = replace(config, path=str(rolled), out=str(tmp_path / "d"))
    with pytest.raises(KdcacheError, match=r"images of ant are answered as bee, .*images of eel are answered as ant"):
        import_logits(config, quiet)
    assert import_logits(replace(config, allow_low_accuracy=True), quiet).views == 1


def test_wrong_order_and_wrong_classes_are_noticed(place, tinyvit, tmp_path, data, truth):
    wrong = write_tinyvit(tmp_path / "w", [str((i + 13) % 30) for i in range(30)], truth["p"], truth["seeds"])
    config = replace(tinyvit[1], path=str(wrong), out=str(tmp_path / "c"))
    with pytest.raises(KdcacheError, match=r"name the label of .* with its classes in this order"):
        import_logits(config, quiet)
    assert import_logits(replace(config, allow_low_accuracy=True), quiet).views == VIEWS
    with pytest.raises(KdcacheError, match="--classes 9: imagenet has 5 classes; --unlabelled"):
        import_logits(replace(config, classes=9), quiet)
    with pytest.raises(KdcacheError, match="says nothing of classes here: give --classes"):
        import_logits(replace(config, unlabelled=True), quiet)
    with pytest.raises(KdcacheError, match="3 classes a record, so there must be more than 3"):
        import_logits(replace(config, unlabelled=True, classes=3), quiet)
    result = import_logits(replace(config, unlabelled=True, classes=9, out=str(tmp_path / "u")), quiet)
    record = open_cache(result.path).identity.record
    assert (record.labels, record.classes, record.lacks) == (0, 9, ("evaluation",))


def test_files_that_change_under_way_are_noticed(tinyvit, tmp_path):
    folder = shutil.copytree(tinyvit[1].path, tmp_path / "tinyvit")
    said = []

    def say(line):
        said.append(line)
        if line.startswith("cache "):
            edit_values(0, "i4", 5)(folder)

    with pytest.raises(KdcacheError, match="is being changed: import it again when that is over"):
        import_logits(replace(tinyvit[1], path=str(folder), out=str(tmp_path / "c")), say)
    assert open_cache(tmp_path / "c").views == ()


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_refused_or_read(place, fkd, tinyvit, data, draws):
    """Any bytes: answers, or one line. Nothing else is raised."""
    if draws.draw(st.booleans()):
        good = first_tar(Path(fkd[1].path)).read_bytes()
    else:
        good = (Path(tinyvit[1].path) / f"logits_top{K}_epoch0/rank0-values.bin").read_bytes()
    content = bytearray(good)
    for _ in range(draws.draw(st.integers(1, 4))):
        content[draws.draw(st.integers(0, len(good) - 1))] = draws.draw(st.integers(0, 255))
    content = content[: draws.draw(st.sampled_from([len(good)] * 3 + [len(good) - 1, 60]))]
    damaged = place / "damaged"
    damaged.write_bytes(content)
    try:
        if good[:2] == b"PK":
            reader, views, rows = FKD(Path(fkd[1].path), data), range(VIEWS), range(2)
            reader._files[0] = damaged
        else:
            epoch = place / f"fuzz/logits_top{K}_epoch0"
            shutil.copytree(Path(tinyvit[1].path) / epoch.name, epoch, dirs_exist_ok=True)
            shutil.copy(damaged, epoch / "rank0-values.bin")
            reader, views, rows = TinyViT(epoch, data), range(1), range(30)
        answers = reader.read(views, rows, quiet)
        importing._require_sound(answers, len(CLASSES), reader, views, rows)
        encoded = stored.encoded(answers.ids[0], answers.p[0], 1.0, len(CLASSES))
        assert np.isfinite(encoded["gaps"]).all() and not np.isnan(encoded["tail"]).any()
    except KdcacheError as e:
        assert "\n" not in str(e)  # noqa: PT017  either of the two
