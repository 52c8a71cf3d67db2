"""What does a schedule cost? Counted from the reveal plan, which all schedules of a study share."""

from functools import cache

import numpy as np
import torch

from unmask.cost import Cost, Meter
from unmask.denoiser import Denoiser
from unmask.kernels.noise import reveal_times
from unmask.reveal import Reveal
from unmask.schedule import Schedule

TYPICAL = 1 << 18  # positions
SLACK = 0.005  # by how much chance may move a saving that is counted over so many


class Prices:
    """The cost of any schedule of `num_samples` texts of `length` tokens, the same as `Sampler.plan(...).cost`.

    A plan packs ticks, which takes as long as many schedules' prices; here the plan is drawn once.
    `Prices.typical` counts over so many texts that chance in their reveal times hardly tells placements of equally
    many segments apart, as it does with few.

    reveal_step: int32 [num_samples, length], the step that reveals each position, whatever the schedule.
    num_samples; num_steps of the trajectory.
    """

    def __init__(
        self, models: dict[str, Denoiser], reveal: Reveal, *, num_samples: int, length: int, seed: int
    ) -> None:
        if getattr(reveal, "remasks", False):
            raise ValueError(f"reveal must be a policy that reveals positions once and for all, got {str(reveal)!r}")
        positions = np.arange(length)
        times = reveal_times(seed, torch.arange(num_samples)[:, None], torch.from_numpy(positions)).numpy()
        self.models, self.num_samples, self.length = models, num_samples, length
        self.num_steps = reveal.num_steps(length)
        self.reveal_step = reveal.plan(times, positions).step
        owner = np.arange(num_samples)[:, None] * self.num_steps
        events, self._rows = np.unique(owner + self.reveal_step, return_counts=True)
        self._sequence, self._step = np.divmod(events, self.num_steps)
        self._priced = {name: _Priced(model) for name, model in models.items()}

    @classmethod
    def typical(cls, models: dict[str, Denoiser], reveal: Reveal, *, length: int, seed: int) -> "Prices":
        return cls(models, reveal, num_samples=max(1, TYPICAL // length), length=length, seed=seed)

    def models_of(self, schedule: Schedule) -> np.ndarray:
        """int64 [num_steps]: the index of each step's model."""
        names, found = list(self.models), np.empty(self.num_steps, np.int64)
        for name, start, stop in schedule.assign(self.num_steps):
            found[start:stop] = names.index(name)
        return found

    def cost(self, schedule: Schedule, first_step: np.ndarray | None = None) -> Cost:
        """All events of a schedule; with first_step, int64 [num_samples], those at and behind it in each text."""
        part = self._part(first_step)
        names, meter = list(self.models), Meter(self._priced)
        calls = self.models_of(schedule)[self._step[part]] * (self.length + 1) + self._rows[part]
        for call, count in zip(*np.unique(calls, return_counts=True), strict=True):
            model, rows = divmod(int(call), self.length + 1)
            meter.calls[names[model], self.length, rows] += int(count)
        return meter.cost

    def nfe(self, cost: Cost) -> dict[str, float]:
        """Network calls per text, by model."""
        return {name: cost.events_of(name) / self.num_samples for name in self.models}

    def num_events(self, first_step: np.ndarray | None = None) -> int:
        """Network calls of single texts; `first_step` as in `cost`."""
        return int(self._part(first_step).sum())

    def _part(self, first_step: np.ndarray | None) -> np.ndarray:
        """bool [events]."""
        return self._step >= (0 if first_step is None else first_step[self._sequence])

    def flops(self, model: str, rows: int) -> int:
        """Of one network call."""
        return self._priced[model].flops(self.length, rows).total


class _Priced:
    """What a `Meter` asks of a denoiser, remembered."""

    def __init__(self, model: Denoiser) -> None:
        self.flops = cache(model.flops)
