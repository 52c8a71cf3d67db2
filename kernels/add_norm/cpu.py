"""add_norm by the compiled extension, on torch's own threads."""

import torch

from unmask.kernels import extension
from unmask.kernels.add_norm.call import AddNormCall

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def refuses(call: AddNormCall) -> str | None:
    if call.residual.device.type != "cpu":
        return f"needs CPU tensors, got {call.residual.device}"
    for name, x in (("delta", call.delta), ("out", call.out)):
        if x is not None and x.dtype not in _DTYPES:
            return f"needs {name} in float32 or bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    return None


def add_norm(call: AddNormCall) -> None:
    on_isa("", call)


def on_isa(isa: str, call: AddNormCall) -> None:
    """add_norm on one instruction set out of `extension._cpu.isas()`; the empty name is the fastest."""
    weight, bias = (None if x is None else x.contiguous() for x in (call.weight, call.bias))
    extension._cpu.add_norm(
        residual=_matrix(call.residual),
        delta=_matrix(call.delta),
        out=_matrix(call.out),
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        gate=_matrix(call.gate),
        shift=_matrix(call.shift),
        scale=_matrix(call.scale),
        row_counts=call.row_counts or (len(call.residual),),
        eps=call.eps,
        rms=call.rms,
        threads=torch.get_num_threads(),
        isa=isa,
    )


def _matrix(x: torch.Tensor | None) -> tuple[int, str, tuple[int, int], tuple[int, int]] | None:
    return None if x is None else (x.data_ptr(), _DTYPES[x.dtype], tuple(x.shape), (x.stride(0), 1))
