"""A linear layer of a trunk, computed by the platform's library."""

from functools import cache

import torch
from torch import Tensor

# Of a result that oneDNN makes: the allocator takes larger ones (from 32 MB on) fresh from the system at each call, and
# a page fault for every 4 KB of them costs as much as the product of few columns.
_RESULT = 24 << 20  # bytes
_FEWEST_ROWS = 256


class Linear:
    """x @ weight.T + bias into a buffer. weight [out, in], bias [out] or None, in the dtype of x.

    On a CPU oneDNN does it for fp32 too, where torch.mm would ask MKL, which has but general code for processors that
    are not Intel's. The weight is laid out for it once, here. It makes its own result, which is copied; plain torch is
    used where it does not serve the dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        one_dnn = _one_dnn(weight.device.type, weight.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if one_dnn else weight
        self.bias = bias

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        return self._product(x, out, gelu=False)

    def split(self, sizes: list[int]) -> tuple["Linear", ...]:
        """Layers that give `sizes` columns each of this one's result. They share its weight where it is not laid out
        for oneDNN."""
        weight = self.weight.to_dense() if self.weight.is_mkldnn else self.weight
        biases = [None] * len(sizes) if self.bias is None else self.bias.split(sizes)
        return tuple(map(Linear, weight.split(sizes), biases))

    def gelu(self, x: Tensor, out: Tensor) -> Tensor:
        """gelu(x @ weight.T + bias) with the tanh approximation, by the product's epilogue where a library has one."""
        return self._product(x, out, gelu=True)

    def _product(self, x: Tensor, out: Tensor, gelu: bool) -> Tensor:
        if self.weight.is_mkldnn:
            epilogue = ("gelu", [], "tanh") if gelu else ("none", [], "")
            step = max(_FEWEST_ROWS, _RESULT // (self.weight.shape[0] * x.element_size()))
            for rows, written in zip(x.split(step), out.split(step), strict=True):
                written.copy_(torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, *epilogue))
            return out
        if gelu and x.is_cuda and self.bias is not None:
            # cuBLASLt's epilogue; on a GPU, and only there, torch means the tanh approximation by this.
            return torch.ops.aten._addmm_activation.out(self.bias, x, self.weight.t(), use_gelu=True, out=out)
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)
        return torch.ops.aten.gelu_(out, approximate="tanh") if gelu else out


class SideBySide:
    """Layers that read the same rows, each with a weight of its own: their results are the columns of one, in order."""

    def __init__(self, layers: tuple[Linear, ...]) -> None:
        self.layers = layers

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        for layer, columns in zip(self.layers, out.split([len(each.weight) for each in self.layers], 1), strict=True):
            layer(x, out=columns)
        return out


@cache
def _one_dnn(device: str, dtype: torch.dtype) -> bool:
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
