"""Checks that several operators make of their arguments. Errors name the argument, what it got and what is right."""

import math
import operator
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
_KEY_BITS = {"sequence": 32, "position": 32, "draw": 24}


class NonFiniteLogits(ValueError):
    """A row has a logit that is NaN or +inf, or no possible id. The message names the row."""


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    device: torch.device | None = None,
    beside: str = "hidden",
) -> None:
    """`name` must be a strided tensor [shape] of one of the dtypes, on this device, which is that of `beside`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor [{', '.join(shape)}], got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(short, dtypes))}, got {short(tensor.dtype)}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor [{', '.join(shape)}], got {tensor.layout}")
    if tensor.ndim != len(shape):
        raise ValueError(f"{name} must be a dense tensor [{', '.join(shape)}], got shape {list(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on the device of {beside}, {device}, got {tensor.device}")


def check_head(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, suffix: str = "") -> int:
    """hidden [N, D] and its head: weight [V, D] or None, bias [V] or None. Returns V."""
    hidden_name, weight_name, bias_name = (f"{name}{suffix}" for name in ("hidden", "weight", "bias"))
    check_tensor(hidden_name, hidden, ("N", "V" if weight is None else "D"))
    if hidden.shape[1] == 0:
        raise ValueError(f"{hidden_name} must have at least one column, got shape {list(hidden.shape)}")
    vocab_size = hidden.shape[1]
    if weight is not None:
        check_tensor(weight_name, weight, ("V", "D"), device=hidden.device, beside=hidden_name)
        if weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
            right = f"[V, {hidden.shape[1]}] for this {hidden_name}"
            raise ValueError(f"{weight_name} must be {right}, got shape {list(weight.shape)}")
        vocab_size = weight.shape[0]
    if bias is not None:
        check_tensor(bias_name, bias, ("V",), device=hidden.device, beside=hidden_name)
        if bias.shape[0] != vocab_size:
            raise ValueError(f"{bias_name} must be [{vocab_size}], one number per id, got shape {list(bias.shape)}")
    return vocab_size


def check_ids(name: str, ids: Tensor | None, hidden: Tensor, shape: str) -> None:
    """Type, shape and device of int64 [shape] indices or None; check_range looks at their values."""
    if ids is not None:
        check_tensor(name, ids, (shape,), (torch.int64,), hidden.device)


def check_range(name: str, ids: Tensor | None, limit: int) -> None:
    """Indices must lie in [0, limit). Waits for their device."""
    if ids is not None and not ((ids >= 0) & (ids < limit)).all():
        bad = int(ids[(ids < 0) | (ids >= limit)][0])
        raise ValueError(f"{name} must be in [0, {limit}), got {bad}")


def check_keys(keys: Tensor, num_rows: int, hidden: Tensor) -> None:
    check_tensor("keys", keys, ("R", "3"), (torch.int64,), hidden.device)
    if keys.shape != (num_rows, 3):
        raise ValueError(f"keys must be [{num_rows}, 3], one per row, got shape {list(keys.shape)}")


def check_key_range(keys: Tensor) -> None:
    """Waits for the device of the keys."""
    for column, (name, bits) in enumerate(_KEY_BITS.items()):
        bad = (keys[:, column] >> bits).nonzero()
        if len(bad):
            row = int(bad[0])
            raise ValueError(f"keys: {name} must be in [0, 2**{bits}), got {int(keys[row, column])} in row {row}")


def check_temperature(temperature: float, zero: bool = True) -> float:
    """A normal fp32 number, or 0 where it stands for the largest logit."""
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number, got {temperature!r} ({type(temperature).__name__})")
    limits = torch.finfo(torch.float32)
    if not ((zero and temperature == 0) or limits.tiny <= temperature <= limits.max):
        allowed = "0 or a positive normal fp32 number" if zero else "a positive normal fp32 number"
        raise ValueError(f"temperature must be {allowed}, got {temperature!r}")
    return float(temperature)


def split_temperature(
    temperature: float | Tensor, num_rows: int, hidden: Tensor, zero: bool = True
) -> tuple[float, Tensor | None]:
    """The number for all rows, and the numbers by row if there are such; check_temperature_range looks at those."""
    if not isinstance(temperature, Tensor):
        return check_temperature(temperature, zero), None
    check_tensor("temperature", temperature, ("R",), (torch.float32,), hidden.device)
    if len(temperature) != num_rows:
        raise ValueError(f"temperature must be a number or [{num_rows}], got shape {list(temperature.shape)}")
    return 1.0, temperature


def check_temperature_range(temperature: Tensor, zero: bool = True) -> None:
    """Waits for its device."""
    limits = torch.finfo(torch.float32)
    good = (temperature >= limits.tiny) & (temperature <= limits.max)
    good |= zero & (temperature == 0)
    if not good.all():
        row = int((~good).int().argmax())
        allowed = "0 or a positive normal fp32 number" if zero else "a positive normal fp32 number"
        raise ValueError(f"temperature must be {allowed}, got {temperature[row].item()} in row {row}")


def check_counts(name: str, counts: Sequence[int], total: int, of: str) -> tuple[int, ...]:
    """Numbers of rows or tokens of each sequence, which sum to `total`."""
    try:
        numbers = tuple(map(operator.index, counts))
    except TypeError:
        raise TypeError(f"{name} must be a sequence of integers, got {counts!r}") from None
    if any(n < 0 for n in numbers) or sum(numbers) != total:
        raise ValueError(f"{name} must be integers, not negative, that sum to the {total} {of}, got {numbers}")
    return numbers


def check_number(name: str, value: float, low: float = -math.inf) -> float:
    """A finite number, `low` or more."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not (math.isfinite(value) and value >= low):
        raise ValueError(f"{name} must be finite{'' if low == -math.inf else f' and at least {low:g}'}, got {value!r}")
    return float(value)


def check_apart(name: str, tensor: Tensor) -> None:
    """No two numbers of a tensor that is written to may share their memory."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < extent:
            raise ValueError(
                f"{name} must not overlap itself, got shape {list(tensor.shape)}, strides {tensor.stride()}"
            )
        extent += stride * (size - 1)


def check_top_k(top_k: int | None) -> int | None:
    return check_positive("top_k", top_k)


def check_positive(name: str, number: int | None) -> int | None:
    """An integer, 1 or more, or None."""
    if number is None:
        return None
    try:
        if isinstance(number, bool):
            raise TypeError
        value = operator.index(number)
    except TypeError:
        raise TypeError(f"{name} must be an integer or None, got {number!r} ({type(number).__name__})") from None
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def check_top_p(top_p: float | None) -> float | None:
    if top_p is None:
        return None
    if isinstance(top_p, bool) or not isinstance(top_p, Real):
        raise TypeError(f"top_p must be a number or None, got {top_p!r} ({type(top_p).__name__})")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must satisfy 0 < top_p <= 1, got {top_p!r}")
    return max(float(top_p), torch.finfo(torch.float32).tiny)  # kernels compute in fp32, where less would be nothing


def bad_row(lse: Tensor, temperature: float | Tensor = 1.0) -> tuple[int, str] | None:
    """The first row whose log-sum-exp is not finite and what is wrong with it. Waits for the device."""
    bad = ~lse.isfinite()
    if not bad.any():
        return None
    row = int(bad.int().argmax())
    problem = "every id is forbidden" if lse[row] == -math.inf else "a logit is NaN or +inf"
    divisor = float(temperature[row] if isinstance(temperature, Tensor) else temperature)
    divided = "" if divisor in (0, 1) else f" after division by temperature {divisor:g}"
    return row, problem + divided


def merge_offset(bias: Tensor | None, forbid: Tensor | None, vocab_size: int, hidden: Tensor) -> Tensor | None:
    """bias and forbid in one row [V]: added to the logits, and -inf wherever an id cannot be drawn."""
    if bias is not None:
        bias = bias.to(torch.promote_types(bias.dtype, torch.float32)).contiguous()
    if forbid is None:
        return bias
    offset = hidden.new_zeros(vocab_size, dtype=torch.float32) if bias is None else bias
    return offset.index_fill(0, forbid, -math.inf)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
