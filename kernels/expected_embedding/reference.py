"""expected_embedding in plain torch: the specification. Runs on any device, in chunks of rows."""

from torch import Tensor

from unmask.kernels.expected_embedding.call import EmbeddingCall, Expectation
from unmask.kernels.logits import widened


def expected_embedding(call: EmbeddingCall) -> Expectation:
    num_rows, width = call.logits.num_rows, call.table.shape[1]
    embedding = call.table.new_zeros(num_rows, width, dtype=call.dtype)
    lse = call.table.new_empty(num_rows, dtype=call.dtype)
    for rows in call.logits.slices(call.dtype):
        logits = call.logits.compute(rows, call.dtype)
        lse[rows] = logits.logsumexp(dim=1)
        _add_expectation(embedding[rows], logits.softmax(dim=1), call.table)
    return Expectation(embedding, lse)


def _add_expectation(embedding: Tensor, probabilities: Tensor, table: Tensor) -> None:
    for ids, vectors in widened(table, embedding.dtype):
        embedding.addmm_(probabilities[:, ids], vectors)
