"""Model schedules: text, sums, cuts."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.schedule import Schedule

NAMES = ("heavy", "light", "org/model:v2")
SANDWICH = "light:125 heavy:750 light:125"

names = st.sampled_from(NAMES)
in_steps = st.lists(st.tuples(names, st.integers(1, 10**6)), min_size=1, max_size=9).map(
    lambda segments: Schedule(tuple(segments), percent=False)
)
weights = st.lists(st.tuples(names, st.integers(1, 10**4)), min_size=1, max_size=9)


def shares(segments: list[tuple[str, int]]) -> Schedule:
    total = sum(weight for _, weight in segments)
    return Schedule(tuple((name, Fraction(100 * weight, total)) for name, weight in segments), percent=True)


def test_steps():
    schedule = Schedule.parse(SANDWICH, NAMES)
    assert schedule.assign(1000) == [("light", 0, 125), ("heavy", 125, 875), ("light", 875, 1000)]
    assert schedule.models == ("light", "heavy")
    assert str(schedule) == SANDWICH


def test_percent():
    schedule = Schedule.parse("light:12.5% heavy:75% light:12.5%", NAMES)
    assert schedule.assign(1000) == Schedule.parse(SANDWICH, NAMES).assign(1000)
    assert schedule.assign(10) == [("light", 0, 1), ("heavy", 1, 9), ("light", 9, 10)]  # 1.25 and 8.75
    assert schedule.assign(4) == [("light", 0, 1), ("heavy", 1, 4)]  # 0.5 and 3.5, halves up
    assert schedule.assign(1) == [("heavy", 0, 1)]
    assert str(schedule) == "light:12.5% heavy:75% light:12.5%"


def test_thirds_are_exact():
    schedule = Schedule.parse("light:100/3% heavy:100/3% light:100/3%", NAMES)
    assert [stop for _, _, stop in schedule.assign(3 * 10**17)] == [10**17, 2 * 10**17, 3 * 10**17]
    assert str(schedule) == "light:100/3% heavy:100/3% light:100/3%"


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_name_takes_it_all(name):
    schedule = Schedule.parse(f" {name} ", NAMES)
    assert schedule == Schedule.single(name) == Schedule.parse(f"{name}:100%", NAMES)
    assert schedule.assign(7) == [(name, 0, 7)] and schedule.models == (name,)


@given(st.one_of(in_steps, weights.map(shares)))
def test_text_round_trip(schedule):
    assert Schedule.parse(str(schedule), NAMES) == schedule


@given(in_steps)
def test_steps_are_kept(schedule):
    total = sum(size for _, size in schedule.segments)
    assigned = schedule.assign(int(total))
    assert [(name, stop - start) for name, start, stop in assigned] == list(schedule.segments)
    assert_covers(assigned, total)


@given(weights, st.one_of(st.integers(1, 50), st.integers(1, 10**15)))
@settings(max_examples=300)
def test_percent_cuts(segments, num_steps):
    schedule = shares(segments)
    assigned = schedule.assign(num_steps)
    assert_covers(assigned, num_steps)
    total, running, cuts = sum(weight for _, weight in segments), 0, [0]
    for _, weight in segments:  # round half up in integers
        running += weight
        cuts.append((2 * running * num_steps + total) // (2 * total))
    wanted = [(name, a, b) for (name, _), a, b in zip(segments, cuts, cuts[1:], strict=False) if a < b]
    assert assigned == wanted


def assert_covers(assigned, num_steps):
    starts, stops = [start for _, start, _ in assigned], [stop for _, _, stop in assigned]
    assert starts == [0, *stops[:-1]] and stops[-1] == num_steps
    assert all(start < stop for _, start, stop in assigned)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"schedule must be .* got nothing"),
        ("  ", r"got nothing"),
        ("small", r"known models \('heavy', 'light', 'org/model:v2'\), got 'small'"),
        ("small:10", r"known models \('heavy', 'light', 'org/model:v2'\), got 'small'"),
        ("org/model:10", r"known models .* got 'org/model'"),
        ("light:10 heavy", r"must give 'heavy' a size"),
        ("light:10 heavy:50%", r"all in steps or all in percent, got both in 'light:10 heavy:50%'"),
        ("light:0 heavy:5", r"positive size, got 'light:0'"),
        ("light:0% heavy:100%", r"positive size, got 'light:0%'"),
        ("light:-5", r"positive sizes, got 'light:-5'"),
        ("light:", r"got 'light:'"),
        ("light:ten", r"got 'light:ten'"),
        ("light:nan%", r"got 'light:nan%'"),
        ("light:1e3", r"got 'light:1e3'"),
        ("light:1/0%", r"got 'light:1/0%'"),
        ("light:%", r"got 'light:%'"),
        ("light:12.5", r"whole steps, got 'light:12.5'; for a share of the trajectory write 'light:12.5%'"),
        ("light:50% heavy:49.9%", r"sum to 100%, got 99.9% in 'light:50% heavy:49.9%'"),
        ("light:50% heavy:60%", r"got 110%"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(ValueError, match=message):
        Schedule.parse(text, NAMES)


def test_wrong_types():
    with pytest.raises(TypeError, match=r"schedule must be text, .* got 125"):
        Schedule.parse(125, NAMES)
    for value in (True, 10.0, "10"):
        with pytest.raises(TypeError, match="num_steps must be a whole number"):
            Schedule.single("heavy").assign(value)


def test_assign_errors():
    with pytest.raises(ValueError, match="num_steps must be positive, got 0"):
        Schedule.single("heavy").assign(0)
    with pytest.raises(ValueError, match=r"trajectory of 500 steps, got 1000 steps in 'light:125") as error:
        Schedule.parse(SANDWICH, NAMES).assign(500)
    assert "'light:12.5% heavy:75% light:12.5%'" in str(error.value)


@given(st.text(alphabet="lighteavy:0123456789.%/ -+\n", max_size=30))
def test_garbage_is_a_value_error_or_a_schedule(text):
    try:
        schedule = Schedule.parse(text, NAMES)
    except ValueError as error:
        assert "schedule" in str(error)
    else:
        assert Schedule.parse(str(schedule), NAMES) == schedule
