"""A checkpoint's tensors on their way into a trunk."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.dtype import DTYPES
from unmask.models.linear import Linear, SideBySide


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor | None = None


class Weights:
    """Reads tensors by name, one at a time: matrices in `dtype`, vectors of norms in fp32, all on `device`.

    Copies them, unless `share`: then tensors that have their dtype and device already are used as they are, and on a
    GPU matrices that read the same rows are left apart (`SideBySide`). transposed: matrices are stored [in, out].
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        share: bool = False,
        transposed: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {[str(d) for d in DTYPES]}, got {dtype}")
        self.tensors, self.dtype, self.device = tensors, dtype, torch.empty(0, device=device).device
        self.share, self.transposed = share, transposed

    def matrix(self, name: str) -> Tensor:
        """As stored, in `dtype`."""
        return self._placed(name, self.dtype)

    def norm(self, name: str) -> Norm:
        """`name`.weight and, where there is one, `name`.bias."""
        bias = f"{name}.bias"
        weight = self._placed(f"{name}.weight", torch.float32)
        return Norm(weight, self._placed(bias, torch.float32) if bias in self.tensors else None)

    def linear(self, *names: str) -> Linear | SideBySide:
        """One layer that gives the columns of all the named ones, side by side."""
        if self.share and self.device.type == "cuda" and all(map(self._is_placed, names)):
            return SideBySide(tuple(Linear(self._stored(name), self._bias(name)) for name in names))
        return self.split(names, (1,))[0]

    def split(self, names: tuple[str, ...], shares: tuple[int, ...]) -> tuple[Linear, ...]:
        """The columns of all the named layers, cut in the proportion of `shares` into layers of their own."""
        weights = [self._stored(name) for name in names]
        fused = self._joined(weights)
        biases = [bias for name in names if (bias := self._bias(name)) is not None]
        sizes = [len(fused) * share // sum(shares) for share in shares]
        bias = torch.cat(biases).split(sizes) if biases else [None] * len(sizes)
        return tuple(map(Linear, fused.split(sizes), bias))
