"""The clock of a profile: when each part of a run began, and how long it took."""

import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from unmask.spans import Spans

NAMES = "plan", "transfer", "tick", "body", "block", "attention", "head", "capture", "decode"
_OUTSIDE = -1  # the tick of a span that lies in none, the parent of one that lies in no other


@dataclass(frozen=True, eq=False)
class Times:
    """S spans in the order in which they began; each begins after its parent.

    name: int64 [S], index into `NAMES`. number: int64 [S], see `unmask.spans`. tick: int64 [S], the tick that it is or
    lies in, -1 outside of ticks. parent: int64 [S], the span that it lies in, -1 for none. start: float64 [S], seconds
    since the recorder was made. seconds: float64 [S]. total: seconds from then until it was asked.
    """

    name: np.ndarray
    number: np.ndarray
    tick: np.ndarray
    parent: np.ndarray
    start: np.ndarray
    seconds: np.ndarray
    total: float

    def are(self, *names: str) -> np.ndarray:
        """bool [S]."""
        return np.isin(self.name, [NAMES.index(name) for name in names])

    @property
    def inside(self) -> np.ndarray:
        """bool [S], whether it is or lies in a tick."""
        return self.tick != _OUTSIDE

    @property
    def alone(self) -> np.ndarray:
        """float64 [S], seconds of a span that no span inside it took: the sum over all spans counts no moment twice."""
        nested = self.parent != _OUTSIDE
        return self.seconds - np.bincount(self.parent[nested], self.seconds[nested], minlength=len(self.seconds))

    def by_tick(self, name: str) -> np.ndarray:
        """float64 [number of ticks], seconds of the spans of that name."""
        chosen = self.are(name)
        return np.bincount(self.tick[chosen], self.seconds[chosen], minlength=self.are("tick").sum())

    def blocks(self, model: int) -> list[float]:
        """Seconds of each block of a model; none where it tells nothing of them."""
        chosen = self.are("block")
        chosen[self.inside] &= self.number[self.are("tick")][self.tick[self.inside]] == model
        return np.bincount(self.number[chosen], self.seconds[chosen]).tolist() if chosen.any() else []

    def placed_in(self, run: "Times") -> "Times":
        """The spans of this run, stretched inside of ticks to fit those of another run that did the same ticks. These
        get its starts as well."""
        inside = self.inside
        ticks, theirs = self.are("tick"), run.are("tick")
        stretch = run.seconds[theirs] / self.seconds[ticks]
        start, seconds = self.start.copy(), self.seconds.copy()
        seconds[inside] *= stretch[self.tick[inside]]
        start[ticks], seconds[ticks] = run.start[theirs], run.seconds[theirs]
        return replace(self, start=start, seconds=seconds, total=run.total)


class Recorder(Spans):
    """Notes every span. On a GPU those in ticks are timed by the device's own clock, and nothing waits for it.

    inside: note also what lies in ticks; must be False where they are captured as CUDA graphs, which take no clock in.
    """

    def __init__(self, device: torch.device, *, inside: bool = True) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._inside, self._deaf = inside, False
        self._name, self._number, self._tick, self._parent, self._begin, self._end = (array("q") for _ in range(6))
        self._open, self._current, self._num_ticks = [_OUTSIDE], _OUTSIDE, 0
        self._events: dict[int, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        if self._on_gpu:
            torch.cuda.synchronize(device)
            with torch.cuda.device(device):
                self._first = _event()
        self._started = time.perf_counter_ns()

    @contextmanager
    def __call__(self, name: str, number: int = 0) -> Iterator[None]:
        if self._deaf:
            yield
            return
        if name == "tick":
            self._current, self._num_ticks = self._num_ticks, self._num_ticks + 1
        self._deaf = not self._inside and name in ("tick", "capture")
        row = len(self._name)
        self._note(row, name, number)
        begin = _event() if self._on_gpu and self._current != _OUTSIDE else None
        try:
            yield
        finally:
            if begin is not None:
                self._events[row] = begin, _event()
            self._end[row] = time.perf_counter_ns()
            self._open.pop()
            self._deaf = False
            if name == "tick":
                self._current = _OUTSIDE

    def _note(self, row: int, name: str, number: int) -> None:
        self._name.append(NAMES.index(name))
        self._number.append(number)
        self._tick.append(self._current)
        self._parent.append(self._open[-1])
        self._open.append(row)
        self._end.append(0)
        self._begin.append(time.perf_counter_ns())

    def times(self) -> Times:
        """What was noted; waits for a GPU."""
        total = (time.perf_counter_ns() - self._started) / 1e9
        columns = (self._name, self._number, self._tick, self._parent, self._begin, self._end)
        name, number, tick, parent, begin, end = (np.array(column, np.int64) for column in columns)
        start, seconds = (begin - self._started) / 1e9, (end - begin) / 1e9
        if self._events:
            torch.cuda.synchronize(self._device)
        for row, (first, last) in self._events.items():
            start[row], seconds[row] = self._first.elapsed_time(first) / 1e3, first.elapsed_time(last) / 1e3
        return Times(name, number, tick, parent, start, seconds, total)


def _event() -> torch.cuda.Event:
    """Recorded on the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
