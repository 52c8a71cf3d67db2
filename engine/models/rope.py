"""Rotary position embedding (Su et al., arXiv 2104.09864): the angles by which a pair of columns turns."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Llama3:
    """Scaling of Llama 3.1 and later: frequencies whose wavelength exceeds `original_length` / `low` are divided by
    `factor`, those below `original_length` / `high` stay, and what lies between is blended."""

    factor: float
    low: float
    high: float
    original_length: int

    def __call__(self, frequencies: Tensor) -> Tensor:
        turns = self.original_length * frequencies / (2 * math.pi)  # within the original length
        share = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - share) * frequencies / self.factor + share * frequencies


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor`."""

    factor: float

    def __call__(self, frequencies: Tensor) -> Tensor:
        return frequencies / self.factor


def rope_tables(
    head_dim: int, max_length: int, base: float = 10_000.0, scaling: Llama3 | Linear | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32 [max_length, head_dim / 2], from fp32 angles as published."""
    frequencies = 1.0 / (base ** (torch.arange(0, head_dim, 2).float() / head_dim))
    if scaling is not None:
        frequencies = scaling(frequencies)
    angles = torch.outer(torch.arange(max_length).float(), frequencies)
    return angles.cos(), angles.sin()
