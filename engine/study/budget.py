"""The placements that promise most at a price, by prediction alone."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from unmask.schedule import Schedule
from unmask.study.placements import Placement
from unmask.study.prices import SLACK, Prices

MAX_CANDIDATES = 100_000


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

    saving: 0.25 is 25 %, without the head, as the published figures are; it may be missed by `SLACK`. Of equal
    predictions the one that saves more comes first. Raises ValueError where none saves that much.
    """
    check_budget(saving, number)
    each = [(one, prices.cost(one.schedule).saving.without_head) for one in placements]
    most = max(saved for _, saved in each)
    if most < saving - SLACK:
        raise ValueError(f"saving must be at most the {most:.1%} that these models can save, got {saving:.1%}")
    enough = [(predict(one.schedule), -saved, one) for one, saved in each if saved >= saving - SLACK]
    return [one for *_, one in sorted(enough, key=lambda found: found[:2])[:number]]
