"""The logits of some rows, not stored: what operators that read whole laws pass to their implementations."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.kernels import checks
from unmask.kernels.dispatch import interpreted

_SHARE = 2 << 20  # bytes for a chunk of anything in plain torch; a few temporaries of that size come on top


@dataclass(frozen=True, eq=False)
class Logits:
    """(hidden[rows] @ weight.T + offset) / temperature, and -inf where offset is, whatever the product was."""

    hidden: Tensor  # [N, D]; the logits themselves [N, V] when weight is None
    weight: Tensor | None
    offset: Tensor | None  # [V]: bias and forbidden ids in one
    temperature: float | Tensor = 1.0  # > 0; one number or fp32 [R]
    rows: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return len(self.hidden if self.rows is None else self.rows)

    @property
    def vocab_size(self) -> int:
        return self.hidden.shape[1] if self.weight is None else self.weight.shape[0]

    def operands(self, suffix: str = "") -> dict[str, Tensor | None]:
        """By the names of the operator's arguments; bias may have forbidden ids in it."""
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.offset}
        return {name + suffix: tensor for name, tensor in named.items()}

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        temperature: float,
        temperatures: Tensor | None,
        forbid: Tensor | None,
        rows: Tensor | None,
        check: bool,
    ) -> "Logits":
        """From an operator's arguments, after the checks that look at values; on a GPU, only with `check`."""
        vocab_size = hidden.shape[1] if weight is None else weight.shape[0]
        if check or hidden.device.type == "cpu":
            checks.check_range("rows", rows, len(hidden))
            checks.check_range("forbid", forbid, vocab_size)
            if temperatures is not None:
                checks.check_temperature_range(temperatures, zero=False)
        offset = checks.merge_offset(bias, forbid, vocab_size, hidden)
        return cls(hidden, weight, offset, temperature if temperatures is None else temperatures, rows)

    def slices(self, dtype: torch.dtype, matrices: int = 1) -> list[slice]:
        """The rows in chunks of which so many matrices of logits in this dtype are small enough to be held."""
        step = max(1, _SHARE // (matrices * self.vocab_size * dtype.itemsize))
        return [slice(first, first + step) for first in range(0, self.num_rows, step)]

    def compute(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The logits of these rows, in plain torch."""
        hidden = (self.hidden[rows] if self.rows is None else self.hidden[self.rows[rows]]).to(dtype)
        if self.weight is None:
            logits = hidden.clone()
        else:
            logits = hidden.new_empty(len(hidden), self.vocab_size)
            for ids, weight in widened(self.weight, dtype):
                logits[:, ids] = hidden @ weight.T
        if self.offset is not None:
            logits += self.offset
            logits.masked_fill_(self.offset == -math.inf, -math.inf)
        divisor = self.temperature
        logits /= divisor[rows, None] if isinstance(divisor, Tensor) else divisor
        return logits


def widened(matrix: Tensor, dtype: torch.dtype):
    """The matrix in this dtype, whole if it has it and otherwise a few rows at a time: (which rows, those rows)."""
    size = matrix.shape[1] * dtype.itemsize
    step = len(matrix) if matrix.dtype == dtype else max(1, _SHARE // size)
    for first in range(0, len(matrix), step):
        rows = slice(first, first + step)
        yield rows, matrix[rows].to(dtype)


def accumulator(operands: dict[str, Tensor | None]) -> torch.dtype:
    """fp64 if any of these is, otherwise fp32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in operands.values())
    return torch.float64 if wide else torch.float32


def triton_refuses(operands: dict[str, Tensor | None]) -> str | None:
    """Why Triton kernels cannot read these tensors, or None."""
    for name, tensor in operands.items():
        if tensor is None:
            continue
        if tensor.device.type != ("cpu" if interpreted() else "cuda"):
            return f"needs {name} on a {'CPU, for the interpreter' if interpreted() else 'GPU'}, got {tensor.device}"
        if tensor.dtype == torch.float64:
            return f"needs {name} in float32, bfloat16 or float16, got float64"
        hidden = operands.get(name.replace("weight", "hidden"))
        if name.startswith("weight") and tensor.dtype != hidden.dtype:
            return (
                f"needs {name} in the dtype of hidden, {checks.short(hidden.dtype)}, got {checks.short(tensor.dtype)}"
            )
    return None
