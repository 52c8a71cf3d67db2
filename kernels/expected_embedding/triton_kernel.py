"""expected_embedding in Triton: two products around a bounded buffer of weights.

For a chunk of rows the first kernel stores the weights exp(logit - largest of its noise block), rounded to the dtype of
the table, and each block's largest logit and mass; the second turns those into a factor for each block; the third
multiplies the weights with the table, span by span of the vocabulary; the last adds the spans in their order.
"""

import torch
import triton
import triton.language as tl

from unmask.kernels import triton_noise
from unmask.kernels.expected_embedding.call import EmbeddingCall, Expectation
from unmask.kernels.triton_arithmetic import dot
from unmask.kernels.triton_logits import NEVER, dim, logits_tile, operands
from unmask.kernels.triton_noise import exp_below, logsumexp

BLOCK = triton_noise.BLOCK
FACTORS = {"block_r": 16, "block_n": 64, "num_warps": 4, "enable_fp_fusion": False}
ADD = {"block": 1024, "num_warps": 4, "enable_fp_fusion": False}
_WORKSPACE = 60 << 20  # bytes of a chunk
_PROGRAMS = 128  # that a tile of rows should give the third kernel


def tile(element_size: int) -> dict[str, int]:
    """Of a product whose operands have this many bytes per number."""
    wide = element_size == 4
    return {"block_r": 64 if wide else 128, "num_warps": 8, "num_stages": 2 if wide else 3, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["num_rows"])
def weights_kernel(
    hidden, weight, offset, temperature, rows, hidden_row, hidden_column, weight_row, weight_column,
    weights, stride, tops, masses, num_rows, vocab_size,
    dim: tl.constexpr, block_r: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """One noise block for one tile of rows. Neighbouring programs share the block."""
    tiles = tl.cdiv(num_rows, block_r)
    block = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * block_r + tl.arange(0, block_r)
    real = row < num_rows
    x = logits_tile(
        hidden, weight, offset, temperature, rows, hidden_row, hidden_column, weight_row, weight_column,
        row, real, block * BLOCK, vocab_size, dim, block_r, BLOCK, block_k,
    )  # fmt: skip
    top = tl.max(x, axis=1)
    rounded = exp_below(x, top[:, None]).to(weights.dtype.element_ty)
    place = weights + row.to(tl.int64)[:, None] * stride + (block * BLOCK + tl.arange(0, BLOCK))[None, :]
    tl.store(place, rounded, mask=real[:, None])
    tl.store(tops + block * num_rows + row, top, mask=real)
    tl.store(masses + block * num_rows + row, tl.sum(rounded.to(tl.float32), axis=1), mask=real)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def factors_kernel(tops, masses, lse, num_rows, num_blocks, block_r: tl.constexpr, block_n: tl.constexpr):
    """Put the factor that makes probabilities of a block's weights where its largest logit is."""
    row = tl.program_id(0) * block_r + tl.arange(0, block_r)
    real = row < num_rows
    highest = tl.full((block_r, block_n), NEVER, tl.float32)
    for start in range(0, num_blocks, block_n):
        place, mask = _place(start, row, real, num_rows, num_blocks, block_n)
        highest = tl.maximum(highest, tl.load(tops + place, mask=mask, other=NEVER))
    top = tl.max(highest, axis=1)[:, None]
    lanes = tl.zeros((block_r, block_n), tl.float32)
    for start in range(0, num_blocks, block_n):
        place, mask = _place(start, row, real, num_rows, num_blocks, block_n)
        factor = exp_below(tl.load(tops + place, mask=mask, other=NEVER), top)
        lanes += factor * tl.load(masses + place, mask=mask, other=0.0)
    mass = tl.where(real, tl.sum(lanes, axis=1), 1.0)
    for start in range(0, num_blocks, block_n):
        place, mask = _place(start, row, real, num_rows, num_blocks, block_n)
        factor = exp_below(tl.load(tops + place, mask=mask, other=NEVER), top)
        tl.store(tops + place, factor / mass[:, None], mask=mask)
    tl.store(lse + row, logsumexp(tl.reshape(top, (block_r,)), mass), mask=real)


@triton.jit
def _place(start, row, real, num_rows, num_blocks, block_n: tl.constexpr):
    block = start + tl.arange(0, block_n)
    return block[None, :] * num_rows + row[:, None], real[:, None] & (block < num_blocks)[None, :]


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "span"])
def product_kernel(
    weights, stride, factors, table, table_row, table_column, partial, num_rows, vocab_size, width, num_blocks, span,
    block_r: tl.constexpr, block_e: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """One span of blocks for a tile of rows and a strip of the table. Neighbouring programs share the strip."""
    steps: tl.constexpr = BLOCK // block_k
    tiles = tl.cdiv(num_rows, block_r)
    strips = tl.cdiv(width, block_e)
    row = tl.program_id(0) % tiles * block_r + tl.arange(0, block_r)
    column = tl.program_id(0) // tiles % strips * block_e + tl.arange(0, block_e)
    index = tl.program_id(0) // (tiles * strips)
    real, exists = row < num_rows, column < width
    total = tl.zeros((block_r, block_e), tl.float32)
    for step in range(index * span * steps, tl.minimum(index * span + span, num_blocks) * steps):
        ids = step * block_k + tl.arange(0, block_k)
        w = tl.load(weights + row.to(tl.int64)[:, None] * stride + ids[None, :], mask=real[:, None], other=0.0)
        place = table + ids.to(tl.int64)[:, None] * table_row + column[None, :] * table_column
        t = tl.load(place, mask=(ids < vocab_size)[:, None] & exists[None, :], other=0.0)
        factor = tl.load(factors + step // steps * num_rows + row, mask=real, other=0.0)
        product = dot(w, t, tl.zeros((block_r, block_e), tl.float32))
        total = tl.fma(product, factor[:, None], total)
    place = partial + (index * num_rows + row).to(tl.int64)[:, None] * width + column[None, :]
    tl.store(place, total, mask=real[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["size", "spans"])
def add_kernel(partial, embedding, size, spans, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    total = tl.zeros((block,), tl.float32)
    place = partial + at
    for _ in range(spans):
        total += tl.load(place, mask=at < size, other=0.0)
        place += size
    tl.store(embedding + at, total, mask=at < size)


def expected_embedding(call: EmbeddingCall) -> Expectation:
    logits, table = call.logits, call.table
    num_rows, width, device = logits.num_rows, table.shape[1], table.device
    num_blocks = triton.cdiv(logits.vocab_size, BLOCK.value)
    block_e = 64 if table.element_size() == 4 else 128
    strips = triton.cdiv(width, block_e)
    span = triton.cdiv(num_blocks, max(1, _PROGRAMS // strips))
    spans, stride = triton.cdiv(num_blocks, span), num_blocks * BLOCK.value
    row_bytes = stride * table.element_size() + 8 * num_blocks + 4 * spans * width
    chunk = min(num_rows, max(16, _WORKSPACE // row_bytes // 128 * 128))
    weights = torch.empty(chunk * stride, dtype=table.dtype, device=device)
    tops, masses = torch.empty(2, chunk * num_blocks, device=device)
    partial = torch.empty(spans * chunk * width, device=device)
    result = Expectation(torch.empty(num_rows, width, device=device), torch.empty(num_rows, device=device))
    first_tile, second_tile = tile(logits.hidden.element_size()), tile(table.element_size())
    for first in range(0, num_rows, chunk):
        rows = slice(first, first + chunk)
        embedding, lse = (tensor[rows] for tensor in result)
        size = len(lse)
        weights_kernel[(triton.cdiv(size, first_tile["block_r"]) * num_blocks,)](
            *operands(logits, rows), weights, stride, tops, masses, size, logits.vocab_size,
            dim=dim(logits), block_k=128 // logits.hidden.element_size(), **first_tile,
        )  # fmt: skip
        factors_kernel[(triton.cdiv(size, FACTORS["block_r"]),)](tops, masses, lse, size, num_blocks, **FACTORS)
        product_kernel[(triton.cdiv(size, second_tile["block_r"]) * strips * spans,)](
            weights, stride, tops, table, *table.stride(), partial, size, logits.vocab_size, width, num_blocks, span,
            block_e=block_e, block_k=64, **second_tile,
        )  # fmt: skip
        add_kernel[(triton.cdiv(size * width, ADD["block"]),)](partial, embedding, size * width, spans, **ADD)
    return result
