"""add_norm in plain torch: the specification. Runs on any device, in bounded chunks of rows.

It waits for a GPU where sequences begin at offsets.
"""

import torch
import torch.nn.functional as F

from unmask.kernels.add_norm.call import AddNormCall

_ROWS = 4096


def add_norm(call: AddNormCall) -> None:
    call = call.counted()
    for start in range(0, len(call.residual), _ROWS):
        rows = slice(start, start + _ROWS)
        gate, shift, scale = (_by_row(x, call, rows) for x in (call.gate, call.shift, call.scale))
        residual = call.residual[rows]
        if call.delta is not None:
            delta = call.delta[rows].float()
            residual += delta if gate is None else gate * delta
        if call.rms:
            normed = residual / (residual.square().mean(1, keepdim=True) + call.eps).sqrt() * call.weight
        else:
            normed = F.layer_norm(residual, residual.shape[1:], call.weight, call.bias, call.eps)
        if scale is not None:
            normed *= 1 + scale
        if shift is not None:
            normed += shift
        call.out[rows] = normed


def _by_row(vectors: torch.Tensor | None, call: AddNormCall, rows: slice) -> torch.Tensor | None:
    if vectors is None:
        return None
    counts = torch.tensor(call.row_counts, device=vectors.device)
    owner = torch.arange(len(counts), device=vectors.device).repeat_interleave(counts)
    return vectors[owner[rows]]
