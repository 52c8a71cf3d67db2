"""What a plan will cost and what a run did: network calls and FLOPs, counted from ticks."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from unmask.denoiser import Denoiser, Flops
from unmask.timeline import Tick


@dataclass(frozen=True)
class Saving:
    """The share of FLOPs that a schedule saves against its costliest model taking every event: 0.1 is 10 %.

    The published figure (Sedykh et al. 2026, arXiv 2604.02340) leaves the LM head out of both sides.
    """

    with_head: float
    without_head: float


@dataclass
class Cost:
    """Network calls of a run, added up tick by tick.

    A call of one sequence is an event; `calls` counts the events of each (model, length, rows revealed), which is all
    that their FLOPs depend on.
    """

    denoisers: Mapping[str, Denoiser]
    calls: Counter = field(default_factory=Counter)

    def add(self, tick: Tick) -> None:
        model = list(self.denoisers)[tick.model]
        shapes = Counter(zip(tick.lengths.tolist(), tick.row_counts.tolist(), strict=True))
        for shape, count in shapes.items():
            self.calls[model, *shape] += count

    def copy(self) -> "Cost":
        """The count as it stands now."""
        return Cost(self.denoisers, self.calls.copy())

    @property
    def num_events(self) -> int:
        return self.calls.total()

    def events_of(self, model: str) -> int:
        return sum(count for (name, *_), count in self.calls.items() if name == model)

    @property
    def flops(self) -> dict[str, Flops]:
        """What each model computes: the products really done, the head and the last block at revealed rows only."""
        total = {name: Flops(0, 0, 0) for name in self.denoisers}
        for (name, length, rows), count in self.calls.items():
            total[name] += self.denoisers[name].flops(length, rows) * count
        return total

    @property
    def total(self) -> Flops:
        return sum(self.flops.values(), Flops(0, 0, 0))

    @property
    def one_model(self) -> Flops:
        """The same events, all computed by the costliest model."""

        def alone(denoiser: Denoiser) -> Flops:
            shapes = ((denoiser.flops(length, rows) * count) for (_, length, rows), count in self.calls.items())
            return sum(shapes, Flops(0, 0, 0))

        return max((alone(denoiser) for denoiser in self.denoisers.values()), key=lambda flops: flops.total)

    @property
    def saving(self) -> Saving:
        with_schedule, without = self.total, self.one_model
        body, body_alone = with_schedule.total - with_schedule.head, without.total - without.head
        return Saving(_saved(with_schedule.total, without.total), _saved(body, body_alone))


def flops_dict(flops: Flops) -> dict[str, int]:
    return {**asdict(flops), "total": flops.total}


def _saved(cost: int, whole: int) -> float:
    return 1 - cost / whole if whole else 0.0
