"""divergence: how far the law of one model is from that of another, row by row. Meaning, checks, dispatch."""

from typing import Protocol

import torch
from torch import Tensor

from unmask.kernels import checks, extension
from unmask.kernels.checks import NonFiniteLogits
from unmask.kernels.dispatch import Implementation, Operator, triton_implementation
from unmask.kernels.divergence import cpu, reference
from unmask.kernels.divergence.call import Divergence, DivergenceCall
from unmask.kernels.logits import Logits, triton_refuses

OPERATOR = Operator(
    "divergence",
    (
        triton_implementation("divergence", lambda call: triton_refuses(call.operands)),
        Implementation("cpu", cpu.divergence, extension.status, cpu.refuses),
        Implementation("reference", reference.divergence, lambda: (True, "plain torch, any device")),
    ),
)


class Head(Protocol):
    """Anything that has a head's weight [V, D] or None and its bias [V] or None, such as `unmask.Head`."""

    weight: Tensor | None
    bias: Tensor | None


@torch.no_grad()
def divergence(
    hidden_a: Tensor,
    head_a: tuple[Tensor | None, Tensor | None] | Head,
    hidden_b: Tensor,
    head_b: tuple[Tensor | None, Tensor | None] | Head,
    *,
    temperature: float | Tensor = 1.0,
    forbid: Tensor | None = None,
    rows: Tensor | None = None,
    check: bool = True,
    impl: str | None = None,
) -> Divergence:
    """KL(a || b), cross-entropy H(a, b) = -sum p_a log p_b and entropy H(a) of each row, without storing the logits.

    p_x = softmax((hidden_x @ weight_x.T + bias_x) / temperature). In nats; cross_entropy is kl + entropy.

    hidden_a, hidden_b  [N, D_a] and [N, D_b], fp32, bf16, fp16 or fp64: rows of two models for the same positions
    head_a, head_b      (weight [V, D_x], bias [V] or None), or an object with these two attributes; an id whose bias is
                        -inf is impossible. weight None: hidden_x [N, V] holds the logits themselves
    temperature         divides all logits, one number or fp32 [R], above 0
    forbid              int64 [K] ids left out of both laws, the mask id for one, or None
    rows                int64 [R], row r compares hidden_a[rows[r]] with hidden_b[rows[r]]; None: every row, R = N
    check               raise for a bad row, which waits for the device. False: it is NaN in all three
    impl                "triton", "cpu", "reference", or None for the fastest that serves these arguments

    An id that is impossible under b (logit -inf) and not under a makes kl and cross_entropy +inf; one that is
    impossible under a adds nothing. kl is a sum of terms that are not negative, and 0 for equal logits, so that a small
    divergence keeps its leading digits: where logits are right to eta (1e-7 of the largest for given ones, about 2e-6
    for fp32 sums), kl is right to eta * sqrt(2 kl) + eta**2 + (eta + 2e-6) * kl. All is in fp32, or in fp64 if an input
    is fp64.

    A row's bits do not depend on the other rows in the implementations "triton" and "cpu". Memory beyond inputs and
    outputs stays below 64 MB on a GPU and 16 MB on a CPU (200,000 ids, 16 threads). Raises NonFiniteLogits for the
    first bad row, those of hidden_a first (a logit is NaN or +inf, or no id is possible), TypeError or ValueError
    naming a bad argument, UnsupportedImplementation.

    >>> light, heavy, hidden = torch.randn(100, 8), torch.randn(100, 16), torch.zeros(5, 16)
    >>> divergence(hidden[:, :8], (light, None), hidden, (heavy, None)).kl
    tensor([0., 0., 0., 0., 0.])
    """
    (weight_a, bias_a), (weight_b, bias_b) = _pair("head_a", head_a), _pair("head_b", head_b)
    vocab_a = checks.check_head(hidden_a, weight_a, bias_a, "_a")
    vocab_b = checks.check_head(hidden_b, weight_b, bias_b, "_b")
    checks.check_tensor("hidden_b", hidden_b, ("N", "D"), device=hidden_a.device, beside="hidden_a")
    if len(hidden_a) != len(hidden_b):
        raise ValueError(f"hidden_b must have the {len(hidden_a)} rows of hidden_a, got shape {list(hidden_b.shape)}")
    if vocab_a != vocab_b:
        raise ValueError(f"head_b must have the {vocab_a} ids of head_a, got {vocab_b}")
    checks.check_ids("rows", rows, hidden_a, "R")
    num_rows = len(hidden_a if rows is None else rows)
    scalar, per_row = checks.split_temperature(temperature, num_rows, hidden_a, zero=False)
    checks.check_ids("forbid", forbid, hidden_a, "K")
    # Without a compiler the registered operator would only add its dispatch, a hundred microseconds.
    answer = _registered if torch.compiler.is_compiling() else _answer
    kl, entropy = answer(
        hidden_a, weight_a, bias_a, hidden_b, weight_b, bias_b, scalar, per_row, forbid, rows, check, impl
    )
    return Divergence(kl, kl + entropy, entropy)


def _pair(name: str, head: tuple[Tensor | None, Tensor | None] | Head) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(head, (tuple, list)) and len(head) == 2:
        return tuple(head)
    if hasattr(head, "weight") and hasattr(head, "bias"):
        return head.weight, head.bias
    raise TypeError(f"{name} must be a pair (weight, bias) or have these attributes, got {type(head).__name__}")


def _answer(
    hidden_a: Tensor,
    weight_a: Tensor | None,
    bias_a: Tensor | None,
    hidden_b: Tensor,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    forbid: Tensor | None,
    rows: Tensor | None,
    check: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """The checks that look at values, the pick and the run: one opaque operator to torch.compile."""
    a = Logits.of(hidden_a, weight_a, bias_a, temperature, temperatures, forbid, rows, check)
    b = Logits.of(hidden_b, weight_b, bias_b, temperature, temperatures, forbid, rows, check)
    call = DivergenceCall(a, b)
    run = OPERATOR.pick(impl, call).run
    if a.num_rows == 0:
        return _blanks(call)
    kl, entropy, lse_a, lse_b = run(call)
    for name, lse in (("hidden_a", lse_a), ("hidden_b", lse_b)) if check else ():
        found = checks.bad_row(lse, a.temperature)
        if found is not None:
            row, problem = found
            raise NonFiniteLogits(f"row {row} of {name}: {problem}")
    return kl, entropy


_registered = torch.library.custom_op("unmask::divergence", _answer, mutates_args=())


@_registered.register_fake
def _(hidden_a, weight_a, bias_a, hidden_b, weight_b, bias_b, temperature, temperatures, forbid, rows, check, impl):
    a, b = Logits(hidden_a, weight_a, bias_a, rows=rows), Logits(hidden_b, weight_b, bias_b, rows=rows)
    return _blanks(DivergenceCall(a, b))


def _blanks(call: DivergenceCall) -> tuple[Tensor, Tensor]:
    return tuple(call.a.hidden.new_empty(call.a.num_rows, dtype=call.dtype) for _ in range(2))
