"""The result of a search: schedules with their measures and prices, by rank."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from unmask.choose import Categorical
from unmask.cost import Saving
from unmask.schedule import Schedule
from unmask.study import bootstrap
from unmask.study.bootstrap import Interval
from unmask.study.placements import SHAPES, Placement, shapes_of
from unmask.study.prices import SLACK, Prices
from unmask.study.quality import Columns, Difference, Quality, difference_of, quality_of
from unmask.study.record import Finished

EXACT, RATIO = "exact_nll", "perplexity_ratio"  # what schedules are ranked by


@dataclass(frozen=True)
class Row:
    """A placement: its texts, how they differ from the first model's, and its price.

    models: of each segment. shapes: the published ones that it has, see `unmask.study.placements`. rank: from 1, the
    best; None for the first model alone. measure: what it is ranked by, less is better; how it compares with the first
    model alone (see `Search.measure`), with a paired 95 % interval. predicted: extra nats per token, see
    `unmask.study.prediction`; None without one. on_front: no other row both saves more FLOPs, without the head, and
    measures better. saved, nfe: of whole runs of this schedule, over so many texts that chance in their reveal times
    does not matter, see `unmask.study.prices`. seconds: of sampling, None where a part of it was
    taken from another schedule's run.
    """

    schedule: str
    models: tuple[str, ...]
    shapes: tuple[str, ...]
    rank: int | None
    measure: Interval
    predicted: Interval | None
    on_front: bool
    quality: Quality
    difference: Difference
    saved: Saving
    nfe: Mapping[str, float]
    seconds: float | None

    def to_json(self) -> dict:
        content = asdict(self)
        parts = {"quality": self.quality.to_json(), "difference": self.difference.to_json()}
        predicted = self.predicted and self.predicted._asdict()
        return {**content, "measure": self.measure._asdict(), "predicted": predicted, **parts}


@dataclass(frozen=True)
class Pair:
    """Two schedules with published shapes that save alike: how the `other` one compares with `one`, text by text.

    measure: as of `Row`, with `one` in the place of the first model alone.
    """

    one: str
    other: str
    measure: Interval

    def to_json(self) -> dict:
        return {**asdict(self), "measure": self.measure._asdict()}


@dataclass(frozen=True)
class Search:
    """Rows by rank, the first model alone before them; pairs of published shapes with the same number of segments for
    each model.

    measure: "exact_nll", nats per token under the data's law less those of the first model alone, or
    "perplexity_ratio", the scorer's perplexity over that of the first model alone. calls_needed: the share of the
    network calls of whole runs that suffices for the study.
    """

    models: tuple[str, ...]
    num_segments: int
    num_samples: int
    length: int
    reveal: str
    seed: int
    choose: Categorical
    scorer: str | None
    measure: str
    calls_needed: float
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]

    def to_json(self) -> dict:
        """What `unmask study search --json` prints; an interval is {"value", "low", "high"}."""
        rows, pairs = ([one.to_json() for one in part] for part in (self.rows, self.pairs))
        return {**asdict(self), "rows": rows, "pairs": pairs}


def ranked(
    placements: Sequence[Placement],
    scored: Sequence[tuple[Finished, Columns]],
    prices: Prices,
    predict: Callable[[Schedule], Interval] | None,
) -> tuple[Row, ...]:
    """The rows of a search. placements: the first model alone, then the others; `scored` has their texts and measures.

    Raises ValueError where the texts are too short for a scorer.
    """
    drawn = bootstrap.resamples(len(scored[0][0].texts.tokens))  # the same for all: intervals are of pairs
    differences = [difference_of(scored[0][1], columns, drawn) for _, columns in scored]
    measures = [_measure(one) for one in differences]
    if None in measures:
        raise ValueError("scorer must score some tokens of the texts, got none; take longer texts")
    costs = [prices.cost(one.schedule) for one in placements]
    points = [(cost.saving.without_head, found.value) for cost, found in zip(costs, measures, strict=True)]
    front = _front(points)
    others = sorted(range(1, len(points)), key=lambda index: (points[index][1], -points[index][0]))
    rows = []
    for rank, index in enumerate([0, *others]):
        placement, (finished, columns) = placements[index], scored[index]
        row = Row(
            schedule=str(placement),
            models=placement.models,
            shapes=shapes_of(placement, placements[0].models[0]),
            rank=rank or None,
            measure=measures[index],
            predicted=None if predict is None else predict(placement.schedule),
            on_front=index in front,
            quality=quality_of(finished.texts.tokens.astype(np.int64), columns, finished.scores, drawn),
            difference=differences[index],
            saved=costs[index].saving,
            nfe=prices.nfe(costs[index]),
            seconds=finished.texts.seconds,
        )
        rows.append(row)
    return tuple(rows)


def paired(placements: Sequence[Placement], scored: Sequence[tuple[Finished, Columns]]) -> tuple[Pair, ...]:
    """Every two published shapes of one saving, in the order of `unmask.study.placements`; arguments as of `ranked`."""
    drawn = bootstrap.resamples(len(scored[0][0].texts.tokens))
    groups: dict[tuple, list[tuple[int, int]]] = {}
    for index, placement in enumerate(placements):
        for shape in shapes_of(placement, placements[0].models[0])[:1]:
            mix = tuple(sorted((name, placement.models.count(name)) for name in set(placement.models)))
            groups.setdefault(mix, []).append((SHAPES.index(shape), index))
    found = []
    for group in groups.values():
        for (_, one), (_, other) in combinations(sorted(group), 2):
            measure = _measure(difference_of(scored[one][1], scored[other][1], drawn))
            found.append(Pair(str(placements[one]), str(placements[other]), measure))
    return tuple(found)


def _measure(difference: Difference) -> Interval | None:
    return difference.measures.get(EXACT, difference.perplexity_ratio)


def _front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Which of (saving, loss) no other one beats in loss and equals in saving, up to `SLACK`."""

    def beaten(saving: float, loss: float) -> bool:
        return any(other >= saving - SLACK and less < loss for other, less in points)

    return {index for index, point in enumerate(points) if not beaten(*point)}
