"""The integers of a tick as a device reads them: one record of bytes, whose layout its bucket fixes."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unmask.timeline import Limits, Tick

ALIGNMENT = 16  # bytes, of every field and every record: vector loads, and one specialisation of a Triton kernel
FEWEST_ROWS = 16
SIZES_OF_A_RAGGED_BATCH = 8


class Bucket(NamedTuple):
    """The shape of a network call: places for sequences, tokens and rows, of which a tick may leave some unused.

    lengths, row_counts: of each sequence where the host fixes them; None where the record's offsets tell them. All that
    the host decides about a call follows from its bucket, so a CUDA graph captured for one tick serves all of its
    bucket.
    """

    model: int
    num_sequences: int
    num_tokens: int
    num_rows: int
    lengths: tuple[int, ...] | None
    row_counts: tuple[int, ...] | None

    def read(self, record: Tensor) -> "TickInputs":
        """The fields of a record, uint8 [nbytes], as views."""
        return TickInputs(**read(record, layout(self)))


class TickInputs(NamedTuple):
    """A record's fields on the device, for B sequences and R rows.

    slots int64 [B]; starts, row_starts int32 [B + 1]: where sequences begin among the tick's tokens and rows; rows
    int64 [R], flat indices into the tokens; positions int64 [R], the same inside their sequence; keys int64 [R, 3] of
    the noise; targets int64 [R], where the drawn tokens go; mask_rate float32 [B].
    Unused places: sequences without tokens or rows, rows that read token 0 and go to the spare target.
    """

    slots: Tensor
    starts: Tensor
    row_starts: Tensor
    rows: Tensor
    positions: Tensor
    keys: Tensor
    targets: Tensor
    mask_rate: Tensor


class LoadedTick(NamedTuple):
    """A tick whose integers are on the device: its record, uint8; slots int64 [A] and what to write into them first,
    rows [L] by the name of the table; places int64 [M] among the tokens of all slots that are masked again, None when
    there are none; slots int64 [F] that are finished afterwards, None when there are none."""

    tick: Tick
    bucket: Bucket
    record: Tensor
    admitted: list[tuple[Tensor, dict[str, Tensor]]]
    masked: Tensor | None
    finished: Tensor | None


class Field(NamedTuple):
    """Where an array lies in a buffer of bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    place: slice


def exact(tick: Tick) -> Bucket:
    """The shape of the tick itself, nothing unused."""
    lengths, row_counts = tuple(tick.lengths.tolist()), tuple(tick.row_counts.tolist())
    return Bucket(tick.model, len(lengths), sum(lengths), sum(row_counts), lengths, row_counts)


def rounded(tick: Tick, limits: Limits) -> Bucket:
    """One of few shapes: powers of two, up to what a run can need.

    Sequences that are all `max_length` long stay so, unused ones included: every dense attention can serve them then.
    Else a batch has `max_batch` places and its tokens one of 8 sizes, and operators leave out what is unused.
    """
    num_sequences, num_tokens, num_rows = len(tick.slots), int(tick.lengths.sum()), len(tick.row_slot)
    places = min(max(FEWEST_ROWS, _power_of_two(num_rows)), limits.num_tokens)
    if num_tokens == num_sequences * limits.max_length:
        num_sequences = min(_power_of_two(num_sequences), limits.num_sequences)
        lengths = (limits.max_length,) * num_sequences
        return Bucket(tick.model, num_sequences, sum(lengths), places, lengths, None)
    step = math.ceil(limits.num_tokens / SIZES_OF_A_RAGGED_BATCH)
    num_tokens = min(math.ceil(num_tokens / step) * step, limits.num_tokens)
    return Bucket(tick.model, limits.num_sequences, num_tokens, places, None, None)


def record(tick: Tick, bucket: Bucket, slot_length: int, spare: int) -> np.ndarray:
    """The tick as uint8 [nbytes]. slot_length: tokens of a slot. spare: where unused rows write their token."""
    buffer, view = blank(layout(bucket))
    num_sequences, num_rows = len(tick.slots), len(tick.row_slot)
    view["slots"][:num_sequences] = tick.slots
    view["slots"][num_sequences:] = tick.slots[0]
    for name, counts in (("starts", tick.lengths), ("row_starts", tick.row_counts)):
        view[name][1 : num_sequences + 1] = counts.cumsum()
        view[name][num_sequences + 1 :] = view[name][num_sequences]
    view["rows"][:num_rows] = np.repeat(view["starts"][:num_sequences], tick.row_counts) + tick.row_position
    view["positions"][:num_rows] = tick.row_position
    view["keys"][:num_rows, 0] = np.repeat(tick.sequences, tick.row_counts)
    view["keys"][:num_rows, 1] = tick.row_position
    if tick.row_draw is not None:
        view["keys"][:num_rows, 2] = tick.row_draw
    view["targets"][:num_rows] = _places(tick.row_slot, tick.row_position, slot_length)
    view["targets"][num_rows:] = spare
    view["mask_rate"][:num_sequences] = tick.mask_rate
    view["mask_rate"][num_sequences:] = 1.0
    return buffer


def read(record: Tensor, fields: dict[str, Field]) -> dict[str, Tensor]:
    """The fields of a record, as views."""
    return {name: read_field(record, field) for name, field in fields.items()}


def read_field(buffer: Tensor, field: Field) -> Tensor:
    """An array in a buffer of bytes, as a view."""
    return buffer[field.place].view(_TORCH[field.dtype]).view(field.shape)


def load(
    ticks: list[Tick],
    bucket_of: Callable[[Tick], Bucket],
    record_of: Callable[[Tick, Bucket], np.ndarray],
    slot_length: int,
    upload: Callable[[np.ndarray], Tensor],
) -> list[LoadedTick]:
    """Ticks with everything about them that the device needs, in one upload."""
    parcel, packed = Parcel(), []
    for tick in ticks:
        bucket = bucket_of(tick)
        admitted = [
            (parcel.add(slots.astype(np.int64)), {name: parcel.add(row) for name, row in planned.rows.items()})
            for slots, planned, _ in tick.admitted
        ]
        masked = None
        if tick.masked_slot is not None and len(tick.masked_slot):
            masked = parcel.add(_places(tick.masked_slot, tick.masked_position, slot_length))
        finished = parcel.add(tick.slots[tick.finished].astype(np.int64)) if tick.finished.any() else None
        packed.append((tick, bucket, parcel.add(record_of(tick, bucket)), admitted, masked, finished))
    arrived = partial(read_field, upload(parcel.packed()))
    return [
        LoadedTick(
            tick,
            bucket,
            arrived(fields),
            [(arrived(slots), {name: arrived(row) for name, row in rows.items()}) for slots, rows in admitted],
            None if masked is None else arrived(masked),
            None if finished is None else arrived(finished),
        )
        for tick, bucket, fields, admitted, masked, finished in packed
    ]


def layout(bucket: Bucket) -> dict[str, Field]:
    """Where each field of a record lies."""
    b, r = bucket.num_sequences, bucket.num_rows
    return fields_of(
        {
            "slots": (np.int64, (b,)),
            "starts": (np.int32, (b + 1,)),
            "row_starts": (np.int32, (b + 1,)),
            "rows": (np.int64, (r,)),
            "positions": (np.int64, (r,)),
            "keys": (np.int64, (r, 3)),
            "targets": (np.int64, (r,)),
            "mask_rate": (np.float32, (b,)),
        }
    )


def fields_of(shapes: dict[str, tuple[type, tuple[int, ...]]]) -> dict[str, Field]:
    """Fields of these dtypes and shapes, one behind the other."""
    fields, begin = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = np.dtype(dtype).itemsize * math.prod(shape)
        fields[name] = Field(np.dtype(dtype), shape, slice(begin, begin + size))
        begin = aligned(begin + size)
    return fields


def nbytes(fields: dict[str, Field]) -> int:
    """Bytes of a record."""
    return aligned(max(field.place.stop for field in fields.values()))


def blank(fields: dict[str, Field]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A record of zeros, uint8 [nbytes], and views of its fields."""
    buffer = np.zeros(nbytes(fields), np.uint8)
    return buffer, {name: buffer[field.place].view(field.dtype).reshape(field.shape) for name, field in fields.items()}


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Parcel:
    """Arrays that go to the device in one copy."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._size = 0

    def add(self, array: np.ndarray) -> Field:
        """Where the array will lie in `packed()`."""
        field = Field(array.dtype, array.shape, slice(self._size, self._size + array.nbytes))
        self._arrays.append(array)
        self._size = aligned(field.place.stop)
        return field

    def packed(self) -> np.ndarray:
        """All arrays as uint8, each at its place."""
        buffer, begin = np.zeros(self._size, np.uint8), 0
        for array in self._arrays:
            buffer[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            begin = aligned(begin + array.nbytes)
        return buffer


_TORCH = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
}


def _places(slot: np.ndarray, position: np.ndarray, slot_length: int) -> np.ndarray:
    """int64, flat indices into the tokens of all slots."""
    return slot.astype(np.int64) * slot_length + position


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
