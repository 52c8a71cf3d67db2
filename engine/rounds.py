"""How does an adaptive run go? Integers only: which sequences meet in the next network call, and for which step.

A tick of an adaptive policy is one step of up to `max_batch` sequences. Where the policy fixes how many positions a
step reveals, the host knows all of them; where scores decide, it knows a bound, and is told of sequences that are
complete before it. Which positions are revealed, it never needs to know.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from unmask.adaptive import Trajectory
from unmask.timeline import FREE, Limits, Packing, Tick, choose_batch


@dataclass(frozen=True, eq=False)
class Request:
    """S sequences that share a template int64 [L]: their ids int64 [S], its masked positions int64 [n], the steps, the
    model int8 [K] of each, and the list of ids int32 [L] that each position may draw from, if there are any lists."""

    sequence: np.ndarray
    template: np.ndarray
    positions: np.ndarray
    trajectory: Trajectory
    model: np.ndarray
    allowed: np.ndarray | None = None

    @property
    def length(self) -> int:
        return len(self.template)

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """What is written into their slots, [L] each. window_start, window_end: of a masked position's window."""
        starts, ends = (np.zeros(self.length, np.int32) for _ in range(2))
        starts[self.positions], ends[self.positions] = self.trajectory.group_start, self.trajectory.group_end
        rows = {"tokens": self.template, "window_start": starts, "window_end": ends}
        return rows if self.allowed is None else rows | {"allowed": self.allowed}


@dataclass(frozen=True, eq=False, kw_only=True)
class Round(Tick):
    """A tick of an adaptive policy. `row_counts` are the candidates of each sequence, at most, and `row_slot` and
    `row_position` are empty. Callbacks are told of it with the rows that were revealed, on a GPU with none.

    ends, counts: int32 [B], see `Trajectory`. num_masked: int32 [B], masked positions of the template.
    """

    ends: np.ndarray
    counts: np.ndarray
    num_masked: np.ndarray

    def with_rows(self, row_counts: np.ndarray, row_position: np.ndarray) -> "Round":
        """The same with these rows: int32 [B] of each sequence, and their positions int32 [R]."""
        return replace(
            self, row_counts=row_counts, row_slot=np.repeat(self.slots, row_counts), row_position=row_position
        )


class Rounds:
    """The ticks of an adaptive run, in order; iterate once. Arguments as of `Timeline`; source: its requests.

    Sequences admitted earlier go first. `release` ends one before its last step.
    """

    def __init__(
        self, source: Iterator[Request], *, num_models: int, max_batch: int, max_resident: int, max_length: int
    ) -> None:
        self.num_models, self.max_batch, self.max_length = num_models, max_batch, max_length
        self.max_resident = max_resident
        self.stats = Packing(max_batch, num_models)
        self._source = iter(source)
        self._waiting, self._taken = next(self._source, None), 0
        self._requests: list[Request | None] = [None] * max_resident
        self._sequence = np.zeros(max_resident, np.int64)
        self._cursor = np.zeros(max_resident, np.int64)
        self._length = np.zeros(max_resident, np.int64)
        self._next_model = np.full(max_resident, FREE, np.int64)
        self._admitted_at = np.zeros(max_resident, np.int64)

    @property
    def limits(self) -> Limits:
        return Limits(self.max_batch, self.max_resident, self.max_length)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, allocated once."""
        return sum(table.nbytes for table in vars(self).values() if isinstance(table, np.ndarray))

    def __iter__(self) -> Iterator[Round]:
        while True:
            admitted = self._admit()
            if (self._next_model == FREE).all():
                return
            yield self._round(admitted)

    def release(self, slot: int, sequence: int) -> Request | None:
        """The sequence in `slot` is complete: its request, or None if it is there no more."""
        request = self._requests[slot]
        if request is None or self._sequence[slot] != sequence:
            return None
        self._free(slot)
        return request

    def _free(self, slot: int) -> None:
        self._requests[slot], self._next_model[slot] = None, FREE

    def _admit(self) -> tuple[tuple[np.ndarray, Request, np.ndarray], ...]:
        """Fill free slots from the source; a request's sequences may be admitted over many ticks."""
        admitted, free = [], np.flatnonzero(self._next_model == FREE)
        while self._waiting is not None and len(free):
            request = self._waiting
            rows = np.arange(self._taken, min(self._taken + len(free), len(request.sequence)))
            slots, free = free[: len(rows)], free[len(rows) :]
            for slot in slots.tolist():
                self._requests[slot] = request
            self._sequence[slots], self._length[slots] = request.sequence[rows], request.length
            self._cursor[slots], self._next_model[slots] = 0, request.model[0]
            self._admitted_at[slots] = self.stats.num_ticks
            admitted.append((slots.astype(np.int32), request, rows))
            self._taken += len(rows)
            if self._taken == len(request.sequence):
                self._waiting, self._taken = next(self._source, None), 0
        return tuple(admitted)

    def _round(self, admitted: tuple[tuple[np.ndarray, Request, np.ndarray], ...]) -> Round:
        slots = choose_batch(
            self._next_model, -self._admitted_at, self._length, self.max_batch, self._waiting is not None
        )
        requests, cursors = [self._requests[slot] for slot in slots], self._cursor[slots].tolist()
        steps = [request.trajectory for request in requests]

        def column(name: str) -> np.ndarray:
            return np.array([getattr(one, name)[at] for one, at in zip(steps, cursors, strict=True)], np.int32)

        finished = np.array([at + 1 == len(one.step) for one, at in zip(steps, cursors, strict=True)])
        tick = Round(
            model=int(self._next_model[slots[0]]),
            slots=slots.astype(np.int32),
            sequences=self._sequence[slots],
            lengths=self._length[slots].astype(np.int32),
            row_counts=column("num_rows"),
            row_slot=np.empty(0, np.int32),
            row_position=np.empty(0, np.int32),
            steps=column("step"),
            mask_rate=np.ones(len(slots), np.float32),
            finished=finished,
            admitted=admitted,
            ends=column("end"),
            counts=column("count"),
            num_masked=np.array([len(request.positions) for request in requests], np.int32),
        )
        self._advance(slots, requests, finished)
        self.stats.add(tick)
        return tick

    def _advance(self, slots: np.ndarray, requests: Sequence[Request], finished: np.ndarray) -> None:
        self._cursor[slots] += 1
        for slot, request, done in zip(slots.tolist(), requests, finished.tolist(), strict=True):
            if done:
                self._free(slot)
            else:
                self._next_model[slot] = request.model[self._cursor[slot]]
