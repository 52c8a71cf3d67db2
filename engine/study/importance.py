"""How much a step needs the heavy model: losses and divergence of denoisers by mask rate, on held-out text.

The two importance measures of Sedykh et al. 2026 (arXiv 2604.02340): the loss gap between a light model and the heavy
one, and the divergence of their laws, both as functions of the time step. Here the mask rate takes the place of the
step: the network does not see the step, and so the curve holds for any number of steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from unmask.denoiser import Batch, Denoiser, check_compatible
from unmask.kernels import divergence, sample_head
from unmask.run import drawable
from unmask.study.bootstrap import Interval, of_ratio, resamples
from unmask.study.identity import identity
from unmask.workspace import Workspace


@dataclass(frozen=True)
class Bin:
    """What was found at mask rates above `low` and up to `high`.

    loss: by model, cross-entropy of the true token in nats per masked token. gap: by model but the first, its loss less
    that of the first, on the same masks. kl: by model but the first, KL(first || model) in nats per masked token.
    """

    low: float
    high: float
    num_tokens: int
    loss: Mapping[str, Interval]
    gap: Mapping[str, Interval]
    kl: Mapping[str, Interval]


@dataclass(frozen=True)
class Importance:
    """Bins of rising mask rate. Intervals are 95 %, by bootstrap over windows of the text. identities: by model, see
    `unmask.study.identity`. gap_covariance: of the gaps, of each model but the first in turn and each bin, float64
    [(models - 1) bins] squared, as windows vary."""

    models: tuple[str, ...]
    num_windows: int
    length: int
    draws: int
    bins: tuple[Bin, ...]
    identities: Mapping[str, dict]
    gap_covariance: np.ndarray = field(compare=False)

    def to_json(self) -> dict:
        """What `unmask study importance --json` prints; an interval is {"value", "low", "high"}."""
        content = asdict(self)
        for line, one in zip(content["bins"], self.bins, strict=True):
            for name in ("loss", "gap", "kl"):
                line[name] = {model: interval._asdict() for model, interval in getattr(one, name).items()}
        content["gap_covariance"] = [[float(f"{value:.6g}") for value in row] for row in self.gap_covariance]
        return content


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over the masked tokens of each window, float64: losses [models, W], kl [models - 1, W], counts [W]."""

    losses: np.ndarray
    kl: np.ndarray
    counts: np.ndarray

    @property
    def residuals(self) -> np.ndarray:
        """How far each window moves the gap of each model but the first, float64 [models - 1, W]: the linear part of a
        ratio of sums."""
        more = self.losses[1:] - self.losses[0]
        gaps = more.sum(1, keepdims=True) / self.counts.sum()
        return (more - gaps * self.counts) / self.counts.mean()

    @classmethod
    def zeros(cls, num_models: int, num_windows: int) -> "_Sums":
        return cls(*(np.zeros((rows, num_windows)) for rows in (num_models, num_models - 1)), np.zeros(num_windows))


def importance(
    models: Mapping[str, Denoiser],
    windows: np.ndarray,
    *,
    bins: int = 16,
    draws: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    on_batch: Callable[[], object] = lambda: None,
) -> Importance:
    """Compare denoisers with the first of them, by mask rate.

    models: at least two, by name, the one that is most trusted first. windows: int64 [W, L], true tokens. bins: equal
    parts of the mask rates (0, 1]. draws: masks of each window and bin; a mask is a uniformly random set of positions
    whose number is spread evenly over the bin. on_batch is called after each batch, `num_batches` times in all.

    Raises:
        ValueError: fewer than two models, models that do not fit together, more bins than positions, no window.
    """
    if len(models) < 2:
        raise ValueError(f"models must be at least two to compare, got {', '.join(models) or 'none'}")
    check_compatible(models)
    length = windows.shape[1] if windows.ndim == 2 else 0
    if not windows.size:
        raise ValueError(f"windows must be int64 [W, L] with at least one token, got shape {list(windows.shape)}")
    longest = min(model.spec.max_length for model in models.values())
    if length > longest:
        raise ValueError(f"windows must have at most the {longest} tokens that the models take, got {length}")
    if not 1 <= bins <= length:
        raise ValueError(f"bins must be from 1 to the {length} positions of a window, got {bins}")
    compare = _Comparison(models, batch_size, length)
    drawn = resamples(len(windows))
    found, residuals = [], []
    for index in range(bins):
        # Each bin has its own generator: its masks do not depend on how many bins came before.
        rng, sums = np.random.default_rng([seed, bins, index]), _Sums.zeros(len(models), len(windows))
        for _ in range(draws):
            masks = masks_of_bin(len(windows), length, index, bins, rng)
            for start in range(0, len(windows), batch_size):
                part = slice(start, start + batch_size)
                compare.add(windows[part], masks[part], sums, part)
                on_batch()
        found.append(_summary(tuple(models), index / bins, (index + 1) / bins, sums, drawn))
        residuals.append(sums.residuals)
    identities = {name: identity(model) for name, model in models.items()}
    each = np.concatenate(np.stack(residuals, 1))  # [(models - 1) bins, W]
    covariance = each @ each.T / max(1, len(windows) - 1) / len(windows)
    return Importance(tuple(models), len(windows), length, draws, tuple(found), identities, covariance)


def num_batches(num_windows: int, bins: int, draws: int, batch_size: int = 16) -> int:
    return bins * draws * -(-num_windows // batch_size)


def masks_of_bin(num: int, length: int, index: int, bins: int, rng: np.random.Generator) -> np.ndarray:
    """bool [num, length]: random positions, their number spread evenly over index / bins < n / length <= (index + 1) /
    bins."""
    counts = np.arange(index * length // bins + 1, (index + 1) * length // bins + 1)
    chosen = counts[((rng.random() + rng.permutation(num)) / num * len(counts)).astype(np.int64)]
    return rng.random((num, length)).argsort(1).argsort(1) < chosen[:, None]


class _Comparison:
    """The denoisers over one workspace."""

    def __init__(self, models: Mapping[str, Denoiser], batch_size: int, length: int) -> None:
        self.models = list(models.values())
        size = batch_size * length
        first = self.models[0]
        self.device, self.mask_id = first.device, first.spec.mask_id
        self.workspaces = [Workspace([model.buffers(size, size, batch_size)], self.device) for model in self.models]
        self.heads = [(model.head.weight, drawable(model)) for model in self.models]

    def add(self, windows: np.ndarray, masks: np.ndarray, sums: _Sums, part: slice) -> None:
        """Add the sums of some windows."""
        batch, targets = self._batch(windows, masks)
        owner = np.repeat(np.arange(len(windows)), masks.sum(1))

        def total(values: Tensor) -> np.ndarray:
            return np.bincount(owner, values.double().cpu().numpy(), minlength=len(windows))

        rows = [model.hidden(batch, space) for model, space in zip(self.models, self.workspaces, strict=True)]
        sums.counts[part] += masks.sum(1)
        for index, (hidden, head) in enumerate(zip(rows, self.heads, strict=True)):
            sums.losses[index, part] += total(losses(hidden, *head, targets))
            if index:
                sums.kl[index - 1, part] += total(divergence(rows[0], self.heads[0], hidden, head).kl)

    def _batch(self, windows: np.ndarray, masks: np.ndarray) -> tuple[Batch, Tensor]:
        num, length = windows.shape
        rows = np.flatnonzero(masks)
        tokens, targets = np.where(masks, self.mask_id, windows).ravel(), windows.ravel()[rows]
        tokens, rows, targets = (torch.from_numpy(part).to(self.device) for part in (tokens, rows, targets))
        rate = torch.from_numpy(masks.mean(1).astype(np.float32)).to(self.device)
        return Batch(tokens, (length,) * num, rows, tuple(masks.sum(1).tolist()), rate), targets


def losses(hidden: Tensor, weight: Tensor | None, bias: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of each row, fp32 [R], without storing logits: the head's log-sum-exp less the target's logit."""
    keys = torch.zeros(len(hidden), 3, dtype=torch.int64, device=hidden.device)
    lse = sample_head(hidden, weight, bias, keys=keys, seed=0, want=("lse",)).lse
    if weight is None:
        chosen = hidden.gather(1, targets[:, None])[:, 0].to(lse.dtype)
    else:
        chosen = (hidden.to(lse.dtype) * weight[targets].to(lse.dtype)).sum(1)
    return lse - (chosen + bias[targets])


def _summary(names: tuple[str, ...], low: float, high: float, sums: _Sums, drawn: np.ndarray) -> Bin:
    def intervals(rows: np.ndarray, of: tuple[str, ...]) -> dict[str, Interval]:
        return {name: of_ratio(row, sums.counts, drawn) for name, row in zip(of, rows, strict=True)}

    return Bin(
        low,
        high,
        int(sums.counts.sum()),
        loss=intervals(sums.losses, names),
        gap=intervals(sums.losses[1:] - sums.losses[0], names[1:]),
        kl=intervals(sums.kl, names[1:]),
    )
