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
    """Reads tensors by name, one layer at a time: matrices in `dtype`, norms in fp32, all on `device`.

    They are copied, unless `share`: then what has its dtype and device already is used as it is, and on a GPU layers
    that read the same rows keep their own matrices. transposed: matrices of layers are stored [in, out].
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
        self.device = torch.empty(0, device=device).device  # with its index: "cuda" is then "cuda:0"
        self._tensors, self._dtype, self._share, self._transposed = tensors, dtype, share, transposed

    def matrix(self, name: str) -> Tensor | None:
        """As it is stored, in `dtype`; None where there is none."""
        return self._placed(self._tensors[name], self._dtype) if name in self._tensors else None

    def norm(self, name: str) -> Norm | None:
        """`name`.weight and `name`.bias; None where there is none."""
        found = [self._tensors.get(f"{name}.{kind}") for kind in Norm._fields]
        if found[0] is None:
            return None
        return Norm(*(None if tensor is None else self._placed(tensor, torch.float32) for tensor in found))

    def linear(self, *names: str, columns: slice = slice(None)) -> Linear | SideBySide:
        """One layer whose result has the columns of all the named ones, or some of them, side by side."""
        matrices = [self._tensors[f"{name}.weight"] for name in names]
        matrices = [(matrix.t() if self._transposed else matrix)[columns] for matrix in matrices]
        biases = [self._tensors.get(f"{name}.bias") for name in names]
        biases = [None if bias is None else self._placed(bias[columns], self._dtype) for bias in biases]
        if self._share and self.device.type == "cuda" and all(map(self._is_placed, matrices)):
            return SideBySide(tuple(map(Linear, matrices, biases)))
        sizes = [len(matrix) for matrix in matrices]
        fused = torch.empty(sum(sizes), matrices[0].shape[1], dtype=self._dtype, device=self.device)
        for part, matrix in zip(fused.split(sizes), matrices, strict=True):
            part.copy_(matrix)
        return Linear(fused, None if biases[0] is None else torch.cat(biases))

    def _placed(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(self.device, dtype, copy=not self._share).contiguous()

    def _is_placed(self, tensor: Tensor) -> bool:
        return tensor.device == self.device and tensor.dtype is self._dtype
