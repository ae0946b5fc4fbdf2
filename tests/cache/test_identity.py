"""The key of a cache counts every field of its identity."""

import hashlib
import json
import random

import pytest

from kdcache.cache import Identity
from kdcache.cache import errors as e
from kdcache.cache.identity import canonical, parse
from kdcache.tests.helpers.caches import FORMATS, identity


def flat(value, at=()):
    if not isinstance(value, dict):
        return {at: value}
    return {k: v for name, child in value.items() for k, v in flat(child, (*at, name)).items()}


def shuffled(value, rng):
    if not isinstance(value, dict):
        return value
    names = rng.sample(sorted(value), len(value))
    return {name: shuffled(value[name], rng) for name in names}


def test_the_key_does_not_depend_on_the_order_of_keys():
    about = identity()
    rng = random.Random(0)
    for _ in range(20):
        text = json.dumps(shuffled(about.model_dump(mode="json"), rng), indent=rng.choice([None, 2])).encode()
        again = parse(Identity, text, "here", "do this")
        assert again == about and again.key == about.key and canonical(again) == canonical(about)
    assert canonical(about) == canonical(identity()) and b" " not in canonical(about)
    assert about.key == hashlib.sha256(canonical(about)).hexdigest()


def test_every_field_counts_and_is_named_where_it_differs():
    about = identity()
    changed = {str: lambda v: v + "x", bool: lambda v: not v, int: lambda v: v + 1, list: lambda v: [9.0, *v[1:]]}
    other_values = {
        ("format",): None, ("teacher", "numeric"): "bf16", ("record", "precision"): "float32",
        ("data", "split"): "eval", ("evaluation", "split"): "train", ("class_map",): "0" * 64,
    }  # fmt: skip
    keys = {about.key}
    for at, value in flat(about.model_dump(mode="json")).items():
        new = other_values.get(at, changed[type(value)](value) if at not in other_values else None)
        if new is None:
            continue
        raw = about.model_dump(mode="json")
        inner = raw
        for name in at[:-1]:
            inner = inner[name]
        inner[at[-1]] = new
        other = parse(Identity, json.dumps(raw).encode(), "here", "do this")
        name = ".".join(at)
        assert about.differences(other) == [f"{name}: the cache has {value}, asked for {new}"]
        with pytest.raises(e.MismatchError, match=f"somewhere is another cache.*: {name}: the cache has"):
            about.require(other, "somewhere")
        keys.add(other.key)
    assert len(keys) == len(flat(about.model_dump(mode="json")))
    assert about.differences(identity()) == []
    dense = identity(k=None, temperatures=())
    assert [line.split(":")[0] for line in about.differences(dense)] == ["record.k", "record.temperatures"]


@pytest.mark.parametrize("kind", list(FORMATS))
def test_every_field_of_format_2_counts_and_usual_values_are_named(kind):
    """The usual values of `mixed` and `sequence` are not in the JSON, and yet are what was asked for."""
    about, plain = identity(**FORMATS[kind]), identity()
    raw = json.loads(canonical(about))
    assert ("mixed" in raw["views"]) == about.views.mixed
    assert ("sequence" in raw["views"]) == (about.views.sequence != "random")
    assert parse(Identity, canonical(about), "here", "do this") == about
    assert len({identity(**changes).key for changes in FORMATS.values()}) == len(FORMATS)
    differences = dict(line.split(": ", 1) for line in about.differences(plain))
    if about.views.mixed:
        assert differences["views.mixed"] == "the cache has True, asked for False"
    if about.views.sequence != "random":
        assert differences["views.sequence"] == "the cache has spread, asked for random"
    assert ("format" in differences) == (about.format == 2)
