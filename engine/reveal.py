"""When is each position revealed? Planned policies: the whole answer before the first network call.

A policy turns reveal times into steps. Time runs from 1, where every position is masked, down to 0, where none is.
Every position has its own time, uniform on (0, 1), and a larger time is revealed earlier.
A policy sees neither logits nor models nor seeds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from unmask.arguments import (
    DIRECTIONS,
    checked,
    checked_grid,
    checked_order,
    checked_steps,
    checked_whole,
    commas,
    listed,
    short,
)

REMAINDERS = ("spread", "first")


@dataclass(frozen=True, eq=False)
class RevealPlan:
    """When each of n masked positions of S sequences is revealed.

    step: int32 [S, n], the 0-based step of the trajectory that reveals the position.
    mask_rate: float64 [S, n] in (0, 1], the share of masked positions that a time-conditioned denoiser is told then.
    """

    step: np.ndarray
    mask_rate: np.ndarray


@dataclass(frozen=True, eq=False)
class RemaskPlan:
    """When the masked positions of S sequences are revealed, masked again and revealed anew: T reveals, in any order.

    row, column: int64 [T], the sequence, and which of its masked positions. step: int32 [T], the 0-based step of the
    trajectory that reveals it. mask_rate: float64 [T], as in `RevealPlan`.
    draw: int32 [T], how often the position was revealed before. masked: int32 [T], the step that masked it again since,
    before `step`; steps behind `masked` see the mask there. Any number where `draw` is 0.
    """

    row: np.ndarray
    column: np.ndarray
    step: np.ndarray
    mask_rate: np.ndarray
    draw: np.ndarray
    masked: np.ndarray


# Random numbers beyond one time for each position: uniform(row, column, count) is float64 [T], uniform on (0, 1), for
# int64 [T] rows and columns of `times`; those of another count, from 1, are independent.
Uniform = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


class Reveal(Protocol):
    """A planned reveal policy: small, frozen, and without randomness of its own. `parse(str(policy)) == policy`.

    A policy that masks positions again has an attribute `remasks` that is true; its `plan` takes a `Uniform` as third
    argument and returns a `RemaskPlan`.
    """

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
        object.__setattr__(self, "steps", checked_steps(self.steps))
        object.__setattr__(self, "grid", checked_grid(self.grid, self.steps))

    def __str__(self) -> str:
        if self.grid == "linear":
            return f"ancestral:{self.steps}"
        return f"ancestral:{self.steps}:{self.grid if isinstance(self.grid, str) else commas(self.grid)}"

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
        times, _ = checked(times, positions)
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
        times, _ = checked(times, positions)
        return RevealPlan(_ranks(times), times)


@dataclass(frozen=True)
class Fixed:
    """Counts fixed in advance, positions at random: of n positions each of N steps reveals floor(n / N) or one more.

    Which positions share a step is a uniformly random partition; how many is the same in every sequence. With n <= N
    every step reveals at most one position, and the law is that of `FirstHitting`.

    steps: the number N of steps, 1 to a million.
    remainder: which n % N steps reveal one more. "spread": evenly over the trajectory, step k reveals
        floor(n (k+1) / N) - floor(n k / N). "first": the first ones, as in LLaDA's `get_num_transfer_tokens`.
    """

    steps: int
    remainder: str = "spread"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", checked_steps(self.steps))
        if self.remainder not in REMAINDERS:
            raise ValueError(f"remainder must be {listed(REMAINDERS)}, got {self.remainder!r}")

    def __str__(self) -> str:
        return f"fixed:{self.steps}" + (":first" if self.remainder == "first" else "")

    def num_steps(self, num_masked: int) -> int:
        return self.steps

    def first_ranks(self, num_masked: int) -> np.ndarray:
        """int64 [N + 1]: how many positions are revealed before each step, and in the end."""
        k, (each, over) = np.arange(self.steps + 1), divmod(num_masked, self.steps)
        return each * k + np.minimum(k, over) if self.remainder == "first" else num_masked * k // self.steps

    def plan(self, times: np.ndarray, positions: np.ndarray) -> RevealPlan:
        times, positions = checked(times, positions)
        n, first_rank = len(positions), self.first_ranks(len(positions))
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
        object.__setattr__(self, "order", checked_order(self.order))

    def __str__(self) -> str:
        return self.order if isinstance(self.order, str) else f"order:{commas(self.order)}"

    def num_steps(self, num_masked: int) -> int:
        return num_masked

    def plan(self, times: np.ndarray, positions: np.ndarray) -> RevealPlan:
        times, positions = checked(times, positions)
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
            raise ValueError(f"order must name every masked position, got one that lacks {short(missing)}")
        return np.searchsorted(positions, order)


@dataclass(frozen=True)
class Blocks:
    """Any policy over consecutive groups of masked positions, each group complete before the next begins.

    Groups go by rank: the first `length` masked positions, the next `length`, and so on; the last may be smaller. What
    is told to a time-conditioned denoiser is the share of all masked positions. Semi-autoregressive sampling, as in
    Nie et al. 2025 (LLaDA), arXiv 2502.09992.

    policy: of each group, which it sees as if there were no other. Its steps are those of one group. An adaptive policy
        (one whose `adaptive` is true) is but kept here, for the loop that runs it.
    length: masked positions of a group, at least 1.
    stop_id: once this token stands in a finished group, no further group begins; None: all do. Only of adaptive
        policies that mask nothing again: a plan is made before any token is known.
    """

    policy: Reveal
    length: int
    stop_id: int | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.policy, "num_steps"):
            raise TypeError(f"policy must be a reveal policy such as Fixed(8), got {self.policy!r}")
        if isinstance(self.policy, Blocks):
            raise ValueError(f"policy must be that of a single group, got {str(self.policy)!r}")
        object.__setattr__(self, "length", checked_whole("length", self.length, least=1))
        if self.stop_id is None:
            return
        object.__setattr__(self, "stop_id", checked_whole("stop_id", self.stop_id, least=0))
        if not self.adaptive or self.remasks:
            kind = "planned policy" if not self.adaptive else "remasking policy"
            raise ValueError(f"stop_id must be None for the {kind} {str(self.policy)!r}, got {self.stop_id}")

    def __str__(self) -> str:
        stop = "" if self.stop_id is None else f"stop:{self.stop_id}:"
        return f"blocks:{self.length}:{stop}{self.policy}"

    @property
    def adaptive(self) -> bool:
        return getattr(self.policy, "adaptive", False)

    @property
    def remasks(self) -> bool:
        return getattr(self.policy, "remasks", False)

    def num_steps(self, num_masked: int) -> int:
        full, rest = divmod(num_masked, self.length)
        return full * self.policy.num_steps(self.length) + (self.policy.num_steps(rest) if rest else 0)

    def plan(self, times: np.ndarray, positions: np.ndarray, uniform: Uniform | None = None) -> RevealPlan | RemaskPlan:
        times, positions = checked(times, positions)
        n, first_step, plans = len(positions), 0, []
        for start in range(0, n, self.length):
            stop = min(start + self.length, n)
            arguments = times[:, start:stop], positions[start:stop]
            if self.remasks:
                plan = self.policy.plan(*arguments, uniform and _behind(uniform, start))
                plan = replace(plan, column=plan.column + start, masked=plan.masked + first_step)
            else:
                plan = self.policy.plan(*arguments)
            mask_rate = (plan.mask_rate * (stop - start) + n - stop) / n
            plans.append(replace(plan, step=plan.step + first_step, mask_rate=mask_rate))
            first_step += self.policy.num_steps(stop - start)
        columns = zip(*(vars(plan).values() for plan in plans), strict=True)
        return type(plans[0])(*(np.concatenate(column, axis=-1) for column in columns))


def _behind(uniform: Uniform, start: int) -> Uniform:
    """The random numbers of the masked positions from `start` on."""
    return lambda row, column, count: uniform(row, column + start, count)


POLICIES = (Ancestral, FirstHitting, Fixed, Order, Blocks)
SPELLINGS = [
    "ancestral:STEPS",
    "ancestral:STEPS:linear|cosine|RATE,RATE,...",
    "first-hitting",
    "fixed:STEPS",
    "fixed:STEPS:spread|first",
    *DIRECTIONS,
    "order:POSITION,POSITION,...",
    "blocks:LENGTH:POLICY",
    "blocks:LENGTH:stop:ID:POLICY",
]
_PARSERS: dict[str, Callable[[list[str]], Reveal | None]] = {}


def parse(text: str) -> Reveal:
    """The policy that `text` spells, for the command line: "ancestral:1000", "blocks:32:fixed:8:first", ...

    `SPELLINGS` lists all forms; anything else raises ValueError, which names them and what is wrong.
    """
    wanted = f"reveal must be one of {listed(SPELLINGS)}, got {text!r}"
    try:
        policy = _spelled(text.split(":"))
    except ValueError as error:
        raise ValueError(f"{wanted}: {error}") from None
    if policy is None:
        raise ValueError(wanted)
    return policy


def register(word: str, parser: Callable[[list[str]], Reveal | None], *spellings: str) -> None:
    """Let `parse` know the policies of another module, whose spellings begin with "word" or "word:".

    parser: gets what follows the word, cut at its colons; gives the policy, or None where nothing is spelled like this.
    """
    _PARSERS[word] = parser
    SPELLINGS.extend(spellings)


def _spelled(parts: list[str]) -> Reveal | None:
    match parts:
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
        case ["fixed", steps, remainder]:
            return Fixed(int(steps), remainder)
        case ["left-to-right" | "right-to-left" as direction]:
            return Order(direction)
        case ["order", order]:
            return Order([int(position) for position in order.split(",")])
        case ["blocks", length, "stop", stop_id, *policy]:
            return _blocks(policy, int(length), int(stop_id))
        case ["blocks", length, *policy]:
            return _blocks(policy, int(length), None)
        case [word, *rest] if word in _PARSERS:
            return _PARSERS[word](rest)
    return None


def _blocks(parts: list[str], length: int, stop_id: int | None) -> Blocks | None:
    policy = _spelled(parts)
    return None if policy is None else Blocks(policy, length, stop_id)


def _ranks(times: np.ndarray) -> np.ndarray:
    """int32 [S, n]: how many positions of the same sequence come earlier, larger times first, then lower positions."""
    order = np.argsort(-times, axis=1, kind="stable")
    ranks = np.empty(times.shape, np.int32)
    np.put_along_axis(ranks, order, np.arange(times.shape[1], dtype=np.int32)[None], axis=1)
    return ranks
