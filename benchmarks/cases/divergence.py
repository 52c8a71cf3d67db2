"""Cases of divergence: the heads of two models of one shape."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases.case import Case, Family
from benchmarks.cases.inputs import normal, picked, shared_weight
from benchmarks.shapes import Shape
from unmask.kernels import Divergence, divergence

_COMPARED = 8  # rows
_WIDE = 4  # bytes of fp32


@dataclass(frozen=True, eq=False)
class DivergenceCase(Case):
    hidden: tuple[Tensor, Tensor]
    weights: tuple[Tensor, Tensor]

    @property
    def operand(self) -> Tensor:
        return self.hidden[0]

    @property
    def num_rows(self) -> int:
        return len(self.hidden[0])

    @property
    def sizes(self) -> dict[str, int]:
        vocab_size, hidden_size = self.weights[0].shape
        return {"num_rows": self.num_rows, "hidden_size": hidden_size, "vocab_size": vocab_size}

    @property
    def num_bytes(self) -> int:
        inputs = sum(tensor.nbytes for tensor in (*self.hidden, *self.weights))
        return inputs + _WIDE * self.num_rows * len(Divergence._fields)

    @property
    def flops(self) -> int:
        """Of the two products."""
        return 2 * self.num_rows * sum(weight.numel() for weight in self.weights)

    def run(self, impl: str, rows: Tensor | None = None) -> Divergence:
        (hidden_a, hidden_b), (weight_a, weight_b) = self.hidden, self.weights
        check = self.device.type == "cpu"
        return divergence(hidden_a, (weight_a, None), hidden_b, (weight_b, None), rows=rows, check=check, impl=impl)

    def compare(self, impl: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rows = picked(self.num_rows, _COMPARED, self.device)
        found = {name: values[rows] for name, values in self.run(impl)._asdict().items()}
        return found, self.run("reference", rows)._asdict()


def _build(part: str, shape: Shape, num_rows: int, dtype: torch.dtype, device: torch.device) -> DivergenceCase:
    options = {"dtype": dtype, "device": device}
    hidden = tuple(normal(num_rows, shape.hidden_size, seed=seed + num_rows, **options) for seed in (1000, 2000))
    weights = tuple(shared_weight(shape.hidden_size, shape.vocab_size, **options, seed=seed) for seed in (1, 2))
    return DivergenceCase(hidden, weights)


FAMILY = Family(
    parts={"whole": "two heads, Kullback-Leibler divergence and entropy"},
    counts="rows",
    unit="R",
    usual={"cpu": (1, 8, 32, 128), "cuda": (1, 64, 1024, 8192)},
    build=_build,
)
