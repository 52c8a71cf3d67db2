"""Percentile bootstrap intervals of statistics of sums over units that were drawn together."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# From 10 units on the nominal 95 % interval of a mean of normal units covers 90 % at least: in 100,000 simulations it
# covered 88.6, 89.5 and 90.1 % with 8, 9 and 10 of them (standard errors 0.1 %).
MIN_UNITS = 10


class Interval(NamedTuple):
    """An estimate and the 2.5 % and 97.5 % quantiles of its bootstrap distribution. As text: ± half their distance."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ±{(self.high - self.low) / 2:.3f}"


def resamples(num_units: int, num_resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each unit is drawn in each resample, float64 [num_resamples, num_units]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_units, np.full(num_units, 1 / num_units), size=num_resamples).astype(np.float64)


def of_sums(statistic: Callable[..., np.ndarray], columns: Sequence[np.ndarray], drawn: np.ndarray) -> Interval:
    """The interval of statistic(sum of each column); columns are [units], `drawn` comes from `resamples`.

    The statistic takes arrays with one element per resample. Where it is NaN, as 0 / 0 is, the resample is left out.
    Quantities of one study share `drawn`: then an interval of their difference is a paired one.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(*(drawn @ column for column in columns))
    low, high = np.nanquantile(values, (0.025, 0.975))
    return Interval(float(statistic(*(column.sum() for column in columns))), float(low), float(high))


def of_ratio(sums: np.ndarray, counts: np.ndarray, drawn: np.ndarray) -> Interval:
    """The interval of sum(sums) / sum(counts), both [units]."""
    return of_sums(np.divide, (sums, counts), drawn)
