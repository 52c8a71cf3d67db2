"""What this machine can do: bytes per second through memory and FLOPs per second in a large product, measured.

Ceilings are taken from the quicker runs, the 20th percentile: what disturbs a run only lowers it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.timing import Effort, Flush, clock, interleave
from unmask.models.linear import Linear

_COPY_BYTES = 2 << 30
_PRODUCT = {"cpu": 1536, "cuda": 8192}


@dataclass(frozen=True)
class Ceilings:
    """`bandwidth`: bytes/s of the fastest operation `by`; on a GPU a copy, read and written bytes counted; on a CPU one
    that only reads, as streaming weights does, with none of them in the cache. `product`: FLOP/s of a square product.
    """

    device: str
    dtype: str
    num_bytes: int
    bandwidth: float
    by: str
    product: float

    def floor(self, num_bytes: int, flops: int) -> float:
        """Seconds that moving these bytes and computing these FLOPs take at least, each overlapping the other."""
        return max(num_bytes / self.bandwidth, flops / self.product)


def measure(device: torch.device, dtype: torch.dtype, num_bytes: int, effort: Effort) -> Ceilings:
    """Ceilings for weights of this type and size (on a GPU, the bandwidth of a copy of 2 GiB)."""
    rates = copying(device, effort) if device.type == "cuda" else reading(num_bytes, effort)
    by = max(rates, key=rates.get)
    name = str(dtype).removeprefix("torch.")
    return Ceilings(device.type, name, num_bytes, rates[by], by, product(device, dtype, effort))


def readers(buffer: Tensor) -> dict[str, Callable[[], object]]:
    """Operations that read every byte of a contiguous CPU buffer once and write next to nothing."""
    words = buffer.flatten().view(torch.float32)
    table = words[: len(words) // 1024 * 1024].view(-1, 1024)
    vector = torch.randn(1024)
    return {
        "sum": words.sum,
        "maximum": words.amax,
        "dot": lambda: torch.dot(words, words),
        "matrix-vector product": lambda: table @ vector,
    }


def reading(num_bytes: int, effort: Effort) -> dict[str, float]:
    buffer = torch.randn(max(num_bytes // 4, 1024))
    flush = Flush(buffer.device)
    timings = interleave(readers(buffer), clock(buffer.device), effort, before=lambda name: flush())
    return {name: buffer.nbytes / timing.p20 for name, timing in timings.items()}


def copying(device: torch.device, effort: Effort) -> dict[str, float]:
    source = torch.randn(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, clock(device), effort)["copy"]
    return {"copy": 2 * source.nbytes / timing.p20}


def product(device: torch.device, dtype: torch.dtype, effort: Effort) -> float:
    """Of torch's own product or of the library that `Linear` asks on a CPU, whichever is faster there."""
    size = _PRODUCT[device.type]
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    variants = {"torch": lambda: torch.mm(a, b, out=out), "linear": lambda: Linear(b)(a, out)}
    timings = interleave(variants, clock(device), effort)
    return 2 * size**3 / min(timing.p20 for timing in timings.values())
