"""Cases of attention: whole sequences, rotary embedding included, and the last block's few queries of each."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.cases.case import Case, Family
from benchmarks.cases.inputs import normal
from benchmarks.shapes import Shape
from unmask.kernels import attention
from unmask.models.rope import rope_tables

_REVEALED = 8  # positions of a sequence that query in its last block


@dataclass(frozen=True, eq=False)
class AttentionCase(Case):
    """B sequences of one length. `positions` of the queries; None: all tokens query."""

    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor | None
    rope: tuple[Tensor, Tensor]
    num_sequences: int
    out: Tensor
    # Rotated rows and shares of a 16-bit call are rounded before their products, in every implementation's own order.
    tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

    @property
    def operand(self) -> Tensor:
        return self.query

    @property
    def length(self) -> int:
        return len(self.key) // self.num_sequences

    @property
    def num_queries(self) -> int:
        """Of each sequence."""
        return len(self.query) // self.num_sequences

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "num_sequences": self.num_sequences,
            "length": self.length,
            "num_queries": self.num_queries,
            "num_heads": self.query.shape[1],
            "num_kv_heads": self.key.shape[1],
            "head_dim": self.query.shape[2],
        }

    @property
    def num_bytes(self) -> int:
        given = (*self.rope, *(() if self.positions is None else (self.positions,)))
        return 2 * self.query.nbytes + self.key.nbytes + self.value.nbytes + sum(tensor.nbytes for tensor in given)

    @property
    def flops(self) -> int:
        """Of the two products."""
        return 4 * self.query.numel() * self.length

    def run(self, impl: str) -> Tensor:
        return self._attend(impl, self.query, self.key, self.value, self.positions, self.num_sequences, self.out)

    def compare(self, impl: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The last sequence."""
        queries, tokens = slice(-self.num_queries, None), slice(-self.length, None)
        positions = None if self.positions is None else self.positions[queries]
        alone = self.query[queries], self.key[tokens], self.value[tokens], positions, 1
        return {"out": self.run(impl)[queries]}, {"out": self._attend("reference", *alone)}

    def _attend(
        self,
        impl: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor | None,
        num_sequences: int,
        out: Tensor | None = None,
    ) -> Tensor:
        counts = {"lengths": (self.length,) * num_sequences, "row_counts": (self.num_queries,) * num_sequences}
        return attention(query, key, value, **counts, positions=positions, rope=self.rope, out=out, impl=impl)


def _build(part: str, shape: Shape, num_sequences: int, dtype: torch.dtype, device: torch.device) -> AttentionCase:
    """Queries, keys and values are views of one buffer of packed rows, as a block's projection leaves them."""
    heads, groups, tokens = shape.num_heads, shape.num_kv_heads, num_sequences * shape.length
    options = {"seed": 1000 + num_sequences, "dtype": dtype, "device": device}
    packed = normal(tokens, heads + 2 * groups, shape.head_dim, **options)
    query, key, value = packed.split([heads, groups, groups], dim=1)
    positions = None
    if part == "rows":
        few = torch.linspace(0, shape.length - 1, min(_REVEALED, shape.length), device=device).long()
        positions = few.repeat(num_sequences)
        first = torch.arange(num_sequences, device=device).repeat_interleave(len(few)) * shape.length
        query = query[first + positions]
    rope = tuple(table.to(device) for table in rope_tables(shape.head_dim, shape.length))
    return AttentionCase(query, key, value, positions, rope, num_sequences, torch.empty_like(query))


FAMILY = Family(
    parts={"full": "every token queries", "rows": f"{_REVEALED} tokens of a sequence query"},
    counts="sequences",
    unit="B",
    usual={"cpu": (1, 8), "cuda": (1, 8, 64)},
    build=_build,
)
