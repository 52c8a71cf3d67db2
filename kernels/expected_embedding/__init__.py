"""expected_embedding: the mean of a table's rows under the law of each hidden row. Meaning, checks, dispatch."""

import torch
from torch import Tensor

from unmask.kernels import checks, extension
from unmask.kernels.checks import NonFiniteLogits
from unmask.kernels.dispatch import Implementation, Operator, triton_implementation
from unmask.kernels.expected_embedding import cpu, reference
from unmask.kernels.expected_embedding.call import EmbeddingCall
from unmask.kernels.logits import Logits, triton_refuses

OPERATOR = Operator(
    "expected_embedding",
    (
        triton_implementation("expected_embedding", lambda call: triton_refuses(call.operands)),
        Implementation("cpu", cpu.expected_embedding, extension.status, cpu.refuses),
        Implementation("reference", reference.expected_embedding, lambda: (True, "plain torch, any device")),
    ),
)


@torch.no_grad()
def expected_embedding(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    forbid: Tensor | None = None,
    rows: Tensor | None = None,
    check: bool = True,
    impl: str | None = None,
) -> Tensor:
    """softmax((hidden @ weight.T + bias) / temperature) @ table without storing the probabilities: fp32 [R, E].

    What a self-conditioned denoiser reads in place of a token's embedding: the mean embedding under its own last law.

    hidden       [N, D] fp32, bf16, fp16 or fp64: rows after the final norm
    weight       [V, D]; or None: `hidden` [N, V] holds the logits themselves
    bias         [V] or None; an id whose bias is -inf has probability 0
    table        [V, E], one vector per id: an input embedding, often; may be weight itself. Finite: 0 * inf is NaN
    temperature  divides the logits, one number or fp32 [R], above 0
    forbid       int64 [K] ids of probability 0, or None
    rows         int64 [R], row r is of hidden[rows[r]]; None: every row of hidden, R = N
    check        raise for a bad row, which waits for the device. False: it is NaN
    impl         "triton", "cpu", "reference", or None for the fastest that serves these arguments

    Logits and sums are accumulated in fp32; all is done and returned in fp64 if an input is fp64. On a GPU the
    probabilities are rounded to the table's dtype before they meet it, and sum to 1 after that. A row's bits do not
    depend on the other rows in the implementations "triton" and "cpu". Memory beyond inputs and outputs stays below
    64 MB on a GPU and 16 MB on a CPU. Raises NonFiniteLogits for the first bad row (a logit is NaN or +inf, or no id is
    possible), TypeError or ValueError naming a bad argument, UnsupportedImplementation.

    >>> hidden, weight, table = torch.zeros(2, 8), torch.zeros(100, 8), torch.randn(100, 16)
    >>> torch.allclose(expected_embedding(hidden, weight, None, table), table.mean(0), atol=1e-6)
    True
    """
    vocab_size = checks.check_head(hidden, weight, bias)
    checks.check_tensor("table", table, ("V", "E"), device=hidden.device)
    if table.shape[0] != vocab_size or table.shape[1] == 0:
        raise ValueError(f"table must be [{vocab_size}, E], one vector per id, got shape {list(table.shape)}")
    checks.check_ids("rows", rows, hidden, "R")
    num_rows = len(hidden if rows is None else rows)
    scalar, per_row = checks.split_temperature(temperature, num_rows, hidden, zero=False)
    checks.check_ids("forbid", forbid, hidden, "K")
    # Without a compiler the registered operator would only add its dispatch, a hundred microseconds.
    answer = _registered if torch.compiler.is_compiling() else _answer
    return answer(hidden, weight, bias, table, scalar, per_row, forbid, rows, check, impl)


def _answer(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    forbid: Tensor | None,
    rows: Tensor | None,
    check: bool,
    impl: str | None,
) -> Tensor:
    """The checks that look at values, the pick and the run: one opaque operator to torch.compile."""
    logits = Logits.of(hidden, weight, bias, temperature, temperatures, forbid, rows, check)
    call = EmbeddingCall(logits, table)
    run = OPERATOR.pick(impl, call).run
    if logits.num_rows == 0:
        return _blank(call)
    embedding, lse = run(call)
    found = checks.bad_row(lse, logits.temperature) if check else None
    if found is not None:
        row, problem = found
        raise NonFiniteLogits(f"row {row}: {problem}")
    return embedding


_registered = torch.library.custom_op("unmask::expected_embedding", _answer, mutates_args=())


@_registered.register_fake
def _(hidden, weight, bias, table, temperature, temperatures, forbid, rows, check, impl):
    return _blank(EmbeddingCall(Logits(hidden, weight, bias, rows=rows), table))


def _blank(call: EmbeddingCall) -> Tensor:
    return call.table.new_empty(call.logits.num_rows, call.table.shape[1], dtype=call.dtype)
