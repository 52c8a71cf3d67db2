"""What passes between the operator divergence and its implementations."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.kernels.logits import Logits, accumulator


class Divergence(NamedTuple):
    """In nats, one number per row: fp32 [R], fp64 if an input is."""

    kl: Tensor
    cross_entropy: Tensor
    entropy: Tensor


class Comparison(NamedTuple):
    """A bad row is NaN in kl and entropy, and its lse is not finite where it is bad."""

    kl: Tensor
    entropy: Tensor
    lse_a: Tensor
    lse_b: Tensor


@dataclass(frozen=True, eq=False)
class DivergenceCall:
    """One checked call with at least one row; both have the same rows and ids. The answer has the call's dtype."""

    a: Logits
    b: Logits

    @property
    def device(self) -> torch.device:
        return self.a.hidden.device

    @property
    def operands(self) -> dict[str, Tensor | None]:
        return {**self.a.operands("_a"), **self.b.operands("_b")}

    @property
    def dtype(self) -> torch.dtype:
        return accumulator(self.operands)
