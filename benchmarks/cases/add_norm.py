"""Cases of add_norm: what lies between two products of a block, without and with time conditioning."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.cases.case import Case, Family
from benchmarks.cases.inputs import normal
from benchmarks.shapes import Shape
from unmask.kernels import add_norm

# Of each number: the sum with delta, the mean, the deviation, its square and their sum, two products of the norm.
_PLAIN = 7
_MODULATED = _PLAIN + 3
_DELTA = 1e-3  # small: the residual grows by it at every run


@dataclass(frozen=True, eq=False)
class NormCase(Case):
    """T rows of B equally long sequences. `vectors`: gate, shift and scale [B, D], or none of them."""

    residual: Tensor
    delta: Tensor
    weight: Tensor
    out: Tensor
    num_sequences: int
    vectors: dict[str, Tensor] = field(default_factory=dict)
    tolerance: ClassVar[dict[torch.dtype, float]] = {
        torch.float32: 1e-5,
        torch.bfloat16: 2.0**-8,
        torch.float16: 2.0**-11,
    }

    @property
    def operand(self) -> Tensor:
        return self.out

    @property
    def sizes(self) -> dict[str, int]:
        num_rows, hidden_size = self.residual.shape
        return {"num_rows": num_rows, "hidden_size": hidden_size, "num_sequences": self.num_sequences}

    @property
    def num_bytes(self) -> int:
        """The residual is read and written."""
        given = self.delta, self.weight, self.out, *self.vectors.values()
        return 2 * self.residual.nbytes + sum(tensor.nbytes for tensor in given)

    @property
    def flops(self) -> int:
        return (_MODULATED if self.vectors else _PLAIN) * self.residual.numel()

    def run(self, impl: str) -> Tensor:
        return self._add(impl, self.residual, self.out)

    def allowed(self, output: str) -> float:
        """The residual is fp32 in any call."""
        return self.tolerance[self.residual.dtype if output == "residual" else self.dtype]

    def compare(self, impl: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found, expected = ({"residual": self.residual.clone(), "out": torch.empty_like(self.out)} for _ in range(2))
        for name, tensors in ((impl, found), ("reference", expected)):
            self._add(name, **tensors)
        return found, expected

    def _add(self, impl: str, residual: Tensor, out: Tensor) -> Tensor:
        counts = (len(residual) // self.num_sequences,) * self.num_sequences
        options = {**self.vectors, "row_counts": counts if self.vectors else None}
        return add_norm(residual, self.delta, self.weight, **options, out=out, impl=impl)


def _build(part: str, shape: Shape, num_rows: int, dtype: torch.dtype, device: torch.device) -> NormCase:
    num_sequences = max(1, num_rows // shape.length)
    if num_rows % num_sequences:
        num_sequences = 1
    wide = {"dtype": torch.float32, "device": device}
    residual = normal(num_rows, shape.hidden_size, seed=1000 + num_rows, **wide)
    delta = normal(num_rows, shape.hidden_size, seed=1, dtype=dtype, device=device, scale=_DELTA)
    weight = normal(shape.hidden_size, seed=2, **wide)
    vectors = {}
    if part == "modulated":
        names = enumerate(("gate", "shift", "scale"))
        vectors = {name: normal(num_sequences, shape.hidden_size, seed=3 + each, **wide) for each, name in names}
    return NormCase(residual, delta, weight, torch.empty_like(delta), num_sequences, vectors)


FAMILY = Family(
    parts={"plain": "residual sum and layer norm", "modulated": "gate, residual sum, layer norm, shift and scale"},
    counts="rows",
    unit="R",
    usual={"cpu": (16, 1024, 8192), "cuda": (16, 1024, 8192, 65536)},
    build=_build,
)
