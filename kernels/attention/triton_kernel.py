"""attention in Triton, after FlashAttention-2 (Dao, arXiv 2307.08691): scores stay in registers.

A program has one tile of the queries that a sequence brings to a key head, its rows times the query heads that share
the head, and passes once over the sequence's keys that one of them sees. It rotates its queries where it loads them.
Keys are rotated by a pass before, which is cheaper than in every program that meets them, by this count for D = 64 on
an H100. A score takes 4 D operations of the tensor cores, 1/16 clock of a multiprocessor; one exp2 on 16 lanes, 1/16
clock; and maximum, fma, sum and rounding on 128 lanes, 1/32 clock. Rotating and rounding a key is 3.5 D operations of
those lanes and loads 4 D bytes of cosines and sines beside 2 D of key: in programs of 128 queries 1.75 operations for
every score, nearly half as many again. The pass moves 4 D bytes for every key, once: for 1024 tokens of 12 heads 3.1
MB, 0.75 us at 4.2 TB/s, where the products take 8 us at 390 TFLOP/s, and less beside them in longer sequences. Queries
go through that pass as well where a program has no whole rows of them: in fp32, and where D is not a power of two.

The bits of a query follow from its own sequence, the call's options and the tile, and the tile from triton_config:
architecture, dtype, D, and whether the largest row count of the call, times the query heads that share a key head, is
at most the `few` tile's, at most the `some` tile's or more. Other queries and sequences change no bit while that holds.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from unmask.kernels.attention.call import AttentionCall
from unmask.kernels.attention.triton_config import choose_tile
from unmask.kernels.offsets import Offsets, device_offsets
from unmask.kernels.triton_arithmetic import dot, exp2, rounded

_NEVER = tl.constexpr(-float("inf"))
_ALMOST_ZERO = 2.0**-126  # in place of a scale of 0, which would make NaN of -inf
ROTATE = {"block_r": 16, "num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _angles(cos, sin, position, column, mask, half: tl.constexpr):
    place = position.to(tl.int64)[:, None] * half + column[None, :]
    return tl.load(cos + place, mask=mask, other=0.0), tl.load(sin + place, mask=mask, other=0.0)


@triton.jit
def _rotated(rows, column, mask, cosine, sine, half: tl.constexpr, dtype: tl.constexpr):
    """Both halves of the rows that begin at these addresses."""
    place = rows[:, None] + column[None, :]
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=mask, other=0.0).to(tl.float32)
    return rounded(first * cosine - second * sine, dtype), rounded(second * cosine + first * sine, dtype)


@triton.jit(do_not_specialize=["tiles", "heads"])
def rotate_kernel(
    x, x_row, x_head, out, cos, sin, starts, positions, tiles, heads,
    half: tl.constexpr, block_r: tl.constexpr, block_h: tl.constexpr,
):  # fmt: skip
    """All heads of one tile of a sequence's rows, into `out` [rows, heads, 2 * half]."""
    sequence = tl.program_id(0) // tiles
    first = tl.load(starts + sequence)
    position = tl.program_id(0) % tiles * block_r + tl.arange(0, block_r)
    exists, column = position < tl.load(starts + sequence + 1) - first, tl.arange(0, block_h)
    row = (first + position).to(tl.int64)
    if positions is not None:
        position = tl.load(positions + row, mask=exists, other=0)
    mask = exists[:, None] & (column < half)[None, :]
    cosine, sine = _angles(cos, sin, position, column, mask, half)
    for head in range(heads):
        rows = x + row * x_row + head * x_head
        left, right = _rotated(rows, column, mask, cosine, sine, half, out.dtype.element_ty)
        place = out + ((row * heads + head) * (2 * half))[:, None] + column[None, :]
        tl.store(place, left, mask=mask)
        tl.store(place + half, right, mask=mask)


@triton.jit
def _load_rows(rows, stride, first, length, start, dim: tl.constexpr, block_n: tl.constexpr, width: tl.constexpr,
               tail: tl.constexpr):  # fmt: skip
    """`width` columns from `start` on of block_n rows from `first` on; in a tail the rows from `length` on are 0."""
    n, column = tl.arange(0, block_n), start + tl.arange(0, width)
    place = rows + tl.cast(first, tl.int64) * stride + (n[:, None] * stride + column[None, :])
    if tail:
        return tl.load(place, mask=(first + n < length)[:, None] & (column < dim)[None, :], other=0.0)
    elif dim % width > 0:
        return tl.load(place, mask=(column < dim)[None, :], other=0.0)
    else:
        return tl.load(place)


@triton.jit
def _scores(query, place, real, key, key_row, first, length, dim: tl.constexpr, block_m: tl.constexpr,
            block_n: tl.constexpr, block_k: tl.constexpr, tail: tl.constexpr):  # fmt: skip
    """One product; or without `query` one for every block_k columns, loaded from `place` each time: a product in the
    arithmetic of fp32 takes registers for every column."""
    scores = tl.zeros((block_m, block_n), tl.float32)
    if query is not None:
        k = _load_rows(key, key_row, first, length, 0, dim, block_n, block_k, tail)
        scores = dot(query, tl.trans(k), scores)
    else:
        for start in range(0, dim, block_k):
            k = _load_rows(key, key_row, first, length, start, dim, block_n, block_k, tail)
            column = start + tl.arange(0, block_k)
            q = tl.load(place[:, None] + column[None, :], mask=real[:, None] & (column < dim)[None, :], other=0.0)
            scores = dot(q, tl.trans(k), scores)
    return scores


@triton.jit
def _step(state, query, place, real, factor, key, key_row, value, value_row, first, length, end, flip: tl.constexpr,
          dim: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr,
          block_k: tl.constexpr, tail: tl.constexpr):  # fmt: skip
    """The next keys: (largest scaled score so far, sum of shares, sum of shares times values). In a tail some keys do
    not exist, or a query does not see those from its `end` on."""
    top, mass, total = state
    scores = _scores(query, place, real, key, key_row, first, length, dim, block_m, block_n, block_k, tail)
    index = first + tl.arange(0, block_n)
    seen = (index < length)[None, :] if end is None else index[None, :] < end[:, None]
    if flip:
        scores = -scores
    if tail:
        scores = tl.where(seen, scores, _NEVER)
    highest = tl.maximum(top, tl.max(scores, axis=1) * factor)
    base = tl.where(highest == _NEVER, 0.0, highest)  # -inf - -inf is NaN
    shares = exp2(tl.fma(scores, factor, -base[:, None]))
    shrink = exp2(top - base)
    mass = tl.fma(mass, shrink, tl.sum(shares, axis=1))
    v = _load_rows(value, value_row, first, length, 0, dim, block_n, block_d, tail)
    total = dot(rounded(shares, v.dtype), v, total * shrink[:, None])
    return highest, mass, total


@triton.jit
def _positions(positions, row, index, real):
    """Of the queries `index` of a sequence, which are in these rows."""
    if positions is None:
        return index
    else:
        return tl.load(positions + row, mask=real, other=0)


@triton.jit(do_not_specialize=["block", "tiles", "factor"])
def attention_kernel(
    query, query_row, query_head, key, key_row, key_head, value, value_row, value_head, out, out_row, out_head,
    starts, row_starts, positions, block, cos, sin, factor, tiles,
    flip: tl.constexpr, dim: tl.constexpr, share: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    block_d: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """One tile of a sequence's queries to one key head. Neighbouring programs share sequence and head."""
    sequence, group = tl.program_id(0) // tiles, tl.program_id(1)
    first_row, first = tl.load(row_starts + sequence), tl.load(starts + sequence)
    num_queries = (tl.load(row_starts + sequence + 1) - first_row) * share
    length = tl.load(starts + sequence + 1) - first
    first_query = tl.program_id(0) % tiles * block_m
    if first_query < num_queries:
        index, column = first_query + tl.arange(0, block_m), tl.arange(0, block_d)
        real = index < num_queries
        mask = real[:, None] & (column < dim)[None, :]
        row, head = (first_row + index // share).to(tl.int64), group * share + index % share
        place = query + row * query_row + head * query_head
        if block_k < block_d:
            q = None
        elif cos is None:
            q = tl.load(place[:, None] + column[None, :], mask=mask, other=0.0)
        else:
            position, half_column = _positions(positions, row, index // share, real), tl.arange(0, dim // 2)
            cosine, sine = _angles(cos, sin, position, half_column, real[:, None], dim // 2)
            halves = _rotated(place, half_column, real[:, None], cosine, sine, dim // 2, query.dtype.element_ty)
            q = tl.reshape(tl.permute(tl.join(*halves), (0, 2, 1)), (block_m, block_d))
        key += first.to(tl.int64) * key_row + group * key_head
        value += first.to(tl.int64) * value_row + group * value_head
        state = (
            tl.full((block_m,), _NEVER, tl.float32),
            tl.zeros((block_m,), tl.float32),
            tl.zeros((block_m, block_d), tl.float32),
        )
        end, all_see, one_sees = None, length, length  # keys before these
        if block is not None:
            position = _positions(positions, row, index // share, real)
            end = tl.minimum((position // block + 1) * block, length).to(tl.int32)
            all_see, one_sees = tl.min(tl.where(real, end, length)), tl.max(tl.where(real, end, 0))
        whole = all_see // block_n * block_n
        for at in range(0, whole, block_n):
            state = _step(
                state, q, place, real, factor, key, key_row, value, value_row, at, length, end,
                flip, dim, block_m, block_n, block_d, block_k, False,
            )  # fmt: skip
        if block is not None:
            for at in range(whole, one_sees, block_n):
                state = _step(
                    state, q, place, real, factor, key, key_row, value, value_row, at, length, end,
                    flip, dim, block_m, block_n, block_d, block_k, True,
                )  # fmt: skip
        elif whole < length:
            state = _step(
                state, q, place, real, factor, key, key_row, value, value_row, whole, length, end,
                flip, dim, block_m, block_n, block_d, block_k, True,
            )  # fmt: skip
        _, mass, total = state
        result = rounded(total / mass[:, None], out.dtype.element_ty)
        tl.store((out + row * out_row + head * out_head)[:, None] + column[None, :], result, mask=mask)


def attention(call: AttentionCall) -> None:
    query, key, device = call.query, call.key, call.query.device
    num_groups, dim = key.shape[1:]
    share, block_d = query.shape[1] // num_groups, max(16, triton.next_power_of_2(dim))
    tokens = device_offsets(call.lengths, device)
    rows = tokens if call.row_counts is call.lengths else device_offsets(call.row_counts, device)
    tile = choose_tile(call)
    block_k = min(tile.block_k or block_d, block_d)
    cos, sin = (None, None) if call.rope is None else (table.contiguous() for table in call.rope)
    positions = None if call.positions is None else call.positions.contiguous()
    if cos is not None:
        key = _rotate(key, cos, sin, tokens, None)
        if dim != block_k:  # no whole tile of queries to rotate in the program
            query, cos = _rotate(query, cos, sin, rows, positions), None
    tiles = triton.cdiv(rows.longest * share, tile.block_m)
    attention_kernel[(tiles * (len(rows.starts) - 1), num_groups)](
        query, *query.stride()[:2], key, *key.stride()[:2], call.value, *call.value.stride()[:2],
        call.out, *call.out.stride()[:2], tokens.starts, rows.starts, positions, call.block, cos, sin,
        abs(call.scale) * math.log2(math.e) or _ALMOST_ZERO, tiles, flip=call.scale < 0, dim=dim, share=share,
        block_m=tile.block_m, block_n=tile.block_n, block_d=block_d, block_k=block_k, **tile.options,
    )  # fmt: skip


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sequences: Offsets, positions: Tensor | None) -> Tensor:
    """The rows of all sequences, rotated; rows of none are left as they came."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles, half = triton.cdiv(sequences.longest, ROTATE["block_r"]), x.shape[2] // 2
    rotate_kernel[(tiles * (len(sequences.starts) - 1),)](
        x, *x.stride()[:2], out, cos, sin, sequences.starts, positions, tiles, x.shape[1],
        half=half, block_h=triton.next_power_of_2(half), **ROTATE,
    )  # fmt: skip
    return out
