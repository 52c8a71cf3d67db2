"""The GPT-2 trunk, bidirectional: layer norms with biases, learned positions, GELU, tied head. It serves DiffuGPT and
GPT-2 checkpoints that were converted.

The equations are those of `transformers`' GPT2Model (github.com/huggingface/transformers, models/gpt2); matrices of
layers are stored [in, out] there.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from unmask.denoiser import DenoiserSpec, Head
from unmask.models.trunk import Block, Layers, Style, Trunk
from unmask.models.weights import Weights


class Shape(NamedTuple):
    """Sizes that fix the names and shapes of a checkpoint."""

    vocab_size: int
    hidden_size: int
    num_blocks: int
    intermediate_size: int
    max_length: int
    tied: bool = True


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every parameter with its shape, by the names of `transformers`' GPT2LMHeadModel."""
    v, d, m = shape.vocab_size, shape.hidden_size, shape.intermediate_size
    layers = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, m), "mlp.c_proj": (m, d)}
    norms = "ln_1", "ln_2"
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (v, d)}
    shapes["transformer.wpe.weight"] = (shape.max_length, d)
    for block in (f"transformer.h.{i}." for i in range(shape.num_blocks)):
        for name, (inner, outer) in layers.items():
            shapes |= {f"{block}{name}.weight": (inner, outer), f"{block}{name}.bias": (outer,)}
        shapes |= {f"{block}{name}.{kind}": (d,) for name in norms for kind in ("weight", "bias")}
    shapes |= {"transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}
    if not shape.tied:
        shapes["lm_head.weight"] = (v, d)
    return shapes


class GPT2(Trunk):
    """`tensors`: a checkpoint's parameters by the names of `tensor_shapes`. eps: of the norms. share: as in `Llama`.
    Everything else is told by `Trunk`."""

    BLOCKS, VOCABULARY = "transformer.h", ("transformer.wte.weight", "lm_head.weight")

    def __init__(
        self,
        spec: DenoiserSpec,
        tensors: Mapping[str, Tensor],
        *,
        eps: float = 1e-5,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tokenizer: Tokenizer | None = None,
        name: str = "gpt2",
        share: bool = False,
    ):
        weights = Weights(tensors, dtype=dtype, device=device, share=share, transposed=True)
        embedding, head = weights.matrix("transformer.wte.weight"), weights.matrix("lm_head.weight")
        layers = Layers(
            embedding,
            [_block(weights, i, spec.hidden_size, last=i == spec.num_blocks - 1) for i in range(spec.num_blocks)],
            weights.norm("transformer.ln_f"),
            Head(embedding if head is None else head),
            positions=weights.matrix("transformer.wpe.weight"),
        )
        style = Style(rms=False, eps=eps, gated=False)
        super().__init__(spec, layers, style, dtype=dtype, tokenizer=tokenizer, name=name)


def _block(weights: Weights, index: int, dim: int, last: bool) -> Block:
    prefix = f"transformer.h.{index}."
    pieces = (slice(dim), slice(dim, None)) if last else (slice(None),)
    return Block(
        weights.norm(f"{prefix}ln_1"),
        tuple(weights.linear(f"{prefix}attn.c_attn", columns=piece) for piece in pieces),
        None,
        weights.linear(f"{prefix}attn.c_proj"),
        weights.norm(f"{prefix}ln_2"),
        weights.linear(f"{prefix}mlp.c_fc"),
        weights.linear(f"{prefix}mlp.c_proj"),
    )
