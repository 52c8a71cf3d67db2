"""The dtype of weights and activations: its names, and which one is the faster on this machine."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from unmask.timing import in_turns

DTYPES = (torch.float32, torch.bfloat16)
AUTO = "auto"


@dataclass(frozen=True)
class Choice:
    """The faster dtype, and the seconds that each took."""

    seconds: Mapping[torch.dtype, float]

    @property
    def dtype(self) -> torch.dtype:
        return min(self.seconds, key=self.seconds.__getitem__)

    def __str__(self) -> str:
        (other,) = self.seconds.keys() - {self.dtype}
        taken, instead = (f"{self.seconds[dtype] * 1e3:.3g} ms" for dtype in (self.dtype, other))
        return f"dtype {short(self.dtype)}: a block takes {taken}, {instead} in {short(other)}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parse(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype that is meant by itself or its name; None is "auto", the faster. Raises ValueError for another."""
    name, known = short(dtype), {short(one): one for one in DTYPES}
    if name != AUTO and name not in known:
        raise ValueError(f"dtype must be {', '.join(known)} or {AUTO}, got {name!r}")
    return known.get(name)


def faster(
    runs: Mapping[torch.dtype, Callable[[], object]], *, device: torch.device | str = "cpu", min_rounds: int = 3
) -> Choice:
    """Runs the same work in both dtypes, in turns for about half a second; their medians decide."""
    taken = in_turns(runs, seconds=0.5, device=device, min_rounds=min_rounds)
    return Choice({dtype: statistics.median(seconds) for dtype, seconds in taken.items()})
