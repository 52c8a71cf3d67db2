"""Cases of expected_embedding: a head and an input embedding of one width, as a self-conditioned denoiser has them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.cases.case import Case, Family
from benchmarks.cases.inputs import normal, picked, shared_weight
from benchmarks.shapes import Shape
from unmask.kernels import expected_embedding

_COMPARED = 8  # rows
_WIDE = 4  # bytes of fp32


@dataclass(frozen=True, eq=False)
class EmbeddingCase(Case):
    hidden: Tensor
    weight: Tensor
    table: Tensor
    # Of 16-bit probabilities, which a GPU rounds before they meet the table.
    tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

    @property
    def operand(self) -> Tensor:
        return self.hidden

    @property
    def sizes(self) -> dict[str, int]:
        vocab_size, hidden_size = self.weight.shape
        width = self.table.shape[1]
        return {
            "num_rows": len(self.hidden), "hidden_size": hidden_size, "vocab_size": vocab_size, "embedding_size": width
        }  # fmt: skip

    @property
    def num_bytes(self) -> int:
        inputs = self.hidden.nbytes + self.weight.nbytes + self.table.nbytes
        return inputs + _WIDE * len(self.hidden) * self.table.shape[1]

    @property
    def flops(self) -> int:
        """Of the two products."""
        return 2 * len(self.hidden) * (self.weight.numel() + self.table.numel())

    def run(self, impl: str, rows: Tensor | None = None) -> Tensor:
        check = self.device.type == "cpu"
        return expected_embedding(self.hidden, self.weight, None, self.table, rows=rows, check=check, impl=impl)

    def compare(self, impl: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rows = picked(len(self.hidden), _COMPARED, self.device)
        return {"embedding": self.run(impl)[rows]}, {"embedding": self.run("reference", rows)}


def _build(part: str, shape: Shape, num_rows: int, dtype: torch.dtype, device: torch.device) -> EmbeddingCase:
    hidden = normal(num_rows, shape.hidden_size, seed=1000 + num_rows, dtype=dtype, device=device)
    tables = (shared_weight(shape.hidden_size, shape.vocab_size, dtype, device, seed) for seed in (1, 2))
    return EmbeddingCase(hidden, *tables)


FAMILY = Family(
    parts={"whole": "head, softmax and product with the table"},
    counts="rows",
    unit="R",
    usual={"cpu": (1, 8, 32, 128), "cuda": (1, 64, 1024, 8192)},
    build=_build,
)
