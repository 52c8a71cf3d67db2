"""What passes between the operator add_norm and its implementations."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmask.kernels.offsets import Counts, Offsets, known_counts


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
    row_counts: Counts | None
    eps: float
    out: Tensor
    rms: bool = False

    @property
    def device(self) -> torch.device:
        return self.residual.device

    def counted(self) -> "AddNormCall":
        """With the numbers of rows, without the rows past their end. Waits for the device of offsets."""
        if not isinstance(self.row_counts, Offsets):
            return self
        row_counts = known_counts("row_counts", self.row_counts, len(self.residual))
        rows = slice(sum(row_counts))
        return replace(
            self,
            residual=self.residual[rows],
            delta=None if self.delta is None else self.delta[rows],
            row_counts=row_counts,
            out=self.out[rows],
        )
