"""The training loss and the held-out bound: two estimates of the same evidence bound."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.denoiser import Batch, Denoiser
from unmask.kernels import divergence
from unmask.workspace import Workspace

BATCH = 64  # windows of one call on held-out text


@dataclass(frozen=True)
class Masked:
    """A batch with some tokens masked.

    tokens: int64 [B, L] with the mask id in place. rows: int64 [R] flat indices of the masked tokens, targets: int64
    [R] what stood there. weights: float32 [R], the weight of each row's cross entropy in the bound.
    """

    tokens: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def of(cls, clean: np.ndarray, mask: np.ndarray, weights: np.ndarray, mask_id: int) -> "Masked":
        """From clean tokens [B, L], a boolean mask [B, L] and one weight per sequence [B]."""
        rows = np.flatnonzero(mask)
        return cls(
            torch.from_numpy(np.where(mask, mask_id, clean)),
            torch.from_numpy(rows),
            torch.from_numpy(clean.reshape(-1)[rows]),
            torch.from_numpy(weights[rows // clean.shape[1]].astype(np.float32)),
        )


def spread_times(num: int, rng: np.random.Generator) -> np.ndarray:
    """Antithetic times float64 [num], spread evenly over (0, 1] from one uniform draw (low-discrepancy sampler of
    Kingma et al. 2021)."""
    return np.maximum((rng.random() + rng.permutation(num)) / num, 1e-3)


def mask_by_time(clean: np.ndarray, mask_id: int, rng: np.random.Generator, times: np.ndarray | None = None) -> Masked:
    """Masks for a training batch: each token of a sequence is masked with probability t, its time, and has the weight
    1/t of the linear schedule. times [B]: `spread_times` when left out."""
    times = spread_times(len(clean), rng) if times is None else times
    mask = rng.random(clean.shape) < times[:, None]
    return Masked.of(clean, mask, 1 / times, mask_id)


def mask_by_count(clean: np.ndarray, mask_id: int, rng: np.random.Generator) -> Masked:
    """Masks for the bound: a uniformly random subset of n tokens, n spread evenly over 1..L, weight L/n.

    With the linear schedule the number of masked tokens, weighted by 1/t, is uniform on 1..L, so this has the mean of
    `mask_by_time` and a smaller variance.
    """
    num, length = clean.shape
    counts = 1 + np.floor((rng.random() + rng.permutation(num)) / num * length).astype(np.int64)
    counts = np.minimum(counts, length)
    ranks = rng.random((num, length)).argsort(1).argsort(1)
    return Masked.of(clean, ranks < counts[:, None], length / counts, mask_id)


def bound_nats(logits: Tensor, batch: Masked) -> Tensor:
    """Each sequence's estimate of the bound, in nats per token: float32 [B].

    It is Σ weight · −log p(target) over the masked rows of the sequence, divided by its length. logits: [R, V] at
    `batch.rows`.
    """
    return _of_windows(F.cross_entropy(logits, batch.targets, reduction="none"), batch)


def _of_windows(of_rows: Tensor, batch: Masked) -> Tensor:
    """Σ weight · value over the masked rows of each sequence, divided by its length: [R] -> [B]."""
    num, length = batch.tokens.shape
    weighted = of_rows * batch.weights
    return torch.zeros(num, dtype=weighted.dtype).index_add(0, batch.rows // length, weighted) / length


@dataclass(frozen=True)
class Bound:
    """An upper bound of the negative log-likelihood in nats per token and bits per byte.

    The standard error is over windows, None for a single one.
    """

    nats_per_token: float
    bits_per_byte: float
    standard_error_bits_per_byte: float | None
    num_tokens: int


@torch.no_grad()
def heldout_bound(
    law: Callable[[Tensor, Tensor], Tensor],
    windows: np.ndarray,
    mask_id: int,
    tokens_per_byte: float,
    *,
    draws: int = 1,
) -> Bound:
    """The bound over held-out windows int64 [W, L], each masked `draws` times; always with the same masks.

    law: from tokens int64 [B, L] and rows int64 [R] to logits [R, V].
    """
    estimates = _heldout(lambda batch: bound_nats(law(batch.tokens, batch.rows), batch), windows, mask_id, draws)
    scale = tokens_per_byte / math.log(2)
    mean, error = float(estimates.mean()), _standard_error(estimates)
    return Bound(mean, mean * scale, None if error is None else error * scale, windows.size)


@torch.no_grad()
def heldout_divergence(
    teacher: Denoiser, student: Denoiser, windows: np.ndarray, *, draws: int = 1
) -> tuple[float, float | None]:
    """KL(teacher || student) in nats per masked token and its standard error over windows; a fused operator, no logits.

    Masked as in `heldout_bound`: the mean over mask rates, each of which counts alike.
    """
    length = windows.shape[1]
    rows = [hidden_of(model, BATCH, length) for model in (teacher, student)]
    heads = [(model.head.weight, model.head.bias) for model in (teacher, student)]
    forbid = torch.tensor([teacher.spec.mask_id])

    def of_batch(batch: Masked) -> Tensor:
        one, other = (of(batch.tokens, batch.rows) for of in rows)
        return _of_windows(divergence(one, heads[0], other, heads[1], forbid=forbid).kl, batch)

    estimates = _heldout(of_batch, windows, teacher.spec.mask_id, draws)
    return float(estimates.mean()), _standard_error(estimates)


def _heldout(of_batch: Callable[[Masked], Tensor], windows: np.ndarray, mask_id: int, draws: int) -> np.ndarray:
    """The mean over `draws` masks of each window, float64 [W]; always with the same masks."""
    rng = np.random.default_rng(0)
    estimates = np.empty((draws, len(windows)))
    for draw in range(draws):
        for start in range(0, len(windows), BATCH):
            part = slice(start, start + BATCH)
            estimates[draw, part] = of_batch(mask_by_count(windows[part], mask_id, rng)).numpy()
    return estimates.mean(0)


def _standard_error(of_windows: np.ndarray) -> float | None:
    num = len(of_windows)
    return float(of_windows.std(ddof=1)) / math.sqrt(num) if num > 1 else None


def hidden_of(denoiser: Denoiser, batch_size: int, length: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The hidden rows [R, D] of a loaded denoiser, from tokens int64 [B, L] and rows int64 [R], for up to `batch_size`
    windows of `length` tokens at a time; valid until the next call."""
    workspace = Workspace([denoiser.buffers(batch_size * length, batch_size * length, batch_size)])
    mask_id = denoiser.spec.mask_id

    def hidden(tokens: Tensor, rows: Tensor) -> Tensor:
        num = len(tokens)
        counts = torch.bincount(rows // length, minlength=num).tolist()
        batch = Batch(tokens.flatten(), (length,) * num, rows, tuple(counts), (tokens == mask_id).float().mean(1))
        return denoiser.hidden(batch, workspace)

    return hidden


def law_of(denoiser: Denoiser, batch_size: int, length: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A loaded denoiser as the `law` of `heldout_bound`; arguments as of `hidden_of`."""
    hidden, head, mask_id = hidden_of(denoiser, batch_size, length), denoiser.head, denoiser.spec.mask_id

    def law(tokens: Tensor, rows: Tensor) -> Tensor:
        logits = F.linear(hidden(tokens, rows).float(), head.weight.float(), head.bias.float())
        logits[:, mask_id] = -torch.inf
        return logits

    return law
