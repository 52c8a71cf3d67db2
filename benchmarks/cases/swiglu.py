"""Cases of swiglu: the activation between the two products of a Llama block's MLP."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.cases.case import Case, Family
from benchmarks.cases.inputs import normal
from benchmarks.shapes import Shape
from unmask.kernels import swiglu

_WIDER = 3  # an MLP than the hidden rows, in LLaDA-8B
_FLOPS = 5  # of each number: negation, exponential, sum, quotient and product


@dataclass(frozen=True, eq=False)
class SwigluCase(Case):
    """T rows [gate | up]."""

    gate_up: Tensor
    out: Tensor
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
        num_rows, mlp_size = self.out.shape
        return {"num_rows": num_rows, "mlp_size": mlp_size}

    @property
    def num_bytes(self) -> int:
        return self.gate_up.nbytes + self.out.nbytes

    @property
    def flops(self) -> int:
        return _FLOPS * self.out.numel()

    def run(self, impl: str) -> Tensor:
        return swiglu(self.gate_up, out=self.out, impl=impl)

    def compare(self, impl: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"out": swiglu(self.gate_up, impl=impl)}, {"out": swiglu(self.gate_up, impl="reference")}


def _build(part: str, shape: Shape, num_rows: int, dtype: torch.dtype, device: torch.device) -> SwigluCase:
    size = _WIDER * shape.hidden_size
    gate_up = normal(num_rows, 2 * size, seed=1000 + num_rows, dtype=dtype, device=device)
    return SwigluCase(gate_up, gate_up.new_empty(num_rows, size))


FAMILY = Family(
    parts={"whole": "activation of the gate and product"},
    counts="rows",
    unit="R",
    usual={"cpu": (16, 1024, 8192), "cuda": (16, 1024, 8192, 65536)},
    build=_build,
)
