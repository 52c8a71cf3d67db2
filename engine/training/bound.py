"""The training loss and the held-out bound: two estimates of the same evidence bound."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.denoiser import Batch, Denoiser
from unmask.workspace import Workspace


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


def mask_by_time(clean: np.ndarray, mask_id: int, rng: np.random.Generator) -> Masked:
    """Masks for a training batch: antithetic times, one per sequence, and the weight 1/t of the linear schedule.

    Times of a batch are spread evenly over (0, 1] from one uniform draw (low-discrepancy sampler of Kingma et al.
    2021); each token is masked with probability t.
    """
    num, length = clean.shape
    times = np.maximum((rng.random() + rng.permutation(num)) / num, 1e-3)
    mask = rng.random((num, length)) < times[:, None]
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
    num, length = batch.tokens.shape
    losses = F.cross_entropy(logits, batch.targets, reduction="none") * batch.weights
    return torch.zeros(num, dtype=losses.dtype).index_add(0, batch.rows // length, losses) / length


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
    batch_size: int = 64,
) -> Bound:
    """The bound over held-out windows int64 [W, L], each masked `draws` times; always with the same masks.

    law: from tokens int64 [B, L] and rows int64 [R] to logits [R, V].
    """
    rng = np.random.default_rng(0)
    estimates = np.empty((draws, len(windows)))
    for draw in range(draws):
        for start in range(0, len(windows), batch_size):
            batch = mask_by_count(windows[start : start + batch_size], mask_id, rng)
            nats = bound_nats(law(batch.tokens, batch.rows), batch)
            estimates[draw, start : start + batch_size] = nats.numpy()
    of_window = estimates.mean(0)
    scale = tokens_per_byte / math.log(2)
    error = scale * float(of_window.std(ddof=1)) / math.sqrt(len(windows)) if len(windows) > 1 else None
    mean = float(of_window.mean())
    return Bound(mean, mean * scale, error, windows.size)


def law_of(denoiser: Denoiser, batch_size: int, length: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A loaded denoiser as the `law` of `heldout_bound`: up to `batch_size` windows of `length` tokens at a time."""
    workspace = Workspace([denoiser.buffers(batch_size * length, batch_size * length, batch_size)])
    mask_id, head = denoiser.spec.mask_id, denoiser.head

    def law(tokens: Tensor, rows: Tensor) -> Tensor:
        num = len(tokens)
        counts = torch.bincount(rows // length, minlength=num).tolist()
        batch = Batch(tokens.flatten(), (length,) * num, rows, tuple(counts), (tokens == mask_id).float().mean(1))
        hidden = denoiser.hidden(batch, workspace)
        logits = F.linear(hidden.float(), head.weight.float(), head.bias.float())
        logits[:, mask_id] = -torch.inf
        return logits

    return law
