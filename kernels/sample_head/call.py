"""What passes between the operator sample_head and its implementations."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.kernels.logits import accumulator

EXTRAS = "logprob", "lse", "max_prob", "argmax", "margin", "entropy"


class HeadSample(NamedTuple):
    """tokens and argmax int64 [R]; the others [R], fp32 (fp64 if hidden or weight is); None unless wanted."""

    tokens: Tensor
    logprob: Tensor | None = None
    lse: Tensor | None = None
    max_prob: Tensor | None = None
    argmax: Tensor | None = None
    margin: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True, eq=False)
class HeadCall:
    """One call of sample_head, checked; what each field means stands in the operator's docstring.

    An implementation answers a call with at least one row by a HeadSample of tensors that share no memory; it has `lse`
    and everything in `want`.
    The token of a row with a NaN or +inf logit, or with nothing to draw, is -1, its lse is not finite, and nothing is
    written for it into `out`.
    """

    hidden: Tensor
    weight: Tensor | None
    offset: Tensor | None  # [V]: bias and forbidden ids in one, -inf for an id that is not drawn whatever its logit
    keys: Tensor
    seed: int
    temperature: float | Tensor = 1.0
    allow: Tensor | None = None
    rows: Tensor | None = None
    top_k: int | None = None
    top_p: float | None = None
    want: tuple[str, ...] = ()
    out: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def num_rows(self) -> int:
        return len(self.keys)

    @property
    def vocab_size(self) -> int:
        return self.hidden.shape[1] if self.weight is None else self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits and of every floating-point output."""
        return accumulator({"hidden": self.hidden, "weight": self.weight, "bias": self.offset})

    def empty(self) -> HeadSample:
        """Uninitialised tensors [R] for every field."""
        ids = {"tokens", "argmax"}
        dtypes = (torch.int64 if name in ids else self.dtype for name in HeadSample._fields)
        return HeadSample(*(self.hidden.new_empty(self.num_rows, dtype=dtype) for dtype in dtypes))

    def scatter(self, tokens: Tensor) -> None:
        """Write the tokens of good rows into `out`, if there is one."""
        if self.out is not None:
            buffer, positions = self.out
            drawn = tokens >= 0
            buffer.view(-1)[positions[drawn]] = tokens[drawn]
