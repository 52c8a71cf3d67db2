"""add_norm: what lies between two products of a transformer, in one pass over memory. Meaning, checks, dispatch."""

import torch
from torch import Tensor

from unmask.kernels import checks, extension, offsets
from unmask.kernels.add_norm import cpu, reference
from unmask.kernels.add_norm.call import AddNormCall
from unmask.kernels.dispatch import Implementation, Operator, triton_implementation
from unmask.kernels.logits import triton_refuses
from unmask.kernels.offsets import Counts, Offsets

_NARROW = torch.float32, torch.bfloat16, torch.float16
MAX_COLUMNS = 8192  # of Triton, which holds a row in registers


def _triton_refuses(call: AddNormCall) -> str | None:
    dim = call.residual.shape[1]
    if dim > MAX_COLUMNS:
        return f"needs at most {MAX_COLUMNS} columns, got {dim}"
    return triton_refuses({"residual": call.residual})


OPERATOR = Operator(
    "add_norm",
    (
        triton_implementation("add_norm", _triton_refuses),
        Implementation("cpu", cpu.add_norm, extension.status, cpu.refuses),
        Implementation("reference", reference.add_norm, lambda: (True, "plain torch, any device")),
    ),
)


@torch.no_grad()
def add_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    row_counts: tuple[int, ...] | Offsets | None = None,
    eps: float = 1e-5,
    rms: bool = False,
    out: Tensor,
    impl: str | None = None,
) -> Tensor:
    """residual += gate * delta, then out = (norm(residual) * weight + bias) * (1 + scale) + shift; returns out.

    norm(x) is (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps), the layer norm, or with `rms` x / sqrt(mean(x²) + eps)
    (Zhang and Sennrich, arXiv:1910.07467).

    residual            fp32 [T, D], D contiguous, updated in place
    delta               [T, D] fp32, bf16 or fp16, D contiguous; None: nothing is added
    weight, bias        fp32 [D] of the norm; bias may be None, and with `rms` must be
    gate, shift, scale  fp32 [B, D], D contiguous, by sequence, or None: 1, 0, 0
    row_counts          rows of each of the B sequences, back to back, their sum is T; or Offsets, which may end before
                        T; given exactly when one of those three is
    eps                 added to the variance, or to the mean square
    rms                 whether the norm leaves the mean where it is
    out                 [T, D] fp32, bf16 or fp16, D contiguous; it may be delta itself
    impl                "triton", "cpu", "reference", or None for the fastest that serves these arguments

    All arithmetic is fp32, the result is rounded once. A row's bits do not depend on the other rows in the
    implementations "triton" and "cpu". Rows past the end of the Offsets are neither read nor written; the values of
    Offsets are checked on a CPU, and a GPU is not waited for, except by "reference". A CUDA graph can capture a call
    with Offsets or equal numbers; unequal numbers are copied to the GPU first. TypeError or ValueError names a bad
    argument; nothing is written then.
    """
    checks.check_tensor("residual", residual, ("T", "D"), (torch.float32,))
    for name, x in (("delta", delta), ("out", out)):
        if x is not None or name == "out":
            checks.check_tensor(name, x, ("T", "D"), _NARROW, residual.device)
            if x.shape != residual.shape:
                raise ValueError(f"{name} must be {list(residual.shape)} as residual, got shape {list(x.shape)}")
    dim = residual.shape[1]
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None or name == "weight":
            checks.check_tensor(name, x, ("D",), (torch.float32,), residual.device)
            if len(x) != dim:
                raise ValueError(f"{name} must be [{dim}], one number per column, got shape {list(x.shape)}")
    vectors = {"gate": gate, "shift": shift, "scale": scale}
    row_counts = _check_vectors(vectors, row_counts, residual)
    if gate is not None and delta is None:
        raise ValueError("gate must be None when delta is None, got a tensor")
    if rms and bias is not None:
        raise ValueError("bias must be None with rms=True, got a tensor")
    rows = {"residual": residual, "delta": delta, "out": out, **vectors}
    for name, x in rows.items():
        if x is not None and x.shape[1] > 1 and x.stride(1) != 1:
            raise ValueError(f"{name} must have contiguous columns, got strides {x.stride()}")
    for name in ("residual", "out"):
        checks.check_apart(name, rows[name])
    eps = checks.check_number("eps", eps, low=0)
    # Without a compiler the registered operator would only add its dispatch, a hundred microseconds.
    answer = _registered if torch.compiler.is_compiling() else _answer
    answer(residual, delta, weight, bias, gate, shift, scale, *offsets.split(row_counts), eps, rms, out, impl)
    return out


def _answer(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    row_counts: list[int] | None,
    starts: Tensor | None,
    longest: int,
    eps: float,
    rms: bool,
    out: Tensor,
    impl: str | None,
) -> None:
    """The checks that look at values, the pick and the run: one opaque operator to torch.compile."""
    counts = offsets.join(row_counts, starts, longest)
    call = AddNormCall(residual, delta, weight, bias, gate, shift, scale, counts, eps, out, rms)
    if residual.device.type == "cpu":
        call = call.counted()
    run = OPERATOR.pick(impl, call).run
    if call.residual.numel():
        run(call)


_registered = torch.library.custom_op("unmask::add_norm", _answer, mutates_args=("residual", "out"))


@_registered.register_fake
def _(*arguments):
    return None


def _check_vectors(vectors: dict[str, Tensor | None], row_counts: Counts | None, residual: Tensor) -> Counts | None:
    given = {name: x for name, x in vectors.items() if x is not None}
    if not given:
        if row_counts is not None:
            raise ValueError(f"row_counts must be None without gate, shift and scale, got {row_counts}")
        return None
    if row_counts is None:
        raise ValueError(f"row_counts must be given with {' and '.join(given)}, got None")
    row_counts = offsets.check_counts("row_counts", row_counts, residual, "rows of residual")
    num_sequences = offsets.num_sequences(row_counts)
    for name, x in given.items():
        checks.check_tensor(name, x, ("B", "D"), (torch.float32,), residual.device)
        if x.shape != (num_sequences, residual.shape[1]):
            raise ValueError(f"{name} must be [{num_sequences}, {residual.shape[1]}], got shape {list(x.shape)}")
    return row_counts
