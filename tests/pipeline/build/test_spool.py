"""The spool: what was computed and not committed is neither lost nor mixed up."""

import contextlib
import os
import shutil

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache.store.publish import SplitStore
from kdcache.pipeline.build import build as build_module
from kdcache.pipeline.build import spool as spool_module
from kdcache.pipeline.build.build import build
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.tests.helpers.building import (
    content,
    quiet,
    settings,
    spooled,
)

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.parametrize(("how", "saved"), [("half", 32), ("empty", 32), ("a bit", 0), ("gap", 16), ("whole", 48)])
def test_a_damaged_spool_costs_time_only(tmp_path, reference, source, monkeypatch, how, saved):
    monkeypatch.setattr(spool_module, "SPOOL_SECONDS", -1.0)
    monkeypatch.setattr(build_module, "probe", lambda *a: (1.0, 1.0))
    path, answers, answer = tmp_path / "c", [], Teacher.logits

    def stop(self, images):
        answers.append(len(images))
        if len(answers) == 3 + 4 + 4:  # the evaluation split, part 0, and the last batch of part 1
            raise ZeroDivisionError
        return answer(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "logits", stop)
        with pytest.raises(ZeroDivisionError):
            build(settings(out=str(path)), quiet, source)
    blocks = sorted(spooled(tmp_path))
    assert [b.name for b in blocks] == [f"{i:012d}-{i + 16:012d}.block" for i in (0, 16, 32)]
    if how == "half":
        os.truncate(blocks[2], blocks[2].stat().st_size // 2)
    elif how == "empty":
        blocks[2].write_bytes(b"")
    elif how == "a bit":
        data = bytearray(blocks[0].read_bytes())
        data[len(data) // 2] ^= 4
        blocks[0].write_bytes(data)
    elif how == "gap":
        blocks[1].unlink()
    assert build(settings(out=str(path)), quiet, source).teacher_images == 340 - 40 - 64 - saved
    assert content(path) == content(reference) and spooled(tmp_path) == []


def test_builds_of_one_key_in_two_places_do_not_share_a_spool(tmp_path, reference, source, monkeypatch):
    monkeypatch.setattr(spool_module, "SPOOL_SECONDS", -1.0)
    write, other = SplitStore.write_shard, iter([tmp_path / "b"])

    def interrupted(self, *args):
        if self.split == "train" and (place := next(other, None)):
            build(settings(out=str(place)), quiet, source)
        write(self, *args)

    monkeypatch.setattr(SplitStore, "write_shard", interrupted)
    assert build(settings(out=str(tmp_path / "a")), quiet, source).teacher_images == 340
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(reference)
    assert spooled(tmp_path) == []


def test_leavings_of_a_build_killed_at_its_very_end_go_with_the_next(tmp_path, reference, source):
    shutil.copytree(reference, tmp_path / "c")
    block = (
        spool_module.spool_folder(tmp_path / "c", source.identity.key)
        / "v00001-p0002-b16-cpu-0"
        / "000000000000-000000000016.block"
    )
    block.parent.mkdir(parents=True)
    block.write_bytes(b"left")
    with FileLock(block.parent / "lock"):  # by a build that was stopped here, and may wake up
        assert build(settings(out=str(tmp_path / "c")), quiet, source).teacher_images == 0
        assert block.exists()
    assert build(settings(out=str(tmp_path / "c")), quiet, source).teacher_images == 0
    assert spooled(tmp_path) == [] and list((tmp_path / "home" / "spool").iterdir()) == []


def test_each_builder_of_a_shard_has_its_own_spool_and_the_next_takes_over_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "SPOOL_SECONDS", -1.0)

    def block(value):
        return {"gaps": np.full((4, 2), value)}

    with contextlib.closing(spool_module.Spool(tmp_path / "s", 12)) as first:
        first.add(block(1), None)
        with contextlib.closing(spool_module.Spool(tmp_path / "s", 12)) as second:
            assert second.rows == 0
            second.add(block(2), None)
            second.add(block(2), None)
            second.remove()
        first.add(block(1), None)
    with contextlib.closing(spool_module.Spool(tmp_path / "s", 12)) as third:
        assert third.rows == 8 and (third.arrays()["gaps"] == 1).all()
        third.remove()
    assert list(tmp_path.iterdir()) == []


@given(
    st.lists(st.floats(0.01, 40), min_size=1, max_size=60)
    | st.builds(lambda seconds, n: [seconds] * n, st.floats(40, 60), st.integers(1, 5))
)
def test_no_more_than_a_minute_of_the_teachers_time_is_ever_at_risk(tmp_path_factory, durations):
    """Killed at the end of a batch, which is when most is lost."""
    now, saved = [0.0], [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool_module.time, "monotonic", lambda: now[0])
        patch.setattr(spool_module, "replace_file", lambda *a: saved.append(now[0]))
        with contextlib.closing(spool_module.Spool(tmp_path_factory.mktemp("spool") / "s", 100)) as spool:
            for seconds in durations:
                now[0] += seconds
                assert now[0] - saved[-1] <= 60
                spool.add({"gaps": np.zeros((1, 1))}, None)
