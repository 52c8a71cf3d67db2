"""Models whose shapes are timed: published ones, and the bundled pair as its files say."""

from benchmarks.shapes import Shape
from unmask.checkpoints import read
from unmask.denoiser import DenoiserSpec
from unmask.options import named_sources


def shape_of(spec: DenoiserSpec) -> Shape:
    return Shape(spec.hidden_size, spec.vocab_size, spec.num_heads, spec.num_heads, spec.max_length)


def bundled_pair() -> Shape:
    """Of the bundled pair, whose models differ in nothing but the number of blocks."""
    (shape,) = {shape_of(read(source).spec) for source in named_sources(None).values()}
    return shape


SHAPES = {
    "mdlm-small": Shape(768, 50_258, 12, 12, 1024),
    "llada-8b": Shape(4096, 126_464, 32, 32, 1024),
    "dream-7b": Shape(3584, 152_064, 28, 4, 1024),
    "bundled": bundled_pair(),
}
