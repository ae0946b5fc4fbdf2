"""Formats 1 and 2 side by side: what belongs to the one is never read as the other, whatever its digests say."""

import hashlib
import json

import numpy as np
import pytest

from kdcache.cache import Cache
from kdcache.cache import errors as e
from kdcache.cache.records.pairs import partners
from kdcache.cache.store.chunks import encode_part
from kdcache.cache.store.layout import record_arrays
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers.caches import BOTH, FORMATS, Filled, identity, same

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


@pytest.fixture
def mixed(tmp_path):
    """A cache of one's own whose views are mixed and spread."""
    return Filled(tmp_path / "cache", identity(**FORMATS["mixed-and-spread"]))


@pytest.mark.parametrize("labels", [0, 1])
@pytest.mark.parametrize("k", [None, 4])
def test_a_mixed_cache_holds_one_label_a_sample_and_two_gaps_a_training_record(tmp_path, k, labels):
    written = Filled(tmp_path / "c", identity(k=k, mixed=True, labels=labels), views=5)
    cache = Cache(tmp_path / "c")
    assert (cache.identity.format, cache.identity.record.labels) == (2, 2 * labels)
    assert cache.train.labels.shape == (21, labels) and cache.evaluation.labels.shape == (9, labels)
    assert cache.read_evaluation().target_gap.shape == cache.read_evaluation().labels.shape == (9, labels)
    for view in (0, 3, 4):
        records, own = cache.read(view), cache.train.labels
        of_partners = own[partners(0, view, range(21), 21)]
        assert np.array_equal(records.labels.numpy(), np.concatenate([own, of_partners], 1))
        assert records.target_gap.shape == (21, 2 * labels)
        z, (row, column) = written.logits["train", view], np.indices((21, 2 * labels))
        gaps = z.max(1, keepdim=True).values - z[row, records.labels.long()]
        np.testing.assert_allclose(records.target_gap.numpy(), gaps, rtol=1e-3)
        assert column.size or not labels
    assert not labels or not np.array_equal(cache.read(3).labels, cache.read(4).labels)  # of two pairings
    assert verify(cache).passed


def change(path, **changes):
    """Change fields of a JSON file; `a__b` is field b of a, and None removes one."""
    about = json.loads(path.read_bytes())
    for name, value in changes.items():
        *outer, last = name.split("__")
        inner = about
        for step in outer:
            inner = inner[step]
        inner[last] = value
        if value is None:
            del inner[last]
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mixed", {"format": 1}, "such views belong to format 2"),
        ("spread", {"format": 1}, "such views belong to format 2"),
        ("mixed", {"format": None}, "such views belong to format 2"),
        ("mixed", {"views__mixed": False}, "such views belong to format 1"),
        ("mixed", {"views__mixed": None}, "such views belong to format 1"),
        ("spread", {"views__sequence": "random"}, "such views belong to format 1"),
        ("format-1", {"views__mixed": True}, "such views belong to format 2"),
        ("mixed", {"record__labels": 1}, "mixed records have two labels or none"),
        ("mixed", {"record__labels": 4}, "record.labels: Input should be less than or equal to 2"),
        ("mixed", {"views__policy": "stored"}, "views: .*imported views are neither mixed nor spread"),
        ("spread", {"views__policy": "foreign"}, "views: .*imported views are neither mixed nor spread"),
        ("spread", {"views__sequence": "sobol"}, "views.sequence: Input should be 'random' or 'spread'"),
        ("mixed", {"views__mixed": 1}, "views.mixed: Input should be a valid boolean"),
        ("mixed", {"views__mixed": "true"}, "views.mixed: Input should be a valid boolean"),
        ("mixed", {"views__pairing": 4}, "views.pairing: Extra inputs"),
        (
            "format-1",
            {"members": [{"key": "a" * 64, "weight": 0.5}, {"key": "b" * 64, "weight": 0.5}]},
            "ensembles belong to format 2",
        ),
    ],
)
def test_an_identity_that_contradicts_itself_is_refused(tmp_path, kind, changes, message):
    path = Filled(tmp_path / "c", identity(**FORMATS[kind]), views=0).cache.path
    change(path / "identity.json", **changes)
    with pytest.raises(e.CorruptError, match=message) as caught:
        Cache(path)
    text = str(caught.value)
    assert str(path / "identity.json") in text and f"or remove {path}" in text and "\n" not in text


def test_the_usual_values_spelled_out_are_the_same_cache(tmp_path):
    written = Filled(tmp_path / "c", identity())
    change(tmp_path / "c" / "identity.json", views__mixed=False, views__sequence="random", record__lacks=[])
    cache = Cache(tmp_path / "c")
    assert cache.key == written.about.key and same(cache.read(1), written.encode(cache.train, 1)[0])


@pytest.mark.parametrize("kind", BOTH)
def test_a_commit_of_the_other_format_is_refused_and_repaired(tmp_path, kind):
    written = Filled(tmp_path / "c", identity(**FORMATS[kind]))
    own = written.about.format
    for name, read in (("v00001-p0001", lambda c: c.read(1)), ("labels", lambda c: c.train.labels)):
        commit = tmp_path / "c" / "commits" / f"{name}.json"
        change(commit, format=3 - own)
        with pytest.raises(e.CorruptError) as caught:
            read(Cache(tmp_path / "c"))
        assert str(caught.value).startswith(f"{commit} has format {3 - own}, its cache has {own}; remove ")
        assert "\n" not in str(caught.value) and "run kdcache build again" in str(caught.value)
    repaired = verify(Cache(tmp_path / "c"), repair=True).repaired
    assert repaired == [f"{name} of {tmp_path / 'c'}" for name in ("labels", "v00001-p0001")]
    written.cache.train.write_labels(written.labels["train"].numpy().astype("uint8"), {})
    assert written.write(written.cache.train, 1, 1)
    assert verify(Cache(tmp_path / "c")).passed


def forge(path, file, content, commit):
    """Put a chunk in place, with a commit that fits it."""
    (path / file).write_bytes(content)
    about = json.loads((path / commit).read_bytes())
    name = file.removeprefix("eval/")
    about["files"][name] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / commit).write_text(json.dumps(about))


def test_gaps_and_labels_of_another_width_are_refused(mixed):
    """Two gaps for a record of the evaluation split, one for a mixed record, two stored labels for a sample."""
    path, train, evaluation = mixed.cache.path, mixed.cache.train, mixed.cache.evaluation
    two, one = mixed.about.record, mixed.about.record_of("eval")
    labels = Filled(path.parent / "two", identity(labels=2), views=0).cache.train.layout.labels
    commit = "commits/v00000-p0000.json"
    for store, record, file, of in (
        (evaluation, two, "eval/views/v00000/target_gap/c/0/0", f"eval/{commit}"),
        (train, one, "views/v00000/target_gap/c/0/0", commit),
        (train, labels, "labels/c/0/0", "commits/labels.json"),
    ):
        spec = record
        if record is not labels:
            spec = {s.name: s for s in record_arrays(record, store.samples, store.part)}["target_gap"]
        kept = (path / file).read_bytes(), (path / of).read_bytes()
        forge(path, file, encode_part(spec, 0, np.zeros((8, *spec.shape[1:]), spec.dtype)), of)
        with pytest.raises(e.CorruptError, match=rf"{file}: .*declares \d+ bytes of data where \d+ belong") as caught:
            _ = Cache(path).read_evaluation(), Cache(path).read(0)
        assert "\n" not in str(caught.value)
        (path / file).write_bytes(kept[0])
        (path / of).write_bytes(kept[1])
    assert verify(Cache(path)).passed


@pytest.mark.parametrize(("value", "message"), [(np.nan, "values that are not finite"), (-1, "values below zero")])
def test_a_partners_gap_that_no_teacher_gives_is_refused(mixed, value, message):
    path, store = mixed.cache.path, mixed.cache.train
    spec = {s.name: s for s in record_arrays(mixed.about.record, store.samples, store.part)}["target_gap"]
    rows = store.read_shard(1, 1)["target_gap"].copy()
    rows[3, 1] = value
    forge(path, "views/v00001/target_gap/c/1/0", encode_part(spec, 1, rows), "commits/v00001-p0001.json")
    with pytest.raises(e.CorruptError, match=f"view 1, part 1 of .*target_gap holds {message}.*kdcache build"):
        Cache(path).read(1)
    assert len(verify(mixed.cache).problems) == 1


def test_shards_of_a_cache_that_differs_in_its_format_alone_are_foreign(tmp_path):
    """The records of an unlabelled cache look alike, mixed or not."""
    plain, mixed = (Filled(tmp_path / str(i), identity(labels=0, mixed=bool(i)), seed=1).cache.path for i in range(2))
    name = "commits/v00001-p0000.json"
    assert json.loads((plain / name).read_bytes())["files"] == json.loads((mixed / name).read_bytes())["files"]
    for source, target in ((plain, mixed), (mixed, plain)):
        kept = (target / name).read_bytes()
        (target / name).write_bytes((source / name).read_bytes())
        with pytest.raises(e.MismatchError, match=r"belongs to cache .*one of the two is damaged or from elsewhere"):
            Cache(target).read(1)
        (target / name).write_bytes(kept)
