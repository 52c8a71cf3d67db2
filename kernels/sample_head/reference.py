"""sample_head in plain torch: the specification. Runs on any device, in bounded chunks of rows."""

import math

import torch
from torch import Tensor

from unmask.kernels import noise
from unmask.kernels.sample_head.call import HeadCall, HeadSample

_SHARE = 2 << 20  # bytes for a chunk's logits; a few temporaries of their size come on top
_MAX_ROWS = 512


def sample_head(call: HeadCall) -> HeadSample:
    num_blocks = -(-call.vocab_size // noise.BLOCK)
    width = num_blocks * noise.BLOCK
    chunk = min(_MAX_ROWS, max(1, _SHARE // (width * call.dtype.itemsize)))
    logits = call.hidden.new_full((chunk, width), -math.inf, dtype=call.dtype)  # ids past the end never win
    parts = []
    for rows in torch.arange(call.num_rows, device=call.hidden.device).split(chunk):
        scored = logits[: len(rows)]
        temperature = torch.as_tensor(call.temperature, dtype=call.dtype, device=rows.device)
        temperature = temperature.expand(call.num_rows)[rows, None]
        _score(scored[:, : call.vocab_size], call, rows)
        scored /= torch.where(temperature > 0, temperature, 1)
        _truncate(scored, call.top_k, call.top_p)
        parts.append(_draw(scored, temperature.squeeze(1) > 0, call.keys[rows], call.seed))
    sample = HeadSample(*map(torch.cat, zip(*parts, strict=True)))
    call.scatter(sample.tokens)
    return sample


def _score(logits: Tensor, call: HeadCall, rows: Tensor) -> None:
    """logits[...] = hidden @ weight.T + offset, -inf where an id cannot be drawn, whatever its logit was.

    Weights of another dtype are widened a few ids at a time.
    """
    hidden = call.hidden[rows if call.rows is None else call.rows[rows]].to(call.dtype)
    if call.weight is None:
        logits.copy_(hidden)
    else:
        same = call.weight.dtype == call.dtype
        step = len(call.weight) if same else max(1, _SHARE // (hidden.shape[1] * hidden.itemsize))
        for first in range(0, len(call.weight), step):
            ids = slice(first, first + step)
            logits[:, ids] = hidden @ call.weight[ids].to(call.dtype).T
    if call.offset is not None:
        logits += call.offset
        logits.masked_fill_(call.offset == -math.inf, -math.inf)
    if call.allow is not None:
        ids = torch.arange(call.vocab_size, device=logits.device)
        logits.masked_fill_((call.allow[rows][:, ids >> 5] >> (ids & 31) & 1) == 0, -math.inf)


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
    """Draw from each row of tempered logits [R, num_blocks * 128], or take its largest where `random` [R] is False."""
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
