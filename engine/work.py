"""What a network call consists of: operations with their sizes, from which FLOPs and seconds are derived."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from typing import NamedTuple

from numpy import ndarray

Count = int | ndarray  # an array holds one number for each of many network calls


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of the products (a multiply-add is 2): linear layers, attention, LM head."""

    blocks: int
    attention: int
    head: int

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.blocks + other.blocks, self.attention + other.attention, self.head + other.head)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.blocks * times, self.attention * times, self.head * times)

    @property
    def total(self) -> int:
        return self.blocks + self.attention + self.head


class Load(NamedTuple):
    """What the work of a network call depends on, summed over the sequences of its batch.

    num_rows: positions to predict. num_pairs, num_row_pairs: pairs of two positions of one sequence, and pairs of a
    position to predict with any of its sequence.
    """

    num_sequences: Count
    num_tokens: Count
    num_rows: Count
    num_pairs: Count
    num_row_pairs: Count

    @classmethod
    def of(cls, lengths: Sequence[int], row_counts: Sequence[int]) -> "Load":
        pairs, row_pairs = sum(map(mul, lengths, lengths)), sum(map(mul, lengths, row_counts))
        return cls(len(lengths), sum(lengths), sum(row_counts), pairs, row_pairs)


@dataclass(frozen=True)
class Product:
    """A linear layer of `rows` rows in all, inner -> outer columns, done in `calls` pieces; with a GELU behind it or
    not."""

    rows: Count
    inner: int
    outer: int
    gelu: bool = False
    calls: Count = 1

    @property
    def flops(self) -> Count:
        return 2 * self.rows * self.inner * self.outer

    @property
    def terms(self) -> dict[str, Count]:
        written = self.rows * self.outer
        return {
            "call": self.calls,
            "weight": self.calls * (self.inner * self.outer),
            "output": written,
            "gelu": written * self.gelu,
            "flop": self.flops,
        }


@dataclass(frozen=True)
class Attention:
    """Attention over a packed batch; `pairs` of a query and a key of its sequence, rotary embedding included.
    kv_heads: of keys and values; None: `heads`."""

    sequences: Count
    queries: Count
    keys: Count
    pairs: Count
    heads: int
    head_dim: int
    kv_heads: int | None = None

    @property
    def flops(self) -> Count:
        return 4 * self.pairs * self.heads * self.head_dim

    @property
    def terms(self) -> dict[str, Count]:
        width = self.heads * self.head_dim
        return {
            "call": self.sequences * 0 + 1,
            "sequence": self.sequences * self.heads,
            "query": self.queries * width,
            "key": self.keys * (self.kv_heads or self.heads) * self.head_dim,
            "score": self.pairs * self.heads,
            "flop": self.flops,
        }


@dataclass(frozen=True)
class AddNorm:
    """Residual add, norm and modulation: `add_norm`."""

    rows: Count
    width: int

    @property
    def terms(self) -> dict[str, Count]:
        return {"call": self.rows * 0 + 1, "element": self.rows * self.width}


@dataclass(frozen=True)
class SwiGLU:
    """silu(gate) * up of rows that hold `width` of each, in `calls` pieces: `swiglu`."""

    rows: Count
    width: int
    calls: Count = 1

    @property
    def terms(self) -> dict[str, Count]:
        return {"call": self.calls, "element": self.rows * self.width}


@dataclass(frozen=True)
class Draw:
    """The head and the draw of `rows` tokens: `sample_head`."""

    rows: Count
    width: int
    vocab_size: int

    @property
    def flops(self) -> Count:
        return 2 * self.rows * self.width * self.vocab_size

    @property
    def terms(self) -> dict[str, Count]:
        return {
            "call": self.rows * 0 + 1,
            "weight": self.rows * 0 + self.width * self.vocab_size,
            "logit": self.rows * self.vocab_size,
            "flop": self.flops,
        }


Operation = Product | Attention | AddNorm | SwiGLU | Draw


@dataclass(frozen=True)
class Work:
    """The operations of one network call, or of many where their sizes are arrays.

    body: (how often, operation) of everything up to the final norm. head: the rows' logits and draws.
    """

    body: tuple[tuple[int, Operation], ...]
    head: Draw

    @property
    def flops(self) -> Flops:
        def total(kind: type) -> Count:
            return sum(times * operation.flops for times, operation in self.body if isinstance(operation, kind))

        return Flops(total(Product), total(Attention), self.head.flops)
