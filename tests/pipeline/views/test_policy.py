"""Policies are read from text, refused where they are wrong, and written in one way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache.errors import InputError
from kdcache.pipeline.views.policy import NAMED, OPERATIONS, check_policy, parse_policy

OLD = ["none", "flip", "crop", "crop,flip", "rrc", "rrc,flip"]


@pytest.mark.parametrize("policy", OLD)
def test_the_policies_of_format_1_are_written_as_they_were(policy):
    assert check_policy(policy) == policy
    assert check_policy(policy.replace(",", " , ")) == policy


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [
        ("flip,crop", "crop,flip"),
        ("flip(0.5),rrc(0.08,1)", "rrc,flip"),
        ("rrc(0.25)", "rrc(0.25,1)"),
        ("erase, randaugment, flip, rrc", "rrc,flip,randaugment(2,9),erase(0.25)"),
        ("cutmix,mixup(0.2),crop", "crop,mixup(0.2),cutmix(1)"),
        ("mixup(1.0)", "mixup(1)"),
        ("trivial()", "trivial"),
        ("color(0.4)", "color(0.4,0.3,0.3,0)"),
        ("funmatch", "rrc,flip,mixup(1)"),
        ("three-augment,cutmix(1)", "rrc,flip,three,color(0.3,0.3,0.3,0),cutmix(1)"),
    ],
)
def test_the_order_is_by_stage_and_every_argument_is_written(typed, canonical):
    assert check_policy(typed) == canonical
    assert check_policy(canonical) == canonical


@pytest.mark.parametrize(
    ("typed", "error"),
    [
        ("randaug(2,9)", "unknown operation 'randaug'.*did you mean.*randaugment"),
        ("crop,flop", "unknown operation 'flop'.*did you mean.*flip"),
        ("crop,rrc", "two crops"),
        ("flip,flip", "names flip twice"),
        ("funmatch,mixup(0.2)", "names mixup twice"),
        ("flip(1.5)", "p 1.5 is not from 0 to 1"),
        ("flip(nan)", "p nan is not from 0 to 1"),
        ("randaugment(2.5,9)", "n '2.5' is not a whole number"),
        ("erase(x)", "p 'x' is not a number"),
        ("gray(0.1,0.2)", r"gray in .* has 2 arguments: write gray\(p\)"),
        ("three(1)", "has 1 arguments: write three, without arguments"),
        ("rrc(1,0.5)", "rrc"),
        ("rrc(0.08,1", "cannot be read"),
        ("crop,,flip", "cannot be read"),
        ("", "cannot be read"),
        ("crop,", "cannot be read"),
        ("none,flip", "unknown operation 'none'"),
        ("mixup(0.33)", "0.33"),
    ],
)
def test_what_is_wrong_is_one_clear_line(typed, error):
    with pytest.raises(InputError, match=error) as caught:
        parse_policy(typed)
    assert "\n" not in str(caught.value)


def test_named_policies_are_policies():
    for name, text in NAMED.items():
        assert check_policy(name) == text


@given(st.text(max_size=30))
def test_any_text_is_a_policy_or_refused(text):
    try:
        canonical = check_policy(text)
    except InputError:
        return
    assert check_policy(canonical) == canonical


@given(st.lists(st.sampled_from(sorted(OPERATIONS)), unique=True, max_size=6))
def test_every_order_of_typing_is_one_policy(names):
    names = [name for name in names if name != "crop"]
    assert check_policy(",".join(names) or "none") == check_policy(",".join(reversed(names)) or "none")
