"""Teachers' weights: published with a cache, found by others in every kind of registry, never believed unchecked."""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcache.cache import care, open_cache
from kdcache.cache import errors as e
from kdcache.cache.home import caches_folder, home, open_registry, registry_beside, teachers_folder, weights_file
from kdcache.cache.registry.teachers import SharedTeachers
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.share import push
from kdcache.pipeline.teachers import weightstore
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.pixels import Wanted
from kdcache.pipeline.teachers.teacher import Teacher, load_teacher
from kdcache.pipeline.teachers.weights import read_weights, weights_hash
from kdcache.tests.helpers.caches import Filled
from kdcache.tests.helpers.members import BUILD, another, only, published, told, works
from kdcache.tests.helpers.registries import about, age, collect, quiet, refused, run
from kdcache.tests.helpers.servers import web_server
from kdcache.train import teach as teach_module

pytestmark = pytest.mark.usefixtures("impatient", "own_home")


@pytest.fixture
def idle(monkeypatch):
    """Nothing is taught from here on; the images that teachers answer for, by call."""
    asked, answer = [], Teacher.logits
    monkeypatch.setattr(teach_module, "_teach", lambda *a, **k: pytest.fail("a teacher was taught"))
    monkeypatch.setattr(Teacher, "logits", lambda self, images: asked.append(len(images)) or answer(self, images))
    return asked


# ---- two members ----


def test_a_second_member_teaches_and_computes_nothing_and_verifies(first, member, root, idle, tmp_path):
    member("a", first)
    works(f"{BUILD} --registry {root} --push")
    weights = open_registry(root).cache(open_registry(root).keys()[0]).identity.teacher.weights
    assert list(open_registry(root).teachers.sizes()) == [weights]
    member("b")
    del idle[:]
    built = works(f"{BUILD} --registry {root} --json")
    facts = json.loads(built.stdout)
    assert idle == [] and facts["teacher_images"] == 0 and facts["key"] == only().key == open_registry(root).keys()[0]
    assert f"using the one of cache {only().key[:12]} in {root}" in built.stderr
    assert "867 records replayed" in works(f"verify {only().key}").output  # without the registry
    # And so it is for one who has nothing of it here, and for a student with the teacher beside.
    member("c")
    works(f"verify {facts['key']} --registry {root} --replay 8")
    member("d")
    train = "train --online --loss kd --student resnet8 --epochs 1 --batch-size 512"
    works(f"{train} --cache {facts['key']} --registry {root} --out run")
    assert weights_file(weights).exists()
    listed = run(f"ls --registry {root}")
    assert "with its teacher" in listed.output


def test_other_caches_by_the_same_teacher(first, member, tmp_path, idle):
    root = str(tmp_path / "shared")
    member("a", first)
    key, weights = published(root)
    member("b")
    more = json.loads(works(f"build --teacher resnet8 --views 2 --registry {root} --push --json").stdout)
    assert more["key"] == key and more["teacher_images"] == 1442
    member("c")
    # Other records of the same images: the key is new, the teacher is not, and lies there once.
    works(f"build --teacher resnet8 --views 1 --topk 3 --registry {root} --push")
    unlabelled = works(f"{BUILD} --unlabelled --registry {root} --push --json")
    assert len(open_registry(root).keys()) == 3 and json.loads(unlabelled.stdout)["teacher_top1"] is None
    assert list(open_registry(root).teachers.sizes()) == [weights]


def test_who_joins_a_build_in_a_shared_folder_takes_its_teacher(first, member, tmp_path, idle, monkeypatch):
    """The identity is there, and no view yet."""
    root = tmp_path / "shared"
    member("a", first)
    shutil.rmtree(caches_folder())
    with monkeypatch.context() as patch:
        patch.setattr(
            "kdcache.pipeline.build.builder.Builder.build", lambda *a: (_ for _ in ()).throw(ZeroDivisionError)
        )
        with pytest.raises(ZeroDivisionError):
            run(f"{BUILD} --registry {root} --push")
    assert open_registry(str(root)).cache(open_registry(str(root)).keys()[0]).views == ()
    member("b")
    works(f"{BUILD} --registry {root} --push")
    (key,) = open_registry(str(root)).keys()
    assert open_registry(str(root)).cache(key).views == (0,)


def test_of_several_teachers_one_is_chosen(first, member, root, idle):
    member("a", first)
    key, weights = published(root)
    other = json.loads(works(f"{BUILD} --weights {another()} --registry {root} --push --json").stdout)["key"]
    theirs = open_registry(root).cache(other).identity.teacher.weights
    member("b")
    line = told(f"{BUILD} --registry {root}", "several teachers resnet8 on this digits data")
    for one, by in ((weights, key), (theirs, other)):
        assert f"--weights {one[:12]} of cache {by[:12]} in {root} (published by " in line
    assert not caches_folder().exists()
    told(f"{BUILD} --registry {root} --weights 0123456", "none begin so")
    del idle[:]
    assert json.loads(works(f"{BUILD} --registry {root} --weights {theirs[:12]} --json").stdout)["key"] == other
    assert idle == []
    assert works(f"verify {other} --weights {theirs[:8]} --replay 8").exit_code == 0
    assert run(f"verify {other} --weights {weights[:8]} --registry {root} --replay 8").exit_code == 1


def test_a_file_that_is_gone_was_published(first, member, root, idle):
    member("a", first)
    given = another()
    key = json.loads(works(f"{BUILD} --weights {given} --json").stdout)["key"]
    Path(given).unlink()
    pushed = works(f"push {key} --registry {root} --json")
    assert json.loads(pushed.stdout)["teacher"] == "published" and "are published too" in pushed.stderr
    assert json.loads(works(f"push {key} --registry {root} --json").stdout)["teacher"] == "there"
    member("b")
    assert json.loads(works(f"verify {key} --registry {root} --replay 8 --json").stdout)["passed"]


def test_kept_back_it_is_not_there_and_that_is_said(first, member, tmp_path, idle):
    root = str(tmp_path / "shared")
    member("a", first)
    key = only().key
    assert json.loads(works(f"push {key} --registry {root} --no-teacher --json").stdout)["teacher"] == "kept back"
    works(f"{BUILD} --topk 3 --registry {root} --push --no-teacher")
    assert open_registry(root).teachers.sizes() == {}
    assert json.loads(run(f"ls --registry {root} --json").stdout)[-1]["teacher_weights"] is None
    member("b")
    refused(f"verify {key} --registry {root}", f"are neither here nor in {root}: give --weights FILE")
    refused(f"train --online --loss kd --cache {key} --registry {root}", f"are neither here nor in {root}")
    told(f"{BUILD} --registry {root}", "run kdcache push", "kdcache teach teaches another")
    works(f"pull {key} --registry {root}")
    refused(f"verify {key}", "are not here: give --weights FILE, or --registry URL")
    # Later it is published after all.
    member("a")
    works(f"push {key} --registry {root}")
    member("b")
    works(f"verify {key} --registry {root} --replay 8")


def test_a_web_server_serves_teachers_too(first, member, tmp_path, idle):
    member("a", first)
    key, weights = published(tmp_path / "shared")
    with web_server(tmp_path / "shared") as address:
        member("b")
        works(f"verify {address}/caches/{key} --replay 8")
        assert weights_file(weights).exists()
        member("c")
        built = works(f"{BUILD} --registry {address} --weights {weights} --json")
        assert json.loads(built.stdout)["teacher_images"] == 0
        member("d")
        told(f"{BUILD} --registry {address} --weights {weights[:12]}", "none begin so")


def test_a_registry_that_cannot_be_listed_is_no_reason_to_teach_in_silence(member, tmp_path, monkeypatch):
    taught = []
    monkeypatch.setattr(teach_module, "_teach_once", lambda *a: taught.append(1) or pytest.skip.Exception)
    member("a")
    with web_server(tmp_path) as address:
        result = run(f"{BUILD} --registry {address}")
    assert taught and "cannot be listed, so no teacher is looked for there" in result.output


def test_shown_otherwise_the_same_weights_are_replayed_as_the_cache_was_built(first, member, tmp_path, idle):
    """There is one file of weights, and its notes are those of the first cache by them."""
    root = tmp_path / "shared"
    member("a", first)
    key, weights = published(root)
    brighter = json.loads(works(f"{BUILD} --teacher-mean 0.3 --registry {root} --push --json").stdout)["key"]
    assert brighter != key and list(open_registry(str(root)).teachers.sizes()) == [weights]
    member("b")
    for one in (key, brighter):
        assert json.loads(works(f"verify {one} --registry {root} --replay 64 --json").stdout)["total_variation"] == 0


@pytest.mark.parametrize("name", ["squeezenet1_1", "timm/test_resnet"])
def test_what_is_filed_is_the_teacher_that_was_used(name, tmp_path):
    """Whatever its source: the same identity and the same answers, to the bit."""
    device, data = torch.device("cpu"), open_data("digits", "train")
    torch.save(build_network(name, 1000, 224).state_dict(), "given.pth")
    given = load_teacher(name, data, device, weights="given.pth", wanted=Wanted(std=(0.3, 0.3, 0.3)))
    weightstore.keep(given, quiet)
    filed = load_teacher(name, data, device, weights=str(weights_file(given.identity.weights)))
    assert filed.identity == given.identity and filed.class_names is given.class_names is None
    images = torch.randint(0, 256, (2, 3, given.input_size, given.input_size), dtype=torch.uint8)
    assert filed.logits(images).equal(given.logits(images))


def test_weights_that_safetensors_does_not_hold_are_said(first, member, tmp_path):
    member("a", first)
    given = load_teacher("resnet8", open_data("digits", "train"), torch.device("cpu"))
    given.model.network.register_buffer("odd", torch.zeros(2, dtype=torch.complex128))
    lines = []
    weightstore.keep(replace(given, identity=given.identity.model_copy(update={"weights": "e" * 64})), lines.append)
    assert lines == ["note: the teacher's weights are not filed, safetensors has no torch.complex128"]


# ---- in one's own home ----


def test_the_teacher_of_a_cache_here_is_taken(first, member, idle):
    member("a", first)
    (taught,) = teachers_folder().glob("digits-*/resnet8.safetensors")
    taught.unlink()
    key = only().key
    assert json.loads(works("build --teacher resnet8 --views 2 --json").stdout)["key"] == key
    weights_file(only().identity.teacher.weights).unlink()
    refused(f"verify {key}", "are not here")
    told("build --teacher resnet8 --views 3", "whose weights are not here: give --registry URL")


def test_a_cache_from_before_weights_were_filed_is_pushed_with_the_taught_ones(first, member, root, idle):
    member("a", first)
    weights = only().identity.teacher.weights
    weights_file(weights).unlink()
    works(f"verify {only().key} --replay 8")
    assert json.loads(works(f"push {only().key} --registry {root} --json").stdout)["teacher"] == "published"
    key = only().key
    member("b")
    works(f"verify {key} --registry {root} --replay 8")
    (taught,) = first.glob("teachers/digits-*/resnet8.safetensors")
    state, notes = read_weights(weights_file(weights))
    assert weights_hash(state) == weights
    assert {name: read_weights(taught)[1][name] for name in ("mean", "std", "class_names", "input_size")}.items() <= (
        notes.items()
    )


def test_weights_that_are_nowhere_are_said_and_the_cache_is_published(tmp_path, root):
    cache = Filled(tmp_path / "c", about()).cache
    lines = []
    assert push(cache.path, root, say=lines.append).teacher == "not here"
    assert any("not published, so that others cannot replay" in line for line in lines)
    assert open_registry(root).cache(cache.key).views == (0, 1)


def test_a_cache_that_lies_in_a_registry_is_replayed_by_its_path(first, member, tmp_path):
    member("a", first)
    key, _ = published(tmp_path / "shared")
    member("b")
    works(f"verify {tmp_path}/shared/caches/{key} --replay 8")
    assert registry_beside(caches_folder() / key) is None


# ---- what others may have put there, and what stops in between ----


class Code:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_what_is_not_what_its_name_says_is_refused_and_not_kept(first, member, root, idle, tmp_path):
    member("a", first)
    key, weights = published(root)
    shared = open_registry(root)
    good, at = shared.teachers.read(weights), f"teachers/{weights}.safetensors"
    state = load_file(weights_file(weights))
    save_file({**state, "fc.bias": state["fc.bias"] + 1}, "other.safetensors")
    torch.save({"fc.bias": Code()}, "code")
    header = good.index(b'input_size\\": 8')
    damaged = {
        "cut": good[: len(good) // 2],
        "empty": b"",
        "a bit": good[:-5] + bytes([good[-5] ^ 1]) + good[-4:],
        "others": Path("other.safetensors").read_bytes(),
        "code": Path("code").read_bytes(),
        "notes": good[:header] + good[header:].replace(b'input_size\\": 8', b'input_size\\": 9', 1),
    }
    for content in damaged.values():
        assert content != good
        shared.objects.replace(at, content)
        member("b")
        advice = "ask whoever keeps the registry to remove it, then kdcache push publishes it again"
        assert advice in refused(f"verify {key} --registry {root}", f"{root}/{at}")
        assert not weights_file(weights).exists() and not Path("harm").exists()
    # What the line says helps.
    member("a")
    assert json.loads(works(f"push {key} --registry {root} --json").stdout)["teacher"] == "there"
    shared.teachers.remove(weights)
    assert json.loads(works(f"push {key} --registry {root} --json").stdout)["teacher"] == "published"
    assert shared.teachers.read(weights) == good
    weights_file(weights).write_bytes(damaged["a bit"])
    refused(f"verify {key}", f"{weights_file(weights)} holds the weights ")


def test_a_huge_file_is_not_read_and_a_link_not_followed(first, member, tmp_path):
    member("a", first)
    key, weights = published(tmp_path / "shared")
    file = tmp_path / "shared/teachers" / f"{weights}.safetensors"
    member("b")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    refused(f"verify {key} --registry {tmp_path}/shared", "symbolic link")
    file.unlink()
    with file.open("wb") as f:
        f.truncate(5 * 10**9)
    refused(f"verify {key} --registry {tmp_path}/shared", "longer than the")


def test_a_hash_that_is_a_path_reads_nothing(tmp_path, root):
    usual = about().teacher
    for weights in ("../../etc/passwd", "", "A" * 64, "a" * 63, "a" * 64 + "\n"):
        teacher = usual.model_copy(update={"weights": weights})
        for ask in (open_registry(root).teachers.has, open_registry(root).teachers.read, weights_file):
            with pytest.raises(e.CorruptError, match="not the hash of a teacher's weights"):
                ask(weights)
        with pytest.raises(e.CorruptError):
            weightstore.find_weights(teacher, [], quiet)


@pytest.mark.parametrize("after", [False, True])
def test_a_push_that_is_killed_at_the_teacher_goes_on(first, member, root, after, monkeypatch):
    member("a", first)
    key, weights = only().key, only().identity.teacher.weights
    real = SharedTeachers.add

    def dies(self, weights, content):
        if after:
            real(self, weights, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SharedTeachers, "add", dies)
        assert run(f"push {key} --registry {root}").exit_code == 130
    assert open_registry(root).cache(key).views == () and open_registry(root).teachers.has(weights) is after
    assert json.loads(works(f"push {key} --registry {root} --json").stdout)["teacher"] == (
        "there" if after else "published"
    )
    member("b")
    works(f"verify {key} --registry {root} --replay 8")


def _die_writing(key, root):
    def die(path, *args, **options):
        if "teachers" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return link(path, *args, **options)

    link, os.link = os.link, lambda a, b, **o: die(b) if "teachers" in str(b) else link(a, b, **o)
    push(key, root, say=quiet)


def test_a_push_that_is_killed_while_it_writes_leaves_no_half_of_it(first, member, tmp_path):
    member("a", first)
    root, key = str(tmp_path / "shared"), only().key
    process = multiprocessing.get_context("fork").Process(target=_die_writing, args=(key, root))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and open_registry(root).teachers.sizes() == {}
    works(f"push {key} --registry {root}")
    member("b")
    works(f"verify {key} --registry {root} --replay 8")


def test_several_who_push_at_once_leave_one(first, member, root):
    member("a", first)
    content = weights_file(only().identity.teacher.weights).read_bytes()
    weights = only().identity.teacher.weights
    assert open_registry(root).teachers.add(weights, content) and not open_registry(root).teachers.add(
        weights, b"other"
    )
    assert open_registry(root).objects.create(f"teachers/{weights}.safetensors", b"other") is False
    assert open_registry(root).teachers.read(weights) == content


# ---- care ----


def test_gc_lists_the_teachers_that_no_cache_there_names(first, member, root, monkeypatch):
    member("a", first)
    key, weights = published(root)
    shared = open_registry(root)
    shared.teachers.add("b" * 64, b"of a cache that is gone")
    removed = run(f"rm {key} --registry {root} --yes")
    assert f"its teacher's weights stay ({root}/teachers/{weights}.safetensors)" in removed.output
    assert list(care.leavings(0, root)) == []  # younger than an hour
    monkeypatch.setattr(care, "HOUR", -60)
    listed = list(care.leavings(-1, root))
    assert {one.path for one in listed} == {f"{root}/teachers/{w}.safetensors" for w in ("b" * 64, weights)}
    works(f"push {key} --registry {root} --name best")  # needed again, since it was listed
    found = care.gc(listed, True)
    kept = {one["path"].rpartition("/")[2][:64]: one["kept"] for one in found["found"]}
    assert kept["b" * 64] is None and "needed again" in kept[weights] and found["freed"] == 23
    assert list(shared.teachers.sizes()) == [weights] and list(care.leavings(-1, root)) == []
    # Of a cache that cannot be read nobody knows what it names.
    shared.teachers.add("c" * 64, b"x")
    shared.objects.create(f"caches/{'d' * 64}/identity.json", b"{")
    assert list(care.leavings(-1, root)) == []


def test_gc_lists_the_teachers_that_no_cache_here_names(first, member, tmp_path):
    member("a", first)
    mine = weights_file(only().identity.teacher.weights)
    unnamed, young = (teachers_folder() / f"{digit * 64}.safetensors" for digit in "bc")
    for path in (unnamed, young):
        path.write_bytes(b"12345")
    for path in (mine, unnamed):
        age(path)
    assert [one["path"] for one in collect("gc --older 60")["found"]] == []
    assert [one["path"] for one in collect("gc")["found"]] == [str(unnamed)]
    (caches_folder() / "stray").mkdir()
    assert collect("gc --delete")["found"] == []
    (caches_folder() / "stray").rmdir()
    assert collect("gc --delete")["freed"] == 5
    assert mine.exists() and young.exists() and not unnamed.exists()


def test_info_says_where_the_weights_are(first, member, root, tmp_path):
    member("a", first)
    key, weights = published(root)
    assert json.loads(works(f"info {key} --json").stdout)["teacher_weights"] == str(weights_file(weights))
    member("b")
    there = json.loads(works(f"info {key} --registry {root} --json").stdout)
    assert there["teacher_weights"] == f"{root}/teachers/{weights}.safetensors"
    works(f"pull {key} --registry {root}")
    assert "weights      of the teacher are not here" in works(f"info {key}").output
    assert open_cache(key).identity.teacher.weights == weights and home().exists()
