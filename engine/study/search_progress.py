"""What people see of a search while it goes: one bar with the time left, or a line for each finished schedule."""

import sys
import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


class Forecast:
    """The time left of work that consists of phases, each at the speed it had so far.

    work: how much there is of each phase, in units of its own. `advance` says that some of it was done since the last
    call, whatever the phase.
    """

    def __init__(self, work: Mapping[str, float], clock=time.perf_counter) -> None:
        self.work, self.clock = dict(work), clock
        self.done, self.seconds = dict.fromkeys(work, 0.0), dict.fromkeys(work, 0.0)
        self._last = clock()

    def advance(self, phase: str, amount: float) -> None:
        now = self.clock()
        self.done[phase] += amount
        self.seconds[phase] += now - self._last
        self._last = now

    @property
    def left(self) -> float | None:
        """Seconds; None while a phase of which something is left has not begun."""
        total = 0.0
        for phase, work in self.work.items():
            rest = max(0.0, work - self.done[phase])
            if rest and not self.done[phase]:
                return None
            total += rest and rest * self.seconds[phase] / self.done[phase]
        return total

    @property
    def elapsed(self) -> float:
        return sum(self.seconds.values())


class Watch:
    """Follows a search; this one shows nothing. A context manager, entered before the search starts."""

    @classmethod
    def on_stderr(cls) -> "Watch":
        """A bar on a terminal, plain lines elsewhere."""
        return Bar() if sys.stderr.isatty() else Lines()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self, num_schedules: int, num_recorded: int, work: Mapping[str, float]) -> None:
        """Once: how many schedules there are, how many of them were finished earlier, and the work to do by phase."""
        self.num_schedules, self.num_finished = num_schedules, num_recorded
        self.forecast = Forecast(work)

    def advance(self, phase: str, amount: float) -> None:
        """Some work was done."""
        self.forecast.advance(phase, amount)

    def finish(self, schedule: str, news: str) -> None:
        """A schedule is measured and recorded."""
        self.num_finished += 1

    def tell(self, message: str) -> None:
        """Something that a person should know."""


class Lines(Watch):
    """A line on standard error for each finished schedule."""

    def start(self, num_schedules: int, num_recorded: int, work: Mapping[str, float]) -> None:
        super().start(num_schedules, num_recorded, work)
        if num_recorded:
            self.tell(f"{num_recorded} of {num_schedules} schedules were finished earlier")

    def finish(self, schedule: str, news: str) -> None:
        super().finish(schedule, news)
        took, left = duration(self.forecast.elapsed), duration(self.forecast.left)
        self.tell(f"{self.num_finished} of {self.num_schedules}: {schedule}: {news}; {took}, {left} left")

    def tell(self, message: str) -> None:
        print(f"search: {message}", file=sys.stderr, flush=True)


class Bar(Watch):
    """One bar, by time: as long as what has passed of what it will take."""

    def __init__(self, console: Console | None = None) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}")
        self._bar = RichProgress(*columns, console=console or Console(stderr=True), transient=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def start(self, num_schedules: int, num_recorded: int, work: Mapping[str, float]) -> None:
        super().start(num_schedules, num_recorded, work)
        self._task = self._bar.add_task(self._description, total=1.0, left="")

    def advance(self, phase: str, amount: float) -> None:
        super().advance(phase, amount)
        left = self.forecast.left
        if left is not None:
            share = self.forecast.elapsed / max(1e-9, self.forecast.elapsed + left)
            self._bar.update(self._task, completed=share, left=f"{duration(left)} left")

    def finish(self, schedule: str, news: str) -> None:
        super().finish(schedule, news)
        self._bar.update(self._task, description=self._description)

    def tell(self, message: str) -> None:
        self._bar.console.print(message, highlight=False, markup=False, soft_wrap=True)

    @property
    def _description(self) -> str:
        return f"{self.num_finished} of {self.num_schedules} schedules"


def duration(seconds: float | None) -> str:
    """Short: '12 s', '4 min', '1.5 h'; '?' for None."""
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
