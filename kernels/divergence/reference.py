"""divergence in plain torch: the specification. Runs on any device, in chunks of rows."""

import math

import torch
from torch import Tensor

from unmask.kernels.divergence.call import Comparison, DivergenceCall


def divergence(call: DivergenceCall) -> Comparison:
    answer = Comparison(*(call.a.hidden.new_empty(call.a.num_rows, dtype=call.dtype) for _ in Comparison._fields))
    for rows in call.a.slices(call.dtype, matrices=2):
        part = _compare(call.a.compute(rows, call.dtype), call.b.compute(rows, call.dtype))
        for whole, piece in zip(answer, part, strict=True):
            whole[rows] = piece
    return answer


def _compare(a: Tensor, b: Tensor) -> Comparison:
    """KL = sum of p (d + exp(-d) - 1), d = log p - log q: what is added to the definition sums to zero, and no term is
    negative, so that nothing cancels when the laws are close."""
    lse_a, lse_b = a.logsumexp(dim=1), b.logsumexp(dim=1)
    log_p, log_q = a - lse_a[:, None], b - lse_b[:, None]
    p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
    terms = torch.where(d.abs() < 1, p * (d + torch.expm1(-d)), p * d + q - p)
    terms = torch.where(a == -math.inf, q, torch.where(b == -math.inf, math.inf, terms))
    entropy = torch.where(p == 0, 0, -p * log_p).sum(dim=1)
    good = lse_a.isfinite() & lse_b.isfinite()
    kl, entropy = (torch.where(good, value, math.nan) for value in (terms.sum(dim=1), entropy))
    return Comparison(kl, entropy, lse_a, lse_b)
