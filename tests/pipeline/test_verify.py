"""verify: replay by the live teacher, the depths of a check, and repair."""

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from kdcache.cache import Cache
from kdcache.cache.store import chunks
from kdcache.cache.store.layout import shard_name
from kdcache.pipeline import verify as verify_module
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.source import open_source
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.pipeline.verify import verify
from kdcache.pipeline.views.render import _Pixels
from kdcache.tests.helpers.building import (
    MIXED,
    PARTS,
    quiet,
    settings,
)

pytestmark = pytest.mark.usefixtures("home")


def forge(path, change, target=0, source=None):
    """Each shard of view `target`: its rows as `change` gives them, and a commit that fits."""
    cache = Cache(path)
    store = cache.train
    view = cache.train.read(target if source is None else source, None)
    rows = {name: change(getattr(view, name)).numpy() for name in ("classes", "gaps", "target_gap", "tail")}
    for part in range(PARTS):
        about = store.commit(shard_name(target, part))
        sums = store.read_shard(0, part)["tail_sums"][0] if target == 0 else None
        (path / "commits" / f"{shard_name(target, part)}.json").unlink()
        at = slice(store.rows(part).start, store.rows(part).stop)
        store.write_shard(target, part, {n: r[at] for n, r in rows.items()}, about.parameters, about.writer, sums)


@pytest.fixture(scope="module", params=["format-1", "mixed-and-spread"])
def replayed(request, taught, toy_at_hand):
    """What `taught` gives, and the same with mixed and spread views."""
    if request.param == "format-1":
        return taught
    folder = taught[2].parent
    configs = [settings(weights=str(folder / f"{epoch}.pt"), **MIXED) for epoch in (4, 5)]
    sources = [open_source(config, quiet) for config in configs]
    build(replace(configs[0], out=str(folder / "mixed")), quiet, sources[0])
    return *sources, folder / "mixed"


def test_replay_passes_on_what_was_built(replayed, toy):
    source, _, path = replayed
    report = verify(Cache(path), source)
    assert report.problems == [] and report.passed
    assert report.total_variation < 1e-6 and report.replayed == 40 + 2 * 150 and report.shards == 1 + 2 * PARTS


def test_replay_passes_on_views_that_an_earlier_version_rounded(taught, tmp_path, monkeypatch):
    """They belong to the same cache as those that are added now."""
    source, _, now = taught
    path = tmp_path / "c"
    config = settings(weights=str(now.parent / "4.pt"), views=1, out=str(path))
    with monkeypatch.context() as earlier:
        earlier.setattr(chunks, "encode_as", partial(chunks.encode_as, carry=False))
        build(config, quiet, source)
    build(replace(config, views=2), quiet, source)
    cache, by_now = Cache(path), Cache(now)
    assert cache.key == by_now.key
    assert not cache.read(0).gaps.equal(by_now.read(0).gaps) and cache.read(1).gaps.equal(by_now.read(1).gaps)
    report = verify(cache, source)
    assert report.passed and report.total_variation < 1e-6


@pytest.mark.parametrize("how", ["another view", "shifted by one", "swapped pair of samples' order"])
def test_replay_fails_on_records_that_are_not_in_their_place(replayed, tmp_path, how):
    source, _, good = replayed
    path = tmp_path / "c"
    shutil.copytree(good, path)
    if how == "another view":
        forge(path, lambda rows: rows, source=1)
    elif how == "shifted by one":
        forge(path, lambda rows: rows.roll(1, 0))
    else:
        forge(path, lambda rows: rows.view(-1, 2, rows.shape[1]).flip(1).reshape(rows.shape), target=1)
    assert verify(Cache(path)).passed  # bytes, hashes and values are sound
    (problem,) = verify(Cache(path), source).problems
    assert "is not what the teacher answers now: mean total variation" in problem and str(path) in problem


def test_replay_fails_on_a_neighbouring_checkpoint(replayed):
    source, later, path = replayed
    (problem,) = verify(Cache(path), later).problems
    assert "teacher.weights: the cache has" in problem
    # Even one that claims to be the cache's.
    forged = replace(later, identity=source.identity, teacher=replace(later.teacher, identity=source.teacher.identity))
    problems = verify(Cache(path), forged).problems
    assert len(problems) == 3 and all("mean total variation" in p for p in problems)


def test_replay_fails_on_inverted_flips(replayed, monkeypatch):
    source, _, path = replayed
    crops = _Pixels.crops
    monkeypatch.setattr(_Pixels, "crops", lambda self, index, boxes, flips: crops(self, index, boxes, ~flips))
    assert len(verify(Cache(path), source).problems) == 3


def test_replay_fails_on_batch_norm_in_training(taught, monkeypatch):
    source, _, path = taught
    answer = Teacher.logits
    state = {name: value.clone() for name, value in source.teacher.model.state_dict().items()}

    def in_training(self, images):
        assert answer(self, images).shape[1] == 12
        self.model.train()
        try:
            with torch.inference_mode():
                return self.model(images).float()
        finally:
            self.model.eval()

    monkeypatch.setattr(Teacher, "logits", in_training)
    problems = verify(Cache(path), source).problems
    source.teacher.model.load_state_dict(state)
    assert len(problems) == 3 and all("mean total variation" in p for p in problems)


def test_replay_fails_on_other_view_parameters(replayed, tmp_path):
    source, _, good = replayed
    path = tmp_path / "c"
    shutil.copytree(good, path)
    commit = path / "commits" / "v00001-p0001.json"
    about = json.loads(commit.read_bytes())
    commit.write_text(json.dumps({**about, "parameters": "0" * 64}))
    assert Cache(path).read(1) is not None
    (problem,) = verify(Cache(path), source).problems
    assert "view 1, part 1 was built with other view parameters" in problem


def test_replay_names_a_single_record_that_is_wrong(taught, tmp_path, monkeypatch):
    source, _, good = taught
    path = tmp_path / "c"
    shutil.copytree(good, path)
    first = Cache(path).read(0).classes[:, 0]
    other = int((first != first[7]).nonzero()[0])
    swapped = torch.arange(len(first))
    swapped[[7, other]] = torch.tensor([other, 7])
    forge(path, lambda rows: rows[swapped])
    (problem,) = verify(Cache(path), source).problems
    assert re.search(rf"view 0 .*: mean total variation 0.*; sample ({other}|7) differs most", problem)
    # Among more records than a toy has, the mean would not show it.
    monkeypatch.setattr(verify_module, "TOLERANCE", {"float32": 1.0})
    (problem,) = verify(Cache(path), source).problems
    assert re.search(rf"view 0, sample ({other}|7) is not what the teacher answers now: total variation 0\.", problem)


@pytest.mark.parametrize("threads", [1, 2])
def test_replay_passes_with_any_number_of_threads(taught, threads):
    source, _, path = taught
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        report = verify(Cache(path), source)
    finally:
        torch.set_num_threads(before)
    assert report.passed and report.total_variation < 0.002


def test_replay_in_another_numeric_type_goes_by_the_coarser_tolerance(taught, tmp_path, monkeypatch):
    float32, _, path = taught
    weights = str(path.parent / "4.pt")
    bf16 = open_source(settings(weights=weights, amp="bf16"), quiet)
    build(settings(weights=weights, amp="bf16", out=str(tmp_path / "bf16")), quiet, bf16)
    for cache, source in ((Cache(path), bf16), (Cache(tmp_path / "bf16"), float32), (Cache(tmp_path / "bf16"), bf16)):
        report = verify(cache, source)
        assert report.passed and report.replayed, report.problems
        assert report.total_variation <= 0.02
    assert verify(Cache(path), bf16).total_variation > 0.0001
    crops = _Pixels.crops
    monkeypatch.setattr(_Pixels, "crops", lambda self, index, boxes, flips: crops(self, index, boxes, ~flips))
    assert not verify(Cache(path), bf16).passed


def flip_a_bit(file, at=-3):
    content = bytearray(file.read_bytes())
    content[at] ^= 8
    file.write_bytes(bytes(content))


def test_each_depth_sees_what_it_looks_at(taught, tmp_path):
    path = tmp_path / "c"
    shutil.copytree(taught[2], path)
    assert verify(Cache(path), contents=False).passed
    chunk = path / "views" / "v00001" / "gaps" / "c" / "1" / "0"
    flip_a_bit(chunk)
    assert verify(Cache(path), contents=False).passed  # sizes are as committed, nothing is read
    (problem,) = verify(Cache(path)).problems
    assert f"{chunk} is not what was committed" in problem and "v00001-p0001" in problem
    chunk.write_bytes(chunk.read_bytes()[:-1])
    (problem,) = verify(Cache(path), contents=False).problems
    assert "bytes that was committed" in problem and str(chunk) in problem
    chunk.unlink()
    (problem,) = verify(Cache(path), contents=False).problems
    assert f"{chunk} is missing" in problem


def test_repair_removes_what_is_damaged_and_the_next_build_makes_it_anew(taught, tmp_path):
    source, _, good = taught
    path = tmp_path / "c"
    shutil.copytree(good, path)
    flip_a_bit(path / "views" / "v00000" / "classes" / "c" / "0" / "0")
    flip_a_bit(path / "views" / "v00001" / "tail" / "c" / "2" / "0")
    flip_a_bit(path / "prior" / "c" / "0" / "0")
    flip_a_bit(path / "labels" / "c" / "1" / "0")
    (path / "commits" / "v00001-p0000.json").write_text("{")
    looked = verify(Cache(path))
    assert len(looked.problems) == 5 and looked.repaired == []
    repaired = verify(Cache(path), repair=True)
    assert len(repaired.problems) == 5
    assert [name.split()[0] for name in repaired.repaired] == [
        "labels", "v00000-p0000", "v00001-p0000", "v00001-p0002", "prior",
    ]  # fmt: skip
    assert Cache(path).views == ()
    report = build(settings(out=str(path)), quiet, source)
    assert report.teacher_images == 64 + 64 + 22
    assert verify(Cache(path), source).passed
    for file in (p for p in good.rglob("*") if p.is_file() and "commits" not in p.parts and "scratch" not in p.parts):
        assert (path / file.relative_to(good)).read_bytes() == file.read_bytes()


def test_repair_leaves_alone_what_cannot_be_read_now(taught, tmp_path, monkeypatch):
    path = tmp_path / "c"
    shutil.copytree(taught[2], path)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    chunk = path / "views" / "v00001" / "gaps" / "c" / "1" / "0"
    opened = os.open

    def failing(file, *args, **kwargs):
        if str(file) == str(chunk):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return opened(file, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    report = verify(Cache(path), repair=True)
    (problem,) = report.problems
    assert f"{chunk} cannot be read: Input/output error" in problem and "remove" not in problem
    assert report.repaired == []
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_repair_does_not_remove_shards_for_a_damaged_identity(taught, tmp_path):
    path = tmp_path / "c"
    shutil.copytree(taught[2], path)
    identity = path / "identity.json"
    identity.write_text(identity.read_text().replace('"seed":0', '"seed":1'))
    report = verify(Cache(path), repair=True)
    assert report.problems and all(str(identity) in problem for problem in report.problems)
    assert report.repaired == [] and len(list((path / "commits").iterdir())) == 2 * PARTS + 2


def test_a_view_that_is_gone_is_a_problem(taught, tmp_path):
    path = tmp_path / "c"
    shutil.copytree(taught[2], path)
    for commit in (path / "commits").glob("v00000-*.json"):
        commit.unlink()
    (problem,) = verify(Cache(path)).problems
    assert "lacks views [0]: run kdcache build again" in problem
