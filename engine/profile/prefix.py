"""The first network calls of a run."""

from contextlib import suppress

from unmask.progress import Progress
from unmask.run import Run
from unmask.sampler import Sampler
from unmask.spans import SILENT, Spans
from unmask.timeline import Tick


class _Enough(Exception):
    """As many ticks as were asked for."""


class _Until(Progress):
    def __init__(self, num_ticks: int) -> None:
        self.num_ticks, self.num_done = num_ticks, 0

    def update(self, run: Run, tick: Tick) -> None:
        self.num_done += 1
        if self.num_done == self.num_ticks:
            raise _Enough


def run_ticks(sampler: Sampler, num_ticks: int, request: dict, spans: Spans = SILENT) -> int:
    """Run at most so many ticks of a request, as `Sampler.sample` takes it; returns how many there were."""
    until = _Until(num_ticks)
    with suppress(_Enough):
        sampler.sample(**request, progress=until, spans=spans)
    return until.num_done
