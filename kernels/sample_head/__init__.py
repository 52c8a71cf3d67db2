"""sample_head: hidden rows in, one token per row out. Meaning, checks, dispatch."""

from dataclasses import replace

import torch
from torch import Tensor

from unmask.kernels import checks, extension, noise
from unmask.kernels.checks import NonFiniteLogits
from unmask.kernels.dispatch import Implementation, Operator, triton_implementation
from unmask.kernels.sample_head import cpu, cuda, reference, triton_limits
from unmask.kernels.sample_head.call import EXTRAS, HeadCall, HeadSample

OPERATOR = Operator(
    "sample_head",
    (
        Implementation("cuda", cuda.sample_head, cuda.status, cuda.refuses),
        triton_implementation("sample_head", triton_limits.refuses),
        Implementation("cpu", cpu.sample_head, extension.status, cpu.refuses),
        Implementation("reference", reference.sample_head, lambda: (True, "plain torch, any device")),
    ),
)


@torch.no_grad()
def sample_head(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    keys: Tensor,
    seed: int,
    temperature: float | Tensor = 1.0,
    forbid: Tensor | None = None,
    allow: Tensor | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    rows: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    want: tuple[str, ...] = (),
    check: bool = True,
    impl: str | None = None,
) -> HeadSample:
    """Draw one token per row from softmax((hidden @ weight.T + bias) / temperature) without storing the logits.

    The draw is an exact Gumbel race in two rounds. Over blocks of 128 consecutive ids, score(b) = logsumexp of b's
    logits + Gumbel(b); inside the best block, token = argmax(logit + Gumbel(token)). The noise is a function of seed
    and key alone, so a row's token does not depend on the other rows of the call. Nor do any of its bits in "cuda",
    "triton" and "cpu"; the products of plain torch may round differently in company.

    hidden       [N, D] fp32, bf16, fp16 or fp64: rows after the final norm
    weight       [V, D]; or None: `hidden` [N, V] holds the logits themselves
    bias         [V] or None; an id whose bias is -inf cannot be drawn
    keys         int64 [R, 3], columns (sequence, position, draw); the first two below 2**32, draw below 2**24
    seed         0 <= seed < 2**64
    temperature  divides the logits, one number or fp32 [R]; 0 takes the largest logit, the lowest id among equals
    forbid       int64 [K] ids that are never drawn, or None
    allow        int32 [R, ceil(V / 32)] or None: row r may draw id i if bit i % 32 of allow[r, i // 32] is set
    top_k        draw from the k largest logits only
    top_p        then from the shortest run of the largest ones that holds this share of their mass, 0 < top_p <= 1
    rows         int64 [R], row r is hidden[rows[r]]; None: every row of hidden, R = N
    out          (contiguous int64 tensor, int64 [R] positions in it, flattened): the tokens are written there too; the
                 positions must differ and the tensor share no memory with an argument
    want         any of "logprob", "lse", "max_prob", "argmax", "margin", "entropy"
    check        look at the values of ids, keys and temperatures and at the rows that came out, which waits for a GPU.
                 False, there: bad values have bad consequences. A bad row's token is -1, its lse is not finite, its
                 other outputs mean nothing, and nothing of it is written to `out`
    impl         "cuda", "triton", "cpu", "reference", or None for the fastest that serves these arguments

    Everything wanted is of the law drawn from, after temperature, forbidden ids, top_k and top_p (at temperature 0, of
    the one at temperature 1): lse, the log-sum-exp of the logits; logprob = logit - lse of the token; the largest
    probability and its id; the margin between the two largest probabilities; the entropy in nats.
    top_k and top_p rank ids by falling logit, the lowest id first among equals, so that ties at the threshold are kept
    from the lowest id on until the number or the mass is reached. Masses are summed in fp32.
    Logits are accumulated in fp32 (in fp64 if hidden or weight is fp64). The noise is added to them in fp32, so the law
    is exact while |logit / temperature| stays below about 2**14; beyond, rounding begins to swallow the noise. Raises
    NonFiniteLogits for the first bad row, TypeError or ValueError naming a bad argument, UnsupportedImplementation;
    nothing is written then.

    >>> hidden, weight = torch.zeros(2, 8), torch.zeros(100, 8)
    >>> keys = torch.tensor([[0, 5, 0], [0, 9, 0]])             # sequence 0, positions 5 and 9, first draw
    >>> sample_head(hidden, weight, keys=keys, seed=0).tokens.shape
    torch.Size([2])
    """
    vocab_size = checks.check_head(hidden, weight, bias)
    checks.check_ids("rows", rows, hidden, "R")
    num_rows = len(hidden if rows is None else rows)
    checks.check_keys(keys, num_rows, hidden)
    seed = noise.check_seed(seed)
    scalar, per_row = checks.split_temperature(temperature, num_rows, hidden)
    checks.check_ids("forbid", forbid, hidden, "K")
    _check_allow(allow, num_rows, vocab_size, hidden)
    top_k, top_p = checks.check_top_k(top_k), checks.check_top_p(top_p)
    _check_want(want)
    buffer, positions = _check_out(out, num_rows, hidden)
    # Without a compiler the registered operator would only add its dispatch, a hundred microseconds.
    answer = _registered if torch.compiler.is_compiling() else _answer
    results = answer(
        hidden,
        weight,
        bias,
        keys,
        seed - (seed >> 63 << 64),  # an operator's integers have 64 bits and a sign
        scalar,
        per_row,
        forbid,
        allow,
        top_k if top_k is not None and top_k < vocab_size else None,
        top_p if top_p != 1 else None,
        rows,
        buffer,
        positions,
        ",".join(want),
        check,
        impl,
    )
    given = dict(zip(HeadSample._fields, results, strict=True))
    return HeadSample(given["tokens"], **{name: given[name] for name in want})


def _answer(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keys: Tensor,
    seed: int,
    temperature: float,
    temperatures: Tensor | None,
    forbid: Tensor | None,
    allow: Tensor | None,
    top_k: int | None,
    top_p: float | None,
    rows: Tensor | None,
    buffer: Tensor | None,
    positions: Tensor | None,
    want: str,
    check: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The checks that look at values, the pick and the run: one opaque operator to torch.compile."""
    call = HeadCall(
        hidden=hidden,
        weight=weight,
        offset=bias,
        keys=keys,
        seed=seed % 2**64,
        temperature=temperature if temperatures is None else temperatures,
        allow=allow,
        rows=rows,
        top_k=top_k,
        top_p=top_p,
        want=tuple(filter(None, want.split(","))),
        out=None if buffer is None else (buffer, positions),
    )
    if check or hidden.device.type == "cpu":
        _check_values(call, forbid)
    run = OPERATOR.pick(impl, call).run
    if call.num_rows == 0:
        return _blanks(call)
    call = replace(call, offset=checks.merge_offset(bias, forbid, call.vocab_size, hidden))
    if check:
        sample = run(replace(call, out=None))
        check_finite(sample.lse, keys, call.temperature)
        call.scatter(sample.tokens)
    else:
        sample = run(call)
    pairs = zip(HeadSample._fields, sample, _blanks(call), strict=True)
    return tuple(given if name in ("tokens", *call.want) else blank for name, given, blank in pairs)


_registered = torch.library.custom_op("unmask::sample_head", _answer, mutates_args=("buffer",))


@_registered.register_fake
def _(hidden, weight, bias, keys, seed, temperature, temperatures, forbid, allow, top_k, top_p, rows, buffer, positions,
      want, check, impl):  # fmt: skip
    return _blanks(HeadCall(hidden, weight, bias, keys, seed, want=tuple(want.split(","))))


def _blanks(call: HeadCall) -> tuple[Tensor, ...]:
    """A new tensor for each field of HeadSample, [R] for those that are wanted and [0] for the others."""
    dtypes = (torch.int64 if name in ("tokens", "argmax") else call.dtype for name in HeadSample._fields)
    sizes = (call.num_rows if name in ("tokens", *call.want) else 0 for name in HeadSample._fields)
    return tuple(call.hidden.new_empty(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True))


def check_finite(lse: Tensor, keys: Tensor, temperature: float | Tensor = 1.0) -> None:
    """Raise NonFiniteLogits for the first row of a HeadSample whose lse is not finite. Waits for the device."""
    found = checks.bad_row(lse, temperature)
    if found is not None:
        row, problem = found
        sequence, position, _ = keys[row].tolist()
        raise NonFiniteLogits(f"sequence {sequence}, position {position} (row {row}): {problem}")


def _check_values(call: HeadCall, forbid: Tensor | None) -> None:
    checks.check_key_range(call.keys)
    checks.check_range("rows", call.rows, len(call.hidden))
    checks.check_range("forbid", forbid, call.vocab_size)
    if isinstance(call.temperature, Tensor):
        checks.check_temperature_range(call.temperature)
    if call.out is not None:
        checks.check_range("out positions", call.out[1], call.out[0].numel())


def _check_allow(allow: Tensor | None, num_rows: int, vocab_size: int, hidden: Tensor) -> None:
    if allow is None:
        return
    checks.check_tensor("allow", allow, ("R", "ceil(V / 32)"), (torch.int32,), hidden.device)
    if allow.shape != (num_rows, -(-vocab_size // 32)):
        raise ValueError(f"allow must be [{num_rows}, {-(-vocab_size // 32)}], got shape {list(allow.shape)}")


def _check_want(want: tuple[str, ...]) -> None:
    if not isinstance(want, (tuple, list)) or not all(name in EXTRAS for name in want):
        raise ValueError(f"want must be a tuple of names out of {EXTRAS}, got {want!r}")


def _check_out(
    out: tuple[Tensor, Tensor] | None, num_rows: int, hidden: Tensor
) -> tuple[None, None] | tuple[Tensor, Tensor]:
    if out is None:
        return None, None
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(f"out must be a pair (buffer, positions), got {type(out).__name__}")
    buffer, positions = out
    checks.check_tensor("out positions", positions, ("R",), (torch.int64,), hidden.device)
    if len(positions) != num_rows:
        raise ValueError(f"out positions must be [{num_rows}], one per row, got shape {list(positions.shape)}")
    if not isinstance(buffer, Tensor) or buffer.dtype != torch.int64:
        got = checks.short(buffer.dtype) if isinstance(buffer, Tensor) else type(buffer).__name__
        raise TypeError(f"out buffer must be an int64 tensor, got {got}")
    if not buffer.is_contiguous() or buffer.device != hidden.device:
        raise ValueError(
            f"out buffer must be contiguous and on the device of hidden, {hidden.device}, "
            f"got strides {buffer.stride()} on {buffer.device}"
        )
    return buffer, positions
