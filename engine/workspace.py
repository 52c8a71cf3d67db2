"""Every buffer of a run, allocated once."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Requirements = Mapping[str, tuple[int, torch.dtype]]


class Workspace:
    """Named flat buffers, shared by everything that runs one call at a time.

    `requirements` holds one mapping `name -> (number of elements, dtype)` for each user of the workspace. Users that
    ask for the same name share one buffer of the largest size asked for; asking for it with two dtypes is an error.
    The memory is not initialised, and what a buffer holds between two calls is nobody's to rely on.
    """

    def __init__(self, requirements: Iterable[Requirements], device: torch.device | str = "cpu"):
        merged: dict[str, tuple[int, torch.dtype]] = {}
        for requirement in requirements:
            for name, (numel, dtype) in requirement.items():
                known, known_dtype = merged.get(name, (0, dtype))
                if known_dtype is not dtype:
                    raise ValueError(f"buffer {name!r} must have one dtype, got {known_dtype} and {dtype}")
                merged[name] = (max(known, numel), dtype)
        self.device = torch.device(device)
        self._buffers = {name: torch.empty(n, dtype=dtype, device=device) for name, (n, dtype) in merged.items()}

    def view(self, name: str, *shape: int) -> Tensor:
        """The first elements of buffer `name` as a contiguous tensor of `shape`. No memory is allocated."""
        buffer = self._buffers.get(name)
        if buffer is None:
            raise KeyError(f"buffer {name!r} is not in this workspace, which holds {sorted(self._buffers)}")
        numel = math.prod(shape)
        if numel > buffer.numel():
            raise ValueError(
                f"buffer {name!r} holds {buffer.numel()} elements, got a request for {numel} as {list(shape)}; "
                "make the workspace with larger max_tokens, max_rows or max_batch"
            )
        return buffer[:numel].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers together."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def poison(self) -> None:
        """Fill every floating-point buffer with NaN, so that a read of memory nobody wrote shows. For tests."""
        for buffer in self._buffers.values():
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)
