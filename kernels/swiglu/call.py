"""What passes between the operator swiglu and its implementations."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SwigluCall:
    """One call of swiglu with at least one row, checked; the fields are the operator's arguments."""

    gate_up: Tensor
    out: Tensor

    @property
    def device(self) -> torch.device:
        return self.gate_up.device
