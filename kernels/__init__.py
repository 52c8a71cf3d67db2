"""Operators of a masked diffusion sampler. One line per operator; `dispatch.explain()` tells who computes them here."""

from unmask.kernels.add_norm import add_norm
from unmask.kernels.attention import attention
from unmask.kernels.checks import NonFiniteLogits
from unmask.kernels.dispatch import UnsupportedImplementation
from unmask.kernels.divergence import Divergence, divergence
from unmask.kernels.expected_embedding import expected_embedding
from unmask.kernels.offsets import Offsets
from unmask.kernels.sample_head import HeadSample, sample_head
from unmask.kernels.swiglu import swiglu

__all__ = [
    "Divergence",
    "HeadSample",
    "NonFiniteLogits",
    "Offsets",
    "UnsupportedImplementation",
    "add_norm",
    "attention",
    "divergence",
    "expected_embedding",
    "sample_head",
    "swiglu",
]
