"""The network in plain torch, every position and every logit, as the straightforward samplers call it."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.network import Network
from unmask.models.dit import fold
from unmask.models.rope import rope_tables


class PlainDiT(nn.Module):
    """tokens int64 [B, L] -> logits [B, L, V] in the dtype of the weights; the mask id's are -inf.

    tensors: on the CPU, by their published names, adaLN included. It is folded into the weights: the network does not
    read the time, and its peers should not pay for that.
    """

    def __init__(self, network: Network, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device):
        super().__init__()
        vocab_size, dim, num_blocks, mlp, *_ = network.shape
        self.vocab_embed = nn.ParameterDict({"embedding": torch.empty(vocab_size, dim)})
        self.blocks = nn.ModuleList(_Block(dim, network.num_heads, mlp) for _ in range(num_blocks))
        self.output_layer = nn.ModuleDict({"norm_final": nn.LayerNorm(dim), "linear": nn.Linear(dim, vocab_size)})
        self.load_state_dict(fold(tensors, num_blocks))
        with torch.no_grad():
            self.output_layer["linear"].bias[network.mask_id] = -torch.inf
        self.to(device, dtype).eval().requires_grad_(False)
        self.cos, self.sin = (table.to(device) for table in rope_tables(dim // network.num_heads, network.length))

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.vocab_embed["embedding"])
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.output_layer["linear"](self.output_layer["norm_final"](x))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp), nn.GELU("tanh"), nn.Linear(mlp, dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.attn_qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(_rotated(query, cos, sin), _rotated(key, cos, sin), value)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
