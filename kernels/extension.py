"""The compiled extension unmask.kernels._cpu as the operators see it: whether it is there, what it reads, how."""

import torch
from torch import Tensor

from unmask.kernels.checks import short
from unmask.kernels.logits import Logits

try:
    import unmask.kernels._cpu as _cpu
except ImportError as error:
    _cpu, _missing = None, error

_DTYPES = torch.float32, torch.bfloat16, torch.float16


def status() -> tuple[bool, str]:
    if _cpu is None:
        how = "UNMASK_CPU=1 pip install . (or -e .) builds it and needs GCC or Clang"
        return False, f"the compiled extension unmask.kernels._cpu is missing ({_missing}); {how}"
    return True, f"compiled extension, {_cpu.isas()[0]}"


def refuses(operands: dict[str, Tensor | None]) -> str | None:
    """Why the extension cannot read these operands, or None. A bias may have any dtype but fp64: it is widened here."""
    for name, tensor in operands.items():
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"needs CPU tensors, got {name} on {tensor.device}"
        if name.startswith("bias"):
            if tensor.dtype == torch.float64:
                return f"needs {name} narrower than float64"
        elif tensor.dtype not in _DTYPES:
            return f"needs {name} in float32, bfloat16 or float16, got {short(tensor.dtype)}"
        if name.startswith("weight") and tensor.stride(1) != 1 and tensor.shape[1] > 1:
            return f"needs the columns of {name} contiguous, got strides {tensor.stride()}"
    return None


class TemperedLogits:
    """Logits, or any call with their fields, as the extension takes them; owns what its addresses point to."""

    def __init__(self, logits: Logits):
        temperature = torch.as_tensor(logits.temperature, dtype=torch.float32)
        self._offset = None if logits.offset is None else logits.offset.float().contiguous()
        self._rows = None if logits.rows is None else logits.rows.contiguous()
        self._temperature = temperature.expand(logits.num_rows).contiguous()
        self.arguments = (
            matrix(logits.hidden),
            None if logits.weight is None else matrix(logits.weight),
            address(self._rows),
            logits.num_rows,
            address(self._offset),
            address(self._temperature),
        )


def matrix(tensor: Tensor) -> tuple[int, str, tuple[int, ...], tuple[int, ...]]:
    strides = tensor.stride() if tensor.shape[1] > 1 else (tensor.stride(0), 1)
    return tensor.data_ptr(), short(tensor.dtype), tuple(tensor.shape), strides


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
