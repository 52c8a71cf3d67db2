"""What is timed: shapes of known models, random inputs, and the bytes and FLOPs that an operator must move and do."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SEED = 0
_LOGIT_SCALE = 3.0  # standard deviation: neither flat nor decided


class Shape(NamedTuple):
    hidden_size: int
    vocab_size: int


SHAPES = {"mdlm-small": Shape(768, 50_258), "llada-8b": Shape(4096, 126_464), "dream-7b": Shape(3584, 152_064)}
PARTS = {"whole": "whole operator", "sampling": "sampling alone, given logits"}


@dataclass(frozen=True, eq=False)
class HeadCase:
    """One call of sample_head: R rows of hidden and a weight, or for the part "sampling" R rows of logits and None."""

    part: str
    shape: Shape
    hidden: Tensor
    weight: Tensor | None
    keys: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.hidden)

    @property
    def num_bytes(self) -> int:
        """Every input read once and the tokens written once."""
        inputs = self.hidden.nbytes + self.keys.nbytes + (0 if self.weight is None else self.weight.nbytes)
        return inputs + 8 * self.num_rows

    @property
    def flops(self) -> int:
        """Of the product; the draw's own are not counted."""
        return 0 if self.weight is None else 2 * self.num_rows * self.weight.numel()


def head_weight(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Such that standard normal hidden rows give logits of a known scale."""
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator, device=device)
    return weight.mul_(_LOGIT_SCALE / math.sqrt(shape.hidden_size)).to(dtype)


def head_case(part: str, shape: Shape, weight: Tensor, num_rows: int) -> HeadCase:
    generator = torch.Generator(weight.device).manual_seed(1000 + num_rows)
    width, scale = (shape.hidden_size, 1.0) if part == "whole" else (shape.vocab_size, _LOGIT_SCALE)
    hidden = torch.randn(num_rows, width, generator=generator, device=weight.device).mul_(scale).to(weight.dtype)
    return HeadCase(part, shape, hidden, weight if part == "whole" else None, position_keys(num_rows, weight.device))


def position_keys(num_rows: int, device: torch.device, first: int = 0) -> Tensor:
    """Keys (sequence 0, position first + i, draw 0)."""
    keys = torch.zeros(num_rows, 3, dtype=torch.int64, device=device)
    keys[:, 1] = torch.arange(first, first + num_rows, device=device)
    return keys
