"""unmask: exact, fast sampling from masked diffusion language models.

>>> import unmask
>>> sampler = unmask.Sampler(
...     {"heavy": unmask.load("sotu-heavy"), "light": unmask.load("sotu-light")},
...     schedule="light:12.5% heavy:75% light:12.5%",
...     reveal=unmask.Ancestral(steps=256),
... )
>>> samples = sampler.sample(num_samples=8, length=256, seed=0)
"""

from unmask import kernels
from unmask.adaptive import Confidence
from unmask.caching import Caching
from unmask.checkpoints import load, load_all
from unmask.choose import Categorical
from unmask.denoiser import Batch, Denoiser, DenoiserSpec, Head, LogitsDenoiser
from unmask.generate import generate
from unmask.kernels.checks import NonFiniteLogits
from unmask.live import wrap
from unmask.measure import calibrate
from unmask.plan import Plan
from unmask.remask import Remask, RemaskConfidence
from unmask.reveal import Ancestral, Blocks, FirstHitting, Fixed, Order
from unmask.sampler import Sampler
from unmask.samples import Sample, Samples
from unmask.schedule import Schedule
from unmask.work import Flops

__all__ = [
    "Ancestral",
    "Batch",
    "Blocks",
    "Caching",
    "Categorical",
    "Confidence",
    "Denoiser",
    "DenoiserSpec",
    "FirstHitting",
    "Fixed",
    "Flops",
    "Head",
    "LogitsDenoiser",
    "NonFiniteLogits",
    "Order",
    "Plan",
    "Remask",
    "RemaskConfidence",
    "Sample",
    "Sampler",
    "Samples",
    "Schedule",
    "calibrate",
    "generate",
    "kernels",
    "load",
    "load_all",
    "wrap",
]
