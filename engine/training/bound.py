"""The training loss and the held-out bound: two estimates of the same evidence bound."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.training.model import TrainableDenoiser


@dataclass(frozen=True)
class Masked:
    """A batch with some tokens masked.

    tokens: int64 [B, L] with the mask id in place. rows: int64 [R] flat indices of the masked tokens, targets: int64 [R]
    what stood there. weights: float32 [R], the weight of each row's cross entropy in the bound.
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

    Times of a batch are spread evenly over (0, 1] from one uniform draw (low-discrepancy sampler of Kingma et al. 2021);
    each token is masked with probability t.
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


def bound_nats(net: TrainableDenoiser, batch: Masked) -> Tensor:
    """Σ weight · −log p(target) over the masked rows, per token of the batch, in nats (a scalar)."""
    losses = F.cross_entropy(net(batch.tokens, batch.rows), batch.targets, reduction="none")
    return (losses * batch.weights).sum() / batch.tokens.numel()


@dataclass(frozen=True)
class Bound:
    """An upper bound of the negative log-likelihood: nats per token, bits per byte, and its standard error."""

    nats_per_token: float
    bits_per_byte: float
    standard_error_bits_per_byte: float
    num_tokens: int


@torch.no_grad()
def heldout_bound(
    net: TrainableDenoiser, windows: np.ndarray, tokens_per_byte: float, *, draws: int = 1, batch_size: int = 64
) -> Bound:
    """The bound over held-out windows int64 [W, L], each masked `draws` times; always with the same masks."""
    rng = np.random.default_rng(0)
    estimates = []
    for _ in range(draws):
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            estimates += [float(bound_nats(net, mask_by_count(batch, net.shape.mask_id, rng)))] * len(batch)
    mean = float(np.mean(estimates))
    batches = np.array(estimates)[:: batch_size]
    error = float(batches.std(ddof=1) / math.sqrt(len(batches))) if len(batches) > 1 else math.nan
    scale = tokens_per_byte / math.log(2)
    return Bound(mean, mean * scale, error * scale, windows.size)
