"""Where is revealed? Adaptive policies: which positions a step reveals is decided by what the network says of them.

In every step a token is drawn for each masked position of the active window, and only the positions with the best
scores keep theirs. So tokens that a network is sure of come first, and the law of the samples is not that of ancestral
sampling, nor of any other model: no order of revealing that looks at the tokens drawn leaves it as it was.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from unmask.arguments import checked_ids, checked_steps, checked_whole
from unmask.kernels.checks import check_number
from unmask.reveal import register

SCORES = ("probability", "margin", "entropy", "random")
RULES = ("steps", "per_step", "threshold", "entropy_bound")
OPTIONS = (*RULES, "eps", "temperature_of_order", "untempered", "doubted")


@dataclass(frozen=True)
class Confidence:
    """Reveals, step by step, the masked positions that score best.

    score: of the law that a position's token is drawn from (at temperature 0, of that at temperature 1). "probability":
        of the drawn token. "margin": between the two largest probabilities. "entropy": the less the better. "random": a
        number that is drawn anew in each step.

    How many positions a step reveals, one of:
    steps: N steps of equal counts, the first of them with one more where n masked positions leave a remainder, as in
        LLaDA (Nie et al. 2025, arXiv 2502.09992). With `eps`, the counts of Dream (Ye et al. 2025, arXiv 2508.15487):
        m (1 - s / t) rounded down of the m that are left, t and s neighbours on a grid of N intervals from 1 to eps;
        the last step reveals what is left.
    per_step: that many, as long as there are so many.
    threshold: all that score at least so much, and at least the best one, or `per_step` of them where given too
        (Fast-dLLM, Wu et al. 2025, arXiv 2505.22618). Entropies must be at most so large instead.
    entropy_bound: the longest run of the best whose entropies sum to at most so much beside the largest of them
        (Ben-Hamu et al. 2025, arXiv 2505.24857).

    temperature_of_order: above 0, positions are drawn without replacement with probabilities proportional to
        exp(score / temperature_of_order), as Dream's `alg_temp`; entropies count as negative scores.
    untempered: "probability" is that of the drawn token in the network's own law, without temperature, top_k and top_p,
        as in LLaDA.
    doubted: ids that nothing is ever sure of. They can be drawn, but their probability counts as 0 and the others' as
        if they did not exist.

    Positions with equal scores go in order. The rows of a step are the masked positions of the window, so a step costs
    more than one of a planned policy: the head at all of them, and the last block's queries.
    """

    score: str = "probability"
    steps: int | None = None
    per_step: int | None = None
    threshold: float | None = None
    entropy_bound: float | None = None
    eps: float | None = None
    temperature_of_order: float = 0.0
    untempered: bool = False
    doubted: tuple[int, ...] = ()

    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "doubted", checked_ids("doubted", self.doubted))
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {self.score!r}")
        self._check_rule()
        if self.steps is not None:
            checked_steps(self.steps)
        if self.per_step is not None:
            checked_whole("per_step", self.per_step, least=1)
        for name in ("threshold", "entropy_bound", "temperature_of_order", "eps"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0)
        if self.eps is not None and not 0 < self.eps < 1:
            raise ValueError(f"eps must lie between 0 and 1, got {self.eps!r}")
        if self.temperature_of_order and self.counts(1) is None:
            got = self.temperature_of_order
            raise ValueError(f"temperature_of_order must be 0 where scores decide how many are revealed, got {got}")
        if (self.untempered or self.doubted) and self.score != "probability":
            raise ValueError(f"score must be 'probability' with untempered or doubted, got {self.score!r}")

    def _check_rule(self) -> None:
        given = [name for name in RULES if getattr(self, name) is not None]
        if given not in (["steps"], ["per_step"], ["threshold"], ["entropy_bound"], ["per_step", "threshold"]):
            raise ValueError(f"one of {', '.join(RULES)} must be given, got {' and '.join(given) or 'none'}")
        if self.eps is not None and self.steps is None:
            raise ValueError("eps must be given with steps only, got it without")
        if self.threshold is not None and self.score == "random":
            raise ValueError("threshold must be left out with random scores, got one")

    def counts(self, num_masked: int) -> np.ndarray | None:
        """int64 [steps], how many of `num_masked` positions each step reveals; None where scores decide it."""
        if self.threshold is not None or self.entropy_bound is not None:
            return None
        if self.per_step is not None:
            return np.diff(np.append(np.arange(0, num_masked, self.per_step), num_masked))
        if self.eps is not None:
            return _dream_counts(num_masked, self.shares)
        base, remainder = divmod(num_masked, self.steps)
        return base + (np.arange(self.steps) < remainder)

    @property
    def shares(self) -> np.ndarray:
        """float32 [steps], with `eps`: of what is still masked, the share that each step reveals."""
        times = torch.linspace(1, self.eps, self.steps + 1)
        return np.append((1 - times[1:] / times[:-1]).numpy()[:-1], np.float32(1))

    def num_steps(self, num_masked: int) -> int:
        """Length of the trajectory of `num_masked` positions, at most."""
        counts = self.counts(num_masked)
        return num_masked if counts is None else len(counts)

    def __str__(self) -> str:
        options = {name: getattr(self, name) for name in (*RULES, "eps") if getattr(self, name) is not None}
        if self.temperature_of_order:
            options["temperature_of_order"] = self.temperature_of_order
        if self.doubted:
            options["doubted"] = "+".join(map(str, self.doubted))
        words = [f"{name}={value}" for name, value in options.items()] + ["untempered"] * self.untempered
        return f"confidence:{self.score}:{','.join(words)}"


def _spelled(parts: list[str]) -> Confidence | None:
    """The policy of "probability:steps=64", "margin:per_step=2", ..., cut at its colons."""
    if len(parts) != 2:
        return None
    kinds = {"steps": int, "per_step": int, "doubted": _ids}
    options = {}
    for word in parts[1].split(","):
        name, equals, value = word.partition("=")
        if name not in OPTIONS or bool(equals) == (name == "untempered"):
            raise ValueError(f"an option must be one of {', '.join(OPTIONS)}, got {word!r}")
        options[name] = kinds.get(name, float)(value) if equals else True
    return Confidence(parts[0], **options)


register(
    "confidence",
    _spelled,
    f"confidence:{'|'.join(SCORES)}:steps=N[,eps=E]|per_step=K|threshold=T|entropy_bound=B[,temperature_of_order=T]"
    "[,untempered][,doubted=ID+ID]",
)


class Trajectory(NamedTuple):
    """What the host knows of the steps of one sequence, K of them.

    step: int32 [K], their numbers; a step that reveals nothing is left out. end: int32 [K], where the window ends, -1
    where the device knows. count: int32 [K], how many to reveal, at most where what is drawn may stay masked, -1 where
    scores or chance decide. num_rows: int32 [K], how many candidates there are at most. group_start, group_end:
    int32 [n], the window of each masked position.
    """

    step: np.ndarray
    end: np.ndarray
    count: np.ndarray
    num_rows: np.ndarray
    group_start: np.ndarray
    group_end: np.ndarray


def groups(policy: object, num_masked: int) -> tuple[object, list[tuple[int, int]]]:
    """The policy inside `Blocks`, and the ranks [start, stop) of the masked positions of each window."""
    length = getattr(policy, "length", num_masked)
    inner = getattr(policy, "policy", policy)
    return inner, [(start, min(start + length, num_masked)) for start in range(0, num_masked, length)]


def trajectory(policy: object, positions: np.ndarray, *, draw_mask: bool = False) -> Trajectory:
    """The steps of `policy`, an adaptive one or `Blocks` of one, over the masked positions int64 [n], ascending.

    draw_mask: what is revealed may stay masked, so a step may find, and with `eps` reveal, more than otherwise.
    """
    inner, windows = groups(policy, len(positions))
    steps, offset = [], 0
    for start, stop in windows:
        end, size = int(positions[stop - 1]) + 1, stop - start
        counts = inner.counts(size)
        if counts is None:
            # What is masked again keeps its window.
            known = end if getattr(inner, "remasks", False) else -1
            most = windows[0][1] if draw_mask else size  # the window may be an earlier one
            steps += [(offset + k, known, -1, most) for k in range(inner.num_steps(size))]
            offset += inner.num_steps(size)
            continue
        left = np.full_like(counts, stop) if draw_mask else size - np.append(0, counts.cumsum()[:-1])
        if draw_mask and inner.eps is not None:
            counts = (left.astype(np.float32) * inner.shares).astype(np.int64)
        steps += [
            (offset + k, end, count, rows)
            for k, (count, rows) in enumerate(zip(counts.tolist(), left.tolist(), strict=True))
            if count
        ]
        offset += len(counts)
    sizes = [stop - start for start, stop in windows]
    group_start = np.repeat([positions[start] for start, _ in windows], sizes)
    group_end = np.repeat([positions[stop - 1] + 1 for _, stop in windows], sizes)
    return Trajectory(
        *np.array(steps, np.int32).reshape(-1, 4).T, group_start.astype(np.int32), group_end.astype(np.int32)
    )


def _dream_counts(num_masked: int, shares: np.ndarray) -> np.ndarray:
    """As published, in float32: `int(masked * (1 - s / t))`."""
    counts, left = [], num_masked
    for share in shares:
        counts.append(int(np.float32(left) * share))
        left -= counts[-1]
    return np.array(counts)


def _ids(text: str) -> tuple[int, ...]:
    return tuple(int(one) for one in text.split("+"))
