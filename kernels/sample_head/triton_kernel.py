"""sample_head in Triton: the product, the race of the noise blocks and the draw in one launch.

A program walks a run of noise blocks for one tile of rows. Each block's log-sum-exp goes into a table; the logits of
the best block so far are the program's record of the row. The last program to finish a tile of rows merges the table by
block index, picks the best record, lets its 128 tokens race and writes the results.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from unmask.kernels import noise, triton_noise
from unmask.kernels.sample_head.call import HeadCall, HeadSample
from unmask.kernels.sample_head.triton_config import TRUNCATE, Config, choose_config
from unmask.kernels.triton_logits import NEVER, dot
from unmask.kernels.triton_noise import block_gumbel, exp_below, fold_sum, halves, log_positive, logsumexp, token_gumbel

BLOCK = triton_noise.BLOCK


# --- logits ---------------------------------------------------------------------------------------------------------


@triton.jit
def _row_offsets(rows, row, real, stride):
    """Where in hidden each row of the call starts."""
    index = row.to(tl.int64) if rows is None else tl.load(rows + row, mask=real, other=0)
    return index * stride


@triton.jit
def _inverse_temperature(temperature, temperatures, row, real):
    """(1 / temperature, whether the row is greedy); greedy rows are not divided."""
    if temperatures is None:
        divisor = tl.zeros_like(row).to(tl.float32) + temperature
    else:
        divisor = tl.load(temperatures + row, mask=real, other=1.0)
    greedy = divisor == 0
    inverse = tl.where(greedy | (divisor == 1), 1.0, 1.0 / divisor)
    return tl.maximum(inverse, 2.0**-126), greedy  # a subnormal factor may count as zero, and -inf * 0 is NaN


@triton.jit
def _product(
    hidden, weight, row_offsets, real, ids, hidden_column, weight_row, weight_column,
    dim: tl.constexpr, block_r: tl.constexpr, block_v: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """hidden . weight of one tile, in the dtype of hidden; `ids` name rows of weight that exist."""
    k = tl.arange(0, block_k)
    left = hidden + row_offsets[:, None] + k[None, :] * hidden_column
    right = weight + ids.to(tl.int64)[None, :] * weight_row + k[:, None] * weight_column
    total = tl.zeros((block_r, block_v), tl.float32)
    for start in range(0, dim, block_k):
        if dim % block_k == 0:
            h = tl.load(left + start * hidden_column, mask=real[:, None], other=0.0)
            w = tl.load(right + start * weight_column)
        else:
            rest = k < dim - start
            h = tl.load(left + start * hidden_column, mask=real[:, None] & rest[None, :], other=0.0)
            w = tl.load(right + start * weight_column, mask=rest[:, None], other=0.0)
        total = dot(h, w.to(h.dtype), total)
    return total


@triton.jit
def _tile(
    hidden, weight, real, row_offsets, first, vocab_size, hidden_column, weight_row, weight_column,
    dim: tl.constexpr, block_r: tl.constexpr, block_v: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """Logits [block_r, block_v] of the ids from `first` on, before offset and temperature."""
    ids = first + tl.arange(0, block_v)
    if weight is None:
        source = hidden + row_offsets[:, None] + ids.to(tl.int64)[None, :] * hidden_column
        return tl.load(source, mask=real[:, None] & (ids < vocab_size)[None, :], other=0.0).to(tl.float32)
    else:
        return _product(
            hidden, weight, row_offsets, real, tl.minimum(ids, vocab_size - 1), hidden_column, weight_row,
            weight_column, dim, block_r, block_v, block_k,
        )  # fmt: skip


@triton.jit
def _shift(offset, offset_stride, first, vocab_size, width: tl.constexpr):
    """What to add to the logits of the ids from `first` on, [1, width]: -inf where an id cannot be drawn."""
    ids = first + tl.arange(0, width)
    return tl.load(offset + ids * offset_stride, mask=ids < vocab_size, other=NEVER)[None, :]


@triton.jit
def _temper(x, shift, allow, row, real, inverse, first, vocab_size, width: tl.constexpr):
    """x [rows, width] with offset and temperature, of the ids from `first` on; -inf where an id cannot be drawn."""
    drawable = shift != NEVER
    if allow is not None:
        word = first // 32 + tl.arange(0, width // 32)
        words = (vocab_size + 31) // 32
        mask = real[:, None] & (word < words)[None, :]
        bits = tl.load(allow + (row * words)[:, None] + word[None, :], mask=mask, other=0)
        bits = bits[:, :, None] >> tl.arange(0, 32)[None, None, :] & 1
        drawable = drawable & (tl.reshape(bits, x.shape) == 1)
    return tl.where(drawable, (x + shift) * inverse[:, None], NEVER)


# --- the race -------------------------------------------------------------------------------------------------------


@triton.jit
def _load_key(keys, row, real):
    """sequence, position and draw of each row."""
    sequence = tl.load(keys + row * 3, mask=real, other=0).to(tl.uint32)
    position = tl.load(keys + row * 3 + 1, mask=real, other=0).to(tl.uint32)
    draw = tl.load(keys + row * 3 + 2, mask=real, other=0).to(tl.uint32)
    return sequence, position, draw


@triton.jit
def _entropy(x, top, rows: tl.constexpr):
    """Entropy in nats of the softmax of each row of x [rows, 128], 0 where all are -inf."""
    term = exp_below(x, top[:, None])
    total = fold_sum(term, rows, BLOCK)
    moment = fold_sum(tl.where(term > 0, term * (x - top[:, None]), 0.0), rows, BLOCK)
    return tl.where(total > 0, log_positive(total) - moment / total, 0.0)


@triton.jit
def _race_blocks(x, block, best, ranking, call, block_r: tl.constexpr, width: tl.constexpr):
    """Enter the noise blocks of x [block_r, width], `block` the first of them, into tables, records and rankings."""
    if width > BLOCK:
        half: tl.constexpr = width // 2
        left, right = halves(x, block_r, width)
        best, ranking = _race_blocks(left, block, best, ranking, call, block_r, half)
        return _race_blocks(right, block + half // BLOCK, best, ranking, call, block_r, half)
    else:
        # What depends on the row alone is read again for each block: held, it would take registers from the tile.
        row, real, keys, key0, key1, temperature, temperatures, offset, offset_stride, allow = call[:10]
        block_lse, block_entropy, num_rows, vocab_size = call[10:]
        inverse, greedy = _inverse_temperature(temperature, temperatures, row, real)
        shift, _ = halves(_shift(offset, offset_stride, block * BLOCK, vocab_size, 2 * BLOCK), 1, 2 * BLOCK)
        x = _temper(x, shift, allow, row, real, inverse, block * BLOCK, vocab_size, BLOCK)
        top = tl.max(x, axis=1)
        lse = logsumexp(top, fold_sum(exp_below(x, top[:, None]), block_r, BLOCK))
        tl.store(block_lse + block * num_rows + row, lse, mask=real)
        if block_entropy is not None:
            tl.store(block_entropy + block * num_rows + row, _entropy(x, top, block_r), mask=real)

        sequence, position, draw = _load_key(keys, row, real)
        noise = block_gumbel(tl.full((block_r,), block, tl.uint32), position, sequence, draw, key0, key1)
        score = tl.where(greedy, top, lse + noise)
        best_score, best_block, record = best
        broken = score > best_score  # blocks come in rising order: the lowest of equals stays
        best_score = tl.where(broken, score, best_score)
        best = best_score, tl.where(broken, block, best_block), tl.where(broken[:, None], x, record)
        if len(ranking) > 0:
            ranking = _rank_block(x, block * BLOCK, ranking, block_r)
        return best, ranking


@triton.jit
def _rank_block(x, first, ranking, block_r: tl.constexpr):
    """Enter x [rows, 128] into the ranking: the largest logit, the lowest id that has it, the largest of the others."""
    top, top_id, second = ranking
    x_top = tl.max(x, axis=1)
    equal = (x == x_top[:, None]).to(tl.int32)
    x_second = tl.max(tl.where(equal == 1, NEVER, x), axis=1)
    x_second = tl.where(tl.sum(equal, axis=1) > 1, x_top, x_second)
    higher = x_top > top
    second = tl.maximum(tl.minimum(x_top, top), tl.where(higher, x_second, second))
    return tl.maximum(x_top, top), tl.where(higher, first + _first_one(equal, block_r, BLOCK), top_id), second


@triton.jit
def _first_one(x, rows: tl.constexpr, columns: tl.constexpr):
    """The first column of each row of x [rows, columns] that holds a one, without registers for column numbers."""
    if columns == 1:
        return tl.zeros((rows,), tl.int32)
    else:
        left, right = halves(x, rows, columns)
        skip = tl.max(left, axis=1) == 0
        rest = _first_one(tl.where(skip[:, None], right, left), rows, columns // 2)
        return rest + tl.where(skip, columns // 2, 0)


@triton.jit(do_not_specialize=["num_rows", "key0", "key1", "splits", "group"])
def race_kernel(
    hidden, weight, offset, keys, temperature, temperatures, allow, rows, buffer, positions,
    tokens, logprob, lse, max_prob, argmax, margin, entropy,
    block_lse, block_entropy, record_score, record_block, record_logits, top_logit, top_id, second_logit, arrivals,
    num_rows, vocab_size, key0, key1, splits, group,
    hidden_row, hidden_column, weight_row, weight_column, offset_stride,
    dim: tl.constexpr, block_r: tl.constexpr, block_v: tl.constexpr, block_k: tl.constexpr,
    finish_r: tl.constexpr, finish_splits: tl.constexpr,
):  # fmt: skip
    # Programs side by side share row tiles and spans of the vocabulary: `group` row tiles by all splits at a time.
    program = tl.program_id(0)
    first_tile = program // (group * splits) * group
    tiles = tl.minimum(tl.cdiv(num_rows, block_r) - first_tile, group)
    tile = first_tile + program % (group * splits) % tiles
    split = program % (group * splits) // tiles

    row = tile * block_r + tl.arange(0, block_r)
    real = row < num_rows
    row_offsets = _row_offsets(rows, row, real, hidden_row)

    call = (
        row, real, keys, key0, key1, temperature, temperatures, offset, offset_stride, allow,
        block_lse, block_entropy, num_rows, vocab_size,
    )  # fmt: skip
    never, nowhere = tl.full((block_r,), NEVER, tl.float32), tl.zeros((block_r,), tl.int32)
    best = never, nowhere, tl.full((block_r, BLOCK), NEVER, tl.float32)  # score, block, its logits
    ranking = () if top_logit is None else (never, nowhere, never)
    spans = tl.cdiv(vocab_size, block_v)
    for span in tl.range(split * spans // splits, (split + 1) * spans // splits, flatten=True):
        x = _tile(
            hidden, weight, real, row_offsets, span * block_v, vocab_size, hidden_column, weight_row, weight_column,
            dim, block_r, block_v, block_k,
        )  # fmt: skip
        best, ranking = _race_blocks(x, span * (block_v // BLOCK), best, ranking, call, block_r, block_v)

    record_row = split * num_rows + row
    score, block, record = best
    tl.store(record_score + record_row, score, mask=real)
    tl.store(record_block + record_row, block, mask=real)
    tl.store(record_logits + record_row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], record, mask=real[:, None])
    if len(ranking) > 0:
        top, top_at, second = ranking
        tl.store(top_logit + record_row, top, mask=real)
        tl.store(top_id + record_row, top_at, mask=real)
        tl.store(second_logit + record_row, second, mask=real)

    tl.debug_barrier()  # everything this program stored comes before its arrival
    if tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == splits - 1:
        tl.store(arrivals + tile, 0)  # ready for the next launch
        for start in range(tile * block_r, tl.minimum((tile + 1) * block_r, num_rows), finish_r):
            _finish(
                keys, temperature, temperatures, buffer, positions,
                tokens, logprob, lse, max_prob, argmax, margin, entropy,
                block_lse, block_entropy, record_score, record_block, record_logits,
                top_logit, top_id, second_logit,
                start, num_rows, vocab_size, key0, key1, splits, finish_r, finish_splits,
            )  # fmt: skip


# --- the merge ------------------------------------------------------------------------------------------------------
# What other programs stored is read past the first-level cache (".cg"), which does not see their stores.


@triton.jit
def _merge_lse(block_lse, row, real, num_rows, num_blocks, finish_r: tl.constexpr):
    """Log-sum-exp over the table of each row: 128 lanes by block index, then the fixed fold."""
    top = tl.full((finish_r, BLOCK), NEVER, tl.float32)
    total = tl.zeros((finish_r, BLOCK), tl.float32)
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        place = block_lse + block[None, :] * num_rows + row[:, None]
        mask = real[:, None] & (block < num_blocks)[None, :]
        value = tl.load(place, mask=mask, other=NEVER, cache_modifier=".cg")
        raised = tl.maximum(top, value)
        total = total * exp_below(top, raised) + exp_below(value, raised)
        top = raised
    highest = tl.max(top, axis=1)
    return logsumexp(highest, fold_sum(total * exp_below(top, highest[:, None]), finish_r, BLOCK))


@triton.jit
def _merge_entropy(block_lse, block_entropy, lse, row, real, num_rows, num_blocks, finish_r: tl.constexpr):
    """Sum over blocks of P(b) (h(b) - log P(b)), in the order of _merge_lse."""
    total = tl.zeros((finish_r, BLOCK), tl.float32)
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        place = block[None, :] * num_rows + row[:, None]
        mask = real[:, None] & (block < num_blocks)[None, :]
        value = tl.load(block_lse + place, mask=mask, other=NEVER, cache_modifier=".cg")
        spread = tl.load(block_entropy + place, mask=mask, other=0.0, cache_modifier=".cg")
        share = tl.exp(value - lse[:, None])
        total += tl.where(share == 0, 0.0, share * (spread - (value - lse[:, None])))
    return fold_sum(total, finish_r, BLOCK)


@triton.jit
def _best_split(value, row, real, num_rows, splits, finish_r: tl.constexpr, finish_splits: tl.constexpr):
    """(largest value, the lowest split that has it) of each row over a table [splits, num_rows]."""
    best = tl.full((finish_r, finish_splits), NEVER, tl.float32)
    best_at = tl.zeros((finish_r, finish_splits), tl.int32)
    for start in range(0, splits, finish_splits):
        split = start + tl.arange(0, finish_splits)
        mask = real[:, None] & (split < splits)[None, :]
        place = value + split[None, :] * num_rows + row[:, None]
        found = tl.load(place, mask=mask, other=NEVER, cache_modifier=".cg")
        higher = found > best
        best = tl.where(higher, found, best)
        best_at = tl.where(higher, split[None, :], best_at)
    highest = tl.max(best, axis=1)
    return highest, tl.min(tl.where(best == highest[:, None], best_at, splits - 1), axis=1)


@triton.jit
def _finish(
    keys, temperature, temperatures, buffer, positions,
    tokens, logprob, lse, max_prob, argmax, margin, entropy,
    block_lse, block_entropy, record_score, record_block, record_logits, top_logit, top_id, second_logit,
    first, num_rows, vocab_size, key0, key1, splits, finish_r: tl.constexpr, finish_splits: tl.constexpr,
):  # fmt: skip
    """Merge, draw and write `finish_r` rows, those from `first` on."""
    row = first + tl.arange(0, finish_r)
    real = row < num_rows
    num_blocks = tl.cdiv(vocab_size, BLOCK)
    _, greedy = _inverse_temperature(temperature, temperatures, row, real)
    sequence, position, draw = _load_key(keys, row, real)

    row_lse = _merge_lse(block_lse, row, real, num_rows, num_blocks, finish_r)
    _, split = _best_split(record_score, row, real, num_rows, splits, finish_r, finish_splits)
    record = split * num_rows + row
    block = tl.load(record_block + record, mask=real, other=0, cache_modifier=".cg")
    lane = tl.arange(0, BLOCK)
    place = record_logits + record[:, None] * BLOCK + lane[None, :]
    logits = tl.load(place, mask=real[:, None], other=NEVER, cache_modifier=".cg")

    noise = token_gumbel(block.to(tl.uint32), position, sequence, draw, key0, key1, finish_r)
    score = logits + tl.where(greedy[:, None], 0.0, noise)
    winner = tl.min(tl.where(score == tl.max(score, axis=1)[:, None], lane[None, :], BLOCK), axis=1)
    drawn = (row_lse - row_lse) == 0  # finite
    token = tl.where(drawn, block * BLOCK + winner, -1).to(tl.int64)
    tl.store(tokens + row, token, mask=real)
    tl.store(lse + row, row_lse, mask=real)
    if logprob is not None:
        logit = tl.max(tl.where(lane[None, :] == winner[:, None], logits, NEVER), axis=1)
        tl.store(logprob + row, tl.where(drawn, logit - row_lse, row_lse - row_lse), mask=real)
    if entropy is not None:
        value = _merge_entropy(block_lse, block_entropy, row_lse, row, real, num_rows, num_blocks, finish_r)
        tl.store(entropy + row, value, mask=real)
    if top_logit is not None:
        _rank(
            max_prob, argmax, margin, top_logit, top_id, second_logit,
            row_lse, row, real, num_rows, splits, finish_r, finish_splits,
        )  # fmt: skip
    if buffer is not None:
        target = tl.load(positions + row, mask=real, other=0)
        tl.store(buffer + target, token, mask=real & drawn)


@triton.jit
def _rank(
    max_prob, argmax, margin, top_logit, top_id, second_logit, row_lse, row, real, num_rows, splits,
    finish_r: tl.constexpr, finish_splits: tl.constexpr,
):  # fmt: skip
    """Largest probability, its id and its lead over the second from the two largest logits of every split."""
    top, split = _best_split(top_logit, row, real, num_rows, splits, finish_r, finish_splits)
    second = tl.load(second_logit + split * num_rows + row, mask=real, other=NEVER, cache_modifier=".cg")
    for start in range(0, splits, finish_splits):
        other = start + tl.arange(0, finish_splits)
        mask = real[:, None] & (other < splits)[None, :] & (other[None, :] != split[:, None])
        place = top_logit + other[None, :] * num_rows + row[:, None]
        found = tl.load(place, mask=mask, other=NEVER, cache_modifier=".cg")
        second = tl.maximum(second, tl.max(found, axis=1))
    probability = tl.exp(top - row_lse)
    if max_prob is not None:
        tl.store(max_prob + row, probability, mask=real)
    if argmax is not None:
        place = top_id + split * num_rows + row
        tl.store(argmax + row, tl.load(place, mask=real, other=0, cache_modifier=".cg").to(tl.int64), mask=real)
    if margin is not None:
        tl.store(margin + row, probability - tl.exp(second - row_lse), mask=real)


# --- top-k and top-p ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows"])
def logits_kernel(
    hidden, weight, offset, temperature, temperatures, allow, rows, logits, stride, num_rows, vocab_size,
    hidden_row, hidden_column, weight_row, weight_column, offset_stride,
    dim: tl.constexpr, block_r: tl.constexpr, block_v: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """Store the tempered logits [num_rows, vocab_size], rows `stride` apart."""
    tiles = tl.cdiv(num_rows, block_r)
    row = tl.program_id(0) % tiles * block_r + tl.arange(0, block_r)
    first = tl.program_id(0) // tiles * block_v
    real = row < num_rows
    row_offsets = _row_offsets(rows, row, real, hidden_row)
    inverse, _ = _inverse_temperature(temperature, temperatures, row, real)
    x = _tile(
        hidden, weight, real, row_offsets, first, vocab_size, hidden_column, weight_row, weight_column,
        dim, block_r, block_v, block_k,
    )  # fmt: skip
    shift = _shift(offset, offset_stride, first, vocab_size, block_v)
    x = _temper(x, shift, allow, row, real, inverse, first, vocab_size, block_v)
    ids = first + tl.arange(0, block_v)
    place = logits + row.to(tl.int64)[:, None] * stride + ids[None, :]
    tl.store(place, x, mask=real[:, None] & (ids < vocab_size)[None, :])


@triton.jit
def _rising(x):
    """uint32 that rises with x; equal for equal values, zeros of either sign included."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ (bits >> 31 | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _value(rising):
    """The number that _rising maps to `rising`."""
    bits = rising.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ -0x80000000, ~bits).to(tl.float32, bitcast=True)


@triton.jit
def _masses(logits, vocab_size, top, a, b, c, counted: tl.constexpr, block_v: tl.constexpr):
    """Sum of exp(logit - top), or number, of the logits that rank at or above each of three thresholds."""
    mass_a = tl.zeros((block_v,), tl.float32)
    mass_b, mass_c = mass_a, mass_a
    for start in range(0, vocab_size, block_v):
        ids = start + tl.arange(0, block_v)
        x = tl.load(logits + ids, mask=ids < vocab_size, other=NEVER)
        rank = _rising(x)
        mass = (ids < vocab_size).to(tl.float32) if counted else tl.exp(x - top)
        mass_a += tl.where(rank >= a, mass, 0.0)
        mass_b += tl.where(rank >= b, mass, 0.0)
        mass_c += tl.where(rank >= c, mass, 0.0)
    return tl.sum(mass_a, axis=0), tl.sum(mass_b, axis=0), tl.sum(mass_c, axis=0)


@triton.jit
def _threshold(logits, vocab_size, top, floor, target, counted: tl.constexpr, block_v: tl.constexpr):
    """(the highest rank from `floor` on whose mass from there up reaches `target`, the mass above that rank)."""
    rank = tl.zeros_like(floor)
    step = rank + 0x40000000
    for _ in range(16):
        a, b, c = rank + step, rank + 2 * step, rank + 3 * step
        mass_a, mass_b, mass_c = _masses(logits, vocab_size, top, a, b, c, counted, block_v)
        rank = tl.where((a <= floor) | (mass_a >= target), a, rank)
        rank = tl.where((b <= floor) | (mass_b >= target), b, rank)
        rank = tl.where((c <= floor) | (mass_c >= target), c, rank)
        step >>= 2
    above, _, _ = _masses(logits, vocab_size, top, rank + 1, rank + 1, rank + 1, counted, block_v)
    return rank, above


@triton.jit(do_not_specialize=["vocab_size", "top_k"])
def truncate_kernel(logits, stride, vocab_size, top_k, top_p, block_v: tl.constexpr):
    """Put -inf for the logits of one row that top_k, then top_p leave out; a row that cannot be drawn stays."""
    logits += tl.program_id(0).to(tl.int64) * stride
    highest = tl.full((block_v,), NEVER, tl.float32)
    bad = tl.zeros((block_v,), tl.int32)
    for start in range(0, vocab_size, block_v):
        ids = start + tl.arange(0, block_v)
        x = tl.load(logits + ids, mask=ids < vocab_size, other=NEVER)
        highest = tl.maximum(highest, x)
        bad += ((x != x) | (x == float("inf"))).to(tl.int32)
    top = tl.max(highest, axis=0)
    if tl.sum(bad, axis=0) == 0:
        rank = tl.full((), 0, tl.uint32)  # ranks above are kept, and the first `quota` ids of those at it
        quota = vocab_size.to(tl.float32)
        if top_k is not None:
            rank, above = _threshold(logits, vocab_size, top, rank, top_k.to(tl.float32), True, block_v)
            quota = top_k.to(tl.float32) - above
        if top_p is not None:
            above, _, _ = _masses(logits, vocab_size, top, rank + 1, rank + 1, rank + 1, False, block_v)
            each = tl.where(rank == 0, 0.0, tl.exp(_value(rank) - top))
            target = top_p * (above + quota * each)
            floor = rank
            rank, above = _threshold(logits, vocab_size, top, floor, target, False, block_v)
            each = tl.exp(_value(rank) - top)
            reach = tl.where(each > 0, tl.ceil((target - above) / each), quota)
            quota = tl.minimum(tl.maximum(reach, 1.0), tl.where(rank == floor, quota, vocab_size.to(tl.float32)))
        equals = tl.full((), 0, tl.int32)
        for start in range(0, vocab_size, block_v):
            ids = start + tl.arange(0, block_v)
            x = tl.load(logits + ids, mask=ids < vocab_size, other=NEVER)
            equal = ((_rising(x) == rank) & (ids < vocab_size)).to(tl.int32)
            before = equals + tl.cumsum(equal, axis=0) - equal
            kept = (_rising(x) > rank) | ((equal == 1) & (before.to(tl.float32) < quota))
            tl.store(logits + ids, NEVER, mask=(ids < vocab_size) & ~kept)
            equals += tl.sum(equal, axis=0)


# --- launches -------------------------------------------------------------------------------------------------------

_WORKSPACE = 64 << 20  # bytes a call may allocate beside its results
_MAX_ROWS = 8192  # of one launch
_RANKED = {"max_prob", "argmax", "margin"}


def sample_head(call: HeadCall) -> HeadSample:
    config = choose_config(call)
    return race(call, config) if call.top_k is None and call.top_p is None else truncated(call, config)


def race(call: HeadCall, config: Config, splits: int | None = None, chunk: int | None = None) -> HeadSample:
    """One launch per `chunk` rows, the vocabulary of each tile of rows split over `splits` programs."""
    spans = triton.cdiv(call.vocab_size, config.block_v)
    chunk = min(call.num_rows, chunk or _rows_of_a_launch(call, config))
    splits = min(splits or config.splits(chunk, spans), spans)
    arrivals, zero = _zeros(call.hidden.device, triton.cdiv(chunk, config.block_r))
    call = _prepared(call, zero)
    sample, work = _results(call), _workspace(call, config, chunk, spans, splits)
    key0, key1 = triton_noise.key_words(call.seed)
    for part, results in _chunks(call, sample, chunk):
        race_kernel[(triton.cdiv(part.num_rows, config.block_r) * splits,)](
            *_operands(part), part.keys, *_temperatures(part), part.allow, part.rows, *(part.out or (None, None)),
            *results, *work, arrivals,
            part.num_rows, part.vocab_size, key0, key1, splits, config.group, *_strides(part), **config.tile(part),
            finish_r=config.finish_r, finish_splits=config.finish_splits, **config.options,
        )  # fmt: skip
    return sample


def truncated(call: HeadCall, config: Config, chunk: int | None = None) -> HeadSample:
    """The logits of `chunk` rows at a time are stored, those left out become -inf, and the others race."""
    share = _WORKSPACE // 8 * 7  # the race over them needs the rest
    stride = triton.cdiv(call.vocab_size, 16) * 16  # rows begin where wide loads may
    chunk = min(call.num_rows, chunk or max(1, share // (4 * stride)))
    logits = torch.empty(chunk, stride, device=call.hidden.device)
    _, zero = _zeros(call.hidden.device, 0)
    call = _prepared(call, zero)
    parts = []
    for part, _ in _chunks(call, HeadSample(call.keys), chunk):
        scored = logits[: part.num_rows, : part.vocab_size]
        tiles = triton.cdiv(part.num_rows, config.block_r) * triton.cdiv(part.vocab_size, config.block_v)
        logits_kernel[(tiles,)](
            *_operands(part), *_temperatures(part), part.allow, part.rows, scored, stride, part.num_rows,
            part.vocab_size, *_strides(part), **config.tile(part), **config.options,
        )  # fmt: skip
        truncate_kernel[(part.num_rows,)](scored, stride, part.vocab_size, part.top_k, part.top_p, **TRUNCATE)
        stored = HeadCall(
            scored, None, None, part.keys, part.seed, _greedy_or_one(part.temperature), want=part.want, out=part.out
        )
        parts.append(race(stored, choose_config(stored)))
    return HeadSample(*(None if fields[0] is None else torch.cat(fields) for fields in zip(*parts, strict=True)))


def _greedy_or_one(temperature: float | Tensor) -> float | Tensor:
    """The temperature that is left for tempered logits."""
    return (temperature != 0).float() if isinstance(temperature, Tensor) else float(temperature != 0)


def _prepared(call: HeadCall, zero: Tensor) -> HeadCall:
    """The call with its small tensors contiguous and an offset in fp32, `zero` for each id if it has none."""
    small = {name: getattr(call, name) for name in ("keys", "allow", "rows", "temperature")}
    small = {name: value.contiguous() for name, value in small.items() if isinstance(value, Tensor)}
    offset = zero.expand(call.vocab_size) if call.offset is None else call.offset.float()
    out = None if call.out is None else (call.out[0], call.out[1].contiguous())
    return replace(call, offset=offset, out=out, **small)


def _chunks(call: HeadCall, sample: HeadSample, chunk: int) -> Iterator[tuple[HeadCall, list[Tensor | None]]]:
    """The call and its results by `chunk` rows."""
    for first in range(0, call.num_rows, chunk):
        rows = slice(first, first + chunk)
        part = replace(
            call,
            hidden=call.hidden[rows] if call.rows is None else call.hidden,
            keys=call.keys[rows],
            temperature=call.temperature[rows] if isinstance(call.temperature, Tensor) else call.temperature,
            allow=None if call.allow is None else call.allow[rows],
            rows=None if call.rows is None else call.rows[rows],
            out=None if call.out is None else (call.out[0], call.out[1][rows]),
        )
        yield part, [None if field is None else field[rows] for field in sample]


def _results(call: HeadCall) -> HeadSample:
    """A new tensor for tokens, lse and everything wanted."""

    def new(name: str) -> Tensor | None:
        if name not in ("tokens", "lse", *call.want):
            return None
        dtype = torch.int64 if name in ("tokens", "argmax") else torch.float32
        return torch.empty(call.num_rows, dtype=dtype, device=call.hidden.device)

    return HeadSample(*map(new, HeadSample._fields))


def _workspace(call: HeadCall, config: Config, rows: int, spans: int, splits: int) -> list[Tensor | None]:
    """block_lse and block_entropy [blocks, rows]; of each split and row: record_score, record_block, record_logits,
    top_logit, top_id, second_logit."""
    blocks, entropy, ranked = spans * config.block_v // noise.BLOCK, "entropy" in call.want, _ranks(call)
    shapes = [(blocks, True), (blocks, entropy), (splits, True), (splits, True), (splits * noise.BLOCK, True)]
    shapes += [(splits, ranked)] * 3
    types = [torch.int32 if at in (3, 6) else torch.float32 for at in range(len(shapes))]
    device = call.hidden.device
    return [
        torch.empty(size * rows, dtype=dtype, device=device) if needed else None
        for (size, needed), dtype in zip(shapes, types, strict=True)
    ]


def _rows_of_a_launch(call: HeadCall, config: Config) -> int:
    """As many as the workspace has room for, in whole tiles."""
    spans, rows = triton.cdiv(call.vocab_size, config.block_v), _MAX_ROWS
    table = spans * config.block_v // noise.BLOCK * (2 if "entropy" in call.want else 1)
    while rows > config.block_r and rows * (table + config.splits(rows, spans) * (noise.BLOCK + 5)) * 4 > _WORKSPACE:
        rows //= 2
    return rows


def _ranks(call: HeadCall) -> bool:
    return not _RANKED.isdisjoint(call.want)


def _operands(call: HeadCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return call.hidden, call.weight, call.offset


def _temperatures(call: HeadCall) -> tuple[float, Tensor | None]:
    """One for all rows, or one by row."""
    return (1.0, call.temperature) if isinstance(call.temperature, Tensor) else (call.temperature, None)


def _strides(call: HeadCall) -> tuple[int, ...]:
    weight = (0, 0) if call.weight is None else call.weight.stride()
    return *call.hidden.stride(), *weight, *call.offset.stride()


_zeros_of: dict[tuple[torch.device, int], Tensor] = {}


def _zeros(device: torch.device, tiles: int) -> tuple[Tensor, Tensor]:
    """int32 [tiles] that every launch leaves as zeros, and an fp32 zero: of each stream, or of each captured graph."""
    size = max(tiles, _MAX_ROWS // 16) + 1
    if device.type != "cuda":
        stream = 0
    elif torch.cuda.is_current_stream_capturing():
        stream = None
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
    zeros = _zeros_of.get((device, stream))
    if zeros is None or len(zeros) < size:
        zeros = torch.zeros(size, dtype=torch.int32, device=device)
        if stream is not None:
            _zeros_of[device, stream] = zeros
    return zeros[:-1], zeros[-1:].view(torch.float32)
