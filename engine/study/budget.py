"""The placements that promise most at a price, by prediction alone."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np

from unmask.schedule import Schedule
from unmask.study.placements import Placement
from unmask.study.prices import SLACK, Prices

MAX_CANDIDATES = 100_000
DIGITS = 12  # of predictions and savings that are compared; what lies behind them is rounding


def every_placement(models: Sequence[str], num_segments: int) -> Iterator[Placement]:
    """All models at all segments, but the first model alone. Raises ValueError for more than `MAX_CANDIDATES`."""
    if num_segments < 1:
        raise ValueError(f"segments must be at least 1, got {num_segments}")
    number = len(models) ** num_segments
    if number > MAX_CANDIDATES:
        raise ValueError(
            f"segments must give at most {MAX_CANDIDATES:,} placements to predict, got {num_segments}, which give "
            f"{number:,} of {len(models)} models"
        )
    return (Placement(one) for one in product(models, repeat=num_segments) if set(one) != {models[0]})


def check_budget(saving: float, number: int) -> None:
    if not 0 < saving < 1:
        raise ValueError(f"saving must be a share between 0 and 1, such as 0.25, got {saving}")
    if number < 1:
        raise ValueError(f"verify must be at least 1, got {number}")


def best_predicted(
    placements: Iterator[Placement],
    prices: Prices,
    predict: Callable[[Schedule], float],
    *,
    saving: float,
    number: int,
) -> list[Placement]:
    """The `number` placements of least predicted loss among those that save at least `saving` of the FLOPs.

    placements: of equally many segments. predict: a sum over steps, as a price is, so that both are asked of each model
    at each segment only. saving: 0.25 is 25 %, without the head, as the published figures are; it may be missed by
    `SLACK`. Of equal predictions the one that saves more comes first. Raises ValueError where none saves that much.
    """
    check_budget(saving, number)
    every, names = list(placements), list(prices.models)
    chosen = np.array([[names.index(name) for name in one.models] for one in every])
    saved = _by_segment(lambda schedule: prices.cost(schedule).saving.without_head, names, chosen)
    most = saved.max()
    if most < saving - SLACK:
        raise ValueError(f"saving must be at most the {most:.1%} that these models can save, got {saving:.1%}")
    enough = np.flatnonzero(saved >= saving - SLACK)
    order = np.lexsort((-saved[enough], _by_segment(predict, names, chosen[enough])))
    return [every[index] for index in enough[order[:number]]]


def _by_segment(measure: Callable[[Schedule], float], names: Sequence[str], chosen: np.ndarray) -> np.ndarray:
    """A sum over steps for each placement, float64 [P], from those with one segment that is not of the first model.

    chosen: int [P, segments], indices into `names`. Segments are the same steps in every placement, and a step costs
    what its own model costs, whatever the reveal policy: what the models change at each segment adds up.
    """
    num_segments = chosen.shape[1]
    alone = (names[0],) * num_segments
    base, changes = measure(Placement(alone).schedule), np.zeros((num_segments, len(names)))
    for i, m in product(range(num_segments), range(1, len(names))):
        changes[i, m] = measure(Placement((*alone[:i], names[m], *alone[i + 1 :])).schedule) - base
    return np.round(base + changes[np.arange(num_segments), chosen].sum(1), DIGITS)
