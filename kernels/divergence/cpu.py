"""divergence by the compiled extension: fp32, bf16 and fp16, on torch's own threads."""

import torch

from unmask.kernels import extension
from unmask.kernels.divergence.call import Comparison, DivergenceCall


def refuses(call: DivergenceCall) -> str | None:
    return extension.refuses(call.operands)


def divergence(call: DivergenceCall) -> Comparison:
    return on_isa("", call)


def on_isa(isa: str, call: DivergenceCall) -> Comparison:
    """divergence on one instruction set out of `_cpu.isas()`; the empty name is the fastest."""
    a, b = extension.TemperedLogits(call.a), extension.TemperedLogits(call.b)
    results = Comparison(*(torch.empty(call.a.num_rows) for _ in Comparison._fields))
    extension._cpu.divergence(
        a=a.arguments,
        b=b.arguments,
        threads=torch.get_num_threads(),
        **{name: tensor.data_ptr() for name, tensor in results._asdict().items()},
        isa=isa,
    )
    return results
