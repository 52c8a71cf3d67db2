"""What passes between the operator expected_embedding and its implementations."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.kernels.logits import Logits, accumulator


class Expectation(NamedTuple):
    embedding: Tensor  # [R, E]; NaN for a bad row
    lse: Tensor  # [R], log-sum-exp of the row's logits; not finite for a bad row


@dataclass(frozen=True, eq=False)
class EmbeddingCall:
    """One checked call with at least one row. Both tensors of the answer have the call's dtype."""

    logits: Logits
    table: Tensor  # [V, E]

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def operands(self) -> dict[str, Tensor | None]:
        return {**self.logits.operands(), "table": self.table}

    @property
    def dtype(self) -> torch.dtype:
        return accumulator(self.operands)
