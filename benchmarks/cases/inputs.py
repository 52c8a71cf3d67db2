"""Random tensors of the cases: standard normal, none of them zero, the same in every process."""

import math
from functools import lru_cache

import torch
from torch import Tensor

LOGIT_SCALE = 3.0  # standard deviation: neither flat nor decided


def normal(*size: int, seed: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*size, generator=generator, device=device).mul_(scale).to(dtype)


def head_weight(hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    """[V, D] such that standard normal hidden rows give logits of a known scale."""
    scale = LOGIT_SCALE / math.sqrt(hidden_size)
    return normal(vocab_size, hidden_size, seed=seed, dtype=dtype, device=device, scale=scale)


shared_weight = lru_cache(maxsize=4)(head_weight)  # two heads of a shape, and those of its tiny twin


def position_keys(num_rows: int, device: torch.device, first: int = 0) -> Tensor:
    """Keys (sequence 0, position first + i, draw 0)."""
    keys = torch.zeros(num_rows, 3, dtype=torch.int64, device=device)
    keys[:, 1] = torch.arange(first, first + num_rows, device=device)
    return keys


def picked(num_rows: int, most: int, device: torch.device) -> Tensor:
    """Up to `most` of the rows, the first and the last among them."""
    return torch.linspace(0, num_rows - 1, min(num_rows, most)).long().unique().to(device)
