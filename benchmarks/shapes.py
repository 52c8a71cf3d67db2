"""Sizes of known models, as far as an operator sees them."""

from typing import NamedTuple

from unmask.checkpoints import read
from unmask.denoiser import DenoiserSpec
from unmask.options import named_sources


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

    @classmethod
    def of(cls, spec: DenoiserSpec) -> "Shape":
        return cls(spec.hidden_size, spec.vocab_size, spec.num_heads, spec.num_heads, spec.max_length)


def bundled_pair() -> Shape:
    """Of the bundled pair, whose models differ in nothing but the number of blocks."""
    shapes = {Shape.of(read(source).spec) for source in named_sources(None).values()}
    (shape,) = shapes
    return shape


SHAPES = {
    "mdlm-small": Shape(768, 50_258, 12, 12, 1024),
    "llada-8b": Shape(4096, 126_464, 32, 32, 1024),
    "dream-7b": Shape(3584, 152_064, 28, 4, 1024),
    "bundled": bundled_pair(),
}
