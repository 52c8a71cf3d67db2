"""Operators of a masked diffusion sampler. One line per operator; `dispatch.explain()` tells who computes them here."""

from unmask.kernels.checks import NonFiniteLogits
from unmask.kernels.sample_head import HeadSample, sample_head

__all__ = ["HeadSample", "NonFiniteLogits", "sample_head"]
