"""sample_head in plain torch: the specification. Runs on any device, in bounded chunks of rows."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.kernels import noise
from unmask.kernels.logits import Logits
from unmask.kernels.sample_head.call import HeadCall, HeadSample


def sample_head(call: HeadCall) -> HeadSample:
    temperature = call.temperature
    if isinstance(temperature, Tensor):
        divisor, random = torch.where(temperature > 0, temperature, 1), temperature > 0
    else:
        divisor, random = temperature or 1.0, torch.full((call.num_rows,), temperature > 0, device=call.keys.device)
    source = Logits(call.hidden, call.weight, call.offset, divisor, call.rows)
    sample = call.empty()
    widths = -(-noise.BLOCK // call.vocab_size)  # the noise of a row is a block wide, however few ids there are
    for rows in source.slices(call.dtype, matrices=widths):
        logits = source.compute(rows, call.dtype)
        if call.allow is not None:
            _disallow(logits, call.allow[rows])
        _truncate(logits, call.top_k, call.top_p)
        for whole, part in zip(sample, _draw(logits, random[rows], call.keys[rows], call.seed), strict=True):
            whole[rows] = part
    call.scatter(sample.tokens)
    return sample


def _disallow(logits: Tensor, allow: Tensor) -> None:
    ids = torch.arange(logits.shape[1], device=logits.device)
    logits.masked_fill_((allow[:, ids >> 5] >> (ids & 31) & 1) == 0, -math.inf)


def _truncate(logits: Tensor, top_k: int | None, top_p: float | None) -> None:
    """Keep the first ids by falling logit, lowest id first among equals: top_k of them, then top_p of their mass."""
    if top_k is None and top_p is None:
        return
    ranked, order = logits.sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        ranked[:, top_k:] = -math.inf
    if top_p is not None:
        mass_before = ranked.softmax(dim=1, dtype=torch.float64).cumsum(dim=1).roll(1, dims=1)
        mass_before[:, 0] = 0
        ranked.masked_fill_(mass_before >= top_p, -math.inf)
    logits.scatter_(1, order, ranked)


def _draw(logits: Tensor, random: Tensor, keys: Tensor, seed: int) -> HeadSample:
    """Draw from each row of tempered logits [R, V], or take its largest where `random` [R] is False."""
    logits = F.pad(logits, (0, -logits.shape[1] % noise.BLOCK), value=-math.inf)  # ids past the end never win
    blocks = logits.unflatten(1, (-1, noise.BLOCK))
    block_lse = blocks.logsumexp(dim=2)
    lse = block_lse.logsumexp(dim=1)
    best = logits.topk(2, dim=1).values
    argmax = logits.argmax(dim=1)  # the lowest of equals, which topk does not promise
    tokens = torch.where(random, _race(blocks, block_lse, keys, seed), argmax)
    top, second = (best - lse[:, None]).exp().unbind(1)
    return HeadSample(
        tokens=torch.where(lse.isfinite(), tokens, -1),
        logprob=logits.gather(1, tokens[:, None]).squeeze(1) - lse,
        lse=lse,
        max_prob=top,
        argmax=argmax,
        margin=top - second,
        entropy=torch.special.entr(logits.softmax(dim=1)).sum(dim=1),
    )


def _race(blocks: Tensor, block_lse: Tensor, keys: Tensor, seed: int) -> Tensor:
    """Tokens [R] of the logits `blocks` [R, num_blocks, 128]: first the blocks race, then the winner's tokens."""
    rows = torch.arange(len(blocks), device=blocks.device)
    winner = (block_lse + noise.block_gumbel(seed, keys, blocks.shape[1])).argmax(dim=1)
    best = (blocks[rows, winner] + noise.winner_gumbel(seed, keys, winner)).argmax(dim=1)
    return winner * noise.BLOCK + best
