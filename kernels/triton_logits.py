"""Tiles of the logits of some rows for Triton kernels, and how launchers pass what they are made of."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from unmask.kernels.logits import Logits
from unmask.kernels.triton_arithmetic import dot

NEVER = tl.constexpr(-float("inf"))


def operands(logits: Logits, rows: slice) -> tuple:
    """The first arguments of logits_tile for a kernel over these rows."""
    if isinstance(logits.temperature, Tensor):
        temperature = logits.temperature[rows].contiguous()
    else:  # filled on the device: a copy from the host could not be captured
        num_rows = len(range(logits.num_rows)[rows])
        temperature = torch.full((num_rows,), logits.temperature, dtype=torch.float32, device=logits.hidden.device)
    return (
        logits.hidden[rows] if logits.rows is None else logits.hidden,
        logits.weight,
        None if logits.offset is None else logits.offset.float().contiguous(),
        temperature,
        None if logits.rows is None else logits.rows[rows].contiguous(),
        *logits.hidden.stride(),
        *((0, 0) if logits.weight is None else logits.weight.stride()),
    )


def dim(logits: Logits) -> int:
    return 1 if logits.weight is None else logits.hidden.shape[1]


@triton.jit
def logits_tile(
    hidden, weight, offset, temperature, rows, hidden_row, hidden_column, weight_row, weight_column,
    row, real, first, vocab_size,
    dim: tl.constexpr, block_r: tl.constexpr, block_v: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """Logits [block_r, block_v] of the rows `row`, those that are `real`, and the ids from `first` on: divided by the
    temperature, -inf where an id is impossible or does not exist."""
    source = row.to(tl.int64) if rows is None else tl.load(rows + row, mask=real, other=0)
    left = hidden + source[:, None] * hidden_row
    ids = first + tl.arange(0, block_v)
    exists = ids < vocab_size
    if weight is None:
        place = left + ids.to(tl.int64)[None, :] * hidden_column
        x = tl.load(place, mask=real[:, None] & exists[None, :], other=0.0).to(tl.float32)
    else:
        k = tl.arange(0, block_k)
        left += k[None, :] * hidden_column
        right = weight + tl.minimum(ids, vocab_size - 1).to(tl.int64)[None, :] * weight_row + k[:, None] * weight_column
        x = tl.zeros((block_r, block_v), tl.float32)
        for start in range(0, dim, block_k):
            if dim % block_k == 0:
                h = tl.load(left + start * hidden_column, mask=real[:, None], other=0.0)
                w = tl.load(right + start * weight_column)
            else:
                rest = k < dim - start
                h = tl.load(left + start * hidden_column, mask=real[:, None] & rest[None, :], other=0.0)
                w = tl.load(right + start * weight_column, mask=rest[:, None], other=0.0)
            x = dot(h, w, x)
    possible = exists
    if offset is not None:
        shift = tl.load(offset + ids, mask=exists, other=NEVER)
        x += shift[None, :]
        possible = shift != NEVER
    inverse = tl.div_rn(1.0, tl.load(temperature + row, mask=real, other=1.0))
    inverse = tl.maximum(inverse, 2.0**-126)  # a subnormal factor may count as zero, and -inf * 0 is NaN
    return tl.where(possible[None, :], x * inverse[:, None], NEVER)
