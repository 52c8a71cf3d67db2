"""expected_embedding by the compiled extension: fp32, bf16 and fp16, on torch's own threads."""

import torch

from unmask.kernels import extension
from unmask.kernels.expected_embedding.call import EmbeddingCall, Expectation


def refuses(call: EmbeddingCall) -> str | None:
    return extension.refuses(call.operands)


def expected_embedding(call: EmbeddingCall) -> Expectation:
    return on_isa("", call)


def on_isa(isa: str, call: EmbeddingCall) -> Expectation:
    """expected_embedding on one instruction set out of `_cpu.isas()`; the empty name is the fastest."""
    logits = extension.TemperedLogits(call.logits)
    embedding = torch.empty(call.logits.num_rows, call.table.shape[1])
    lse = torch.empty(call.logits.num_rows)
    extension._cpu.expected_embedding(
        logits=logits.arguments,
        table=extension.matrix(call.table),
        threads=torch.get_num_threads(),
        embedding=embedding.data_ptr(),
        lse=lse.data_ptr(),
        isa=isa,
    )
    return Expectation(embedding, lse)
