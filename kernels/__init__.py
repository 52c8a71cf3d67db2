"""Operators of a masked diffusion sampler. One line per operator; `dispatch.explain()` tells who computes them here."""

from unmask.kernels.add_norm import add_norm
from unmask.kernels.attention import attention
from unmask.kernels.sample_head import HeadSample, NonFiniteLogits, sample_head

__all__ = ["HeadSample", "NonFiniteLogits", "add_norm", "attention", "sample_head"]
