"""What a plan will cost and what a run did: network calls and FLOPs, counted from ticks."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from unmask.denoiser import Denoiser
from unmask.timeline import Tick
from unmask.work import Flops


@dataclass(frozen=True)
class Saving:
    """The share of FLOPs that a schedule saves against its costliest model taking every event: 0.1 is 10 %.

    The published figure (Sedykh et al. 2026, arXiv 2604.02340) leaves the LM head out of both sides.
    """

    with_head: float
    without_head: float


@dataclass(frozen=True)
class Cost:
    """Network calls of a run and their FLOPs, as plain numbers.

    calls: events (calls of one sequence) of each (model, length, rows revealed). flops: what each model computes, the
    products really done, the head and the last block at revealed rows only. one_model: the same events, all computed by
    the costliest model.
    """

    calls: Mapping[tuple[str, int, int], int]
    flops: Mapping[str, Flops]
    one_model: Flops

    @property
    def num_events(self) -> int:
        return sum(self.calls.values())

    def events_of(self, model: str) -> int:
        return sum(count for (name, *_), count in self.calls.items() if name == model)

    @property
    def total(self) -> Flops:
        return sum(self.flops.values(), Flops(0, 0, 0))

    @property
    def saving(self) -> Saving:
        with_schedule, without = self.total, self.one_model
        body, body_alone = with_schedule.total - with_schedule.head, without.total - without.head
        return Saving(_saved(with_schedule.total, without.total), _saved(body, body_alone))


@dataclass(frozen=True)
class Seconds:
    """What a run is predicted to take, in seconds.

    models: "body" (hidden rows) and "head" (head, draw and write) of each model, as in `Stats.model_seconds`. other:
    everything else, the reveal plans and the packing of ticks included.
    """

    models: Mapping[str, Mapping[str, float]]
    other: float

    def of(self, phase: str) -> float:
        """ "body" or "head" of all models together."""
        return sum(phases[phase] for phases in self.models.values())

    @property
    def total(self) -> float:
        return self.of("body") + self.of("head") + self.other

    def to_json(self) -> dict:
        """In the form of `Stats.seconds`, with the models' own beside them."""
        phases = {"total": self.total, "body": self.of("body"), "head": self.of("head"), "other": self.other}
        return {**phases, "models": {name: dict(phases) for name, phases in self.models.items()}}

    def __str__(self) -> str:
        bodies = ", ".join(f"{name} {phases['body']:.3g}" for name, phases in self.models.items())
        return f"{self.total:.3g} s ({bodies}, head {self.of('head'):.2g}, other {self.other:.2g})"


class Meter:
    """Counts the calls of a run, tick by tick, each as so many. `cost` is the count as it stands."""

    def __init__(self, denoisers: Mapping[str, Denoiser], calls_per_event: int = 1) -> None:
        self.denoisers, self.calls, self._times = dict(denoisers), Counter(), calls_per_event

    def add(self, tick: Tick) -> None:
        model = list(self.denoisers)[tick.model]
        shapes = Counter(zip(tick.lengths.tolist(), tick.row_counts.tolist(), strict=True))
        for shape, count in shapes.items():
            self.calls[model, *shape] += count * self._times

    @property
    def cost(self) -> Cost:
        flops = {
            name: self._flops(denoiser, {call: n for call, n in self.calls.items() if call[0] == name})
            for name, denoiser in self.denoisers.items()
        }
        alone = (self._flops(denoiser, self.calls) for denoiser in self.denoisers.values())
        return Cost(dict(self.calls), flops, max(alone, key=lambda flops: flops.total))

    @staticmethod
    def _flops(denoiser: Denoiser, calls: Mapping[tuple[str, int, int], int]) -> Flops:
        """What `calls` cost if this denoiser computes them."""
        each = (denoiser.flops(length, rows) * count for (_, length, rows), count in calls.items())
        return sum(each, Flops(0, 0, 0))


def flops_dict(flops: Flops) -> dict[str, int]:
    return {**asdict(flops), "total": flops.total}


def _saved(cost: int, whole: int) -> float:
    return 1 - cost / whole if whole else 0.0
