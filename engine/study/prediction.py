"""What will a schedule cost in quality? Predicted from the losses of its models by mask rate, without sampling.

The tokens that step k reveals have cross-entropy loss(model of step k, state at its start) under the schedule. Summed
over the steps and averaged over texts of the data, masked as the reveal policy masks them, this is the schedule's
variational bound on -log p(text): the bound of the masked diffusion whose step k is that model. So

    extra(schedule) = sum over steps k, bins b of exposure[k, b] * (loss[model of k][b] - loss[first model][b])

is exactly how much higher the schedule's bound is than that of the first model alone, in nats per token, up to the
width of the bins and the noise of the losses. exposure[k, b] is the share of a text's tokens that step k reveals
from a state in bin b. In the limit of many linear steps a token is revealed at a uniformly random time, and the sum
is the integral of the loss gap over the times of the lighter models.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmask.denoiser import Denoiser
from unmask.reveal import Ancestral, FirstHitting, Fixed, Reveal
from unmask.schedule import Schedule
from unmask.study.bootstrap import Interval
from unmask.study.identity import first_difference, identity
from unmask.study.importance import Importance

STEPS_AT_ONCE = 4096
QUANTILE = 1.96  # of the normal law, both sides of 95 %


@dataclass(frozen=True, eq=False)
class Losses:
    """Cross-entropy of each model by mask rate, float64 [B] nats per masked token; bin b holds the rates above b / B
    and up to (b + 1) / B. gap_covariance: as of `Importance`; None for losses that are known exactly."""

    of: Mapping[str, np.ndarray]
    gap_covariance: np.ndarray | None = None

    @classmethod
    def measured(cls, found: Importance) -> "Losses":
        losses = {name: np.array([one.loss[name].value for one in found.bins]) for name in found.models}
        return cls(losses, found.gap_covariance)

    @classmethod
    def read(cls, path: Path, models: Mapping[str, Denoiser], length: int) -> "Losses":
        """From the JSON of `unmask study importance` over windows of `length` tokens. Raises ValueError for a file of
        other models, of another length or of another kind, OSError for one that cannot be read; both name it."""
        wanted = f"importance must be a file of unmask study importance, got {str(path)!r}"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            bins, identities, measured = content["bins"], content["identities"], content["length"]
            losses = {name: np.array([float(one["loss"][name]["value"]) for one in bins]) for name in content["models"]}
            covariance = np.array(content["gap_covariance"], dtype=np.float64)
        except OSError as error:
            raise type(error)(f"{wanted}, which cannot be read: {error.strerror}") from error
        except KeyError as error:
            raise ValueError(f"{wanted}, which lacks {error}; make it again with this version") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{wanted}, which is damaged or something else") from error
        missing = [name for name in models if name not in losses]
        if missing:
            raise ValueError(f"importance must be of the models {', '.join(models)}, got {', '.join(losses)} in {path}")
        for name, model in models.items():
            other = first_difference(identities.get(name), identity(model))
            if other:
                place, theirs, ours = other
                raise ValueError(
                    f"importance must be of the same models, got another {name!r} in {path}: "
                    f"{place or 'it'} is {theirs} there and {ours} here"
                )
        if measured != length:
            raise ValueError(
                f"importance must be measured at the study's length of {length} tokens, got windows of {measured} in "
                f"{path}"
            )
        if not all(len(loss) and np.isfinite(loss).all() for loss in losses.values()):
            raise ValueError(f"{wanted}, which lacks losses or has some that are no numbers")
        others = (len(losses) - 1) * len(bins)
        if covariance.shape != (others, others) or not np.isfinite(covariance).all():
            raise ValueError(f"{wanted}, whose gap_covariance is not that of its bins")
        return cls({name: losses[name] for name in models}, _of_models(covariance, list(losses), list(models)))


def _of_models(covariance: np.ndarray, known: list[str], wanted: list[str]) -> np.ndarray:
    """The covariance of the gaps to the first of `wanted`, from that of the gaps to the first of `known`."""
    size = len(covariance) // (len(known) - 1)
    whole = np.pad(covariance, (size, 0))  # the first one's gap to itself is known
    take = np.kron(np.eye(len(known))[[known.index(name) for name in wanted]], np.eye(size))
    less = take[size:] - np.tile(take[:size], (len(wanted) - 1, 1))
    return less @ whole @ less.T


class Prediction:
    """Extra loss of schedules against the first of `losses`; see the module."""

    def __init__(self, losses: Losses, reveal: Reveal, length: int) -> None:
        first, *_ = losses.of.values()
        self._gaps = {name: loss - first for name, loss in losses.of.items()}
        self._covariance = losses.gap_covariance
        exposed = exposure(reveal, length, len(first))
        # Cumulative over steps, so that a schedule costs a look at the ends of its segments.
        self._exposed = np.concatenate([np.zeros((1, len(first))), exposed.cumsum(0)])
        self._num_steps = len(exposed)

    def of(self, schedule: Schedule) -> float:
        """Nats per token."""
        return float(sum(part @ self._gaps[name] for name, part in self._parts(schedule).items()))

    def interval(self, schedule: Schedule) -> Interval:
        """`of` with its 95 % interval as windows of the text vary, by their normal limit."""
        value, spread = self.of(schedule), 0.0
        if self._covariance is not None:
            _, *others = self._gaps
            weights = np.concatenate([self._parts(schedule)[name] for name in others])
            spread = float(QUANTILE * np.sqrt(weights @ self._covariance @ weights))
        return Interval(value, value - spread, value + spread)

    def _parts(self, schedule: Schedule) -> dict[str, np.ndarray]:
        """The share of a text's tokens that each model writes in each bin, float64 [B] by name."""
        found = {name: np.zeros(self._exposed.shape[1]) for name in self._gaps}
        for name, start, stop in schedule.assign(self._num_steps):
            found[name] += self._exposed[stop] - self._exposed[start]
        return found


def exposure(reveal: Reveal, length: int, num_bins: int) -> np.ndarray:
    """The share of a text's tokens that each step reveals from a state in each bin of mask rates, float64 [N, B].

    A token that is revealed has `length` - 1 others, of which a planned policy has revealed some at random; the state
    counts the token itself as masked. Raises ValueError for a policy that reveals positions in an order of its own: the
    losses are those of random positions.
    """
    bins = (np.arange(1, length + 1) * num_bins - 1) // length  # of n = 1 ... length masked positions
    if isinstance(reveal, Ancestral):
        rates = reveal.mask_rates
        shares, found = -np.diff(rates), np.zeros((len(rates) - 1, num_bins))
        for start in range(0, len(shares), STEPS_AT_ONCE):
            part = slice(start, start + STEPS_AT_ONCE)
            chances = _binomial(length - 1, rates[:-1][part])
            first_of_bin = np.flatnonzero(np.diff(bins, prepend=-1))
            found[part, bins[first_of_bin]] = np.add.reduceat(chances, first_of_bin, axis=1)
        return found * shares[:, None]
    if isinstance(reveal, FirstHitting | Fixed):
        ends = reveal.first_ranks(length) if isinstance(reveal, Fixed) else np.arange(length + 1)
        found = np.zeros((len(ends) - 1, num_bins))
        used = np.flatnonzero(np.diff(ends))
        found[used, bins[length - ends[used] - 1]] = np.diff(ends)[used] / length
        return found
    raise ValueError(f"reveal must be ancestral, first-hitting or fixed for a prediction, got {str(reveal)!r}")


def _binomial(number: int, rates: np.ndarray) -> np.ndarray:
    """P(k of `number`), float64 [rates, number + 1], of rates in (0, 1]."""
    k = np.arange(number + 1)
    logs = np.concatenate([[0.0], np.log(np.arange(1, number + 1)).cumsum()])
    choose = logs[number] - logs[k] - logs[::-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        none = np.where(k == number, 0.0, (number - k) * np.log1p(-rates)[:, None])  # 0 * log 0 is 0
    return np.exp(choose + k * np.log(rates)[:, None] + none)
