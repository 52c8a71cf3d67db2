"""The timeline against a slow checker that keeps every sequence's events in a list."""

from itertools import groupby, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.events import Events, events
from unmask.remask import Remask
from unmask.reveal import Ancestral, FirstHitting, Fixed, Order, RemaskPlan, RevealPlan
from unmask.schedule import Schedule
from unmask.timeline import FREE, Timeline, choose_batch

MODELS = ("light", "heavy")
SANDWICH = "light:12.5% heavy:75% light:12.5%"


def chunk(sequence, length, policy, schedule=SANDWICH, positions=None, models=MODELS, seed=0) -> Events:
    positions = np.arange(length) if positions is None else np.asarray(positions)
    rng = np.random.default_rng([seed, sequence[0]])
    times = rng.random((len(sequence), len(positions)))
    assigned = Schedule.parse(schedule, models).assign(policy.num_steps(len(positions)))
    segments = [(models.index(name), start, stop) for name, start, stop in assigned]
    more = (lambda row, column, count: rng.random(len(row)),) if isinstance(policy, Remask) else ()
    return events(policy.plan(times, positions, *more), positions, length, np.asarray(sequence), segments)


def chunks(num_samples, length, policy, schedule=SANDWICH, size=64):
    for start in range(0, num_samples, size):
        yield chunk(range(start, min(start + size, num_samples)), length, policy, schedule)


def rows_of(chunk: Events, row: int) -> list[tuple]:
    """A sequence's events, obviously: (model, step, mask rate, positions, draws, positions masked again before it)."""
    n, remasks = chunk.position.shape[1], chunk.remasks
    num_rows, draw, stop, masked = n, [0] * n, [0] * n, []
    if remasks is not None:
        num_rows, draw, stop, masked = (
            values[row] for values in (remasks.num_rows, remasks.draw, remasks.stop, remasks.position)
        )
    columns = (chunk.model[row], chunk.step[row], chunk.mask_rate[row], stop, chunk.position[row], draw)
    entries = list(zip(*columns, strict=True))[:num_rows]
    found, done = [], 0
    for (model, step, mask_rate, stop), rows in groupby(entries, key=lambda entry: entry[:4]):
        *_, positions, draws = zip(*rows, strict=True)
        found.append((model, step, mask_rate, positions, draws, tuple(masked[done:stop])))
        done = stop
    return found


def run(source, *, num_models=2, max_batch, max_resident, max_length=1024) -> Timeline:
    """Run a timeline and check every tick; returns it, with `.sizes` the number of sequences of each tick."""
    total = []  # what the source handed out

    def tapped():
        for part in source:
            total.append(part)
            yield part

    timeline = Timeline(
        tapped(), num_models=num_models, max_batch=max_batch, max_resident=max_resident, max_length=max_length
    )
    resident, admitted, finished, timeline.sizes = {}, [], [], []
    for tick in timeline:
        for slots, part, rows in tick.admitted:
            for slot, row in zip(slots.tolist(), rows.tolist(), strict=True):
                assert slot not in resident, "a slot is shared by two live sequences"
                resident[slot] = part.sequence[row], part.length, rows_of(part, row)
                admitted.append(part.sequence[row])
        assert len(resident) <= max_resident and max(resident) < max_resident
        assert sum(len(part.sequence) for part in total[:-1]) <= len(admitted), "at most one chunk is drawn ahead"
        slots = tick.slots.tolist()
        assert 1 <= len(slots) <= max_batch and slots == sorted(set(slots))
        stop, row_draw = 0, np.zeros_like(tick.row_position) if tick.row_draw is None else tick.row_draw
        masked_again = []
        for i, slot in enumerate(slots):
            sequence, length, todo = resident[slot]
            model, step, mask_rate, positions, draws, masked = todo.pop(0)
            masked_again += [(slot, position) for position in masked]
            start, stop = stop, stop + tick.row_counts[i]
            assert (tick.sequences[i], tick.lengths[i]) == (sequence, length)
            assert (tick.model, tick.steps[i], tick.mask_rate[i]) == (model, step, mask_rate)
            assert tuple(tick.row_position[start:stop]) == positions == tuple(sorted(positions))
            assert tuple(row_draw[start:stop]) == draws and set(tick.row_slot[start:stop]) == {slot}
            assert tick.finished[i] == (not todo)
            if not todo:
                finished.append(resident.pop(slot)[0])
        assert stop == len(tick.row_position) == len(tick.row_slot) == len(row_draw)
        if tick.masked_slot is None:
            assert not masked_again
        else:
            assert list(zip(tick.masked_slot, tick.masked_position, strict=True)) == masked_again
        assert tick.num_revealed == stop - len(masked_again)
        timeline.sizes.append(len(slots))
    assert not resident
    wanted = [sequence for part in total for sequence in part.sequence.tolist()]
    assert admitted == wanted and sorted(finished) == sorted(wanted)
    assert timeline.stats.num_ticks == len(timeline.sizes) and timeline.stats.num_events == sum(timeline.sizes)
    assert timeline.stats.num_events == sum(len(rows_of(p, row)) for p in total for row in range(len(p.sequence)))
    return timeline


@st.composite
def workloads(draw):
    """Chunks of ragged templates, policies and schedules of one to three models."""
    models = ("a", "b", "c")[: draw(st.integers(1, 3))]
    parts, start = [], 0
    for _ in range(draw(st.integers(0, 6))):
        num_samples, length = draw(st.integers(1, 9)), draw(st.integers(1, 12))
        positions = sorted(draw(st.sets(st.integers(0, length - 1), min_size=1)))
        steps = draw(st.integers(1, 12))
        policies = Ancestral(steps), Fixed(steps), FirstHitting(), Order("left-to-right"), Remask(steps, eta=0.5)
        policy = draw(st.sampled_from(policies))
        names = draw(st.lists(st.sampled_from(models), min_size=1, max_size=4))
        schedule = " ".join(f"{name}:{'100/' + str(len(names))}%" for name in names)
        sequence = range(start, start + num_samples)
        parts.append(chunk(sequence, length, policy, schedule, positions, models, seed=draw(st.integers(0, 99))))
        start += num_samples
    return parts, len(models)


@given(workloads(), st.integers(1, 6), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_any_workload(workload, max_batch, max_resident):
    parts, num_models = workload
    run(iter(parts), num_models=num_models, max_batch=max_batch, max_resident=max_resident, max_length=12)


def test_no_work():
    timeline = run(iter(()), max_batch=4, max_resident=8)
    assert timeline.stats.num_ticks == 0 and timeline.stats.occupancy == 1.0


@pytest.mark.parametrize(("num_samples", "floor"), [(16, 0.94), (64, 0.998), (256, 0.998), (400, 0.99)])
def test_occupancy(num_samples, floor):
    """Three segments; only the last ticks of each may fall short."""
    source = chunks(num_samples, 1024, Ancestral(1000), "light:125 heavy:750 light:125")
    timeline = Timeline(source, num_models=2, max_batch=16, max_resident=256, max_length=1024)
    sizes = np.array([len(tick.slots) for tick in timeline])
    stats = timeline.stats
    short = (sizes < 16).sum()
    print(f"{num_samples} sequences: {stats.num_ticks} ticks, occupancy {stats.occupancy:.2%}, {short} not full")
    assert stats.occupancy >= floor
    assert stats.num_ticks == sum(stats.model_ticks) and stats.num_events == sizes.sum() == sum(stats.model_events)
    assert stats.model_events[1] / stats.num_events == pytest.approx(0.75, abs=0.01)


def test_one_model_is_full_to_the_end():
    sizes = run(chunks(50, 64, Ancestral(40), "heavy", size=7), max_batch=8, max_resident=24).sizes
    assert (np.array(sizes[:-2]) == 8).all()


def test_full_while_the_source_lasts():
    """num_models * max_batch slots are enough: some queue always fills a tick."""
    drawn = []

    def source():
        yield from chunks(200, 32, Ancestral(20), size=5)
        drawn.append(True)

    timeline = Timeline(source(), num_models=2, max_batch=8, max_resident=16, max_length=32)
    ticks = ((len(tick.slots), bool(drawn)) for tick in timeline)
    assert all(size == 8 for size, dry in ticks if not dry)


def test_source_is_drawn_lazily():
    count = 0

    def endless():
        nonlocal count
        while True:
            count += 1
            yield chunk([count], 8, FirstHitting())

    timeline = Timeline(endless(), num_models=2, max_batch=4, max_resident=10, max_length=8)
    assert count == 0
    finished = sum(tick.finished.sum() for tick in islice(timeline, 1000))
    assert finished > 400 and finished <= count <= finished + 10 + 1


def test_ragged_lengths_keep_together():
    """Equally urgent sequences are served by closeness of length."""
    source = (chunk([i], length, FirstHitting(), "heavy") for i, length in enumerate([9, 3, 8, 3, 9, 4]))
    timeline = Timeline(source, num_models=2, max_batch=3, max_resident=5, max_length=9)
    assert next(iter(timeline)).lengths.tolist() == [9, 8, 9]


def test_packing_does_not_change_a_sequence():
    """The same events for each sequence, whatever the batch, the slots and the chunks."""

    def rows(size, max_batch, max_resident):
        whole = chunk(range(30), 20, Ancestral(16))
        parts = [
            Events(
                whole.sequence[a:b], 20, whole.position[a:b], whole.step[a:b], whole.mask_rate[a:b], whole.model[a:b]
            )
            for a, b in ((a, a + size) for a in range(0, 30, size))
        ]
        seen = []
        for tick in Timeline(iter(parts), num_models=2, max_batch=max_batch, max_resident=max_resident, max_length=20):
            sequence = np.repeat(tick.sequences, tick.row_counts)
            step = np.repeat(tick.steps, tick.row_counts)
            seen += zip(sequence.tolist(), step.tolist(), tick.row_position.tolist(), strict=True)
        return sorted(seen)

    assert rows(30, 16, 30) == rows(1, 1, 1) == rows(7, 4, 9)


def test_events_sorts_and_assigns_models():
    plan = RevealPlan(np.array([[2, 0, 2, 1]], np.int32), np.array([[0.25, 1, 0.25, 0.75]]))
    made = events(plan, np.array([1, 4, 6, 9]), 10, [7], [(1, 0, 1), (0, 1, 3)])
    assert made.sequence.tolist() == [7] and made.length == 10
    assert made.step.tolist() == [[0, 1, 2, 2]] and made.position.tolist() == [[4, 9, 1, 6]]
    assert made.model.tolist() == [[1, 0, 0, 0]] and made.mask_rate.tolist() == [[1, 0.75, 0.25, 0.25]]
    dtypes = {name: getattr(made, name).dtype for name in ("sequence", "position", "step", "mask_rate", "model")}
    assert dtypes == {"sequence": "i8", "position": "i4", "step": "i4", "mask_rate": "f4", "model": "i1"}


def test_events_of_positions_that_are_masked_again():
    """A sequence of five reveals and one of two. What step 2 masks is masked when step 3 begins, not when 2 does."""
    entries = [  # row, column, step, draw, masked
        (1, 0, 3, 0, 0),
        (0, 1, 6, 2, 4),
        (0, 1, 2, 1, 1),
        (0, 0, 3, 1, 2),
        (0, 0, 2, 0, 0),
        (1, 1, 1, 0, 0),
        (0, 1, 0, 0, 0),
    ]
    row, column, step, draw, masked = np.array(entries, np.int32).T
    plan = RemaskPlan(row, column, step, 1 - step / 8, draw, masked)
    made = events(plan, np.array([3, 5]), 8, [7, 8], [(1, 0, 3), (0, 3, 7)])
    assert made.remasks.num_rows.tolist() == [5, 2]
    assert made.step.tolist() == [[0, 2, 2, 3, 6], [1, 3, 3, 3, 3]]
    assert made.position.tolist() == [[5, 3, 5, 3, 5], [5, 3, 3, 3, 3]]
    assert made.model.tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert made.mask_rate.tolist() == [[1, 0.75, 0.75, 0.625, 0.25], [0.875, 0.625, 0.625, 0.625, 0.625]]
    assert made.remasks.draw.tolist() == [[0, 0, 1, 1, 2], [0] * 5]
    assert made.remasks.position[0].tolist() == [5, 3, 5] and made.remasks.stop.tolist() == [[0, 1, 1, 2, 3], [0] * 5]
    dtypes = [getattr(made.remasks, name).dtype for name in ("num_rows", "draw", "position", "stop")]
    assert dtypes == ["i8", "i4", "i4", "i4"] and made.position.dtype == made.step.dtype == "i4"


def test_tables_grow_with_what_is_masked_again():
    """Rows of a slot, and its memory, follow the longest sequence so far; no other sequence notices."""
    policies = FirstHitting(), Remask(8, eta=0.3), Remask(60, "loop", eta=0.5, alpha_on=0.5), FirstHitting()
    parts = [chunk(range(i, i + 5), 9, policy, "heavy") for i, policy in zip((0, 5, 10, 15), policies, strict=True)]
    assert 9 < parts[1].position.shape[1] < parts[2].position.shape[1]
    timeline = run(iter(parts), max_batch=3, max_resident=4, max_length=9)
    fixed = run(iter(parts[:1]), max_batch=3, max_resident=4, max_length=9)
    rows, masked = parts[2].position.shape[1], parts[2].remasks.position.shape[1]
    assert timeline.nbytes - fixed.nbytes == 4 * (25 * (rows - 9) + 8 * rows + 4 * masked + 8)


@pytest.mark.parametrize("segments", [[], [(0, 1, 3)], [(0, 0, 1), (1, 2, 3)]])
def test_segments_must_be_contiguous(segments):
    plan = Fixed(3).plan(np.array([[0.5, 0.25, 0.75]]), np.arange(3))
    with pytest.raises(ValueError, match="segments must be contiguous from step 0"):
        events(plan, np.arange(3), 3, [0], segments)


def test_segments_must_cover_the_plan():
    plan = Fixed(3).plan(np.array([[0.5, 0.25, 0.75]]), np.arange(3))
    with pytest.raises(ValueError, match="segments must cover step 2 of the plan, got an end at 2"):
        events(plan, np.arange(3), 3, [0], [(0, 0, 2)])


NO_ROWS = Events(np.array([5]), 4, *(np.zeros((1, 0), dtype) for dtype in ("i4", "i4", "f4", "i1")))
RAGGED = Events(
    np.array([5, 6]), 4, *(np.zeros((n, 3), dtype) for n, dtype in ((2, "i4"), (1, "i4"), (2, "f4"), (2, "i1")))
)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (NO_ROWS, r"at least one masked position per sequence, got none in sequences from \[5\]"),
        (RAGGED, r"step must have one entry per sequence and row \[2, 3\], got \[1, 3\]"),
        (chunk([3], 9, FirstHitting()), r"length must lie between .* 9 and max_length 8, got 9"),
        (chunk([3], 8, FirstHitting(), "c", models=("a", "b", "c")), r"model must lie between 0 and 1, got 2 to 2"),
    ],
)
def test_bad_events(part, message):
    with pytest.raises(ValueError, match=message):
        list(Timeline(iter([part]), num_models=2, max_batch=2, max_resident=2, max_length=8))


@pytest.mark.parametrize("name", ["num_models", "max_batch", "max_resident", "max_length"])
def test_bad_sizes(name):
    sizes = {"num_models": 1, "max_batch": 1, "max_resident": 1, "max_length": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Timeline(iter(()), **sizes)


def test_choose_batch():
    def choose(next_model, urgency, length=None, max_batch=2, more=False):
        length = [4] * len(next_model) if length is None else length
        return choose_batch(np.array(next_model), np.array(urgency), np.array(length), max_batch, more).tolist()

    assert choose([0, 1, 1, FREE, 1], [1, 2, 3, 9, 4]) == [2, 4]  # the most urgent of the most urgent's queue
    assert choose([0, 1, 1, FREE, 1], [5, 2, 3, 9, 4]) == [0]  # even alone, when nobody can join it
    assert choose([0, 1, 1, FREE, 1], [5, 2, 3, 9, 4], more=True) == [2, 4]  # else it waits
    assert choose([0, 0, 1, 1, 1], [5, 4, 3, 2, 1], more=True) == [0, 1]  # unless it fills a tick
    assert choose([0] * 4, [7] * 4, length=[4, 9, 8, 5]) == [0, 3]  # lengths alike
    assert choose([0] * 4, [7, 8, 7, 7], length=[4, 9, 8, 5]) == [1, 2]  # as the first pick's
    assert choose([0] * 3, [8, 7, 6], length=[1, 9, 1]) == [0, 1]  # urgency first
