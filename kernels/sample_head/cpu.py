"""sample_head by the compiled extension: fp32 and bf16, on torch's own threads."""

import torch
from torch import Tensor

from unmask.kernels.sample_head.call import HeadCall, HeadSample

try:
    import unmask.kernels._cpu as _cpu
except ImportError as error:
    _cpu, _missing = None, error

_DTYPES = torch.float32, torch.bfloat16


def status() -> tuple[bool, str]:
    if _cpu is None:
        how = "UNMASK_CPU=1 pip install . (or -e .) builds it and needs GCC or Clang"
        return False, f"the compiled extension unmask.kernels._cpu is missing ({_missing}); {how}"
    return True, f"compiled extension, {_cpu.isas()[0]}"


def refuses(call: HeadCall) -> str | None:
    if call.hidden.device.type != "cpu":
        return f"needs CPU tensors, got {call.hidden.device}"
    for name, tensor in (("hidden", call.hidden), ("weight", call.weight)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"needs {name} in float32 or bfloat16, got {str(tensor.dtype).removeprefix('torch.')}"
    if call.weight is not None and call.weight.stride(1) != 1 and call.weight.shape[1] > 1:
        return f"needs the columns of weight contiguous, got strides {call.weight.stride()}"
    if isinstance(call.temperature, Tensor) or call.allow is not None:
        return "needs one temperature, no allow"
    if call.top_k is not None or call.top_p is not None or set(call.want) - {"logprob", "lse"}:
        return "serves no top_k, no top_p and no more than logprob and lse"
    return None


def sample_head(call: HeadCall) -> HeadSample:
    return on_isa("", call)


def on_isa(isa: str, call: HeadCall) -> HeadSample:
    """sample_head on one instruction set out of `_cpu.isas()`; the empty name is the fastest."""
    offset = None if call.offset is None else call.offset.float().contiguous()
    rows = None if call.rows is None else call.rows.contiguous()
    keys = call.keys.contiguous()
    tokens = torch.empty(call.num_rows, dtype=torch.int64)
    logprob, lse = torch.empty(call.num_rows), torch.empty(call.num_rows)
    _cpu.sample_head(
        hidden=_matrix(call.hidden),
        weight=None if call.weight is None else _matrix(call.weight),
        rows=0 if rows is None else rows.data_ptr(),
        num_rows=call.num_rows,
        offset=0 if offset is None else offset.data_ptr(),
        keys=keys.data_ptr(),
        seed=call.seed,
        temperature=call.temperature,
        threads=torch.get_num_threads(),
        tokens=tokens.data_ptr(),
        logprob=logprob.data_ptr(),
        lse=lse.data_ptr(),
        isa=isa,
    )
    call.scatter(tokens)
    return HeadSample(tokens, logprob, lse)


def _matrix(tensor: Tensor) -> tuple[int, str, tuple[int, ...], tuple[int, ...]]:
    strides = tensor.stride() if tensor.shape[1] > 1 else (tensor.stride(0), 1)
    return tensor.data_ptr(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), strides
