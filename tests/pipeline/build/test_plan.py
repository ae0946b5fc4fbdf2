"""A build is settled once: each default and each dataset is asked for once, and what runs later reads the plan."""

from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch

from kdcache.cache.errors import InputError
from kdcache.cache.home import caches_folder
from kdcache.pipeline.build import build as build_module
from kdcache.pipeline.build import source as source_module
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.plan import plan_build
from kdcache.pipeline.build.source import draft_build, open_teacher
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.tests.helpers.building import quiet, settings
from kdcache.train.teach import build_and_teach

pytestmark = pytest.mark.usefixtures("home")


def test_a_plan_has_no_setting_left_open(source):
    """Of what may be None, the folder means the usual place, workers the cores, and elsewhere that it is here."""
    plan = plan_build(BuildConfig("kd_toy:net", "kd_toy:images"), source)
    assert (plan.views, plan.batch, plan.compile, plan.any_numeric) == (16, 150, "no", True)
    assert {field.name for field in fields(plan) if getattr(plan, field.name) is None} == {
        "folder",
        "workers",
        "elsewhere",
    }
    assert plan.key == source.identity.key and plan.path == caches_folder() / plan.key
    with pytest.raises(FrozenInstanceError):
        plan.views = 3


def test_what_is_asked_for_goes_before_the_defaults(source):
    asked = settings(views=3, batch_size=9, out="there", compile=True, amp="bf16", workers=2, views_per_decode=7)
    plan = plan_build(asked, source)
    assert (plan.views, plan.batch, plan.path, plan.compile) == (3, 9, Path("there"), "must")
    assert (plan.workers, plan.views_per_decode, plan.any_numeric, plan.allow_low_accuracy) == (2, 7, False, True)
    with pytest.raises(InputError, match=r"--views 0: at least one view is needed"):
        plan_build(settings(views=0), source)


def test_the_place_of_a_plan_goes_by_its_identity(source):
    """As where a published cache by the teacher in the other numeric type is taken."""
    identity = source.identity.model_copy(update={"part": 32})
    plan = plan_build(settings(), source)
    other = replace(plan, source=replace(source, identity=identity))
    assert other.key != plan.key and other.path == caches_folder() / other.key


def test_data_and_defaults_are_asked_for_once(tmp_path, monkeypatch):
    asked = []
    opened, defaults = source_module.open_data, source_module.defaults_for
    monkeypatch.setattr(source_module, "open_data", lambda *a, **k: asked.append(a[1]) or opened(*a, **k))
    monkeypatch.setattr(source_module, "defaults_for", lambda data: asked.append("defaults") or defaults(data))
    result, packed = build_and_teach(settings(views=1), str(tmp_path / "shared"), say=quiet, store="hdf5")
    assert asked == ["train", "eval", "defaults"]
    assert result.teacher_images == 190 and packed.views == 1 and packed.key == result.key


def test_whatever_runs_reads_the_plan(tmp_path, source, monkeypatch):
    """Nothing that is changed later, in the environment or in the table of defaults, changes a build."""
    of_two_views = replace(source, defaults=replace(source.defaults, views=2))
    plan = plan_build(settings(views=None, out=str(tmp_path / "c")), of_two_views)
    monkeypatch.setattr(source_module, "defaults_for", None)
    monkeypatch.setattr(build_module, "open_source", None)
    result = build_module.carry_out(plan, quiet)
    assert (result.views, result.teacher_images, result.path) == (2, 340, tmp_path / "c")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"augment": "crap"}, "unknown operation 'crap' in view policy 'crap': did you mean crop"),
        ({"out": "s3://bucket/c"}, "caches are built in folders"),
        ({"out": "c.beton"}, "a cache is built in a folder; with --store ffcv the file lies beside it"),
        ({"device": "meta"}, "device 'meta' cannot be used here"),
    ],
)
def test_what_no_teacher_can_make_good_is_an_error_before_one_is_opened(monkeypatch, wrong, words):
    monkeypatch.setattr(source_module, "load_teacher", None)
    with pytest.raises(InputError, match=words):
        draft_build(settings(**wrong))


def test_a_draft_becomes_the_same_source_with_the_weights_that_it_is_given(taught):
    source, _, path = taught
    draft = draft_build(settings())
    assert draft.policy == "crop,flip" and len(draft.train) == 150 and len(draft.evaluation) == 40
    found = open_teacher(draft.with_weights(path.parent / "4.pt"))
    assert found.identity == source.identity and draft.config.weights is None
    assert found.train is draft.train and found.defaults is draft.defaults


def test_what_is_wrong_with_the_registry_is_said_before_anything_is_taught(tmp_path, monkeypatch):
    monkeypatch.setattr(Teacher, "logits", None)
    monkeypatch.setattr(torch.optim, "SGD", None)
    with pytest.raises(InputError, match="no registry is named: give --registry URL"):
        build_and_teach(BuildConfig("resnet8"), publish=True, say=quiet)
    with pytest.raises(InputError, match="can only be read"):
        build_and_teach(BuildConfig("resnet8"), "http://127.0.0.1:9/kd", publish=True, say=quiet)
    assert not (tmp_path / "home" / "teachers").exists()
