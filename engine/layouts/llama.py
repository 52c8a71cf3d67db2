"""Layouts of the Llama trunk: LLaDA, Dream, SDAR, DiffuLLaMA, and Llama, Qwen2 and Qwen3 as `transformers` writes them.

| model_type                            | tensors                       | shift | attention                       |
|---------------------------------------|-------------------------------|-------|---------------------------------|
| llada                                 | `model.transformer.*`         | no    | bidirectional                   |
| Dream                                 | `model.layers.*`, QKV biases  | yes   | bidirectional                   |
| sdar                                  | `model.layers.*`, head norms  | no    | bidirectional inside blocks     |
| llama (DiffuLLaMA), qwen2, qwen3      | `model.layers.*`, or those of | yes   | bidirectional                   |
|                                       | `DiscreteDiffusionModel`      |       |                                 |
| a2d-llama, a2d-qwen2, a2d-qwen3       | `model.layers.*`              | no    | bidirectional                   |

A configuration's own `shift` (true or false) is heeded.
"""

from typing import Any

from tokenizers import Tokenizer

from unmask.layouts.fields import must, need, need_mask_id, number, size
from unmask.layouts.layout import Family, Layout
from unmask.layouts.stored import Stored
from unmask.models.llama import Llama, Shape, tensor_shapes
from unmask.models.rope import Linear, Llama3
from unmask.pickles import CheckpointError

LLADA_KEYS = "d_model", "n_layers", "n_heads", "mlp_hidden_size", "max_sequence_length"
KEYS = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"
NOT_SHIFTED = "llada", "sdar", "a2d-llama", "a2d-qwen2", "a2d-qwen3"

# What LLaDA's code can do otherwise, and what its checkpoints have.
LLADA = {"block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True}
LLADA_WITHOUT = "alibi", "attention_layer_norm", "scale_logits", "input_emb_norm", "clip_qkv", "include_bias"
LLADA_LAYERS = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
}
LLADA_ENDS = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}


def _describe_llada(stored: Stored, tokenizer: Tokenizer | None) -> Layout:
    config = stored.config
    dim, num_blocks, num_heads, mlp, length = need(stored, *LLADA_KEYS)
    for key, value in LLADA.items():
        must(stored, key, config.get(key, value), value)
    for key in LLADA_WITHOUT:
        must(stored, key, config.get(key) or None, None)
    (vocab_size,) = need(stored, "embedding_size" if config.get("embedding_size") else "vocab_size")
    shape = Shape(
        vocab_size,
        dim,
        num_blocks,
        mlp,
        num_heads,
        config.get("n_kv_heads") or num_heads,
        dim // num_heads if num_heads else 0,
        qkv_bias=bool(config.get("include_qkv_bias")),
        tied=bool(config.get("weight_tying", True)),
    )
    options = {"eps": number(stored, "rms_norm_eps", 1e-5), "rope_base": number(stored, "rope_theta", 10_000.0)}
    names = {name: _llada_name(name) for name in tensor_shapes(shape)}
    return _layout(stored, tokenizer, shape, length, options, names)


def _llada_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in LLADA_ENDS:
        return f"model.transformer.{LLADA_ENDS[stem]}.{kind}"
    _, _, index, layer = stem.split(".", 3)
    return f"model.transformer.blocks.{index}.{LLADA_LAYERS[layer]}.{kind}"


def _describe_llama(stored: Stored, tokenizer: Tokenizer | None) -> Layout:
    config, kind = stored.config, stored.config["model_type"].removeprefix("a2d-")
    dim, num_blocks, num_heads, mlp, length = need(stored, *KEYS)
    must(stored, "hidden_act", config.get("hidden_act", "silu"), "silu")
    if config.get("use_sliding_window"):
        raise CheckpointError(f"{stored.path}: use_sliding_window must be false, attention sees all; got true")
    head_dim = config.get("head_dim") or (dim // num_heads if num_heads > 0 else 0)
    biased = bool(config.get("attention_bias"))
    wrapped = any(name.startswith("denoise_model.") for name in stored.tensors)
    shape = Shape(
        # DiffuLLaMA's code adds a mask token to the model and leaves the configuration as it was.
        (size(stored, "embed_tokens.weight") if wrapped else None) or need(stored, "vocab_size")[0],
        dim,
        num_blocks,
        mlp,
        num_heads,
        config.get("num_key_value_heads") or num_heads,
        head_dim,
        qkv_bias=biased or kind in ("Dream", "qwen2"),
        out_bias=biased,
        mlp_bias=kind == "llama" and bool(config.get("mlp_bias")),
        head_norms=kind in ("qwen3", "sdar"),
        tied=bool(config.get("tie_word_embeddings", False)),
    )
    options = {"eps": number(stored, "rms_norm_eps", 1e-6), **_rope(stored)}
    if kind == "sdar":
        (options["block"],) = need(stored, "block_size")
    names = {name: _wrapped_name(name) for name in tensor_shapes(shape)} if wrapped else {}
    return _layout(stored, tokenizer, shape, length, options, names)


def _wrapped_name(name: str) -> str:
    """In a `DiscreteDiffusionModel` (github.com/HKUNLP/DiffuLLaMA, model.py)."""
    if name == "model.embed_tokens.weight":
        return "embed_tokens.weight"
    return f"denoise_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def _rope(stored: Stored) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 writes it, or rope_theta and `rope_scaling`."""
    config = stored.config
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    by_layer = [key for key, value in given.items() if isinstance(value, dict)]
    if by_layer:
        raise CheckpointError(f"{stored.path}: all layers must have one rotary embedding, got {', '.join(by_layer)}")
    kind = given.get("rope_type", given.get("type", "default"))
    must(stored, "the kind of rope_scaling", kind, "default", "linear", "llama3")
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    must(stored, "partial_rotary_factor", 1.0 if partial is None else partial, 1.0)
    base = given.get("rope_theta") or number(stored, "rope_theta", 10_000.0)
    keys = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings") if kind == "llama3" else ()
    keys = () if kind == "default" else ("factor", *keys)
    missing = [key for key in keys if not isinstance(given.get(key), (int, float))]
    if missing:
        raise CheckpointError(f"{stored.path}: the {kind} scaling of the rotary embedding lacks {', '.join(missing)}")
    kinds = {"default": lambda: None, "linear": Linear, "llama3": Llama3}
    return {"rope_base": float(base), "scaling": kinds[kind](*(given[key] for key in keys))}


def _layout(
    stored: Stored,
    tokenizer: Tokenizer | None,
    shape: Shape,
    length: int,
    options: dict[str, Any],
    names: dict[str, str],
) -> Layout:
    kind, shapes = stored.config["model_type"], tensor_shapes(shape)
    heads = shape.num_heads, shape.num_kv_heads
    if min(heads) < 1 or shape.num_heads % shape.num_kv_heads or shape.head_dim < 2 or shape.head_dim % 2:
        raise CheckpointError(
            f"{stored.path}: heads must be positive, a multiple of those of keys, of an even number of columns; got "
            f"{shape.num_heads}, {shape.num_kv_heads} and {shape.head_dim}"
        )
    fields = ("vocab_size", "hidden_size", "num_blocks", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    spec = {key: getattr(shape, key) for key in fields}
    spec |= {"family": kind.lower(), "mask_id": need_mask_id(stored, tokenizer, shape.vocab_size)}
    spec |= {"max_length": length, "shift": bool(stored.config.get("shift", kind not in NOT_SHIFTED))}
    unused: dict[str, None] = {name: None for name in stored.tensors if name.endswith("rotary_emb.inv_freq")}
    if shape.tied:
        unused["model.transformer.ff_out.weight" if kind == "llada" else "lm_head.weight"] = None
    return Layout(spec, shapes, Llama, options, names, unused)


FAMILIES = (
    Family("llada", ("llada",), LLADA_KEYS, ("model.transformer.wte.weight",), _describe_llada),
    Family(
        "dream, sdar, llama, qwen2, qwen3",
        ("Dream", "sdar", "llama", "qwen2", "qwen3", "a2d-llama", "a2d-qwen2", "a2d-qwen3"),
        KEYS,
        ("model.embed_tokens.weight", "embed_tokens.weight"),
        _describe_llama,
    ),
)
