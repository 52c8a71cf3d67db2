"""add_norm in Triton: one pass over memory, a few rows to a program, each row held in registers from sum to result.

With a bf16 delta and result that is 12 bytes of device memory per number; the vectors of the norm and of the sequences
come out of the cache. A row finds its sequence by halving the table of starts. The tile follows from D alone, so a
row's bits do not depend on the other rows.
"""

import torch
import triton
import triton.language as tl

from unmask.kernels.add_norm.call import AddNormCall
from unmask.kernels.offsets import device_offsets
from unmask.kernels.triton_arithmetic import rounded

_TILE = 4096  # numbers, sixteen to a thread
_MOST_ROWS = 16


def tile(dim: int) -> dict[str, int | bool]:
    block_d = max(16, triton.next_power_of_2(dim))
    block_r = min(_MOST_ROWS, max(1, _TILE // block_d))
    num_warps = max(1, block_r * block_d // 512)
    return {"block_r": block_r, "block_d": block_d, "num_warps": num_warps, "enable_fp_fusion": False}


@triton.jit
def _owner(starts, row, num_sequences, halvings):
    """The last sequence that starts at the row or before it, the one row's own; num_sequences past the end."""
    low = tl.zeros_like(row)
    for step in range(halvings):
        middle = low + (1 << (halvings - 1 - step))
        exists = middle <= num_sequences
        begins = tl.load(starts + tl.where(exists, middle, 0))
        low = tl.where(exists & (begins <= row), middle, low)
    return low


@triton.jit
def _load(matrix, stride, row, column, mask):
    """Rows of a matrix with contiguous columns, in fp32."""
    place = matrix + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "halvings", "eps"])
def add_norm_kernel(
    residual, residual_row, delta, delta_row, out, out_row, weight, bias, gate, gate_row, shift, shift_row,
    scale, scale_row, starts, num_sequences, halvings, num_rows, eps,
    rms: tl.constexpr, dim: tl.constexpr, block_r: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * block_r + tl.arange(0, block_r)
    column = tl.arange(0, block_d)
    exists, real = column < dim, row < num_rows
    owner = row
    if starts is not None:
        owner = _owner(starts, row, num_sequences, halvings)
        real = real & (owner < num_sequences)
    mask = real[:, None] & exists[None, :]
    x = _load(residual, residual_row, row, column, mask)
    if delta is not None:
        d = _load(delta, delta_row, row, column, mask)
        if gate is not None:
            d = _load(gate, gate_row, owner, column, mask) * d
        x += d
        tl.store(residual + row.to(tl.int64)[:, None] * residual_row + column[None, :], x, mask=mask)
    centred = x if rms else tl.where(exists[None, :], x - (tl.sum(x, axis=1) / dim)[:, None], 0.0)
    deviation = tl.sqrt_rn(tl.sum(centred * centred, axis=1) / dim + eps)
    y = centred * tl.div_rn(1.0, deviation)[:, None] * tl.load(weight + column, mask=exists, other=0.0)[None, :]
    if bias is not None:
        y += tl.load(bias + column, mask=exists, other=0.0)[None, :]
    if scale is not None:
        y *= 1.0 + _load(scale, scale_row, owner, column, mask)
    if shift is not None:
        y += _load(shift, shift_row, owner, column, mask)
    place = out + row.to(tl.int64)[:, None] * out_row + column[None, :]
    tl.store(place, rounded(y, out.dtype.element_ty), mask=mask)


def add_norm(call: AddNormCall) -> None:
    num_rows, dim = call.residual.shape
    starts = None if call.row_counts is None else device_offsets(call.row_counts, call.residual.device).starts
    num_sequences = 0 if starts is None else len(starts) - 1
    weight, bias = (None if x is None else x.contiguous() for x in (call.weight, call.bias))
    options = tile(dim)
    add_norm_kernel[(triton.cdiv(num_rows, options["block_r"]),)](
        *_rows(call.residual), *_rows(call.delta), *_rows(call.out), weight, bias,
        *_rows(call.gate), *_rows(call.shift), *_rows(call.scale),
        starts, num_sequences, num_sequences.bit_length(), num_rows, call.eps, rms=call.rms, dim=dim,
        **options,
    )  # fmt: skip


def _rows(matrix: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    return (None, 0) if matrix is None else (matrix, matrix.stride(0))
