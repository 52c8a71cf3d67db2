"""The networks that are timed: sizes, random weights, and the bytes and FLOPs of a step, counted by hand."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.ceilings import Ceilings
from unmask.denoiser import DenoiserSpec
from unmask.models.dit import DiT, Shape, tensor_shapes

_LOGIT_SCALE = 3.0  # standard deviation: neither flat nor decided
_WIDE = 4  # bytes of fp32


class Network(NamedTuple):
    """A DiT of the published layout, adaLN included, that does not read the time."""

    shape: Shape
    num_heads: int
    length: int

    @property
    def mask_id(self) -> int:
        return self.shape.vocab_size - 1


NETWORKS = {
    "mdlm-small": Network(Shape(50_258, 768, 12, 3072, cond_dim=128), 12, 1024),
    "narrow": Network(Shape(1024, 128, 4, 512, cond_dim=32), 4, 256),
    "toy": Network(Shape(300, 32, 2, 128, cond_dim=8), 2, 24),
}


def random_tensors(network: Network, device: torch.device) -> dict[str, Tensor]:
    """Weights by their published names, in fp32, none of them zero: every part of the network matters."""
    generator = torch.Generator(device).manual_seed(1)

    def tensor(name: str, size: tuple[int, ...]) -> Tensor:
        noise = torch.randn(size, generator=generator, device=device)
        if len(size) == 1:
            return noise.mul_(0.3).add_(1.0 if "norm" in name else 0.0)
        if name == "vocab_embed.embedding":
            return noise
        return noise.mul_((_LOGIT_SCALE if name == "output_layer.linear.weight" else 1) / math.sqrt(size[1]))

    return {name: tensor(name, size) for name, size in tensor_shapes(network.shape).items()}


def denoiser(network: Network, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> DiT:
    shape = network.shape
    spec = DenoiserSpec(
        family="mdlm",
        vocab_size=shape.vocab_size,
        mask_id=network.mask_id,
        hidden_size=shape.hidden_size,
        num_blocks=shape.num_blocks,
        num_heads=network.num_heads,
        intermediate_size=shape.intermediate_size,
        max_length=network.length,
    )
    return DiT(spec, tensors, dtype=dtype, device=device, name="mdlm")


def half_masked(network: Network, batch: int, device: torch.device) -> Tensor:
    """Random tokens int64 [B, L] in which every second position, at random, is masked."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(network.mask_id, (batch, network.length), generator=generator)
    masked = torch.rand(tokens.shape, generator=generator) < 0.5
    return tokens.masked_fill_(masked, network.mask_id).to(device)


# --- what must be moved and computed ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """A part of a step that ends before the next begins."""

    name: str
    num_bytes: int
    flops: int


def predicted(passes: list[Pass], ceilings: Ceilings) -> float:
    """Seconds that the passes take at least, one after the other."""
    return sum(ceilings.floor(each.num_bytes, each.flops) for each in passes)


def our_passes(network: Network, itemsize: int, batch: int, num_rows: int) -> list[Pass]:
    """One tick that reveals `num_rows` rows in all: every weight read once, no logits written.

    Between two products the residual is read and written in fp32, and a block's delta and normed rows in the dtype of
    the weights. In the last block only keys and values are computed for every position.
    """
    v, d, blocks, m, *_ = network.shape
    tokens = batch * network.length
    after = d * d + 2 * d * m
    products = (blocks - 1) * tokens * (3 * d * d + after) + tokens * 2 * d * d + num_rows * (d * d + after)
    attended = 2 * d * network.length * ((blocks - 1) * tokens + num_rows)
    return [
        Pass("products", itemsize * blocks * (3 * d * d + after), 2 * products),
        Pass("attention", itemsize * 4 * d * tokens * blocks, 2 * attended),
        Pass("between", 2 * (2 * _WIDE + 2 * itemsize) * d * tokens * blocks, 0),
        Pass("head", itemsize * v * d, 2 * num_rows * d * v),
    ]


# Reads and writes of each logit by the published sampler, operation by operation. In the dtype of the logits: the
# logsumexp, the difference, the rows of revealed positions (half of them), exp, and the product's read; then in fp32
# the product's write, rand, + 1e-10, log, 1e-10 - it, the quotient and argmax.
_LOGIT_ACCESSES = 1 + 2 + 0.5 + 2 + 1
_WIDE_ACCESSES = 1 + 1 + 2 + 2 + 2 + 3 + 1
# Tensors of logits alive when the quotient is made: p(x0), which is kept, and in fp32 its product, noise and quotient.
_WIDE_TENSORS = 3
# Of each activation between two products, twice in a block: layer norm, its weight and the two steps of the modulation
# read and write it, the gate does, and the residual sum reads two and writes one.
_ACTIVATION_ACCESSES = 2 * (4 * 2 + 2 + 3)


def published_passes(network: Network, itemsize: int, batch: int) -> list[Pass]:
    """One step of the published sampler in which the network runs. Its residual and what is between its products is
    fp32 whatever the weights."""
    v, d, blocks, m, *_ = network.shape
    tokens = batch * network.length
    weights = blocks * (4 * d * d + 2 * d * m)
    logits = tokens * v
    sampling = int((_LOGIT_ACCESSES * itemsize + _WIDE_ACCESSES * _WIDE) * logits)
    return [
        Pass("products", itemsize * weights, 2 * tokens * weights),
        Pass("attention", itemsize * 4 * d * tokens * blocks, 4 * d * network.length * tokens * blocks),
        Pass("between", _ACTIVATION_ACCESSES * _WIDE * d * tokens * blocks, 0),
        Pass("head", itemsize * (v * d + logits), 2 * logits * d),
        Pass("sampling", sampling, 0),
    ]


def published_bytes(network: Network, itemsize: int, batch: int) -> int:
    """The most memory that the logits of such a step take at once."""
    return (itemsize + _WIDE_TENSORS * _WIDE) * batch * network.length * network.shape.vocab_size
