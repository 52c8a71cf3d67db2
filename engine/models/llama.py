"""The Llama trunk, bidirectional: RMSNorm, rotary embedding, SwiGLU, grouped keys. It serves LLaDA, Dream, DiffuLLaMA,
SDAR, and Llama, Qwen2 and Qwen3 checkpoints that were converted.

The equations are those of `transformers`' LlamaModel (github.com/huggingface/transformers, models/llama), with biases
(Qwen2, Dream) and norms of query and key heads (Qwen3, SDAR) where a checkpoint holds them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from unmask.denoiser import DenoiserSpec, Head
from unmask.models.rope import Linear, Llama3, rope_tables
from unmask.models.trunk import Block, Layers, Style, Trunk
from unmask.models.weights import Weights


class Shape(NamedTuple):
    """Sizes that fix the names and shapes of a checkpoint. *_bias: whether those layers have one."""

    vocab_size: int
    hidden_size: int
    num_blocks: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    tied: bool = False


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every parameter with its shape, by the names of `transformers`' LlamaForCausalLM."""
    v, d, m, c = shape.vocab_size, shape.hidden_size, shape.intermediate_size, shape.head_dim
    queries, keys = shape.num_heads * c, shape.num_kv_heads * c
    layers = {
        "self_attn.q_proj": (queries, d, shape.qkv_bias),
        "self_attn.k_proj": (keys, d, shape.qkv_bias),
        "self_attn.v_proj": (keys, d, shape.qkv_bias),
        "self_attn.o_proj": (d, queries, shape.out_bias),
        "mlp.gate_proj": (m, d, shape.mlp_bias),
        "mlp.up_proj": (m, d, shape.mlp_bias),
        "mlp.down_proj": (d, m, shape.mlp_bias),
    }
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    if shape.head_norms:
        norms |= {"self_attn.q_norm": c, "self_attn.k_norm": c}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
    for block in (f"model.layers.{i}." for i in range(shape.num_blocks)):
        shapes |= {f"{block}{name}.weight": (outer, inner) for name, (outer, inner, _) in layers.items()}
        shapes |= {f"{block}{name}.bias": (outer,) for name, (outer, _, biased) in layers.items() if biased}
        shapes |= {f"{block}{name}.weight": (size,) for name, size in norms.items()}
    shapes["model.norm.weight"] = (d,)
    if not shape.tied:
        shapes["lm_head.weight"] = (v, d)
    return shapes


class Llama(Trunk):
    """`tensors`: a checkpoint's parameters by the names of `tensor_shapes`. eps: of the norms. rope_base, scaling: of
    the rotary embedding. block: see `Style`. share: use `tensors` as they are where dtype and device agree, instead of
    copying them; they must not change then. Everything else is told by `Trunk`."""

    BLOCKS, VOCABULARY = "model.layers", ("model.embed_tokens.weight", "lm_head.weight")

    def __init__(
        self,
        spec: DenoiserSpec,
        tensors: Mapping[str, Tensor],
        *,
        eps: float = 1e-6,
        rope_base: float = 10_000.0,
        scaling: Llama3 | Linear | None = None,
        block: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tokenizer: Tokenizer | None = None,
        name: str = "llama",
        share: bool = False,
    ):
        weights = Weights(tensors, dtype=dtype, device=device, share=share)
        embedding = weights.matrix("model.embed_tokens.weight")
        tables = rope_tables(spec.heads[2], spec.max_length, rope_base, scaling)
        head = weights.matrix("lm_head.weight")
        layers = Layers(
            embedding,
            [_block(weights, i, last=i == spec.num_blocks - 1) for i in range(spec.num_blocks)],
            weights.norm("model.norm"),
            Head(embedding if head is None else head),
            rope=tuple(table.to(weights.device) for table in tables),
        )
        style = Style(rms=True, eps=eps, gated=True, block=block)
        super().__init__(spec, layers, style, dtype=dtype, tokenizer=tokenizer, name=name)


def _block(weights: Weights, index: int, last: bool) -> Block:
    prefix = f"model.layers.{index}."
    query, key, value = (f"{prefix}self_attn.{name}_proj" for name in "qkv")
    of_queries, of_keys = (weights.norm(f"{prefix}self_attn.{name}_norm") for name in "qk")
    return Block(
        weights.norm(f"{prefix}input_layernorm"),
        (weights.linear(query), weights.linear(key, value)) if last else (weights.linear(query, key, value),),
        None if of_queries is None else (of_queries, of_keys),
        weights.linear(f"{prefix}self_attn.o_proj"),
        weights.norm(f"{prefix}post_attention_layernorm"),
        weights.linear(f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"),
        weights.linear(f"{prefix}mlp.down_proj"),
    )
