"""What passes between the operator add_norm and its implementations."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class AddNormCall:
    """One call of add_norm with at least one number, checked; the fields are the operator's arguments."""

    residual: Tensor
    delta: Tensor | None
    weight: Tensor
    bias: Tensor | None
    gate: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    row_counts: tuple[int, ...] | None
    eps: float
    out: Tensor
