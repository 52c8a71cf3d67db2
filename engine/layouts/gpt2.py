"""Layouts of the GPT-2 trunk: GPT-2 as `transformers` writes it, and DiffuGPT.

Tensors are `transformer.*`, or bare as in the first published files, or those of a `DiscreteDiffusionModel`
(github.com/HKUNLP/DiffuLLaMA, model.py). Row i - 1 predicts position i, unless the configuration has `shift` false.
"""

import re

from tokenizers import Tokenizer

from unmask.layouts.fields import must, need, need_mask_id, number, size
from unmask.layouts.layout import Family, Layout
from unmask.layouts.stored import Stored
from unmask.models.gpt2 import GPT2, Shape, tensor_shapes
from unmask.pickles import CheckpointError

KEYS = "n_embd", "n_layer", "n_head", "n_positions"
EMBEDDINGS = "transformer.wte.weight", "wte.weight", "embed_tokens.weight"
CAUSAL_MASK = re.compile(r"(.*\.)?attn\.(bias|masked_bias)")  # a buffer of old checkpoints


def _describe(stored: Stored, tokenizer: Tokenizer | None) -> Layout:
    config = stored.config
    dim, num_blocks, num_heads, length = need(stored, *KEYS)
    must(stored, "activation_function", config.get("activation_function", "gelu_new"), "gelu_new", "gelu_pytorch_tanh")
    for key, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        must(stored, key, config.get(key, usual), usual)
    if num_heads < 1 or dim % num_heads:
        raise CheckpointError(f"{stored.path}: n_embd must be a multiple of n_head = {num_heads}, got {dim}")
    embedding = next((name for name in EMBEDDINGS if name in stored.tensors), EMBEDDINGS[0])
    tied = bool(config.get("tie_word_embeddings", True))
    wrapped = embedding == "embed_tokens.weight"
    # DiffuGPT's code adds a mask token to the model and leaves the configuration as it was.
    vocab_size = (size(stored, embedding) if wrapped else None) or need(stored, "vocab_size")[0]
    mlp = config.get("n_inner") or 4 * dim
    shapes = tensor_shapes(Shape(vocab_size, dim, num_blocks, mlp, length, tied))
    prefix = "denoise_model." if wrapped else embedding.removesuffix("wte.weight")
    names = {name: prefix + name.removeprefix("transformer.") for name in shapes if name != "lm_head.weight"}
    names[EMBEDDINGS[0]] = embedding
    spec = {"family": "diffugpt" if wrapped else "gpt2", "vocab_size": vocab_size, "hidden_size": dim}
    spec |= {"num_blocks": num_blocks, "num_heads": num_heads, "intermediate_size": mlp, "max_length": length}
    spec |= {"mask_id": need_mask_id(stored, tokenizer, vocab_size), "shift": bool(config.get("shift", True))}
    unused: dict[str, None] = {name: None for name in stored.tensors if CAUSAL_MASK.fullmatch(name)}
    if tied:
        unused["lm_head.weight"] = None
    return Layout(spec, shapes, GPT2, {"eps": number(stored, "layer_norm_epsilon", 1e-5)}, names, unused)


FAMILIES = (Family("gpt2", ("gpt2",), KEYS, EMBEDDINGS, _describe),)
