"""sample_head by the compiled extension: fp32 and bf16, on torch's own threads."""

import torch
from torch import Tensor

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


def refuses(hidden: Tensor, weight: Tensor | None) -> str | None:
    if hidden.device.type != "cpu":
        return f"needs CPU tensors, got {hidden.device}"
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"needs {name} in float32 or bfloat16, got {str(tensor.dtype).removeprefix('torch.')}"
    if weight is not None and weight.stride(1) != 1 and weight.shape[1] > 1:
        return f"needs the columns of weight contiguous, got strides {weight.stride()}"
    return None


def sample_head(
    hidden: Tensor, weight: Tensor | None, offset: Tensor | None, keys: Tensor, seed: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as the operator's, with bias and forbid merged into `offset`. Returns tokens, logprob, lse."""
    return on_isa("", hidden, weight, offset, keys, seed, temperature)


def on_isa(
    isa: str,
    hidden: Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    keys: Tensor,
    seed: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """sample_head on one instruction set out of `_cpu.isas()`; the empty name is the fastest."""
    offset = None if offset is None else offset.float().contiguous()
    keys = keys.contiguous()
    tokens = torch.empty(len(hidden), dtype=torch.int64)
    logprob, lse = torch.empty(2, len(hidden))
    _cpu.sample_head(
        hidden=_matrix(hidden),
        weight=None if weight is None else _matrix(weight),
        offset=0 if offset is None else offset.data_ptr(),
        keys=keys.data_ptr(),
        seed=seed,
        temperature=temperature,
        threads=torch.get_num_threads(),
        tokens=tokens.data_ptr(),
        logprob=logprob.data_ptr(),
        lse=lse.data_ptr(),
        isa=isa,
    )
    return tokens, logprob, lse


def _matrix(tensor: Tensor) -> tuple[int, str, tuple[int, ...], tuple[int, ...]]:
    strides = tensor.stride() if tensor.shape[1] > 1 else (tensor.stride(0), 1)
    return tensor.data_ptr(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), strides
