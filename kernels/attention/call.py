"""What passes between the operator attention and its implementations."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.kernels.offsets import Counts, Offsets, known_counts


class Span(NamedTuple):
    """Neighbouring sequences of equal length and equal number of queries: they make dense views."""

    num_sequences: int
    queries: slice
    keys: slice


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of attention with at least one query, checked; the fields are the operator's arguments."""

    query: Tensor
    key: Tensor
    value: Tensor
    lengths: Counts
    row_counts: Counts
    positions: Tensor | None
    rope: tuple[Tensor, Tensor] | None
    scale: float
    out: Tensor  # [Q, H, D]
    block: int | None = None

    @property
    def device(self) -> torch.device:
        return self.query.device

    def counted(self) -> "AttentionCall":
        """With the numbers of tokens and queries, without the rows past their end. Waits for the device of offsets."""
        if not isinstance(self.lengths, Offsets) and not isinstance(self.row_counts, Offsets):
            return self
        lengths = known_counts("lengths", self.lengths, len(self.key))
        row_counts = known_counts("row_counts", self.row_counts, len(self.query))
        tokens, rows = slice(sum(lengths)), slice(sum(row_counts))
        return replace(
            self,
            query=self.query[rows],
            key=self.key[tokens],
            value=self.value[tokens],
            lengths=lengths,
            row_counts=row_counts,
            positions=None if self.positions is None else self.positions[rows],
            out=self.out[rows],
        )

    def spans(self) -> Iterator[Span]:
        """The spans that have queries, in order; of a call with known counts."""
        query = key = 0
        for (length, count), group in groupby(zip(self.lengths, self.row_counts, strict=True)):
            n = sum(1 for _ in group)
            if count:
                yield Span(n, slice(query, query + n * count), slice(key, key + n * length))
            query, key = query + n * count, key + n * length

    def rotated(self, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        """query [n, queries, H, D], key and value [n, keys, G, D] of a span, rotated in fp32 and rounded."""
        n = span.num_sequences
        query, key, value = (
            x[rows].unflatten(0, (n, -1))
            for x, rows in ((self.query, span.queries), (self.key, span.keys), (self.value, span.keys))
        )
        if self.rope is None:
            return query, key, value
        where = torch.arange(key.shape[1], device=key.device)[None]
        return self._rotate(query, self._positions(span)), self._rotate(key, where), value

    def visible(self, span: Span) -> Tensor | None:
        """Which keys the queries of a span see, bool [n or 1, queries, keys]; None: every key."""
        if self.block is None:
            return None
        num_keys = len(range(len(self.key))[span.keys]) // span.num_sequences
        end = (self._positions(span) // self.block + 1) * self.block
        return torch.arange(num_keys, device=self.device) < end[..., None]

    def _positions(self, span: Span) -> Tensor:
        """Where the queries of a span stand, [n or 1, queries]."""
        if self.positions is not None:
            return self.positions[span.queries].view(span.num_sequences, -1)
        num_queries = len(range(len(self.query))[span.queries]) // span.num_sequences
        return torch.arange(num_queries, device=self.device)[None]

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = (table[positions].unsqueeze(2) for table in self.rope)
        first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
