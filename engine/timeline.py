"""How does it run? Integers only: the events of many sequences are packed into ticks.

A tick is one network call: one model, up to `max_batch` sequences, each at its own next event. A sequence's whole
state is its tokens, so any resident sequence may be in any tick; which ones are is decided by `choose_batch` alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from unmask.events import Events, Remasks

FREE = -1  # the next model of a slot that holds no sequence


@dataclass(frozen=True, eq=False)
class Tick:
    """One network call: B sequences of one model, R rows to reveal, all of them int32 unless stated.

    slots, lengths, row_counts, steps [B]; sequences int64 [B]; mask_rate float32 [B]; slots ascend.
    row_slot, row_position [R]: grouped by sequence in the order of `slots`, positions ascending inside a sequence.
    finished: bool [B], whether this is the sequence's last event; its slot may be taken by the next tick's admissions.
    admitted: what to write into slots before this tick runs, as (slots int32 [A], Events, their rows int64 [A]).

    None unless sequences are masked again: row_draw [R], how often the position was revealed before; masked_slot,
    masked_position [M], where to write the mask id before this tick runs, grouped like rows.
    """

    model: int
    slots: np.ndarray
    sequences: np.ndarray
    lengths: np.ndarray
    row_counts: np.ndarray
    row_slot: np.ndarray
    row_position: np.ndarray
    steps: np.ndarray
    mask_rate: np.ndarray
    finished: np.ndarray
    admitted: tuple[tuple[np.ndarray, Events, np.ndarray], ...]
    row_draw: np.ndarray | None = None
    masked_slot: np.ndarray | None = None
    masked_position: np.ndarray | None = None

    @property
    def num_revealed(self) -> int:
        """By how many positions fewer are masked after this tick than before; negative where more are masked again."""
        return len(self.row_slot) - (0 if self.masked_slot is None else len(self.masked_slot))


class Limits(NamedTuple):
    """What no tick of a run exceeds: sequences of a network call, sequences in progress, tokens of a sequence."""

    max_batch: int
    max_resident: int
    max_length: int

    @property
    def num_sequences(self) -> int:
        """Sequences that can meet in a network call."""
        return min(self.max_batch, self.max_resident)

    @property
    def num_tokens(self) -> int:
        """Of a network call."""
        return self.num_sequences * self.max_length


@dataclass
class Packing:
    """How many ticks there were so far and how full, per model and in total."""

    max_batch: int
    num_models: int
    model_ticks: list[int] = field(init=False)
    model_events: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.model_ticks, self.model_events = ([0] * self.num_models for _ in range(2))

    def add(self, tick: Tick) -> None:
        self.model_ticks[tick.model] += 1
        self.model_events[tick.model] += len(tick.slots)

    @property
    def num_ticks(self) -> int:
        return sum(self.model_ticks)

    @property
    def num_events(self) -> int:
        return sum(self.model_events)

    @property
    def occupancy(self) -> float:
        """Events per place in a tick, 1.0 before the first tick."""
        return self.num_events / (self.num_ticks * self.max_batch) if self.num_ticks else 1.0


def choose_batch(
    next_model: np.ndarray, urgency: np.ndarray, length: np.ndarray, max_batch: int, more: bool
) -> np.ndarray:
    """Which slots go in the next tick: int64 [B], ascending, all of one model, at least one.

    next_model, urgency, length: [slots]; `next_model` is `FREE` where a slot holds no sequence.
    more: whether further sequences wait for a slot.

    The rule: a *queue* is the slots that wait for the same model. Serve the queue of the most urgent slot; but if it
    does not fill a tick and more sequences are to come that may, let it wait and serve the longest queue. Of a queue
    take the most urgent slots; among equally urgent ones those whose length is closest to the first pick's, then the
    lowest.
    """
    live = np.flatnonzero(next_model != FREE)
    model = next_model[live[urgency[live].argmax()]]
    if more:
        queues = np.bincount(next_model[live])
        model = model if queues[model] >= max_batch else queues.argmax()
    queue = live[next_model[live] == model]
    if len(queue) <= max_batch:
        return queue
    urgency, length = urgency[queue], length[queue]
    distance = np.abs(length - length[urgency.argmax()])
    best = np.argsort(distance - urgency * (distance.max() + 1), kind="stable")[:max_batch]
    return np.sort(queue[best])


class Timeline:
    """The ticks of a run, in order; iterate once. `stats` counts as it goes.

    source: chunks of events; the next chunk is drawn when the last sequence of the one before has got its slot.
    num_models: models are numbered from 0. max_batch: sequences per tick. max_length: tokens per slot.
    max_resident: slots. With num_models * max_batch of them, every tick is full while the source lasts.

    While the source has more, sequences admitted earlier are more urgent, so slots come free steadily. Once it is dry,
    sequences with more segments to go are more urgent, then those with more events to go in this segment: all reach
    the end of a segment together, the few ticks that cannot be full are the last of each segment, and no sequence is
    left to run alone. Every sequence's own order of events is kept, whatever the packing.
    """

    def __init__(
        self, source: Iterator[Events], *, num_models: int, max_batch: int, max_resident: int, max_length: int
    ) -> None:
        _check_positive(num_models=num_models, max_batch=max_batch, max_resident=max_resident, max_length=max_length)
        self.num_models, self.max_batch, self.max_length = num_models, max_batch, max_length
        self.max_resident = max_resident
        self.stats = Packing(max_batch, num_models)
        self._source, self._chunk, self._taken = iter(source), None, 0

        # Per slot: its sequence, and a cursor to the first row of its next event.
        self._sequence = np.zeros(max_resident, np.int64)
        self._length = np.zeros(max_resident, np.int64)
        self._num_rows = np.zeros(max_resident, np.int64)
        self._cursor = np.zeros(max_resident, np.int64)
        self._next_model = np.full(max_resident, FREE, np.int64)
        self._admitted_at = np.zeros(max_resident, np.int64)
        # Per slot and row: a copy of its events, where the event of that row stops, and how much is left from there on.
        # A sequence has a row for each masked position, and more where positions are masked again: tables grow then.
        self._max_rows = max_length
        rows = (max_resident, max_length)
        self._position, self._step, self._stop = (np.empty(rows, np.int32) for _ in range(3))
        self._mask_rate = np.empty(rows, np.float32)
        self._model = np.empty(rows, np.int8)
        self._left = np.empty(rows, np.int64)
        # Made for the first sequences that are masked again: per row, see `Remasks`; per slot, how much of it is done.
        self._row_draw = self._masked_stop = self._masked = self._masked_cursor = None

    @property
    def limits(self) -> Limits:
        return Limits(self.max_batch, self.max_resident, self.max_length)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables. They are allocated once, but grow with sequences that are masked again."""
        return sum(table.nbytes for table in vars(self).values() if isinstance(table, np.ndarray))

    def __iter__(self) -> Iterator[Tick]:
        self._chunk = self._draw()
        while True:
            admitted = self._admit()
            if (self._next_model == FREE).all():
                return
            yield self._tick(admitted)

    def _draw(self) -> Events | None:
        """The next chunk with a sequence in it; None when the source is dry."""
        self._taken = 0
        for chunk in self._source:
            self._check(chunk)
            if len(chunk.sequence):
                return chunk
        return None

    def _admit(self) -> tuple[tuple[np.ndarray, Events, np.ndarray], ...]:
        """Fill free slots from the source; a chunk's sequences may be admitted over many ticks."""
        admitted = []
        free = np.flatnonzero(self._next_model == FREE) if self._chunk else ()
        while self._chunk and len(free):
            chunk = self._chunk
            rows = np.arange(self._taken, min(self._taken + len(free), len(chunk.sequence)))
            slots, free = free[: len(rows)], free[len(rows) :]
            self._load(slots, chunk, rows)
            admitted.append((slots.astype(np.int32), chunk, rows))
            self._taken += len(rows)
            if self._taken == len(chunk.sequence):
                self._chunk = self._draw()
        return tuple(admitted)

    def _load(self, slots: np.ndarray, chunk: Events, rows: np.ndarray) -> None:
        n = chunk.position.shape[1]
        if n > self._max_rows:
            self._grow(n)
        step, model = chunk.step[rows], chunk.model[rows]
        self._position[slots, :n] = chunk.position[rows]
        self._step[slots, :n] = step
        self._mask_rate[slots, :n] = chunk.mask_rate[rows]
        self._model[slots, :n] = model
        self._stop[slots, :n], self._left[slots, :n] = _ahead(step, model)

        self._sequence[slots] = chunk.sequence[rows]
        self._length[slots] = chunk.length
        self._num_rows[slots] = n
        self._cursor[slots] = 0
        self._next_model[slots] = model[:, 0]
        self._admitted_at[slots] = self.stats.num_ticks
        if chunk.remasks is not None:
            self._load_remasks(slots, chunk.remasks, rows, n)
        elif self._row_draw is not None:
            self._row_draw[slots], self._masked_stop[slots], self._masked_cursor[slots] = 0, 0, 0

    def _load_remasks(self, slots: np.ndarray, remasks: Remasks, rows: np.ndarray, n: int) -> None:
        if self._row_draw is None:
            self._row_draw, self._masked_stop = (np.zeros_like(self._position) for _ in range(2))
            self._masked = np.empty((self.max_resident, 0), np.int32)
            self._masked_cursor = np.zeros(self.max_resident, np.int64)
        m = remasks.position.shape[1]
        if m > self._masked.shape[1]:
            self._masked = _widened(self._masked, m)
        self._row_draw[slots, :n], self._masked_stop[slots, :n] = remasks.draw[rows], remasks.stop[rows]
        self._masked[slots, :m] = remasks.position[rows]
        self._num_rows[slots] = remasks.num_rows[rows]
        # Rows behind the last repeat it, so its event would go on to the end of the table.
        self._stop[slots, :n] = np.minimum(self._stop[slots, :n], remasks.num_rows[rows, None])
        self._masked_cursor[slots] = 0

    def _grow(self, num_rows: int) -> None:
        for name in ("_position", "_step", "_stop", "_mask_rate", "_model", "_left", "_row_draw", "_masked_stop"):
            table = getattr(self, name)
            if table is not None:
                setattr(self, name, _widened(table, num_rows))
        self._max_rows = num_rows

    def _tick(self, admitted: tuple[tuple[np.ndarray, Events, np.ndarray], ...]) -> Tick:
        slots = self._choose()
        model = int(self._next_model[slots[0]])
        first = slots * self._max_rows + self._cursor[slots]  # index of the event's first row in the flat row arrays
        stop = self._stop.ravel()[first].astype(np.int64)
        counts = stop - self._cursor[slots]
        rows = _ranges(first, counts)
        finished = stop == self._num_rows[slots]
        tick = Tick(
            model=model,
            slots=slots.astype(np.int32),
            sequences=self._sequence[slots],
            lengths=self._length[slots].astype(np.int32),
            row_counts=counts.astype(np.int32),
            row_slot=np.repeat(slots.astype(np.int32), counts),
            row_position=self._position.ravel()[rows],
            steps=self._step.ravel()[first],
            mask_rate=self._mask_rate.ravel()[first],
            finished=finished,
            admitted=admitted,
            **({} if self._row_draw is None else self._masked_again(slots, first, rows)),
        )
        self._cursor[slots] = stop
        upcoming = self._model.ravel()[np.where(finished, first, first + counts)]
        self._next_model[slots] = np.where(finished, FREE, upcoming)
        self.stats.add(tick)
        return tick

    def _masked_again(self, slots: np.ndarray, first: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What a tick says of positions that are revealed more than once."""
        start, stop = self._masked_cursor[slots], self._masked_stop.ravel()[first].astype(np.int64)
        masked = _ranges(slots * self._masked.shape[1] + start, stop - start)
        self._masked_cursor[slots] = stop
        return {
            "row_draw": self._row_draw.ravel()[rows],
            "masked_slot": np.repeat(slots.astype(np.int32), stop - start),
            "masked_position": self._masked.ravel()[masked],
        }

    def _choose(self) -> np.ndarray:
        more = self._chunk is not None
        if more:
            urgency = -self._admitted_at
        else:  # in a free slot the cursor may stand beyond the buffer; its urgency is never looked at
            slot = np.arange(len(self._cursor))
            urgency = self._left[slot, np.minimum(self._cursor, self._max_rows - 1)]
        return choose_batch(self._next_model, urgency, self._length, self.max_batch, more)

    def _check(self, chunk: Events) -> None:
        num_sequences, n = chunk.position.shape
        where = f"sequences from {chunk.sequence[:1].tolist()}"
        for name in ("step", "mask_rate", "model"):
            if getattr(chunk, name).shape != (num_sequences, n) or len(chunk.sequence) != num_sequences:
                raise ValueError(
                    f"{name} must have one entry per sequence and row {[len(chunk.sequence), n]}, "
                    f"got {list(getattr(chunk, name).shape)} in {where}"
                )
        if n == 0:
            raise ValueError(f"position must have at least one masked position per sequence, got none in {where}")
        num_masked = n if chunk.remasks is None else 1
        if not num_masked <= chunk.length <= self.max_length:
            raise ValueError(
                f"length must lie between the number of masked positions {num_masked} and "
                f"max_length {self.max_length}, got {chunk.length} in {where}"
            )
        if num_sequences and not 0 <= chunk.model.min() <= chunk.model.max() < self.num_models:
            got = f"{chunk.model.min()} to {chunk.model.max()} in {where}"
            raise ValueError(f"model must lie between 0 and {self.num_models - 1}, got {got}")


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _ahead(step: np.ndarray, model: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row of sorted events, [S, n]: the index after its event's last row, int32, and what is left, int64.

    What is left is one number: segments to go after this one, weighted above any number of events, plus events to go
    in this one.
    """
    n = step.shape[1]
    event_ends, segment_ends = np.ones(step.shape, bool), np.zeros(step.shape, bool)
    event_ends[:, :-1] = step[:, 1:] != step[:, :-1]
    segment_ends[:, :-1] = model[:, 1:] != model[:, :-1]
    stop = _from_right(np.minimum, np.where(event_ends, np.arange(1, n + 1, dtype=np.int32), np.int32(n)))
    events_left = _from_right(np.add, event_ends.astype(np.int64))
    beyond = _from_right(np.maximum, np.where(segment_ends, events_left - 1, 0))
    segments_left = _from_right(np.add, segment_ends.astype(np.int64))
    return stop, (segments_left << 32) + events_left - beyond


def _from_right(ufunc: np.ufunc, values: np.ndarray) -> np.ndarray:
    return ufunc.accumulate(values[:, ::-1], axis=1)[:, ::-1]


def _ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ..., counts[0] numbers of these, then those of first[1], and so on: int64."""
    ends = counts.cumsum()
    return np.arange(ends[-1]) + np.repeat(first - ends + counts, counts)


def _widened(table: np.ndarray, width: int) -> np.ndarray:
    """The table [slots, n] with `width` columns, the new ones 0."""
    return np.pad(table, ((0, 0), (0, width - table.shape[1])))
