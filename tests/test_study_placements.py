"""Placements against brute force, shapes against drawings of them."""

from itertools import product

import pytest

from unmask.study.placements import SHAPES, Placement, arrangements, num_arrangements, shapes, shapes_of


@pytest.mark.parametrize(
    ("counts", "segments"),
    [({"l": 2}, 8), ({"l": 1}, 1), ({"l": 3, "t": 2}, 6), ({"a": 1, "b": 1, "c": 1}, 4), ({"l": 4}, 4)],
)
def test_arrangements_are_all_there_are(counts, segments):
    wanted = {"h": segments - sum(counts.values()), **counts}
    every = {one for one in product(wanted, repeat=segments) if all(one.count(n) == k for n, k in wanted.items())}
    found = [one.models for one in arrangements("h", counts, segments)]
    assert set(found) == every and len(found) == len(every) == num_arrangements(counts, segments)


def test_the_published_search_has_28():
    assert num_arrangements({"light": 2}, 8) == 28


@pytest.mark.parametrize(
    ("counts", "segments", "message"),
    [
        ({"l": 0}, 8, "at least 1 segment, got 0 for 'l'"),
        ({"l": 5, "t": 4}, 8, "at most the 8 segments there are, got 9"),
        ({"l": 1}, 0, "segments must be at least 1, got 0"),
    ],
)
def test_bad_counts(counts, segments, message):
    with pytest.raises(ValueError, match=message):
        arrangements("h", counts, segments)


def test_schedules_merge_neighbours():
    assert str(Placement(tuple("hhllhhhh"))) == "h:25% l:25% h:50%"
    assert str(Placement(tuple("lhhl"))) == "l:25% h:50% l:25%"
    assert str(Placement(("h",) * 3)) == "h:100%"
    assert Placement(tuple("lhh")).schedule.assign(12) == [("l", 0, 4), ("h", 4, 12)]  # thirds are exact
    assert Placement(tuple("lhhllhl")).schedule.assign(7)[-1] == ("l", 6, 7)


def drawn(segments, light):
    found = shapes(segments, light)
    return {name: "".join("l" if i in found[name] else "." for i in range(segments)) for name in found}


def test_shapes():
    found = drawn(8, 2)
    random = found.pop("random")
    assert found == {
        "sandwich": "l......l",
        "light first": "ll......",
        "light last": "......ll",
        "light middle": "...ll...",
        "interleaved": "..l...l.",
    }
    assert random.count("l") == 2 and random not in found.values() and drawn(8, 2)["random"] == random
    odd = drawn(8, 3)
    assert odd["sandwich"] == "ll.....l" and odd["light middle"] == "..lll..." and odd["interleaved"] == ".l..l.l."
    assert drawn(8, 4)["interleaved"] == ".l.l.l.l" and set(drawn(8, 1)) == set(SHAPES) - {"sandwich", "interleaved"}
    assert drawn(8, 8) == drawn(8, 0) == {}
    for light in range(1, 8):
        assert all(len(segments) == light for segments in shapes(8, light).values())


def test_a_placement_may_have_two_shapes_or_none():
    assert shapes_of(Placement(tuple("lhhhh")), "h") == ("light first",)
    two = shapes(3, 2)
    assert two["sandwich"] == (0, 2) == two["interleaved"]
    assert shapes_of(Placement(tuple("lhl")), "h")[:2] == ("sandwich", "interleaved")
    assert shapes_of(Placement(tuple("lhht")), "h") == () == shapes_of(Placement(tuple("hhh")), "h")
