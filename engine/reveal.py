"""When is each position revealed? Planned policies: the whole answer before the first network call.

A policy turns reveal times into steps. Time runs from 1, where every position is masked, down to 0, where none is.
Every position has its own time, uniform on (0, 1), and a larger time is revealed earlier.
A policy sees neither logits nor models nor seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

GRIDS = ("linear", "cosine")
DIRECTIONS = ("left-to-right", "right-to-left")
MAX_STEPS = 1_000_000  # the cosine grid, rounded to 2^-40, still falls strictly at this many steps


@dataclass(frozen=True, eq=False)
class RevealPlan:
    """When each of n masked positions of S sequences is revealed.

    step: int32 [S, n], the 0-based step of the trajectory that reveals the position.
    mask_rate: float64 [S, n] in (0, 1], the share of masked positions that a time-conditioned denoiser is told then.
    """

    step: np.ndarray
    mask_rate: np.ndarray


class Reveal(Protocol):
    """A planned reveal policy: small, frozen, and without randomness of its own. `parse(str(policy)) == policy`."""

    def num_steps(self, num_masked: int) -> int:
        """Length of the trajectory of a sequence with `num_masked` masked positions."""

    def plan(self, times: np.ndarray, positions: np.ndarray) -> RevealPlan:
        """Steps of S sequences that share one template.

        times: float64 [S, n], the reveal times. positions: int64 [n], the masked positions, ascending.
        Between positions with equal times the lower one goes first.
        """


@dataclass(frozen=True)
class Ancestral:
    """The ancestral sampler of masked diffusion: in each step every masked position is revealed independently.

    Step k starts at mask rate m[k]. A position still masked then is revealed with probability 1 - m[k+1] / m[k], so
    step k reveals it with probability m[k] - m[k+1]; tokens of one step are drawn independently given what is already
    revealed. Sahoo et al. 2024 (MDLM), arXiv 2406.07524; its log-linear noise is the linear grid.

    steps: the number N of steps, 1 to a million.
    grid: the mask rates m[0] > ... > m[N]. "linear" (1 - k/N), "cosine" (cos(pi/2 k/N), rounded to 2^-40 so that plans
        are the same on every machine), or N + 1 numbers that fall strictly from 1 to 0 or above. If they end above 0,
        one extra last step reveals what is left.
    """

    steps: int
    grid: str | tuple[float, ...] = "linear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _checked_steps(self.steps))
        object.__setattr__(self, "grid", _checked_grid(self.grid, self.steps))

    def __str__(self) -> str:
        if self.grid == "linear":
            return f"ancestral:{self.steps}"
        return f"ancestral:{self.steps}:{self.grid if isinstance(self.grid, str) else _commas(self.grid)}"

    @cached_property
    def mask_rates(self) -> np.ndarray:
        """float64 [num_steps + 1], the mask rate at the start of each step, then 0."""
        k = np.arange(self.steps + 1)
        if self.grid == "linear":
            return (self.steps - k) / self.steps
        if self.grid == "cosine":
            exact = [math.cos(math.pi / 2 * i / self.steps) for i in range(self.steps)]
            return np.append(np.round(np.ldexp(exact, 40)), 0.0) / 2.0**40
        return np.array(self.grid if self.grid[-1] == 0 else (*self.grid, 0.0))

    def num_steps(self, num_masked: int) -> int:
        return len(self.mask_rates) - 1

    def plan(self, times: np.ndarray, positions: np.ndarray) -> RevealPlan:
        times, _ = _checked(times, positions)
        ends = self.mask_rates[:0:-1]  # ascending: where each step ends, last step first
        step = len(ends) - np.searchsorted(ends, times, side="right")
        return RevealPlan(step.astype(np.int32), self.mask_rates[step])


@dataclass(frozen=True)
class FirstHitting:
    """One position per step, in falling order of time: a uniformly random order; the step happens at that very time.

    The law is that of ancestral sampling with infinitely many steps, in exactly n network calls for n masked positions.
    Zheng et al. 2024, "Masked diffusion models are secretly time-agnostic masked models", arXiv 2409.02908.
    """

    def __str__(self) -> str:
        return "first-hitting"

    def num_steps(self, num_masked: int) -> int:
        return num_masked

    def plan(self, times: np.ndarray, positions: np.ndarray) -> RevealPlan:
        times, _ = _checked(times, positions)
        return RevealPlan(_ranks(times), times)


@dataclass(frozen=True)
class Fixed:
    """Counts fixed in advance, positions at random: step k of N reveals floor(n (k+1) / N) - floor(n k / N) of n
    positions.

    Which positions share a step is a uniformly random partition; how many is the same in every sequence and differs
    by at most one between steps. With n <= N every step reveals at most one position, and the law is that of
    `FirstHitting`.

    steps: the number N of steps, 1 to a million.
    """

    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _checked_steps(self.steps))

    def __str__(self) -> str:
        return f"fixed:{self.steps}"

    def num_steps(self, num_masked: int) -> int:
        return self.steps

    def plan(self, times: np.ndarray, positions: np.ndarray) -> RevealPlan:
        times, positions = _checked(times, positions)
        n = len(positions)
        first_rank = n * np.arange(self.steps + 1) // self.steps
        step_of_rank = np.repeat(np.arange(self.steps, dtype=np.int32), np.diff(first_rank))
        step = step_of_rank[_ranks(times)]
        return RevealPlan(step, (n - first_rank[step]) / n)


@dataclass(frozen=True)
class Order:
    """One position per step in a given order; times play no part. The law is autoregressive in that order.

    order: "left-to-right", "right-to-left", or distinct positions in the order of their reveal. Positions that are
        given in the template, or lie outside it, are skipped; a masked position that the order lacks is an error.
    """

    order: str | tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", _checked_order(self.order))

    def __str__(self) -> str:
        return self.order if isinstance(self.order, str) else f"order:{_commas(self.order)}"

    def num_steps(self, num_masked: int) -> int:
        return num_masked

    def plan(self, times: np.ndarray, positions: np.ndarray) -> RevealPlan:
        times, positions = _checked(times, positions)
        n = len(positions)
        step = np.empty(n, np.int32)
        step[self._sequence_of(positions)] = np.arange(n)
        mask_rate = (n - step) / n
        return RevealPlan(np.broadcast_to(step, times.shape).copy(), np.broadcast_to(mask_rate, times.shape).copy())

    def _sequence_of(self, positions: np.ndarray) -> np.ndarray:
        """Indices into `positions`, in the order of their reveal."""
        if isinstance(self.order, str):
            return np.arange(len(positions))[:: 1 if self.order == "left-to-right" else -1]
        order = np.array(self.order)
        order = order[np.isin(order, positions)]
        if len(order) < len(positions):
            missing = np.setdiff1d(positions, order).tolist()
            raise ValueError(f"order must name every masked position, got one that lacks {_short(missing)}")
        return np.searchsorted(positions, order)


POLICIES = (Ancestral, FirstHitting, Fixed, Order)
SPELLINGS = (
    "ancestral:STEPS",
    "ancestral:STEPS:linear|cosine|RATE,RATE,...",
    "first-hitting",
    "fixed:STEPS",
    *DIRECTIONS,
    "order:POSITION,POSITION,...",
)


def parse(text: str) -> Reveal:
    """The policy that `text` spells, for the command line: "ancestral:1000", "ancestral:64:cosine", "first-hitting",
    ...

    `SPELLINGS` lists all forms; anything else raises ValueError, which names them and what is wrong.
    """
    try:
        match text.split(":"):
            case ["ancestral", steps]:
                return Ancestral(int(steps))
            case ["ancestral", steps, ("linear" | "cosine") as grid]:
                return Ancestral(int(steps), grid)
            case ["ancestral", steps, rates]:
                return Ancestral(int(steps), [float(rate) for rate in rates.split(",")])
            case ["first-hitting"]:
                return FirstHitting()
            case ["fixed", steps]:
                return Fixed(int(steps))
            case ["left-to-right" | "right-to-left" as direction]:
                return Order(direction)
            case ["order", order]:
                return Order([int(position) for position in order.split(",")])
    except ValueError as error:
        raise ValueError(f"reveal must be one of {_listed(SPELLINGS)}, got {text!r}: {error}") from None
    raise ValueError(f"reveal must be one of {_listed(SPELLINGS)}, got {text!r}")


def _ranks(times: np.ndarray) -> np.ndarray:
    """int32 [S, n]: how many positions of the same sequence come earlier, larger times first, then lower positions."""
    order = np.argsort(-times, axis=1, kind="stable")
    ranks = np.empty(times.shape, np.int32)
    np.put_along_axis(ranks, order, np.arange(times.shape[1], dtype=np.int32)[None], axis=1)
    return ranks


def _checked(times: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    times, positions = np.asarray(times, np.float64), np.asarray(positions)
    if positions.ndim != 1 or len(positions) == 0 or positions[0] < 0 or (positions[1:] <= positions[:-1]).any():
        raise ValueError(
            f"positions must be ascending masked positions, at least one, got {_short(positions.tolist())}"
        )
    if times.ndim != 2 or times.shape[1] != len(positions):
        raise ValueError(f"times must have shape [sequences, {len(positions)}], got {list(times.shape)}")
    outside = ~((times > 0) & (times < 1))  # true for NaN as well
    if outside.any():
        raise ValueError(f"times must lie strictly between 0 and 1, got {times[outside][0]}")
    return times, positions


def _checked_steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
        raise TypeError(f"steps must be a whole number, got {steps!r}")
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must lie between 1 and {MAX_STEPS}, got {steps}")
    return int(steps)


def _checked_grid(grid: str | Sequence[float], steps: int) -> str | tuple[float, ...]:
    wanted = f"grid must be {_listed(GRIDS)}, or steps + 1 = {steps + 1} numbers falling strictly from 1 to 0 or above"
    if isinstance(grid, str):
        if grid not in GRIDS:
            raise ValueError(f"{wanted}, got {grid!r}")
        return grid
    try:
        rates = np.asarray(grid, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{wanted}, got {_short(grid)}") from None
    if rates.shape != (steps + 1,):
        raise ValueError(f"{wanted}, got shape {list(rates.shape)}: {_short(rates.tolist())}")
    if rates[0] != 1:
        raise ValueError(f"{wanted}, got a start at {rates[0]}")
    rising = np.flatnonzero(~(rates[1:] < rates[:-1]))
    if len(rising):
        k = int(rising[0])
        raise ValueError(f"{wanted}, got {rates[k]} and then {rates[k + 1]} at {k} and {k + 1}")
    if rates[-1] < 0:
        raise ValueError(f"{wanted}, got an end at {rates[-1]}")
    return tuple(rates.tolist())


def _checked_order(order: str | Sequence[int]) -> str | tuple[int, ...]:
    wanted = f"order must be {_listed(DIRECTIONS)}, or distinct positions"
    if isinstance(order, str):
        if order not in DIRECTIONS:
            raise ValueError(f"{wanted}, got {order!r}")
        return order
    try:
        array = np.asarray(order)
    except ValueError:
        raise TypeError(f"{wanted}, got {_short(order)}") from None
    if array.ndim != 1 or not (len(array) and np.issubdtype(array.dtype, np.integer)):
        raise TypeError(f"{wanted} (whole numbers, at least one), got {_short(order)}")
    values, counts = np.unique(array, return_counts=True)
    if values[0] < 0:
        raise ValueError(f"{wanted} counted from 0, got {values[0]}")
    if (counts > 1).any():
        raise ValueError(f"{wanted}, got {values[counts > 1][0]} more than once")
    return tuple(array.tolist())


def _commas(values: Sequence[float]) -> str:
    return ",".join(map(repr, values))


def _listed(words: Sequence[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
