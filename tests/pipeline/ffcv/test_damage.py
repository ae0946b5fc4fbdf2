"""FFCV files that are damaged, cut, foreign or forged are refused."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from kdcache.cache import KdcacheError
from kdcache.cache import errors as e
from kdcache.cache.identity import canonical
from kdcache.pipeline.ffcv import format, read
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.pipeline.views.parameters import draw_as
from kdcache.tests.helpers.ffcv import equal, everything, packed_arrays


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Not to be changed: see copy."""
    return packed_arrays(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def copy(packed, tmp_path):
    return Path(shutil.copy(packed[2], tmp_path / "copy.beton"))


def test_every_flipped_bit_is_refused_or_harmless(packed, copy):
    whole = everything(packed[2])
    content = copy.read_bytes()
    places = random.Random(0).sample(range(len(content)), 150)
    used = len(content.rstrip(b"\0"))
    # Pages are mostly padding here: every part of the file gets its share.
    table = FFCVFile(copy).table
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
    end = int(np.frombuffer(content[:24], format.HEADER)[0]["allocations"])
    path.write_bytes(content[: end - 8] + b"theirs!\n" + content[end:])
    with pytest.raises(e.InputError, match="not packed by kdcache"):
        FFCVFile(path)
    os.mkfifo(tmp_path / "pipe.beton")
    with pytest.raises(e.InputError, match="not a plain file"):
        FFCVFile(tmp_path / "pipe.beton")
    with pytest.raises(e.NotFoundError, match="there is no file"):
        FFCVFile(tmp_path / "none.beton")


def forge(path, change_table=None, change_notes=None, change_header=None, version=1):
    """Rewrite parts of a file with digests that fit."""
    content = path.read_bytes()
    header = np.frombuffer(content[:24], format.HEADER).copy()
    file = FFCVFile(path)
    start = 24 + file.layout.descriptors.nbytes
    end = int(header[0]["allocations"])
    table = np.frombuffer(bytearray(content[start : start + file.table.nbytes]), file.layout.table)
    allocations = np.frombuffer(content[end:], format.ALLOCATION).copy().reshape(-1, 2)
    descriptors = file.layout.descriptors.copy()
    if change_table:
        change_table(table, allocations)
    if change_header:
        change_header(header[0], descriptors)
    head = header.tobytes() + descriptors.tobytes() + table.tobytes()
    notes = json.loads(canonical(file._headers.notes))
    notes["table"] = hashlib.sha256(head + allocations.tobytes()).hexdigest()
    if change_notes:
        change_notes(notes)
    text = json.dumps(notes, sort_keys=True, separators=(",", ":")).encode()
    notes_at = end - format.TRAILER.size - len(canonical(file._headers.notes))
    assert notes_at + len(text) + format.TRAILER.size == end, "keep the length"
    trailer = format.TRAILER.pack(hashlib.sha256(text).digest(), len(text), version, b"kdcache\n")
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
            FFCVFile(copy)
    for change in (
        lambda h, d: h.__setitem__("page_size", 3 << 20),
        lambda h, d: d[0].__setitem__("name", b"../image"),
        lambda h, d: d[-1].__setitem__("arguments", np.void(b"\xff" * 1024)),
    ):
        shutil.copy(packed[2], copy)
        forge(copy, change_header=change)
        with pytest.raises(e.CorruptError, match="table does not fit its identity"):
            FFCVFile(copy)
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
        FFCVFile(copy)


def test_other_view_parameters_are_refused(packed, monkeypatch):
    file = FFCVFile(packed[2])
    monkeypatch.setattr(read, "draw_as", lambda views, view, *rest: draw_as(views, view + 1, *rest))
    with pytest.raises(e.MismatchError, match=r"view 0 of .* other view parameters than this kdcache draws"):
        file.parameters(0)


def test_a_file_that_claims_to_hold_mixed_views_is_refused(tmp_path):
    """Its loader would give images that nothing is mixed into."""
    path = packed_arrays(tmp_path, labelled=False)[2]

    def mixed(notes):
        about = notes["identity"]
        about["format"], about["views"]["mixed"] = 2, True
        about["teacher"]["weights"] = "a" * (64 - len('"mixed":true,'))

    forge(path, change_notes=mixed)
    with pytest.raises(e.CorruptError, match="said to hold mixed views, which are never packed; remove it"):
        FFCVFile(path)
