"""attention by the compiled extension: fp32 and bf16, on torch's own threads."""

import torch

from unmask.kernels import extension
from unmask.kernels.attention.call import AttentionCall

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def status() -> tuple[bool, str]:
    usable, reason = extension.status()
    return usable, reason + ("; on request only, without AVX-512 torch's own is as fast" if slower_than_torch() else "")


def slower_than_torch() -> bool:
    return extension._cpu is not None and not extension._cpu.isas()[0].startswith("avx512")


def refuses(call: AttentionCall) -> str | None:
    if call.query.device.type != "cpu":
        return f"needs CPU tensors, got {call.query.device}"
    if call.query.dtype not in _DTYPES:
        return f"needs float32 or bfloat16, got {str(call.query.dtype).removeprefix('torch.')}"
    return None


def attention(call: AttentionCall) -> None:
    on_isa("", call)


def on_isa(isa: str, call: AttentionCall) -> None:
    """attention on one instruction set out of `extension._cpu.isas()`; the empty name is the fastest."""
    cos, sin = (None, None) if call.rope is None else (table.contiguous() for table in call.rope)
    positions = None if call.positions is None else call.positions.contiguous()
    heads = {name: _heads(getattr(call, name)) for name in ("query", "key", "value", "out")}
    extension._cpu.attention(
        **heads,
        type=_DTYPES[call.query.dtype],
        shape=(call.query.shape[1], call.key.shape[1], call.query.shape[2]),
        scale=call.scale,
        block=call.block or 0,
        lengths=call.lengths,
        row_counts=call.row_counts,
        cos=0 if cos is None else cos.data_ptr(),
        sin=0 if sin is None else sin.data_ptr(),
        positions=0 if positions is None else positions.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )


def _heads(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)
