"""Records of ticks: what goes in comes out, at the tick's own size and in a padded bucket."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from toys import Toy

from unmask import Ancestral, FirstHitting, Remask, Sampler
from unmask.tables import ALIGNMENT, Bucket, Parcel, exact, layout, load, nbytes, read_field, record, rounded
from unmask.timeline import Limits

SPARE = 10**6


def ticks_of(num_samples, length, *, max_batch=4, reveal=None, max_resident=None):
    """All ticks of a run over toys, with its limits."""
    models = {"a": Toy(9, 32), "b": Toy(9, 32)}
    reveal = reveal or Ancestral(6)
    sampler = Sampler(models, schedule="a:50% b:50%", reveal=reveal, max_batch=max_batch, max_resident=max_resident)
    timeline = sampler.stream(num_samples, length, seed=3).timeline
    return list(timeline), timeline.limits


RUNS = {
    "equal lengths": ((21, 32), {}),
    "ragged": ((9, [5, 32, 7, 7, 31, 2, 12, 32, 32]), {}),
    "one row a time": ((5, 32), {"reveal": FirstHitting()}),
    "fewer than a batch": ((3, 32), {"max_batch": 8}),
    "an odd batch": ((20, 32), {"max_batch": 7}),
    "masked again": ((9, 32), {"reveal": Remask(12, eta=0.4)}),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_record_holds_its_tick(name, padded):
    (num_samples, length), options = RUNS[name]
    ticks, limits = ticks_of(num_samples, length, **options)
    for tick in ticks:
        bucket = rounded(tick, limits) if padded else exact(tick)
        inputs = bucket.read(torch.from_numpy(record(tick, bucket, limits.max_length, SPARE)))
        num, num_rows, total = len(tick.slots), len(tick.row_slot), int(tick.lengths.sum())
        assert inputs.slots[:num].tolist() == tick.slots.tolist()
        assert inputs.starts[: num + 1].diff().tolist() == tick.lengths.tolist() and inputs.starts[0] == 0
        assert inputs.row_starts[: num + 1].diff().tolist() == tick.row_counts.tolist()
        owner = np.repeat(np.arange(num), tick.row_counts)
        starts = inputs.starts.numpy()
        assert (inputs.rows[:num_rows].numpy() - starts[owner]).tolist() == tick.row_position.tolist()
        assert inputs.positions[:num_rows].tolist() == tick.row_position.tolist()
        draws = np.zeros(num_rows) if tick.row_draw is None else tick.row_draw
        keys = np.stack([tick.sequences[owner], tick.row_position, draws], 1)
        assert inputs.keys[:num_rows].tolist() == keys.tolist()
        assert inputs.targets[:num_rows].tolist() == (tick.slots[owner] * 32 + tick.row_position).tolist()
        assert inputs.mask_rate[:num].tolist() == tick.mask_rate.tolist()
        # Unused places: sequences without tokens or rows, rows that are harmless.
        assert set(inputs.slots[num:].tolist()) <= {int(tick.slots[0])}
        assert set(inputs.starts[num:].tolist()) == {total} and set(inputs.row_starts[num:].tolist()) == {num_rows}
        assert set(inputs.targets[num_rows:].tolist()) <= {SPARE}
        assert set(inputs.mask_rate[num:].tolist()) <= {1.0}
        for unused in (inputs.rows, inputs.positions, inputs.keys):
            assert not unused[num_rows:].any()
        assert [len(inputs.slots), len(inputs.rows)] == [bucket.num_sequences, bucket.num_rows]


@pytest.mark.parametrize("name", RUNS)
def test_buckets_hold_their_ticks_and_are_few(name):
    (num_samples, length), options = RUNS[name]
    ticks, limits = ticks_of(num_samples, length, **options)
    buckets = [rounded(tick, limits) for tick in ticks]
    for tick, bucket in zip(ticks, buckets, strict=True):
        assert len(tick.slots) <= bucket.num_sequences <= limits.num_sequences
        assert tick.lengths.sum() <= bucket.num_tokens <= limits.num_tokens
        assert len(tick.row_slot) <= bucket.num_rows <= limits.num_tokens
        assert bucket.row_counts is None and bucket.model == tick.model
        if bucket.lengths is None:
            assert len(set(tick.lengths.tolist()) | {limits.max_length}) > 1
        else:
            assert bucket.lengths == (limits.max_length,) * bucket.num_sequences
            assert sum(bucket.lengths) == bucket.num_tokens
    shapes = {bucket[1:4] for bucket in buckets}
    assert len(shapes) <= 12, shapes


def test_what_is_masked_again_goes_up_with_its_tick():
    (num_samples, length), options = RUNS["masked again"]
    ticks, limits = ticks_of(num_samples, length, **options)
    make = partial(record, slot_length=limits.max_length, spare=SPARE)
    loaded = load(ticks, exact, make, limits.max_length, torch.from_numpy)
    assert loaded[0].masked is None and sum(one.masked is not None for one in loaded) > 5
    for one in loaded:
        places = [] if one.masked is None else one.masked.tolist()
        assert places == (one.tick.masked_slot.astype(int) * limits.max_length + one.tick.masked_position).tolist()


def test_rounded_shapes():
    """Equal lengths round the batch to powers of two, ragged ones the tokens to eighths of the most."""

    def shape(lengths, row_counts, *limits):
        class Tick:
            model, slots = 1, np.arange(len(lengths))

        Tick.lengths, Tick.row_counts = np.array(lengths), np.array(row_counts)
        Tick.row_slot = np.repeat(Tick.slots, Tick.row_counts)
        return rounded(Tick, Limits(*(limits or (12, 12, 100))))

    assert shape([100] * 3, [1, 20, 1]) == Bucket(1, 4, 400, 32, (100,) * 4, None)
    assert shape([100] * 9, [1] * 9) == Bucket(1, 12, 1200, 16, (100,) * 12, None)
    assert shape([100, 99], [1, 1]) == Bucket(1, 12, 300, 16, None, None)
    assert shape([7], [7], 2, 1, 7) == Bucket(1, 1, 7, 7, (7,), None)
    assert shape([6], [5], 2, 1, 7) == Bucket(1, 1, 6, 7, None, None)


def test_fields_are_aligned_and_apart():
    bucket = Bucket(0, 3, 100, 5, None, None)
    fields = sorted(layout(bucket).values(), key=lambda field: field.place.start)
    assert all(field.place.start % ALIGNMENT == 0 for field in fields) and nbytes(layout(bucket)) % ALIGNMENT == 0
    assert all(one.place.stop <= other.place.start for one, other in pairwise(fields))
    assert fields[-1].place.stop <= nbytes(layout(bucket))


def test_a_parcel_keeps_its_arrays():
    arrays = [np.arange(5), np.float32([[1.5, 2], [3, 4]]), np.zeros(0, np.int64), np.uint8([7] * 17), np.arange(3)]
    parcel = Parcel()
    fields = [parcel.add(array) for array in arrays]
    buffer = torch.from_numpy(parcel.packed())
    for array, field in zip(arrays, fields, strict=True):
        assert field.place.start % ALIGNMENT == 0
        assert read_field(buffer, field).tolist() == array.tolist()
