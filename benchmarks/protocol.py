"""How whole runs are taken, and what is made of their seconds."""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

_NORMAL_95 = statistics.NormalDist().inv_cdf(0.975)


class Ratio(NamedTuple):
    """How many times as long a peer takes as ours, and between what bounds; one run has none."""

    value: float
    low: float | None = None
    high: float | None = None


class Turn(NamedTuple):
    """One run of the variant of that name; `timed`: it is no warm-up."""

    name: str
    timed: bool


@dataclass(frozen=True)
class Protocol(ABC):
    """rounds: timed runs of each variant. warmups: runs before these."""

    rounds: int
    warmups: int
    name: ClassVar[str]
    bounds: ClassVar[str]

    @abstractmethod
    def turns(self, names: list[str]) -> Iterator[Turn]:
        """Who runs when."""

    @abstractmethod
    def center(self, seconds: list[float]) -> float:
        """The one number of several runs."""

    @abstractmethod
    def ratio(self, ours: list[float], peer: list[float]) -> Ratio:
        """From the seconds of as many runs of both, at least one."""


@dataclass(frozen=True)
class Paired(Protocol):
    """Variants take turns, the order rotated by one from round to round; each round gives a ratio, and these their
    median. A machine that becomes busy or slow slows both sides of a ratio."""

    rounds: int = 5
    warmups: int = 1
    name: ClassVar[str] = "paired"
    bounds: ClassVar[str] = "p20–p80 of rounds"

    def turns(self, names: list[str]) -> Iterator[Turn]:
        yield from (Turn(name, timed=False) for _ in range(self.warmups) for name in names)
        for turn in range(self.rounds):
            first = turn % max(1, len(names))
            yield from (Turn(name, timed=True) for name in names[first:] + names[:first])

    def center(self, seconds: list[float]) -> float:
        return statistics.median(seconds)

    def ratio(self, ours: list[float], peer: list[float]) -> Ratio:
        ratios = [theirs / mine for mine, theirs in zip(ours, peer, strict=False)]  # the last round may be unfinished
        return Ratio(statistics.median(ratios), *(middle(ratios) if len(ratios) > 1 else ()))


@dataclass(frozen=True)
class LatencySample(Protocol):
    """The protocol of the mode `latency_sample` in the code of partition generative models (arXiv 2505.18883): one
    variant after the other, two warm-ups, mean and standard deviation of the runs. The interval is that of a ratio of
    means by the delta method."""

    rounds: int = 10
    warmups: int = 2
    name: ClassVar[str] = "latency_sample"
    bounds: ClassVar[str] = "95 % interval"

    def turns(self, names: list[str]) -> Iterator[Turn]:
        for name in names:
            yield from (Turn(name, timed=turn >= self.warmups) for turn in range(self.warmups + self.rounds))

    def center(self, seconds: list[float]) -> float:
        return statistics.mean(seconds)

    def ratio(self, ours: list[float], peer: list[float]) -> Ratio:
        value = statistics.mean(peer) / statistics.mean(ours)
        if min(len(ours), len(peer)) < 2:
            return Ratio(value)
        spread = _NORMAL_95 * math.hypot(_relative_error(ours), _relative_error(peer))
        return Ratio(value, value * math.exp(-spread), value * math.exp(spread))


PROTOCOLS: dict[str, type[Protocol]] = {each.name: each for each in (Paired, LatencySample)}


def middle(values: list[float]) -> tuple[float, float]:
    """The 20th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0]
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return p20, p80


def _relative_error(seconds: list[float]) -> float:
    """Standard error of the mean of at least two runs, as a share of it."""
    return statistics.stdev(seconds) / math.sqrt(len(seconds)) / statistics.mean(seconds)
