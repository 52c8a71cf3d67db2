"""The exact law of what a schedule writes, where everything that can be written can be counted."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from math import isfinite, log10

import numpy as np
import torch
import torch.nn.functional as F

from unmask import metrics
from unmask.choose import Categorical
from unmask.denoiser import Batch, Denoiser, check_compatible
from unmask.reveal import Ancestral, FirstHitting, Reveal
from unmask.schedule import Schedule
from unmask.workspace import Workspace

MAX_STATES = 1 << 20  # partly masked sequences: with 10 tokens, tables of 80 MB for each model
MAX_PRODUCTS = 10**10  # multiplications of all steps, about a minute
BATCH_TOKENS = 4096  # of one network call
Masked = tuple[int, ...]  # which positions are masked, ascending


@dataclass(frozen=True)
class Exact:
    """What the law q of a schedule's texts is against the law p of the data. Exact, so there is no interval.

    nll: −Σ q(x) log p(x) / L, nats per token; ∞ where the schedule writes what the data excludes. For q = p it is the
    entropy of the data; a schedule that only writes likely texts has less. total_variation: ½ Σ |q(x) − p(x)|.
    """

    nll: float
    total_variation: float

    @classmethod
    def of(cls, output: np.ndarray, data: np.ndarray) -> "Exact":
        """From laws of one shape, [V] * L."""
        total_variation = metrics.total_variation(output, data)
        written = output > 0
        with np.errstate(divide="ignore"):
            nll = -(output[written] * np.log(data[written])).sum() / output.ndim
        return cls(float(nll), total_variation)

    def to_json(self) -> dict:
        """An infinite nll is None."""
        return {**asdict(self), "nll": self.nll if isfinite(self.nll) else None}


def output_law(
    models: Mapping[str, Denoiser],
    schedule: Schedule | str,
    reveal: Reveal,
    length: int,
    choose: Categorical | None = None,
) -> np.ndarray:
    """The joint law of the texts of `length` tokens that the sampler writes without a prompt, float64 [V] * length.

    `law[tuple(tokens)]` is the probability of a text; texts with a mask in them have none. It is exact: the law over
    the V ** length partly masked sequences is carried from step to step, each by the model that the schedule gives it,
    with the softmax in fp64 of the logits that the model gives. The sampler sums its logits in fp32, and its law is
    this one but for that rounding.

    models, schedule, choose: as `unmask.Sampler` takes them. reveal: `Ancestral`, whose steps reveal each masked
    position independently, or `FirstHitting`, where each step reveals one of them, all equally likely.

    Raises:
        ValueError: another policy; too many partly masked sequences, or too many products of them over all steps; a
            time-conditioned model with `FirstHitting`, whose times are continuous; logits that make no law.
    """
    check_compatible(models)
    if isinstance(schedule, str):
        schedule = Schedule.parse(schedule, tuple(models))
    spec = next(iter(models.values())).spec
    _check(models, reveal, spec.vocab_size, length)
    tables = {name: _Table(model, length, choose or Categorical()) for name, model in models.items()}
    num_steps = reveal.num_steps(length)
    who = [name for name, start, stop in schedule.assign(num_steps) for _ in range(start, stop)]
    weights = np.zeros((spec.vocab_size,) * length)
    weights[(spec.mask_id,) * length] = 1.0
    for step, name in enumerate(who):
        if isinstance(reveal, FirstHitting):
            weights = _reveal_one(weights, tables[name], length - step)
        else:
            before, after = reveal.mask_rates[step : step + 2]
            weights = _reveal_each(weights, tables[name], 1 - after / before, before)
    return weights


class _Table:
    """What a model says of masked positions, by which positions are masked."""

    def __init__(self, model: Denoiser, length: int, choose: Categorical) -> None:
        self.model, self.length, self.choose = model, length, choose
        self.vocab_size, self.mask_id = model.spec.vocab_size, model.spec.mask_id
        self.real = np.delete(np.arange(self.vocab_size), self.mask_id)
        self._batch_size = max(1, BATCH_TOKENS // length)
        most = self._batch_size * length
        self._workspace = Workspace([model.buffers(most, most, self._batch_size)], model.device)
        self._known: dict[Masked, list[np.ndarray]] = {}

    def patterns(self, num_masked: int | None = None) -> Iterator[Masked]:
        """Every choice of at least one masked position, or of `num_masked` of them."""
        for flags in product((False, True), repeat=self.length):
            if any(flags) and num_masked in (None, sum(flags)):
                yield tuple(np.flatnonzero(flags).tolist())

    def index(self, masked: Masked, written: Masked = ()) -> tuple[np.ndarray, ...]:
        """Where the sequences masked at `masked` are, real elsewhere; any id may stand at `written` of them."""
        every, mask = np.arange(self.vocab_size), [self.mask_id]
        ids = (every if i in written else mask if i in masked else self.real for i in range(self.length))
        return np.ix_(*ids)

    def laws(self, masked: Masked, mask_rate: float) -> list[np.ndarray]:
        """The law of each masked position: an array with V along its axis, 1 along those of other masked positions, and
        V − 1, the real tokens, along those of the rest."""
        if masked not in self._known or self.model.spec.time_conditioned:
            grid = np.broadcast_arrays(*self.index(masked))
            states = np.stack([axis.ravel() for axis in grid], 1)
            found = self._ask(states, masked, mask_rate).reshape(*grid[0].shape, len(masked), self.vocab_size)
            self._known[masked] = [self._along(found[..., k, :], i) for k, i in enumerate(masked)]
        return self._known[masked]

    def _along(self, law: np.ndarray, position: int) -> np.ndarray:
        """The last axis, that of the tokens, put where the masked position has one of size 1."""
        return np.moveaxis(law, -1, position).squeeze(position + 1)

    @torch.no_grad()
    def _ask(self, states: np.ndarray, masked: Masked, mask_rate: float) -> np.ndarray:
        """float64 [states, masked, V]."""
        found, device = [], self.model.device
        for start in range(0, len(states), self._batch_size):
            tokens = torch.from_numpy(states[start : start + self._batch_size]).to(device)
            num = len(tokens)
            rows = (torch.arange(num)[:, None] * self.length + torch.tensor(masked)).flatten().to(device)
            rates = torch.full((num,), mask_rate, dtype=torch.float32, device=device)
            batch = Batch(tokens.flatten(), (self.length,) * num, rows, (len(masked),) * num, rates)
            for _, hidden in self.model.chunks(batch, self._workspace):
                found.append(_logits(self.model, hidden))
        logits = np.concatenate(found)
        logits[:, self.mask_id] = -np.inf
        if not np.isfinite(logits.max(1)).all():
            raise ValueError(f"model {self.model.name!r} must give a finite largest logit everywhere, got NaN or ±∞")
        law = _chosen(logits, self.choose)
        return law.reshape(len(states), len(masked), self.vocab_size)


def _logits(model: Denoiser, hidden: torch.Tensor) -> np.ndarray:
    weight, bias = model.head.weight, model.head.bias
    if weight is not None:
        hidden = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    return hidden.double().cpu().numpy().copy()


def _chosen(logits: np.ndarray, choose: Categorical) -> np.ndarray:
    """The law of one token under a token choice, float64 [R, V]; equal logits rank in the order of their ids."""
    order = np.argsort(-logits, axis=1, kind="stable")
    ranked = np.take_along_axis(logits, order, 1)
    if choose.temperature == 0:
        ranked = np.tile(np.arange(logits.shape[1]) == 0, (len(logits), 1)).astype(np.float64)
    else:
        ranked = np.exp((ranked - ranked[:, :1]) / choose.temperature)
        if choose.top_k is not None:
            ranked[:, choose.top_k :] = 0
        ranked /= ranked.sum(1, keepdims=True)
        if choose.top_p is not None:
            ranked[ranked.cumsum(1) - ranked >= choose.top_p] = 0
            ranked /= ranked.sum(1, keepdims=True)
    law = np.empty_like(ranked)
    np.put_along_axis(law, order, ranked, 1)
    return law


def _reveal_each(weights: np.ndarray, table: _Table, chance: float, mask_rate: float) -> np.ndarray:
    """A step that reveals each masked position with probability `chance`, independently."""
    following, finished = np.zeros_like(weights), table.index(())
    following[finished] = weights[finished]
    for masked in table.patterns():
        reached = weights[table.index(masked)]
        if reached.any():
            for position, law in zip(masked, table.laws(masked, mask_rate), strict=True):
                factor = chance * law
                factor[(slice(None),) * position + (table.mask_id,)] = 1 - chance
                reached = reached * factor
            following[table.index(masked, masked)] += reached
    return following


def _reveal_one(weights: np.ndarray, table: _Table, num_masked: int) -> np.ndarray:
    """A step that reveals one of `num_masked` masked positions, all equally likely."""
    following = np.zeros_like(weights)
    for masked in table.patterns(num_masked):
        reached = weights[table.index(masked)] / num_masked
        for position, law in zip(masked, table.laws(masked, 1.0), strict=True):
            following[table.index(masked, (position,))] += reached * law
    return following


def _check(models: Mapping[str, Denoiser], reveal: Reveal, vocab_size: int, length: int) -> None:
    if not isinstance(reveal, Ancestral | FirstHitting):
        raise ValueError(f"reveal must be Ancestral or FirstHitting for an exact law, got {str(reveal)!r}")
    longest = min(model.spec.max_length for model in models.values())
    if not 1 <= length <= longest:
        raise ValueError(f"length must be between 1 and the models' {longest}, got {length}")
    conditioned = [name for name, model in models.items() if model.spec.time_conditioned]
    if conditioned and isinstance(reveal, FirstHitting):
        raise ValueError(f"reveal must be Ancestral for the time-conditioned model {conditioned[0]!r}, got {reveal}")
    if length * log10(vocab_size) > log10(MAX_STATES):
        raise ValueError(
            f"length must leave at most {MAX_STATES:,} partly masked sequences for an exact law, got {vocab_size:,} "
            f"ids ** {length} tokens = 10 ** {length * log10(vocab_size):.1f}"
        )
    # A masked position becomes any of V ids, in each step of an ancestral trajectory anew.
    num_products = length * vocab_size**length
    if isinstance(reveal, Ancestral):
        num_products = reveal.num_steps(length) * (2 * vocab_size - 1) ** length
    if num_products > MAX_PRODUCTS:
        raise ValueError(
            f"reveal must need at most {MAX_PRODUCTS:,} products for an exact law, got {num_products:,} of {reveal} "
            f"with {vocab_size:,} ids and {length} tokens: take fewer steps, fewer tokens, or first-hitting"
        )
