"""Sizes of a model, as far as an operator sees them."""

from typing import NamedTuple


class Shape(NamedTuple):
    """`num_heads` query heads of hidden_size / num_heads columns; `num_kv_heads` heads of keys and values."""

    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    length: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads
