"""Percentile bootstrap intervals of ratios of sums over units that were drawn together."""

from typing import NamedTuple

import numpy as np


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


def of_ratio(sums: np.ndarray, counts: np.ndarray, drawn: np.ndarray) -> Interval:
    """The interval of sum(sums) / sum(counts), both [units], with `drawn` from `resamples`.

    Quantities of one study share `drawn`: then an interval of their difference is a paired one.
    """
    low, high = np.quantile(drawn @ sums / (drawn @ counts), (0.025, 0.975))
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))
