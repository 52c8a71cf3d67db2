"""Arithmetic for Triton kernels that means the same on a GPU and in the interpreter."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from unmask.kernels.dispatch import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def dot(left, right, total):
    """total + left . right in fp32."""
    if INTERPRETED:  # which multiplies the bits of bf16
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 to the nearest number of a dtype, the even one of two."""
    if INTERPRETED and dtype == tl.bfloat16:  # where the interpreter cuts off
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(dtype)


@triton.jit
def exp2(x):
    """2**x; a GPU flushes subnormal results, which saves three operations."""
    return tl.exp2(x) if INTERPRETED else libdevice.exp2(x)
