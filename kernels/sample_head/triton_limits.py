"""What the Triton kernels of sample_head serve; importable without Triton."""

import torch

from unmask.kernels.checks import short
from unmask.kernels.dispatch import interpreted
from unmask.kernels.sample_head.call import HeadCall

_DTYPES = torch.float32, torch.bfloat16, torch.float16


def refuses(call: HeadCall) -> str | None:
    needed = "cpu" if interpreted() else "cuda"
    if call.hidden.device.type != needed:
        return f"needs {needed.upper()} tensors, got {call.hidden.device}"
    if call.hidden.dtype not in _DTYPES:
        return f"needs hidden in float32, bfloat16 or float16, got {short(call.hidden.dtype)}"
    if call.weight is not None:
        fitting = _DTYPES if call.hidden.dtype == torch.float32 else (call.hidden.dtype,)
        if call.weight.dtype not in fitting:
            return f"needs weight in {' or '.join(map(short, fitting))} for this hidden, got {short(call.weight.dtype)}"
    if call.offset is not None and call.offset.dtype == torch.float64:
        return "needs bias narrower than float64"
    return None
