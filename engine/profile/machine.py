"""What this machine can do, and what it has been used for: the largest product rate, the high-water mark of memory."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from unmask.measure import prepare
from unmask.timing import in_turns
from unmask.work import Product

SIZE = {"cpu": 1536, "cuda": 8192}  # of the square product; a larger one is no faster
SECONDS = 0.5
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product, computed as the layers of a network are. The quickest fifth of the runs: what else
    goes on here only makes them slower."""
    size = SIZE[device.type]
    product = Product(size, size, size)
    taken = in_turns({product: prepare(product, device, dtype)}, seconds=SECONDS, device=device)[product]
    return product.flops / taken[len(taken) // 5]


@dataclass(frozen=True)
class HighWater:
    """Bytes of memory: resident before a run and at most while it went on, None where the system does not tell;
    allocated at most by torch on a GPU, weights included, None elsewhere."""

    resident_before: int | None
    resident_peak: int | None
    device_peak: int | None


class MemoryWatch:
    """Measures the high-water mark from here on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with suppress(OSError):  # it is then the peak of the whole process
            _RESET.write_text("5")
        self._before = _resident("VmRSS")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> HighWater:
        allocated = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None
        # Linux counts pages in batches by thread: the two figures may be some pages behind each other.
        peak = max((each for each in (self._before, _resident("VmHWM")) if each is not None), default=None)
        return HighWater(self._before, peak, allocated)


def _resident(field: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) << 10
    except (OSError, StopIteration):
        return None
