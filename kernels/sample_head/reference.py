"""sample_head in plain torch: the specification. Runs on any device, needs at most 8 MiB beyond its arguments."""

import math

import torch
from torch import Tensor

from unmask.kernels import noise

_SHARE = 2 << 20  # bytes for a chunk's logits, as much again for each temporary of their size
_MAX_ROWS = 512


def sample_head(
    hidden: Tensor, weight: Tensor | None, offset: Tensor | None, keys: Tensor, seed: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as the operator's, with bias and forbid merged into `offset`. Returns tokens, logprob, lse."""
    vocab_size = hidden.shape[1] if weight is None else weight.shape[0]
    num_blocks = -(-vocab_size // noise.BLOCK)
    exact = torch.float64 in (hidden.dtype, None if weight is None else weight.dtype)
    dtype = torch.float64 if exact else torch.float32
    chunk = min(_MAX_ROWS, max(1, _SHARE // (num_blocks * noise.BLOCK * dtype.itemsize)))

    tokens = hidden.new_empty(len(hidden), dtype=torch.int64)
    logprob, lse = hidden.new_empty(2, len(hidden), dtype=dtype)
    logits = hidden.new_full((chunk, num_blocks * noise.BLOCK), -math.inf, dtype=dtype)  # ids past the end never win
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        scored = logits[: len(hidden[rows])]
        _score(scored[:, :vocab_size], hidden[rows].to(dtype), weight, offset)
        if temperature > 0:
            scored /= temperature
        blocks = scored.unflatten(1, (num_blocks, noise.BLOCK))
        block_lse = blocks.logsumexp(dim=2)
        lse[rows] = block_lse.logsumexp(dim=1)
        tokens[rows] = _race(blocks, block_lse, keys[rows], seed) if temperature > 0 else scored.argmax(dim=1)
        logprob[rows] = scored.gather(1, tokens[rows, None]).squeeze(1) - lse[rows]
    return tokens, logprob, lse


def _score(logits: Tensor, hidden: Tensor, weight: Tensor | None, offset: Tensor | None) -> None:
    """logits[...] = hidden @ weight.T + offset; weights of another dtype are widened a few ids at a time."""
    if weight is None:
        logits.copy_(hidden)
    else:
        step = len(weight) if weight.dtype == hidden.dtype else max(1, _SHARE // (hidden.shape[1] * hidden.itemsize))
        for first in range(0, len(weight), step):
            ids = slice(first, first + step)
            logits[:, ids] = hidden @ weight[ids].to(hidden.dtype).T
    if offset is not None:
        logits += offset
        logits.masked_fill_(offset == -math.inf, -math.inf)  # whatever the logit was, NaN included


def _race(blocks: Tensor, block_lse: Tensor, keys: Tensor, seed: int) -> Tensor:
    """Tokens [R] of the logits `blocks` [R, num_blocks, 128]: first the blocks race, then the winner's tokens."""
    rows = torch.arange(len(blocks), device=blocks.device)
    winner = (block_lse + noise.block_gumbel(seed, keys, blocks.shape[1])).argmax(dim=1)
    best = (blocks[rows, winner] + noise.winner_gumbel(seed, keys, winner)).argmax(dim=1)
    return winner * noise.BLOCK + best
