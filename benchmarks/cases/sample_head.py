"""Cases of sample_head: the whole operator, and the draw alone from logits that are given."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases.case import SEED, Case, Family
from benchmarks.cases.inputs import LOGIT_SCALE, normal, position_keys, shared_weight
from benchmarks.shapes import Shape
from unmask.kernels import sample_head

_MOST_LOGITS = 1 << 31  # given logits: 8 GiB in fp32


@dataclass(frozen=True, eq=False)
class HeadCase(Case):
    """R rows of hidden and a weight; for the part "sampling" R rows of logits and None."""

    part: str
    hidden: Tensor
    weight: Tensor | None
    keys: Tensor

    @property
    def operand(self) -> Tensor:
        return self.hidden

    @property
    def num_rows(self) -> int:
        return len(self.hidden)

    @property
    def vocab_size(self) -> int:
        return self.hidden.shape[1] if self.weight is None else len(self.weight)

    @property
    def sizes(self) -> dict[str, int]:
        hidden_size = {} if self.weight is None else {"hidden_size": self.hidden.shape[1]}
        return {"num_rows": self.num_rows, **hidden_size, "vocab_size": self.vocab_size}

    @property
    def num_bytes(self) -> int:
        inputs = self.hidden.nbytes + self.keys.nbytes + (0 if self.weight is None else self.weight.nbytes)
        return inputs + 8 * self.num_rows

    @property
    def flops(self) -> int:
        """Of the product; the draw's own are not counted."""
        return 0 if self.weight is None else 2 * self.num_rows * self.weight.numel()

    def run(self, impl: str) -> Tensor:
        return draw(impl, self.hidden, self.weight, self.keys)


def draw(impl: str, hidden: Tensor, weight: Tensor | None, keys: Tensor) -> Tensor:
    """Tokens by an implementation; on a GPU without `check`, which would wait for the device."""
    check = hidden.device.type == "cpu"
    return sample_head(hidden, weight, keys=keys, seed=SEED, check=check, impl=impl).tokens


def head_case(part: str, weight: Tensor, num_rows: int) -> HeadCase:
    """Rows for this weight; for the part "sampling", of logits of as many ids, and in its dtype and on its device."""
    width, scale = (weight.shape[1], 1.0) if part == "whole" else (weight.shape[0], LOGIT_SCALE)
    options = {"dtype": weight.dtype, "device": weight.device, "scale": scale}
    hidden = normal(num_rows, width, seed=1000 + num_rows, **options)
    return HeadCase(part, hidden, weight if part == "whole" else None, position_keys(num_rows, weight.device))


def _build(part: str, shape: Shape, num_rows: int, dtype: torch.dtype, device: torch.device) -> HeadCase:
    return head_case(part, shared_weight(shape.hidden_size, shape.vocab_size, dtype, device), num_rows)


FAMILY = Family(
    parts={"whole": "whole operator", "sampling": "sampling alone, given logits"},
    counts="rows",
    unit="R",
    usual={"cpu": (1, 8, 32, 128), "cuda": (1, 8, 32, 64, 128, 256, 1024, 8192, 65536)},
    build=_build,
    fits=lambda part, shape, num_rows: part == "whole" or num_rows * shape.vocab_size <= _MOST_LOGITS,
)
