"""sample_head: hidden rows in, one token per row out. Meaning, checks, dispatch."""

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.kernels import noise
from unmask.kernels.dispatch import Implementation, Operator
from unmask.kernels.sample_head import cpu, reference

OPERATOR = Operator(
    "sample_head",
    (
        Implementation("cpu", cpu.sample_head, cpu.status, cpu.refuses),
        Implementation("reference", reference.sample_head, lambda: (True, "plain torch, any device")),
    ),
)
_DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
_EXTRAS = "logprob", "lse"


class HeadSample(NamedTuple):
    """tokens int64 [R]; logprob and lse [R], fp32 (fp64 if hidden or weight is), None unless wanted."""

    tokens: Tensor
    logprob: Tensor | None = None
    lse: Tensor | None = None


class NonFiniteLogits(ValueError):
    """A row has a logit that is NaN or +inf, or no id left to draw. The message names its sequence and position."""


@torch.no_grad()
def sample_head(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    keys: Tensor,
    seed: int,
    temperature: float = 1.0,
    forbid: Tensor | None = None,
    want: tuple[str, ...] = (),
    impl: str | None = None,
) -> HeadSample:
    """Draw one token per row from softmax((hidden @ weight.T + bias) / temperature) without storing the logits.

    The draw is an exact Gumbel race in two rounds. Over blocks of 128 consecutive ids, score(b) = logsumexp of b's
    logits + Gumbel(b); inside the best block, token = argmax(logit + Gumbel(token)). The noise is a function of seed
    and key alone, so a row's token does not depend on the other rows of the call.

    hidden       [R, D] fp32, bf16, fp16 or fp64: rows after the final norm
    weight       [V, D]; or None: `hidden` [R, V] holds the logits themselves, and bias must be None
    bias         [V] or None; an id whose bias is -inf cannot be drawn
    keys         int64 [R, 3], columns (sequence, position, draw); the first two below 2**32, draw below 2**24
    seed         0 <= seed < 2**64
    temperature  divides the logits; 0 takes the largest logit, the lowest id among equals
    forbid       int64 [K] ids that are never drawn, or None
    want         any of "logprob", "lse"
    impl         "cpu", "reference", or None for the fastest that serves these arguments

    lse is the log-sum-exp of the row's logits after temperature, forbidden ids left out; logprob = logit - lse is the
    log-probability of the token under the law drawn from. At temperature 0 both refer to temperature 1.
    Logits are accumulated in fp32 (in fp64 if hidden or weight is fp64). The noise is added to them in fp32, so the law
    is exact while |logit / temperature| stays below about 2**14; beyond, rounding begins to swallow the noise. Raises
    NonFiniteLogits for the first bad row, TypeError or ValueError naming a bad argument, UnsupportedImplementation.

    >>> hidden, weight = torch.zeros(2, 8), torch.zeros(100, 8)
    >>> keys = torch.tensor([[0, 5, 0], [0, 9, 0]])             # sequence 0, positions 5 and 9, first draw
    >>> sample_head(hidden, weight, keys=keys, seed=0).tokens.shape
    torch.Size([2])
    """
    _check_rows(hidden, weight, bias)
    vocab_size = (hidden if weight is None else weight).shape[-1 if weight is None else 0]
    _check_keys(keys, hidden)
    seed = noise.check_seed(seed)
    temperature = _check_temperature(temperature)
    _check_forbid(forbid, vocab_size, hidden)
    _check_want(want)
    run = OPERATOR.pick(impl, hidden, weight).run

    offset = _offset(bias, forbid, vocab_size, hidden)
    tokens, logprob, lse = run(hidden, weight, offset, keys, seed, temperature)
    _check_finite(lse, keys, temperature)
    return HeadSample(tokens, logprob if "logprob" in want else None, lse if "lse" in want else None)


def _offset(bias: Tensor | None, forbid: Tensor | None, vocab_size: int, hidden: Tensor) -> Tensor | None:
    """bias and forbid in one row [V]: added to the logits, and -inf wherever an id cannot be drawn."""
    if bias is None and forbid is None:
        return None
    if bias is None:
        offset = hidden.new_zeros(vocab_size, dtype=torch.float32)
    else:
        offset = bias.to(torch.promote_types(bias.dtype, torch.float32), copy=True)
    return offset if forbid is None else offset.index_fill_(0, forbid, -math.inf)


def _check_finite(lse: Tensor, keys: Tensor, temperature: float) -> None:
    bad = ~lse.isfinite()
    if not bad.any():
        return
    row = int(bad.int().argmax())
    sequence, position, _ = keys[row].tolist()
    problem = "every id is forbidden" if lse[row] == -math.inf else "a logit is NaN or +inf"
    divided = "" if temperature in (0, 1) else f" after division by temperature {temperature:g}"
    raise NonFiniteLogits(f"sequence {sequence}, position {position} (row {row}): {problem}{divided}")


def _check_rows(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    _check_tensor("hidden", hidden, ("R", "V" if weight is None else "D"), _DTYPES)
    if hidden.shape[1] == 0:
        raise ValueError(f"hidden must have at least one column, got shape {list(hidden.shape)}")
    if weight is None:
        if bias is not None:
            raise ValueError("bias must be None when weight is None: hidden rows are then the logits, add it to them")
        return
    _check_tensor("weight", weight, ("V", "D"), _DTYPES, hidden.device)
    if weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight must be [V, {hidden.shape[1]}] for this hidden, got shape {list(weight.shape)}")
    if bias is not None:
        _check_tensor("bias", bias, ("V",), _DTYPES, hidden.device)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias must be [{weight.shape[0]}] for this weight, got shape {list(bias.shape)}")


def _check_keys(keys: Tensor, hidden: Tensor) -> None:
    _check_tensor("keys", keys, ("R", "3"), (torch.int64,), hidden.device)
    if keys.shape != (hidden.shape[0], 3):
        raise ValueError(f"keys must be [{hidden.shape[0]}, 3] for this hidden, got shape {list(keys.shape)}")
    if keys.device.type != "cpu":  # reading values back would stall the device
        return
    for column, (name, limit) in enumerate((("sequence", 32), ("position", 32), ("draw", 24))):
        bad = (keys[:, column] >> limit).nonzero()
        if len(bad):
            row = int(bad[0])
            raise ValueError(f"keys: {name} must be in [0, 2**{limit}), got {int(keys[row, column])} in row {row}")


def _check_temperature(temperature: float) -> float:
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number, got {temperature!r} ({type(temperature).__name__})")
    if not (temperature == 0 or 2.0**-126 <= temperature <= torch.finfo(torch.float32).max):
        raise ValueError(f"temperature must be 0 or a positive normal fp32 number, got {temperature!r}")
    return float(temperature)


def _check_forbid(forbid: Tensor | None, vocab_size: int, hidden: Tensor) -> None:
    if forbid is None:
        return
    _check_tensor("forbid", forbid, ("K",), (torch.int64,), hidden.device)
    if forbid.device.type == "cpu" and not ((forbid >= 0) & (forbid < vocab_size)).all():
        raise ValueError(f"forbid must hold ids in [0, {vocab_size}), got {forbid.tolist()}")


def _check_want(want: tuple[str, ...]) -> None:
    if isinstance(want, str) or not set(want) <= set(_EXTRAS):
        raise ValueError(f"want must be a tuple of names out of {_EXTRAS}, got {want!r}")


def _check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """`name` must be a strided tensor [shape] of one of the dtypes, on the device of hidden."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor [{', '.join(shape)}], got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(_short, dtypes))}, got {_short(tensor.dtype)}")
    if tensor.ndim != len(shape) or tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor [{', '.join(shape)}], got shape {list(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on the device of hidden, {device}, got {tensor.device}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
