"""When is each position revealed, masked again, and revealed anew? Remasking that does not look at tokens is planned.

Time runs over a grid from 1 to a small `eps`; alpha(t) is the share of positions that are revealed at time t. In the
step from t to s < t every revealed position is masked again with probability sigma, and every masked one revealed with
a probability that keeps these shares. Wang et al. 2025 (ReMDM), arXiv 2503.00307, in the form of its published code.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np

from unmask.arguments import checked, checked_steps, listed
from unmask.reveal import RemaskPlan, Uniform, register

ETA = {"cap": 0.008, "rescale": 0.015, "loop": 0.02}  # of the published experiments, as are these
LOOP = {"t_on": 0.55, "t_off": 0.05, "alpha_on": 0.9}
EPS = 1e-5
_NUMBERS = ("eta", *LOOP, "eps")
# A product of survival probabilities starts anew below this, so that rounding never decides.
_SMALLEST_PRODUCT = 2.0**-32


def time_grid(steps: int, eps: float = EPS) -> np.ndarray:
    """float64 [steps + 1]: the time at which each step starts, from 1, and where the last one ends, `eps`."""
    return np.append(1 - np.arange(steps) * ((1 - eps) / steps), eps)


def sigma_max(grid: np.ndarray) -> np.ndarray:
    """The largest remasking probability of each step that alpha(t) = 1 - t allows: min(1, (1 - alpha(s)) / alpha(t)).

    grid: float64 [N + 1], falling times. Result: float64 [N], 1 where nothing is revealed yet.
    In ReMDM-conf step k masks the revealed position i again with probability sigma_max[k] * softmax(-p)_i, the softmax
    over the revealed positions, p_i the probability that its token had when it was drawn (`RemaskConfidence`).
    """
    alpha, share_masked = 1 - grid[:-1], grid[1:]
    return np.minimum(1.0, np.divide(share_masked, alpha, out=np.ones_like(alpha), where=alpha > 0))


def reveal_chance(grid: np.ndarray, sigma: np.ndarray | float) -> np.ndarray:
    """The probability with which a masked position is revealed, of each step under alpha(t) = 1 - t:
    (alpha(s) - (1 - sigma) alpha(t)) / (1 - alpha(t)).

    grid: float64 [N + 1], falling times. sigma: float64 [N], of the masked positions; in ReMDM-conf theirs is 0.
    """
    alpha = 1 - grid
    return np.clip((alpha[1:] - (1 - sigma) * alpha[:-1]) / grid[:-1], 0.0, 1.0)


@dataclass(frozen=True)
class Remask:
    """ReMDM: in each of N steps masked positions are revealed and revealed ones masked again, all independently.

    The law is that of the published sampler (remdm-cap, remdm-rescale, remdm-loop) except in what is still masked where
    its grid ends, at `eps`: there it takes the likeliest token, here a last step, number N, draws from the model's law.
    That concerns a share of `eps` of all positions, in the mean, and of eps (1 - alpha_on) / t_off in "loop".

    No probability depends on tokens, so all is planned ahead, and only steps that reveal something cost a network call.
    A time-conditioned denoiser is told the time of the grid, as there. A position's `reveal_step` is that of its last
    reveal.

    steps: the number N of steps, 1 to a million.
    schedule: "cap": sigma = min(eta, sigma_max). "rescale": sigma = eta sigma_max. "loop": ancestral sampling until a
        share alpha_on is revealed at time t_on, then sigma = eta at that share, and from time t_off on ancestral again.
    eta: from 0, which never masks again, to 1. None: 0.008, 0.015, 0.02 for the three, as published.
    t_on, t_off, alpha_on: of "loop" alone, between 0 and 1, t_off <= t_on. None: 0.55, 0.05, 0.9, as published. Where a
        step across t_on or a large eta makes a probability exceed 1, it is 1, as there.
    eps: the end of the grid, between 0 and 1.
    """

    steps: int
    schedule: str = "cap"
    eta: float | None = None
    t_on: float | None = None
    t_off: float | None = None
    alpha_on: float | None = None
    eps: float = EPS

    remasks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", checked_steps(self.steps))
        if self.schedule not in ETA:
            raise ValueError(f"schedule must be {listed(ETA)}, got {self.schedule!r}")
        usual = {"eta": ETA[self.schedule], **(LOOP if self.schedule == "loop" else {})}
        for name in _NUMBERS:
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, usual.get(name))
            elif name in LOOP and name not in usual:
                raise ValueError(f'{name} must be None unless schedule is "loop", got {given} with "{self.schedule}"')
            else:
                object.__setattr__(self, name, _checked_share(name, given, closed=name == "eta"))
        if self.schedule == "loop" and self.t_off > self.t_on:
            raise ValueError(f"t_off must not exceed t_on, got {self.t_off} and {self.t_on}")

    def __str__(self) -> str:
        usual = {"eta": ETA[self.schedule], **LOOP, "eps": EPS}
        given = {name: getattr(self, name) for name in _NUMBERS}
        changed = [f"{name}={value!r}" for name, value in given.items() if value not in (None, usual[name])]
        return f"remask:{self.steps}:{self.schedule}" + (f":{','.join(changed)}" if changed else "")

    @cached_property
    def grid(self) -> np.ndarray:
        """float64 [N + 1], the times of the steps, the last one's included."""
        return time_grid(self.steps, self.eps)

    @cached_property
    def chances(self) -> np.ndarray:
        """float64 [2, N + 1]: the probability of each step to reveal a masked position, and to mask a revealed one."""
        if self.schedule == "loop":
            reveal, mask = self._loop_chances()
        else:
            bound = sigma_max(self.grid)
            mask = np.minimum(self.eta, bound) if self.schedule == "cap" else self.eta * bound
            reveal = reveal_chance(self.grid, mask)
        return np.stack((np.append(reveal, 1.0), np.append(mask, 0.0)))

    def _loop_chances(self) -> tuple[np.ndarray, np.ndarray]:
        t, s, alpha_on = self.grid[:-1], self.grid[1:], self.alpha_on
        before, after = t > self.t_on, t <= self.t_off
        rising = alpha_on / (1 - self.t_on)  # alpha(t) = rising * (1 - t) until t_on
        reveal = np.where(after, (t - s) / t, rising * (t - s) / (1 - rising * (1 - t) * before))
        loop = ~(before | after)
        reveal[loop] = self.eta * alpha_on / (1 - alpha_on)
        return np.minimum(reveal, 1.0), np.where(loop, self.eta, 0.0)

    def num_steps(self, num_masked: int) -> int:
        return self.steps + 1

    def plan(self, times: np.ndarray, positions: np.ndarray, uniform: Uniform | None = None) -> RemaskPlan:
        """Steps of S sequences that share one template.

        times, positions: as for every policy. A position's time decides its first reveal, uniform number c how long it
        stays as it is after that; how long is one draw, however many steps it takes.
        """
        times, _ = checked(times, positions)
        if uniform is None and len(times):
            raise ValueError(f"uniform must give random numbers to plan with for {str(self)!r}, got None")
        row, column = (index.ravel() for index in np.indices(times.shape))
        step, shown, draw, masked = (np.zeros(len(row), np.int32) for _ in range(4))
        number, count, found = times.ravel(), 0, []
        while True:
            end, leaves = self._stays.leave(shown, step, number)
            revealed = leaves & (shown == 0)
            found.append([values[revealed] for values in (row, column, end, draw, masked)])
            masked = np.where(leaves & (shown == 1), end, masked)
            step, shown, draw = end + leaves, shown ^ leaves, draw + revealed
            going = np.flatnonzero(step <= self.steps)
            if not len(going):
                break
            row, column, step, shown, draw, masked = (
                values[going] for values in (row, column, step, shown, draw, masked)
            )
            count += 1
            number = uniform(row, column, count)
        row, column, step, draw, masked = (np.concatenate(values) for values in zip(*found, strict=True))
        return RemaskPlan(row, column, step, self.grid[step], draw, masked)

    @cached_property
    def _stays(self) -> "_Stays":
        return _Stays.of(self.chances)


class _Stays(NamedTuple):
    """How long positions stay as they are: a masked one (first row of each table) and a revealed one (second).

    before, after: float64 [2, N], the probability to stay until a step begins and ends, counted from the start of a
    stretch of steps. stop: int32 [2, N], where the stretch of a step ends. A position that stays that long starts anew
    there, with a fresh number: that keeps these products from vanishing, and makes no difference to a Markov chain.
    """

    before: np.ndarray
    after: np.ndarray
    stop: np.ndarray

    @classmethod
    def of(cls, chances: np.ndarray) -> "_Stays":
        """chances: float64 [2, N], to leave in each step."""
        before, after = np.empty(chances.shape), np.empty(chances.shape)
        stop = np.full(chances.shape, chances.shape[1], np.int32)
        for state, row in enumerate(chances.tolist()):
            product, start = 1.0, 0
            for step, chance in enumerate(row):
                before[state, step] = product
                product *= 1 - chance
                after[state, step] = product
                if product < _SMALLEST_PRODUCT:
                    stop[state, start : step + 1] = step + 1
                    product, start = 1.0, step + 1
        return cls(before, after, stop)

    def leave(self, state: np.ndarray, step: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For positions in a state from a step on, and a uniform number of each: the step in which they leave it,
        int32, and whether they do; those that stay until the end of the stretch do not, and get its stop."""
        goal = number * self.before[state, step]
        low, stop = step.copy(), self.stop[state, step]
        high = stop.copy()
        while len(searching := np.flatnonzero(low < high)):
            middle = (low[searching] + high[searching]) >> 1
            gone = self.after[state[searching], middle] <= goal[searching]
            high[searching[gone]] = middle[gone]
            low[searching[~gone]] = middle[~gone] + 1
        return low, low < stop


@dataclass(frozen=True)
class RemaskConfidence:
    """ReMDM-conf: remasking that looks at tokens, those first that were unlikely when they were drawn.

    In each of N steps every masked position is revealed with the chance of the plain chain, independently, and every
    one that was revealed before, not given, is masked again with probability eta_i sigma_max: sigma_max the largest
    that the grid allows, eta = softmax(-p) over these positions of the sequence, p_i the probability that the token of
    position i had when it was drawn, in the law that it was drawn from. So a step masks one of them again at most, in
    the mean. What is still masked where the grid ends is drawn from the model's law in a last step, number N; the
    published sampler takes the likeliest token there. In `Blocks`, all of this concerns the positions of the block.

    Which positions are masked again depends on tokens, so there is no plan; but on a CPU no network call is made for a
    sequence in a step that reveals nothing in it. On a GPU, which the host does not wait for, each step costs a call,
    and the head at as many rows as were masked at first. A time-conditioned denoiser is told the time of the grid.

    steps: the number N of steps, 1 to a million. eps: the end of the grid, between 0 and 1.
    """

    steps: int
    eps: float = EPS

    adaptive: ClassVar[bool] = True
    remasks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", checked_steps(self.steps))
        object.__setattr__(self, "eps", _checked_share("eps", self.eps, closed=False))

    def __str__(self) -> str:
        return f"remask:{self.steps}:conf" + (f":eps={self.eps!r}" if self.eps != EPS else "")

    @cached_property
    def grid(self) -> np.ndarray:
        """float64 [N + 1], the times of the steps, the last one's included."""
        return time_grid(self.steps, self.eps)

    @cached_property
    def chances(self) -> np.ndarray:
        """float64 [2, N + 1]: the probability of each step to reveal a masked position, and sigma_max."""
        return np.stack((np.append(reveal_chance(self.grid, 0.0), 1.0), np.append(sigma_max(self.grid), 0.0)))

    def counts(self, num_masked: int) -> None:
        """None: chance decides how many positions a step reveals."""

    def num_steps(self, num_masked: int) -> int:
        return self.steps + 1


def _checked_share(name: str, number: float, closed: bool) -> float:
    inside = "from 0 to 1" if closed else "between 0 and 1"
    try:
        value = float(number)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number {inside}, got {number!r}") from None
    if not (0 <= value <= 1 if closed else 0 < value < 1):
        raise ValueError(f"{name} must lie {inside}, got {number}")
    return value


def _parse(parts: list[str]) -> Remask | RemaskConfidence | None:
    match parts:
        case [steps, "conf"]:
            return RemaskConfidence(int(steps))
        case [steps, "conf", number]:
            name, _, value = number.partition("=")
            return RemaskConfidence(int(steps), float(value)) if name == "eps" else None
        case [steps]:
            return Remask(int(steps))
        case [steps, schedule]:
            return Remask(int(steps), schedule)
        case [steps, schedule, numbers]:
            pairs = [number.partition("=") for number in numbers.split(",")]
            if all(name in _NUMBERS for name, _, _ in pairs):
                return Remask(int(steps), schedule, **{name: float(value) for name, _, value in pairs})
    return None


register("remask", _parse, "remask:STEPS", "remask:STEPS:cap|rescale|loop|conf", "remask:STEPS:SCHEDULE:eta=NUMBER,...")
