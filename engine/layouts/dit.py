"""Layouts of the DiT: this library's own checkpoints, MDLM's and SEDD's."""

from typing import Any

from tokenizers import Tokenizer

from unmask.layouts import fields
from unmask.layouts.fields import get, must, need, size
from unmask.layouts.layout import Family, Layout
from unmask.layouts.stored import ROPE_BUFFER, Stored
from unmask.models.dit import DiT, Shape, tensor_shapes
from unmask.pickles import CheckpointError

# Tokenizers of MDLM's experiments that bring their own mask token; for the others MDLM appends one.
MASK_IDS = {"bert-base-uncased": 103, "text8": 4}

UNMASK_KEYS = "vocab_size", "hidden_dim", "n_blocks", "mlp_dim", "tie_word_embeddings", "mask_id", "n_heads"
UNMASK_KEYS += ("model_length",)
MDLM_KEYS = "vocab_size", "hidden_dim", "n_blocks", "n_heads", "model_length", "time_conditioning"
HYDRA_KEYS = "model.hidden_size", "model.n_blocks", "model.n_heads", "model.length"


def describe_unmask(stored: Stored, tokenizer: Tokenizer | None = None) -> Layout:
    vocab_size, dim, num_blocks, mlp, tied, mask_id, num_heads, length = need(stored, *UNMASK_KEYS)
    shape = Shape(vocab_size, dim, num_blocks, mlp, tied=bool(tied))
    return _layout(stored, "unmask", shape, num_heads, mask_id=mask_id, max_length=length)


def _describe_mdlm(stored: Stored, tokenizer: Tokenizer | None) -> Layout:
    vocab_size, dim, num_blocks, num_heads, length, conditioned = need(stored, *MDLM_KEYS)
    shape = _published_shape(stored, vocab_size, dim, num_blocks)
    mask_id = _mask_id(stored, vocab_size, tokenizer)
    spec = {"mask_id": mask_id, "max_length": length, "time_conditioned": bool(conditioned)}
    return _layout(stored, "mdlm", shape, num_heads, **spec)


def _describe_hydra(stored: Stored, tokenizer: Tokenizer | None) -> Layout:
    """The configuration of a training run: MDLM's code base (which trains SEDD too) or SEDD's own."""
    config = stored.config
    family = "sedd" if "graph" in config or config.get("parameterization") == "sedd" else "mdlm"
    if "graph" in config:
        *sizes, tokens, graph, noise = need(stored, *HYDRA_KEYS, "tokens", "graph.type", "noise.type")
        must(stored, "graph.type", graph, "absorb")
        vocab_size, conditioned, mask_id = tokens + 1, True, tokens
    else:
        *sizes, conditioned, parameterization = need(stored, *HYDRA_KEYS, "time_conditioning", "parameterization")
        must(stored, "parameterization", parameterization, "subs", "sedd")
        noise = get(config, "noise.type")
        vocab_size = size(stored, "vocab_embed.embedding", "output_layer.linear.bias")
        if vocab_size is None:
            raise CheckpointError(f"{stored.path}: missing vocab_embed.embedding and output_layer.linear.bias")
        mask_id = _mask_id(stored, vocab_size, tokenizer)
    if conditioned:
        must(stored, "noise.type", noise, "loglinear")
    dim, num_blocks, num_heads, length = sizes
    spec = {"mask_id": mask_id, "max_length": length, "time_conditioned": bool(conditioned)}
    return _layout(stored, family, _published_shape(stored, vocab_size, dim, num_blocks), num_heads, **spec)


def _published_shape(stored: Stored, vocab_size: int, dim: int, num_blocks: int) -> Shape:
    """Sizes that the tensors know best: the default of cond_dim in the published MDLMConfig (129) is not its value."""
    cond_dim = size(stored, "sigma_map.mlp.2.bias", "sigma_map.mlp.0.weight")
    mlp = size(stored, "blocks.0.mlp.0.weight", "blocks.0.mlp.0.bias") or 4 * dim
    return Shape(vocab_size, dim, num_blocks, mlp, cond_dim or stored.config.get("cond_dim") or 128)


def _mask_id(stored: Stored, vocab_size: int, tokenizer: Tokenizer | None) -> int:
    """As MDLM does: the tokenizer's mask token if it has one, else one id after the last."""
    found = fields.mask_id(stored.config, tokenizer)
    if found is None and tokenizer is None:
        found = MASK_IDS.get(get(stored.config, "data.tokenizer_name_or_path"))
    return vocab_size - 1 if found is None else found


def _layout(stored: Stored, family: str, shape: Shape, num_heads: int, **spec: Any) -> Layout:
    if num_heads < 1 or shape.hidden_size % (2 * num_heads):
        raise CheckpointError(
            f"{stored.path}: the hidden size {shape.hidden_size} must be a multiple of twice the number of heads, "
            f"got {num_heads}"
        )
    sizes = {key: getattr(shape, key) for key in ("vocab_size", "hidden_size", "num_blocks", "intermediate_size")}
    unused = {ROPE_BUFFER: (shape.hidden_size // num_heads // 2,)}
    return Layout({"family": family, **sizes, "num_heads": num_heads, **spec}, tensor_shapes(shape), DiT, unused=unused)


EMBEDDING = ("vocab_embed.embedding",)
FAMILIES = (
    Family("unmask", ("unmask",), UNMASK_KEYS, EMBEDDING, describe_unmask),
    Family("mdlm", ("mdlm",), MDLM_KEYS, EMBEDDING, _describe_mdlm),
    Family("mdlm or sedd, hydra configuration", (), HYDRA_KEYS, EMBEDDING, _describe_hydra),
)
