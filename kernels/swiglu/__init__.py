"""swiglu: the gated activation between two products of a transformer's MLP. Meaning, checks, dispatch."""

import torch
from torch import Tensor

from unmask.kernels import checks, extension
from unmask.kernels.dispatch import Implementation, Operator, triton_implementation
from unmask.kernels.logits import triton_refuses
from unmask.kernels.swiglu import cpu, reference
from unmask.kernels.swiglu.call import SwigluCall

_NARROW = torch.float32, torch.bfloat16, torch.float16

OPERATOR = Operator(
    "swiglu",
    (
        triton_implementation("swiglu", lambda call: triton_refuses({"gate_up": call.gate_up})),
        Implementation("cpu", cpu.swiglu, extension.status, cpu.refuses),
        Implementation("reference", reference.swiglu, lambda: (True, "plain torch, any device")),
    ),
)


@torch.no_grad()
def swiglu(gate_up: Tensor, *, out: Tensor | None = None, impl: str | None = None) -> Tensor:
    """silu(gate) * up, where silu(x) = x / (1 + exp(-x)) (Shazeer, arXiv 2002.05202); returns out.

    gate_up  [T, 2 M] fp32, bf16 or fp16, columns contiguous: M columns of gate, then M of up
    out      [T, M] fp32, bf16 or fp16, columns contiguous, no memory of gate_up; None: a new tensor in its dtype
    impl     "triton", "cpu", "reference", or None for the fastest that serves these arguments

    All arithmetic is fp32, the result is rounded once. TypeError or ValueError names a bad argument; nothing is written
    then.
    """
    checks.check_tensor("gate_up", gate_up, ("T", "2 M"), _NARROW)
    num_rows, columns = gate_up.shape
    if columns % 2 or not columns:
        raise ValueError(f"gate_up must have an even, positive number of columns, got shape {list(gate_up.shape)}")
    if out is None:
        out = gate_up.new_empty(num_rows, columns // 2)
    checks.check_tensor("out", out, ("T", "M"), _NARROW, gate_up.device, "gate_up")
    if out.shape != (num_rows, columns // 2):
        raise ValueError(f"out must be {[num_rows, columns // 2]} for this gate_up, got shape {list(out.shape)}")
    for name, x in (("gate_up", gate_up), ("out", out)):
        if x.shape[1] > 1 and x.stride(1) != 1:
            raise ValueError(f"{name} must have contiguous columns, got strides {x.stride()}")
    checks.check_apart("out", out)
    # Without a compiler the registered operator would only add its dispatch, a hundred microseconds.
    answer = _registered if torch.compiler.is_compiling() else _answer
    answer(gate_up, out, impl)
    return out


def _answer(gate_up: Tensor, out: Tensor, impl: str | None) -> None:
    """The pick and the run: one opaque operator to torch.compile."""
    call = SwigluCall(gate_up, out)
    run = OPERATOR.pick(impl, call).run
    if len(gate_up):
        run(call)


_registered = torch.library.custom_op("unmask::swiglu", _answer, mutates_args=("out",))


@_registered.register_fake
def _(*arguments):
    return None
