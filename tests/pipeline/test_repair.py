"""verify names every damage to a cache's folder, and --repair with build brings the original back, byte for byte."""

import json
import random
import shutil

import pytest

from kdcache.cache import Cache
from kdcache.cache import errors as e
from kdcache.cache.identity import canonical
from kdcache.cache.store.chunks import same_metadata
from kdcache.pipeline.build.build import build
from kdcache.pipeline.redrawn import Redrawn
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers import damage
from kdcache.tests.helpers.building import content, quiet, settings
from kdcache.tests.helpers.caches import Filled, identity
from kdcache.tests.helpers.places import DATA

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def path(reference, tmp_path):
    """A copy of a cache that a build has made."""
    return shutil.copytree(reference, tmp_path / "c")


@pytest.fixture(scope="module")
def other(toy_at_hand, tmp_path_factory):
    """The folder of another cache, which no repair may touch."""
    folder = tmp_path_factory.mktemp("other") / "c"
    build(settings(out=str(folder), seed=1), quiet)
    return folder


def change(file, **fields):
    """Change fields of a JSON file; its spelling stays canonical."""
    about = {**json.loads(file.read_bytes()), **fields}
    file.write_text(json.dumps(about, sort_keys=True, separators=(",", ":")))


def repaired(path, source, reference):
    """What verify says of the damaged cache, after a repair and a build that give the reference again."""
    problems = verify(Cache(path)).problems
    assert not verify(Cache(path), repair=True).passed
    build(settings(out=str(path)), quiet, source)
    assert content(path) == content(reference)
    assert verify(Cache(path), source).passed
    return problems


def test_whatever_a_commit_says_is_compared_with_the_cache(path, source, reference, other):
    def rows(file):
        about = json.loads(file.read_bytes())
        first = sorted(about["files"])[0]
        about["files"][first]["rows"] = "0" * 64
        return {"files": about["files"]}

    changes = {
        "v00000-p0000": rows,
        "prior": rows,
        "labels": lambda file: {"parameters": "0" * 64},
        "v00000-p0002": lambda file: {"parameters": None},
        "v00001-p0000": lambda file: {"parameters": "1" * 64},
        "v00001-p0001": lambda file: {"key": "2" * 64},
        "v00001-p0002": lambda file: {"format": 2},
        "eval/v00000-p0000": lambda file: {"parameters": "3" * 64},
        "eval/labels": lambda file: {"name": "sizes"},
    }
    for name, of in changes.items():
        folder, _, base = name.rpartition("/")
        file = path / folder / "commits" / f"{base}.json"
        change(file, **of(file))
    problems = repaired(path, source, reference)
    assert len(problems) == len(changes)
    for wanted in (
        "commits/v00000-p0000.json names another digest of rows than",
        "commits/prior.json names another digest of rows than",
        "commits/labels.json has parameters of a view",
        "commits/v00000-p0002.json lacks parameters of a view",
        "view 1, part 0 was built with other view parameters",
        "commits/v00001-p0001.json belongs to cache 222222222222",
        "commits/v00001-p0002.json has format 2, its cache has 1",
        "eval: view 0, part 0 was built with other view parameters",
        "eval/commits/labels.json is that of sizes",
    ):
        assert sum(wanted in problem for problem in problems) == 1, (wanted, problems)


@pytest.mark.parametrize("seed", range(2))
def test_damaged_files_are_named_and_come_back(path, source, reference, other, seed):
    """One file for each commit, and many of the others. Each kind of damage meets each file in bench/damage.py."""
    rng, of_commits = random.Random(seed), {}
    for name in damage.files_of(path):
        if name != "identity.json":
            of_commits.setdefault(commit_of(name), []).append(name)
    hurt = [rng.choice(names) for names in of_commits.values()]
    for name in hurt:
        damage.do(rng.choice(damage.FILE), path, name, other)
    unnamed = {name for name in hurt if not damage.is_harmless(path, reference, name)}
    problems = repaired(path, source, reference)
    unnamed -= {name for name in unnamed for problem in problems if str(path / name) in problem}
    for name in unnamed:  # a commit that is gone is not named by its file
        view, part = int(name[-16:-11]), int(name[-9:-5])
        assert any(f"view {view} lacks parts" in p and str(part) in p for p in problems), (name, problems)


def commit_of(name):
    """The commit that names a chunk; a file that no commit names stands for itself."""
    parts = name.split("/")
    if "c" not in parts:
        return name
    at = parts.index("c")
    split = "eval/" if parts[0] == "eval" else ""
    if parts[at - 1] == "tail_sums" or "views" in parts:
        view = "v00000" if parts[at - 1] == "tail_sums" else parts[at - 2]
        return f"{split}commits/{view}-p{int(parts[at + 1]):04d}.json"
    return f"{split}commits/{parts[at - 1]}.json"


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (damage.folder_a_file, "commits"),
        (damage.folder_linked, "eval"),
        (damage.folder_a_loop, "views"),
        (damage.folder_linked, "views/v00001/gaps/c"),
        (damage.folder_a_file, "labels"),
    ],
)
def test_damaged_folders_are_named_and_come_back(path, source, reference, other, how, name):
    before = content(other)
    damage.do(how, path, name, other)
    assert repaired(path, source, reference)
    assert content(other) == before  # of a link only the link goes


def test_metadata_for_plain_zarr_is_compared_with_the_identity_and_written_again(path, reference):
    view = path / "views" / "v00001"
    for file, about in (
        (view / "gaps" / "zarr.json", {"attributes": {"nats": "as stored"}}),
        (view / "classes" / "zarr.json", {"data_type": "uint16"}),
        (path / "eval" / "labels" / "zarr.json", {"shape": [41, 1]}),
        (path / "prior" / "zarr.json", {"more": 1}),
    ):
        change(file, **about)
    (view / "zarr.json").unlink()
    (view / "tail" / "zarr.json").unlink()
    (view / "tail" / "zarr.json").mkdir()
    (path / "tail_sums" / "zarr.json").write_bytes(b"[" * 100_000)
    problems = verify(Cache(path)).problems
    assert len(problems) == 7 and all("zarr.json" in problem for problem in problems)
    assert all(problem.endswith(f"kdcache verify {path} --repair writes it again") for problem in problems)
    assert verify(Cache(path), contents=False).passed  # which reads no such file
    report = verify(Cache(path), repair=True)
    assert report.repaired == [] and len(report.mended) == 7
    assert "wrote views/v00001/gaps/zarr.json again" in report.text().splitlines()
    assert verify(Cache(path)).passed and content(path) == content(reference)


def test_other_versions_of_zarr_may_write_it_otherwise():
    whole = {"shape": [2], "attributes": {}, "storage_transformers": [], "consolidated_metadata": None, "fill": 0}
    brief = {"fill": 0, "shape": [2]}
    assert same_metadata(json.dumps(whole).encode(), json.dumps(brief).encode())
    for other in ({**brief, "fill": False}, {**brief, "fill": 0.0}, {**brief, "more": []}, {"shape": [2]}, [brief]):
        assert not same_metadata(json.dumps(other).encode(), json.dumps(brief).encode())


IDENTITY = [*damage.FILE, lambda path, rng, other: change(path, part=65)]


@pytest.mark.parametrize("how", IDENTITY, ids=lambda how: how.__name__)
def test_build_writes_a_damaged_identity_again_if_its_commits_agree(path, source, reference, other, how):
    damage.do(how, path, "identity.json", other)
    said = []
    build(settings(out=str(path)), said.append, source)
    assert said[0] == f"note: the identity in {path} was missing or damaged, and is written again"
    assert content(path) == content(reference)


def test_an_identity_that_the_commits_do_not_tell_is_left_alone(path, other):
    damage.another_caches(path / "identity.json", None, other / "identity.json")
    before = content(path)
    with pytest.raises(e.MismatchError, match="is another cache than the one asked for"):
        build(settings(out=str(path), topk=5), quiet)
    assert content(path) == before
    assert not verify(Cache(path), repair=True).passed and content(path) == before


def test_a_build_with_damaged_leases_and_decisions_goes_on(path, source, reference, tmp_path):
    """And verify names them. A shard that was decided is committed, one whose bytes are damaged is computed again."""
    shard = path / "commits" / "v00001-p0001.json"
    decided = path / "scratch" / "decided" / "train"
    for name, sound in (("v00001-p0000", True), ("v00001-p0001", False)):
        (decided / name).mkdir(parents=True)
        (path / "commits" / f"{name}.json").rename(decided / name / "commit.json")
        about = json.loads((decided / name / "commit.json").read_bytes())
        for file, stored in about["files"].items():
            (path / file).rename(decided / name / stored["sha256"])
        if not sound:
            (decided / name / stored["sha256"]).write_bytes(b"")
    (path / "leases" / "v00001-p0001.0").write_bytes(b"")
    shutil.rmtree(path / "scratch" / "decided" / "eval")
    (path / "scratch" / "decided" / "eval").write_bytes(b"no folder")
    problems = verify(Cache(path)).problems
    assert [str(decided.parent / "eval") in problems[0], "v00001-p0001.0 is no lease: the next" in problems[1]] == [
        True
    ] * 2
    assert not shard.exists()
    report = build(settings(out=str(path)), quiet, source)
    assert report.teacher_images == 64 and content(path) == content(reference)


def test_repair_clears_what_builders_left_and_finishes_what_they_decided(path, reference):
    name, decided = "v00001-p0001", path / "scratch" / "decided" / "train" / "v00001-p0001"
    decided.mkdir(parents=True)
    about = json.loads((path / "commits" / f"{name}.json").read_bytes())
    (path / "commits" / f"{name}.json").rename(decided / "commit.json")
    for file, stored in about["files"].items():
        (path / file).rename(decided / stored["sha256"])
    shutil.rmtree(path / "leases")
    (path / "leases").symlink_to("elsewhere")
    report = verify(Cache(path), repair=True)
    assert report.mended == ["cleared away what builders had left"] and len(report.problems) == 1
    assert verify(Cache(path)).passed and content(path) == content(reference)


def test_parameters_are_compared_where_the_cache_tells_them(tmp_path, reference, monkeypatch):
    """Sizes of image files stand in the cache; images in memory have one size, which their digests give away."""
    old = shutil.copytree(DATA / "format-2" / "cache", tmp_path / "old")
    (tmp_path / "old" / "scratch").mkdir()
    look = Redrawn(Cache(old))
    for store, views in ((look._cache.evaluation, 1), (look._cache.train, 2)):
        for view in range(views):
            for part in range(store.parts):
                look.require(store, view, part)
    assert look.fitting == 1 + 2 * 2 and look.unknown == []
    change(old / "commits" / "v00001-p0001.json", parameters="0" * 64)
    (problem,) = verify(Cache(old), repair=True).problems
    assert "view 1, part 1 was built with other view parameters" in problem
    assert Cache(old).train.committed() == {0: {0, 1}, 1: {0}}
    monkeypatch.setattr(Redrawn, "_fitting", lambda *a: None)  # as of images that are too large to be tried
    report = verify(Cache(reference))
    assert report.passed and "no commit tells how large the images of kd_toy:images are" in report.text()


def test_a_foreign_renderer_is_told(tmp_path):
    report = verify(Filled(tmp_path / "c", identity()).cache)
    assert report.passed and report.unknown == [
        f"the view parameters were not compared: {tmp_path / 'c'} was rendered by toy, not by torch-uint8-1"
    ]


def test_no_shard_is_removed_if_none_has_the_parameters_that_are_drawn_now(path, monkeypatch):
    """Then it is the drawing that differs, not the commits."""
    monkeypatch.setattr(Redrawn, "_digest", lambda *a: "0" * 64)
    before = content(path)
    report = verify(Cache(path), repair=True)
    assert len(report.problems) == 7 and report.repaired == [] and content(path) == before


def test_flips_in_commits_and_metadata_are_named_or_harmless(path, reference):
    rng, seen = random.Random(5), {"found": 0, "writer": 0}
    names = [name for name in damage.files_of(path) if name.endswith(".json") and name != "identity.json"]
    for name in rng.choices(names, k=40):
        good = (path / name).read_bytes()
        damage.flipped(path / name, rng, None)
        bad = (path / name).read_bytes()
        if verify(Cache(path)).passed:
            assert "commits/" in name and damage.without_writer(bad) == damage.without_writer(good), (name, bad)
            seen["writer"] += 1
        else:
            seen["found"] += 1
        (path / name).write_bytes(good)
    assert seen["found"] > 20
    assert (
        content(path) == content(reference) and canonical(Cache(path).identity) == (path / "identity.json").read_bytes()
    )
