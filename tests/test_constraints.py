"""Lists of ids for single positions: their bits, which position has which, and what is wrong with a request's."""

import numpy as np
import pytest
from toys import MASK, Toy

from unmask import Ancestral, Categorical, Confidence, Sampler
from unmask.constraints import Constraints

VOCAB = 70


def allowed(constraints, lists):
    """The ids that each position may draw, read from the bits."""
    words = constraints.bits[lists].view(np.uint32)
    ids = np.arange(VOCAB)
    return [set(ids[row[ids // 32] >> ids % 32 & 1 == 1]) for row in words]


def test_bits_hold_the_lists():
    everything = set(range(VOCAB))
    constraints = Constraints(VOCAB, begin_suppress=(2, 69), allow=[{1: (2, 31, 32), 3: (69,)}, None, {0: (2, 3)}])
    first, second, third = (constraints.of(i, np.array([1, 3]), 4) for i in range(3))
    assert first.dtype == np.int32
    assert allowed(constraints, first) == [everything, {31, 32}, everything, {69}]
    assert allowed(constraints, second) == [everything, everything - {2, 69}, everything, everything]
    assert allowed(constraints, third) == [{2, 3}, everything - {2, 69}, everything, everything]
    assert first[0] == second[0] == 0 and not Constraints(VOCAB) and constraints


def test_one_mapping_serves_all_samples():
    constraints = Constraints(VOCAB, allow={2: [5, 5, 6]})
    for index in (0, 1, 1000):
        assert allowed(constraints, constraints.of(index, np.array([2]), 3))[2] == {5, 6}


BAD = {
    "no mapping": ({"allow": 5}, TypeError, "allow must be a mapping from positions to ids or a list of them, got 5"),
    "no mappings": ({"allow": [{}, 6]}, TypeError, "allow must be a list of mappings from positions to ids, got 6"),
    "no list": ({"allow": {3: 5}}, TypeError, r"allow\[3\] must be a list of ids, got 5"),
    "text": ({"allow": {3: "5"}}, TypeError, r"allow\[3\] must be a list of ids, got '5'"),
    "no id": ({"allow": {3: ("5",)}}, TypeError, r"allow\[3\] must hold ids from 0 to 69, got '5'"),
    "empty": ({"allow": {3: ()}}, ValueError, r"allow\[3\] must leave an id that is not suppressed, got \[\]"),
    "no position": ({"allow": {True: (5,)}}, ValueError, "allow must have positions from 0, got True"),
    "all": ({"suppress": range(VOCAB)}, ValueError, "suppress must leave an id that is not suppressed, got all 70"),
    "all at first": ({"begin_suppress": range(VOCAB)}, ValueError, r"begin_suppress must leave an id .* got \[\]"),
    "beyond": ({"begin_suppress": (VOCAB,)}, ValueError, "begin_suppress must hold ids from 0 to 69, got 70"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lists_are_named(name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        Constraints(VOCAB, **options)


@pytest.mark.parametrize("choose", [lambda: Categorical(suppress=3), lambda: Categorical(begin_suppress="3")])
def test_what_is_no_list_is_named(choose):
    with pytest.raises(TypeError, match=r"suppress must be a list of ids, got '?3'?$"):
        choose()


@pytest.mark.parametrize("policy", [Ancestral(2), Confidence(steps=2)], ids=str)
@pytest.mark.parametrize(
    ("choose", "allow", "message"),
    [
        (Categorical(), {9: (3,)}, "allow must have positions below the length 8, got 9"),
        (Categorical(begin_suppress=(4,)), [None, None, {1: (4,)}], r"allow\[1\] must leave an id that begin_suppress"),
        (Categorical(suppress=tuple(i for i in range(VOCAB) if i != MASK)), None, "suppress must leave an id"),
    ],
)
def test_lists_of_later_samples_are_checked_before_any_network_call(policy, choose, allow, message):
    toy = Toy(VOCAB, 16)
    sampler = Sampler(toy, reveal=policy, choose=choose, max_batch=1, max_resident=1)
    with pytest.raises(ValueError, match=message):
        sampler.sample(3, [16, 16, 8], prompt=[[2, 3], [2], [2]], allow=allow)
    assert toy.num_calls == 0


def test_a_stream_takes_one_mapping():
    sampler = Sampler(Toy(VOCAB, 16), reveal=Confidence(steps=2))
    with pytest.raises(TypeError, match="allow must be one mapping from positions to ids for a stream, got list"):
        sampler.stream(2, 16, allow=[{}, {}])
    assert all(sample.tokens[3] == 9 for sample in sampler.stream(4, 16, allow={3: (9,)}))
