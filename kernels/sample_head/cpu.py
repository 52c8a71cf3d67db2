"""sample_head by the compiled extension: fp32, bf16 and fp16, on torch's own threads."""

import torch

from unmask.kernels import extension
from unmask.kernels.sample_head.call import HeadCall, HeadSample


def refuses(call: HeadCall) -> str | None:
    return extension.refuses({"hidden": call.hidden, "weight": call.weight, "bias": call.offset})


def sample_head(call: HeadCall) -> HeadSample:
    return on_isa("", call)


def on_isa(isa: str, call: HeadCall) -> HeadSample:
    """sample_head on one instruction set out of `_cpu.isas()`; the empty name is the fastest."""
    dtypes = {"tokens": torch.int64, "argmax": torch.int64}
    given = "tokens", "logprob", "lse", *call.want
    outputs = {name: torch.empty(call.num_rows, dtype=dtypes.get(name, torch.float32)) for name in given}
    logits, keys, allow = extension.TemperedLogits(call), call.keys.contiguous(), call.allow
    if allow is not None and allow.stride(1) != 1:
        allow = allow.contiguous()
    extension._cpu.sample_head(
        logits=logits.arguments,
        allow=(0, 0) if allow is None else (allow.data_ptr(), allow.stride(0)),
        keys=keys.data_ptr(),
        seed=call.seed,
        top_k=call.top_k or 0,
        top_p=call.top_p or 1.0,
        threads=torch.get_num_threads(),
        isa=isa,
        **{name: extension.address(outputs.get(name)) for name in HeadSample._fields},
    )
    call.scatter(outputs["tokens"])
    return HeadSample(**outputs)
