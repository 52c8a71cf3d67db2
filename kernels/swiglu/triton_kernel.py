"""swiglu in Triton: every number read once and written once, a row or a few short ones to a program."""

import triton
import triton.language as tl

from unmask.kernels.swiglu.call import SwigluCall
from unmask.kernels.triton_arithmetic import rounded

_TILE = 2048  # numbers of the result, sixteen to a thread


def tile(dim: int) -> dict[str, int | bool]:
    block_d = min(_TILE, max(16, triton.next_power_of_2(dim)))
    return {"block_r": _TILE // block_d, "block_d": block_d, "num_warps": 4, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_kernel(
    gate_up, gate_up_row, out, out_row, num_rows, dim,
    block_r: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * block_r + tl.arange(0, block_r)
    column = tl.program_id(1) * block_d + tl.arange(0, block_d)
    mask = (row < num_rows)[:, None] & (column < dim)[None, :]
    row = row.to(tl.int64)[:, None]
    place = gate_up + row * gate_up_row + column[None, :]
    gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(place + dim, mask=mask, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(gate))  # at most 1
    silu = tl.where(gate < 0, gate * e, gate) / (1.0 + e)
    tl.store(out + row * out_row + column[None, :], rounded(silu * up, out.dtype.element_ty), mask=mask)


def swiglu(call: SwigluCall) -> None:
    num_rows, dim = call.out.shape
    options = tile(dim)
    swiglu_kernel[(triton.cdiv(num_rows, options["block_r"]), triton.cdiv(dim, options["block_d"]))](
        call.gate_up, call.gate_up.stride(0), call.out, call.out.stride(0), num_rows, dim, **options
    )
