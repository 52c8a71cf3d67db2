"""swiglu by the compiled extension, on torch's own threads."""

import torch

from unmask.kernels import extension
from unmask.kernels.checks import short
from unmask.kernels.swiglu.call import SwigluCall

_DTYPES = torch.float32, torch.bfloat16


def refuses(call: SwigluCall) -> str | None:
    if call.gate_up.device.type != "cpu":
        return f"needs CPU tensors, got {call.gate_up.device}"
    for name, x in (("gate_up", call.gate_up), ("out", call.out)):
        if x.dtype not in _DTYPES:
            return f"needs {name} in float32 or bfloat16, got {short(x.dtype)}"
    return None


def swiglu(call: SwigluCall) -> None:
    on_isa("", call)


def on_isa(isa: str, call: SwigluCall) -> None:
    """swiglu on one instruction set out of `extension._cpu.isas()`; the empty name is the fastest."""
    extension._cpu.swiglu(
        gate_up=extension.matrix(call.gate_up),
        out=extension.matrix(call.out),
        threads=torch.get_num_threads(),
        isa=isa,
    )
