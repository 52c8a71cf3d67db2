"""Spans as named ranges in the tools that show them: torch.profiler's trace, for Perfetto, and NVTX, for Nsight."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from unmask.files import replace_whole
from unmask.profile.prefix import run_ticks
from unmask.sampler import Sampler
from unmask.spans import Spans


class Ranges(Spans):
    """Opens a range for each span: "tick 12" and in it "heavy", "body", "block 3", "attention".

    models: their names. ranged: name -> the range as a context manager.
    """

    def __init__(self, models: Sequence[str], ranged: Callable[[str], AbstractContextManager]) -> None:
        self._models, self._ranged, self._num_ticks = models, ranged, 0

    @contextmanager
    def __call__(self, name: str, number: int = 0) -> Iterator[None]:
        with ExitStack() as stack:
            for label in self._labels(name, number):
                stack.enter_context(self._ranged(label))
            yield

    def _labels(self, name: str, number: int) -> tuple[str, ...]:
        if name == "tick":
            self._num_ticks += 1
            return f"tick {self._num_ticks - 1}", self._models[number]
        if name == "capture":
            return (f"capture {self._models[number]}",)
        return (f"block {number}" if name == "block" else name,)


class Both(Spans):
    """Tells two listeners."""

    def __init__(self, first: Spans, second: Spans) -> None:
        self._first, self._second = first, second

    @contextmanager
    def __call__(self, name: str, number: int = 0) -> Iterator[None]:
        with self._first(name, number), self._second(name, number):
            yield


def write_trace(sampler: Sampler, path: Path, num_ticks: int, request: dict) -> int:
    """Run the first `num_ticks` ticks of a request under torch.profiler and write its trace, whole or not at all.

    request: as `Sampler.sample` takes it. Returns how many ticks there were.
    """
    on_gpu = next(iter(sampler.models.values())).device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    ranges = Ranges(list(sampler.models), record_function)
    with torch.profiler.profile(activities=activities) as profiler:
        num_done = run_ticks(sampler, num_ticks, request, ranges)
    replace_whole(path, lambda file: profiler.export_chrome_trace(str(file)))
    return num_done
