"""The Llama network in plain torch, bidirectional, as LLaDA's `generate` calls it: every position and every logit."""

from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.models.llama import Shape, tensor_shapes
from unmask.models.rope import rope_tables

EPS = 1e-6
SHARPNESS = 8  # of the head: laws as sure as a trained network's, so that rounding seldom decides between positions


class Published(NamedTuple):
    """A configuration as a module of `transformers` holds it."""

    model_type: str
    sizes: dict

    def to_dict(self) -> dict:
        return {"model_type": self.model_type, **self.sizes}


class PlainLlama(nn.Module):
    """tokens int64 [B, L] -> an object with `logits` [B, L, V] in the dtype of the weights, row i for position i.

    Its tensors have the names of `transformers`' LlamaForCausalLM, and random values; norms and rotation are fp32.
    """

    def __init__(self, shape: Shape, max_length: int, seed: int = 0):
        super().__init__()
        self.shape = shape
        self.config = Published("a2d-llama", _config(shape, max_length))
        generator, self.weights = torch.Generator().manual_seed(seed), nn.ParameterDict()
        for name, size in tensor_shapes(shape).items():
            value = torch.randn(size, generator=generator)
            if len(size) == 1:
                value = 1 + 0.1 * value
            elif "embed" not in name:
                value *= (SHARPNESS if "lm_head" in name else 1) * size[1] ** -0.5
            self.weights[name.replace(".", "/")] = nn.Parameter(value, requires_grad=False)
        self.rope = rope_tables(shape.head_dim, max_length)
        self.eval()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def state_dict(self, *arguments, **options) -> dict[str, Tensor]:
        return {name.replace("/", "."): weight for name, weight in self.weights.items()}

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        x = F.embedding(tokens, self._weight("model.embed_tokens"))
        for i in range(self.shape.num_blocks):
            x = self._block(x, f"model.layers.{i}.")
        x = self._norm(x, "model.norm")
        head = self._weight("model.embed_tokens" if self.shape.tied else "lm_head")
        return SimpleNamespace(logits=F.linear(x, head))

    def _weight(self, name: str) -> Tensor:
        return self.weights[f"{name}.weight".replace(".", "/")]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return self._weight(name) * wide.to(x.dtype)

    def _block(self, x: Tensor, prefix: str) -> Tensor:
        normed = self._norm(x, f"{prefix}input_layernorm")
        query, key, value = (
            F.linear(normed, self._weight(f"{prefix}self_attn.{name}_proj")).unflatten(-1, (-1, self.shape.head_dim))
            for name in "qkv"
        )
        query, key, value = self._rotated(query), self._rotated(key), value.transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2).flatten(2)
        x = x + F.linear(attended, self._weight(f"{prefix}self_attn.o_proj"))
        normed = self._norm(x, f"{prefix}post_attention_layernorm")
        gate, up = (F.linear(normed, self._weight(f"{prefix}mlp.{name}_proj")) for name in ("gate", "up"))
        return x + F.linear(F.silu(gate) * up, self._weight(f"{prefix}mlp.down_proj"))

    def _rotated(self, x: Tensor) -> Tensor:
        """[B, L, H, D] -> [B, H, L, D]."""
        cos, sin = (table[: x.shape[1], None].to(x.device) for table in self.rope)
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype).transpose(1, 2)


def _config(shape: Shape, max_length: int) -> dict:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_blocks,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": max_length,
        "rms_norm_eps": EPS,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": shape.tied,
        "mask_token_id": shape.vocab_size - 1,
    }
