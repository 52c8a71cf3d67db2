"""The random numbers of a run for Triton kernels, and sums in a fixed order: noise.py, elementary.h and online.h again.

Tensors of words are uint32. Kernels that use these functions are launched with enable_fp_fusion=False, so that an
expression rounds alike in every kernel and tile: where a product and a sum are to be one operation it says tl.fma.
"""

import triton
import triton.language as tl

from unmask.kernels import noise
from unmask.kernels.triton_arithmetic import exp2

BLOCK = tl.constexpr(noise.BLOCK)
_BLOCK_RACE, _TOKEN_RACE = tl.constexpr(noise.BLOCK_RACE << 24), tl.constexpr(noise.TOKEN_RACE << 24)


def key_words(seed: int) -> tuple[int, int]:
    """The two words of Philox's key, signed, so that a kernel's argument has one type for every seed."""
    return tuple((word & 0xFFFFFFFF ^ 0x80000000) - 0x80000000 for word in (seed, seed >> 32))


@triton.jit
def philox(index, position, sequence, stream_draw, key0, key1):
    """Philox4x32-10: four words for each counter, of the broadcast shape of its parts. The keys are int32 or uint32."""
    c0, c1, c2, c3 = index, position, sequence, stream_draw
    key0, key1 = key0.to(tl.uint32, bitcast=True), key1.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key0, (p0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _split(x):
    """(f, n) with x = 2**n * (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), for positive normal x."""
    bits = x.to(tl.int32, bitcast=True)
    n = (bits - 0x3F3504F3) >> 23
    return (bits - (n << 23)).to(tl.float32, bitcast=True) - 1.0, n.to(tl.float32)


@triton.jit
def _log_split(f, n):
    """log(2**n * (1 + f)); full relative precision as f -> 0 with n = 0, where it is log1p. Cephes logf, S. Moshier."""
    square = f * f
    p = tl.fma(f, 7.0376836292e-2, -1.1514610310e-1)
    p = tl.fma(p, f, 1.1676998740e-1)
    p = tl.fma(p, f, -1.2420140846e-1)
    p = tl.fma(p, f, 1.4249322787e-1)
    p = tl.fma(p, f, -1.6668057665e-1)
    p = tl.fma(p, f, 2.0000714765e-1)
    p = tl.fma(p, f, -2.4999993993e-1)
    p = tl.fma(p, f, 3.3333331174e-1)
    tail = tl.fma(square, -0.5, tl.fma(p, f * square, n * -2.12194440e-4))
    return tl.fma(n, 0.693359375, f + tail)


@triton.jit
def log_positive(x):
    """log of positive normal x."""
    f, n = _split(x)
    return _log_split(f, n)


@triton.jit
def _gumbel_of(v, u):
    """-log(-log1p(-v)) from v and its exact complement u = 1 - v, which keeps log finite where v rounds to one."""
    f, n = _split(u)
    small = v < 0.25
    return -log_positive(-_log_split(tl.where(small, -v, f), tl.where(small, 0.0, n)))


@triton.jit
def _unit(word):
    """(k + 1/2) / 2**32, with full relative precision near zero."""
    return (word.to(tl.float32) + 0.5) * (2.0**-32)


@triton.jit
def _unit_of_two(high, low):
    """(k + 1/2) / 2**64, with full relative precision near zero."""
    return high.to(tl.float32) * (2.0**-32) + (low.to(tl.float32) + 0.5) * (2.0**-64)


@triton.jit
def _gumbel(word):
    return _gumbel_of(_unit(word), _unit(word ^ 0xFFFFFFFF))


@triton.jit
def block_gumbel(block, position, sequence, draw, key0, key1):
    """Gumbel noise of noise blocks: fp32 of the broadcast shape of the arguments, which are uint32 but for the keys."""
    w0, w1, _, _ = philox(block, position, sequence, draw | _BLOCK_RACE, key0, key1)
    return _gumbel_of(_unit_of_two(w0, w1), _unit_of_two(w0 ^ 0xFFFFFFFF, w1 ^ 0xFFFFFFFF))


@triton.jit
def token_gumbel(block, position, sequence, draw, key0, key1, rows: tl.constexpr):
    """Gumbel noise of the 128 ids of one noise block per row: uint32 [rows] each -> fp32 [rows, 128]."""
    index = block[:, None] * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :].to(tl.uint32)
    stream_draw = (draw | _TOKEN_RACE)[:, None]
    w0, w1, w2, w3 = philox(index, position[:, None], sequence[:, None], stream_draw, key0, key1)
    even, odd = tl.join(_gumbel(w0), _gumbel(w2)), tl.join(_gumbel(w1), _gumbel(w3))
    return tl.reshape(tl.join(even, odd), (rows, BLOCK))


@triton.jit
def fold_sum(x, rows: tl.constexpr, columns: tl.constexpr):
    """Sums [rows] of x [rows, columns], columns a power of two: halves are added until one column is left.

    tl.sum of more than two numbers takes whatever order the layout of the tile suggests.
    """
    if columns == 1:
        return tl.reshape(x, (rows,))
    else:
        return fold_sum(tl.sum(tl.reshape(x, (rows, 2, columns // 2)), axis=1), rows, columns // 2)


@triton.jit
def halves(x, rows: tl.constexpr, columns: tl.constexpr):
    """The first and the second half of the columns of x [rows, columns]."""
    return tl.split(tl.permute(tl.reshape(x, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit
def logsumexp(top, total):
    """top + log(total) of a total of exponentials of differences to top: -inf where top is, NaN where total is."""
    return tl.where(total == total, top + log_positive(total), total)


@triton.jit
def exp_below(x, top):
    """exp(x - top) for x <= top, 0 where both are -inf."""
    return exp2((x - tl.where(top == float("-inf"), 0.0, top)) * 1.4426950408889634)
