"""divergence in Triton: one kernel compares the two laws inside each noise block, one the laws over the blocks.

KL and entropy obey a chain rule, inside the blocks first and then over them, so that a block leaves four numbers of a
row: both log-sum-exps, KL and entropy. They stand in a table [4, blocks, rows] until the second kernel takes them in
the order of the blocks. Rows are served in chunks whose table is small.
"""

import torch
import triton
import triton.language as tl

from unmask.kernels import triton_noise
from unmask.kernels.divergence.call import Comparison, DivergenceCall
from unmask.kernels.triton_logits import NEVER, dim, logits_tile, operands
from unmask.kernels.triton_noise import exp_below, logsumexp

BLOCK = triton_noise.BLOCK
ROWS_OF_PRODUCT, ROWS_OF_GIVEN = 64, 16
TILE = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}
MERGE = {"block_r": 16, "block_n": 64, "num_warps": 4, "enable_fp_fusion": False}
_TABLE = 32 << 20  # bytes


@triton.jit
def _excess(d):
    """d + exp(-d) - 1 for |d| < 1/2, to a relative 2e-9."""
    p = tl.fma(d, -1.0 / 362880, 1.0 / 40320)
    p = tl.fma(p, d, -1.0 / 5040)
    p = tl.fma(p, d, 1.0 / 720)
    p = tl.fma(p, d, -1.0 / 120)
    p = tl.fma(p, d, 1.0 / 24)
    p = tl.fma(p, d, -1.0 / 6)
    p = tl.fma(p, d, 0.5)
    return p * (d * d)


@triton.jit
def _terms(x, y, lse_a, lse_b, inside, spread):
    """What outcomes with log-weights x and y add to KL and to entropy, those with laws inside included.

    With p and q the two probabilities and d = log p - log q, a term of KL is p (d + exp(-d) - 1) = p d + q - p, never
    negative: what it adds to p d sums to zero.
    """
    log_p = x - tl.where(lse_a == NEVER, 0.0, lse_a)
    log_q = y - tl.where(lse_b == NEVER, 0.0, lse_b)
    d, p, q = log_p - log_q, tl.exp(log_p), tl.exp(log_q)
    kl = tl.where(tl.abs(d) < 0.5, p * _excess(d), p * d + (q - p)) + p * inside
    kl = tl.where((y == NEVER) | (inside == float("inf")), float("inf"), kl)  # possible under a alone
    return tl.where(x == NEVER, q, kl), tl.where(p == 0, 0.0, p * (spread - log_p))


@triton.jit(do_not_specialize=["num_rows"])
def blocks_kernel(
    hidden_a, weight_a, offset_a, temperature, rows, row_a, column_a, weight_row_a, weight_column_a,
    hidden_b, weight_b, offset_b, temperature_b, rows_b, row_b, column_b, weight_row_b, weight_column_b,
    table, num_rows, vocab_size,
    dim_a: tl.constexpr, dim_b: tl.constexpr, block_r: tl.constexpr, block_k_a: tl.constexpr, block_k_b: tl.constexpr,
):  # fmt: skip
    """The four numbers of one noise block for one tile of rows. Neighbouring programs share the block."""
    tiles = tl.cdiv(num_rows, block_r)
    block = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * block_r + tl.arange(0, block_r)
    real = row < num_rows
    a = logits_tile(
        hidden_a, weight_a, offset_a, temperature, rows, row_a, column_a, weight_row_a, weight_column_a,
        row, real, block * BLOCK, vocab_size, dim_a, block_r, BLOCK, block_k_a,
    )  # fmt: skip
    b = logits_tile(
        hidden_b, weight_b, offset_b, temperature_b, rows_b, row_b, column_b, weight_row_b, weight_column_b,
        row, real, block * BLOCK, vocab_size, dim_b, block_r, BLOCK, block_k_b,
    )  # fmt: skip
    top_a, top_b = tl.max(a, axis=1), tl.max(b, axis=1)
    lse_a = logsumexp(top_a, tl.sum(exp_below(a, top_a[:, None]), axis=1))
    lse_b = logsumexp(top_b, tl.sum(exp_below(b, top_b[:, None]), axis=1))
    kl, entropy = _terms(a, b, lse_a[:, None], lse_b[:, None], 0.0, 0.0)
    size = tl.num_programs(0) // tiles * num_rows
    place = table + block * num_rows + row
    tl.store(place, lse_a, mask=real)
    tl.store(place + size, lse_b, mask=real)
    tl.store(place + 2 * size, tl.sum(kl, axis=1), mask=real)
    tl.store(place + 3 * size, tl.sum(entropy, axis=1), mask=real)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def rows_kernel(
    table, kl, entropy, lse_a, lse_b, num_rows, num_blocks, block_r: tl.constexpr, block_n: tl.constexpr
):  # fmt: skip
    """The law over the blocks: lanes by block index modulo block_n, then one sum over the lanes."""
    row = tl.program_id(0) * block_r + tl.arange(0, block_r)
    real = row < num_rows
    size = num_blocks * num_rows
    top_a = tl.full((block_r, block_n), NEVER, tl.float32)
    top_b = top_a
    for start in range(0, num_blocks, block_n):
        place, mask = _place(table, start, row, real, num_rows, num_blocks, block_n)
        top_a = tl.maximum(top_a, tl.load(place, mask=mask, other=NEVER))
        top_b = tl.maximum(top_b, tl.load(place + size, mask=mask, other=NEVER))
    max_a, max_b = tl.max(top_a, axis=1)[:, None], tl.max(top_b, axis=1)[:, None]
    mass_a, mass_b = tl.zeros((block_r, block_n), tl.float32), tl.zeros((block_r, block_n), tl.float32)
    for start in range(0, num_blocks, block_n):
        place, mask = _place(table, start, row, real, num_rows, num_blocks, block_n)
        mass_a += exp_below(tl.load(place, mask=mask, other=NEVER), max_a)
        mass_b += exp_below(tl.load(place + size, mask=mask, other=NEVER), max_b)
    row_lse_a = logsumexp(max_a, tl.sum(mass_a, axis=1)[:, None])
    row_lse_b = logsumexp(max_b, tl.sum(mass_b, axis=1)[:, None])
    kls, entropies = tl.zeros((block_r, block_n), tl.float32), tl.zeros((block_r, block_n), tl.float32)
    for start in range(0, num_blocks, block_n):
        place, mask = _place(table, start, row, real, num_rows, num_blocks, block_n)
        x, y = tl.load(place, mask=mask, other=NEVER), tl.load(place + size, mask=mask, other=NEVER)
        inside = tl.load(place + 2 * size, mask=mask, other=0.0)
        spread = tl.load(place + 3 * size, mask=mask, other=0.0)
        more_kl, more_entropy = _terms(x, y, row_lse_a, row_lse_b, inside, spread)
        kls += more_kl
        entropies += more_entropy
    bad = (row_lse_a - row_lse_a) + (row_lse_b - row_lse_b)  # 0, or NaN
    bad = tl.reshape(bad, (block_r,))
    tl.store(kl + row, tl.where(bad == 0, tl.sum(kls, axis=1), bad), mask=real)
    tl.store(entropy + row, tl.where(bad == 0, tl.sum(entropies, axis=1), bad), mask=real)
    tl.store(lse_a + row, tl.reshape(row_lse_a, (block_r,)), mask=real)
    tl.store(lse_b + row, tl.reshape(row_lse_b, (block_r,)), mask=real)


@triton.jit
def _place(table, start, row, real, num_rows, num_blocks, block_n: tl.constexpr):
    block = start + tl.arange(0, block_n)
    return table + block[None, :] * num_rows + row[:, None], real[:, None] & (block < num_blocks)[None, :]


def divergence(call: DivergenceCall) -> Comparison:
    num_rows, vocab_size, device = call.a.num_rows, call.a.vocab_size, call.a.hidden.device
    num_blocks = triton.cdiv(vocab_size, BLOCK.value)
    given = call.a.weight is None or call.b.weight is None
    block_r = ROWS_OF_GIVEN if given else ROWS_OF_PRODUCT
    chunk = min(num_rows, max(block_r, _TABLE // (16 * num_blocks) // block_r * block_r))
    table = torch.empty(4 * num_blocks * chunk, device=device)
    results = Comparison(*(torch.empty(num_rows, device=device) for _ in Comparison._fields))
    for first in range(0, num_rows, chunk):
        rows = slice(first, first + chunk)
        size = len(results.kl[rows])
        blocks_kernel[(triton.cdiv(size, block_r) * num_blocks,)](
            *operands(call.a, rows), *operands(call.b, rows), table, size, vocab_size,
            dim_a=dim(call.a), dim_b=dim(call.b), block_k_a=_depth(call.a), block_k_b=_depth(call.b),
            block_r=block_r, **TILE,
        )  # fmt: skip
        rows_kernel[(triton.cdiv(size, MERGE["block_r"]),)](
            table, *(result[rows] for result in results), size, num_blocks, **MERGE
        )
    return results


def _depth(logits) -> int:
    """Columns of hidden per step: 128 bytes."""
    return 128 // logits.hidden.element_size()
