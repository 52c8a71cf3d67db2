"""attention: over packed sequences, both ways or by blocks, rotary embedding included. Meaning, checks, dispatch."""

import torch
from torch import Tensor

from unmask.kernels import checks, offsets
from unmask.kernels.attention import cpu, reference, sdpa, triton_config
from unmask.kernels.attention.call import AttentionCall
from unmask.kernels.dispatch import Implementation, Operator, triton_implementation
from unmask.kernels.offsets import Offsets

OPERATOR = Operator(
    "attention",
    (
        triton_implementation(
            "attention", triton_config.refuses, status=triton_config.status, defers=triton_config.defers_to_sdpa
        ),
        Implementation("cpu", cpu.attention, cpu.status, cpu.refuses, on_request=cpu.slower_than_torch),
        Implementation("sdpa", sdpa.attention, lambda: (True, "torch's scaled_dot_product_attention"), sdpa.refuses),
        Implementation("reference", reference.attention, lambda: (True, "plain torch, any device")),
    ),
)


@torch.no_grad()
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: tuple[int, ...] | Offsets,
    row_counts: tuple[int, ...] | Offsets | None = None,
    positions: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    block: int | None = None,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """softmax(query keyᵀ · scale) value inside each sequence; every query sees all keys of its own sequence.

    Sequences lie back to back without padding, as in FlashAttention's variable-length form: sequence s has `lengths[s]`
    keys and values and `row_counts[s]` queries, its own tokens or any of them. With `block` a query sees nothing behind
    its own block of positions.

    query       [Q, H, D] fp32, bf16, fp16 or fp64, D contiguous; Q is the sum of row_counts
    key, value  [T, G, D] in the dtype of query, D contiguous; G divides H: consecutive query heads share one of them
    lengths     tokens of each sequence, their sum is T; or Offsets, which may end before T
    row_counts  queries of each sequence, or Offsets, which may end before Q; None: as many as it has tokens
    positions   int64 [Q], where each query stands in its own sequence; None: query i stands at position i
    rope        (cos, sin), fp32 [P, D / 2] by position: rotate queries and keys first, column i paired with i + D / 2
                (rotate_half; Su et al., arXiv 2104.09864); every position is below P
    scale       None: 1 / sqrt(D)
    block       None: all keys; n: the query at position p sees the keys at positions below (p // n + 1) * n, so that 1
                is causal attention (block-causal: Arriola et al., arXiv 2503.09573)
    out         [Q, H, D] or [Q, H * D] in the dtype of query, to be written; None: a new tensor [Q, H, D]
    impl        "triton", "cpu", "sdpa", "reference", or None for the fastest that serves these arguments; on sm_90 that
                is "sdpa" for some calls with D = 128, and `unmask info` says for which

    Scores and sums are fp32 (fp64 for fp64); for narrower dtypes the rotated rows and the softmax's shares are rounded
    before their products, the result once more. "cpu" gives a query the same bits whatever sequences and queries stand
    beside it; so does "triton" among calls of one tile, see its docstring. Tokens and queries past the end of their
    Offsets are neither read nor written. The values of Offsets and positions are checked on a CPU; a GPU is not waited
    for, except by "reference", and a sequence with queries and no tokens is NaN there. A CUDA graph can capture a call
    with Offsets or equal numbers; unequal numbers are copied to the GPU first. TypeError or ValueError names a bad
    argument; nothing is written then.
    """
    num_queries = _check_heads(query, key, value)
    lengths = offsets.check_counts("lengths", lengths, key, "tokens of key")
    if row_counts is not None:
        row_counts = offsets.check_counts("row_counts", row_counts, query, "rows of query")
    elif num_queries != len(key):
        raise ValueError(f"row_counts must be given unless all {len(key)} tokens query, got None for {num_queries}")
    num_sequences = offsets.num_sequences(lengths)
    if row_counts is not None and offsets.num_sequences(row_counts) != num_sequences:
        got = offsets.num_sequences(row_counts)
        raise ValueError(f"row_counts must have one number per sequence, {num_sequences}, got {got}")
    checks.check_ids("positions", positions, query, "Q")
    if positions is not None and len(positions) != num_queries:
        raise ValueError(f"positions must be [{num_queries}], one per query, got shape {list(positions.shape)}")
    _check_rope(rope, query)
    scale = query.shape[2] ** -0.5 if scale is None else checks.check_number("scale", scale)
    if out is None:
        out = query.new_empty(query.shape)
    cos, sin = (None, None) if rope is None else rope
    # Without a compiler the registered operator would only add its dispatch, a hundred microseconds.
    answer = _registered if torch.compiler.is_compiling() else _answer
    answer(
        query,
        key,
        value,
        *offsets.split(lengths),
        *offsets.split(row_counts),
        positions,
        cos,
        sin,
        scale,
        _check_block(block, offsets.longest(lengths)),
        _check_out(out, query),
        impl,
    )
    return out


def _answer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int] | None,
    starts: Tensor | None,
    longest: int,
    row_counts: list[int] | None,
    row_starts: Tensor | None,
    most_rows: int,
    positions: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    block: int | None,
    out: Tensor,
    impl: str | None,
) -> None:
    """The checks that look at values, the pick and the run: one opaque operator to torch.compile."""
    tokens = offsets.join(lengths, starts, longest)
    rows = offsets.join(row_counts, row_starts, most_rows)
    rope = None if cos is None else (cos, sin)
    rows = tokens if rows is None else rows
    call = AttentionCall(query, key, value, tokens, rows, positions, rope, scale, out, block)
    if query.device.type == "cpu":
        call = call.counted()
    _check_values(call)
    run = OPERATOR.pick(impl, call).run
    if len(call.query):
        run(call)


_registered = torch.library.custom_op("unmask::attention", _answer, mutates_args=("out",))


@_registered.register_fake
def _(*arguments):
    return None


def _check_values(call: AttentionCall) -> None:
    """What the numbers in the arguments must satisfy, as far as the host knows them."""
    lengths, row_counts = call.lengths, call.row_counts
    if not isinstance(lengths, Offsets) and not isinstance(row_counts, Offsets):
        empty = [s for s, (n, rows) in enumerate(zip(lengths, row_counts, strict=True)) if rows and not n]
        if empty:
            raise ValueError(f"lengths must be positive where there are queries, got 0 for sequence {empty[0]}")
    if call.rope is None and call.block is None:
        return
    longest = offsets.longest(lengths)
    if call.positions is None:
        longest = max(longest, offsets.longest(row_counts))
    num_positions = longest if call.rope is None else len(call.rope[0])
    if longest > num_positions:
        raise ValueError(f"rope must have a row for each position, {longest}, got {num_positions}")
    if call.positions is not None and call.positions.device.type == "cpu":  # a GPU would have to be waited for
        checks.check_range("positions", call.positions, num_positions)


def _check_heads(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Returns Q."""
    checks.check_tensor("query", query, ("Q", "H", "D"))
    for name, tensor in (("key", key), ("value", value)):
        checks.check_tensor(name, tensor, ("T", "G", "D"), (query.dtype,), query.device)
        if tensor.shape != key.shape or tensor.shape[2] != query.shape[2]:
            right = f"[{len(key)}, {key.shape[1]}, {query.shape[2]}] as query and key have it"
            raise ValueError(f"{name} must be {right}, got shape {list(tensor.shape)}")
    if 0 in query.shape[1:] or 0 in key.shape[1:] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query must have columns and a multiple of {key.shape[1]} heads as key has it, got {list(query.shape)}"
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.stride(2) != 1 and tensor.shape[2] > 1:
            raise ValueError(f"{name} must have contiguous columns, got strides {tensor.stride()}")
    return len(query)


def _check_rope(rope: tuple[Tensor, Tensor] | None, query: Tensor) -> None:
    if rope is None:
        return
    if query.shape[2] % 2:
        raise ValueError(f"query must have an even number of columns to rotate, got shape {list(query.shape)}")
    if not isinstance(rope, tuple) or len(rope) != 2:
        raise TypeError(f"rope must be a pair (cos, sin), got {type(rope).__name__}")
    for name, table in zip(("cos", "sin"), rope, strict=True):
        checks.check_tensor(f"rope's {name}", table, ("P", "D / 2"), (torch.float32,), query.device)
        if table.shape != rope[0].shape or table.shape[1] != query.shape[2] // 2:
            raise ValueError(f"rope's {name} must be [P, {query.shape[2] // 2}], got shape {list(table.shape)}")


def _check_block(block: int | None, longest: int) -> int | None:
    """An integer that the kernels can hold: a block of the longest sequence hides as little as a longer one."""
    block = checks.check_positive("block", block)
    return None if block is None else min(block, max(1, longest))


def _check_out(out: Tensor, query: Tensor) -> Tensor:
    """`out` as [Q, H, D]."""
    flat = (len(query), query.shape[1] * query.shape[2])
    if not isinstance(out, Tensor) or out.dtype != query.dtype or out.device != query.device:
        got = f"{checks.short(out.dtype)} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"out must be {checks.short(query.dtype)} on {query.device} as query, got {got}")
    if out.shape not in (query.shape, flat):
        raise ValueError(f"out must be {list(query.shape)} or {list(flat)}, got shape {list(out.shape)}")
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        raise ValueError(f"out must have contiguous columns, got strides {out.stride()}")
    checks.check_apart("out", out)
    return out.view(query.shape)
