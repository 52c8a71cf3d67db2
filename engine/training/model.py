"""The denoiser as a trainable module: a plain pre-norm bidirectional transformer without time conditioning."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MLP_RATIO = 4


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a trainable denoiser: V ids with the mask among them, D hidden, blocks, heads, L positions.

    tied: the head's weight is the embedding.
    """

    vocab_size: int
    mask_id: int
    hidden_dim: int
    n_blocks: int
    n_heads: int
    model_length: int
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_dim", "n_blocks", "n_heads", "model_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_dim % self.n_heads or (self.hidden_dim // self.n_heads) % 2:
            raise ValueError(
                f"hidden_dim must be n_heads times an even head size, got {self.hidden_dim} for {self.n_heads} heads"
            )

    @property
    def mlp_dim(self) -> int:
        return MLP_RATIO * self.hidden_dim

    def to_config(self) -> dict[str, int | bool]:
        """As `unmask.checkpoints.save` takes them."""
        sizes = {name: value for name, value in asdict(self).items() if name != "tied"}
        return {**sizes, "mlp_dim": self.mlp_dim, "tie_word_embeddings": self.tied}


class TrainableDenoiser(nn.Module):
    """The body of MDLM without its time conditioning, its head tied to the embedding or not.

    Parameter names follow the published checkpoint, so that its state dict is the saved one.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.vocab_embed = _Embedding(shape)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.n_blocks))
        self.output_layer = _Output(shape)
        self._init_weights()

    def _init_weights(self) -> None:
        # GPT-2's scheme: products that write to the residual stream shrink with depth.
        residual_std = 0.02 / (2 * self.shape.n_blocks) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                writes_residual = name.endswith(("attn_out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=residual_std if writes_residual else 0.02)

    def forward(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Logits [R, V] at `rows` (flat int64 indices into `tokens`, int64 [B, L]); the mask id's logit is −inf."""
        weight, bias = self.head
        logits = F.linear(self.hidden(tokens, rows), weight, bias).float()
        return logits.index_fill(1, torch.tensor([self.shape.mask_id]), float("-inf"))

    def hidden(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """What the head reads, [R, D], at `rows`."""
        x = self.vocab_embed.embedding[tokens]
        rotary = _rotary(tokens.shape[1], self.shape.hidden_dim // self.shape.n_heads)
        for block in self.blocks:
            x = block(x, rotary)
        return self.output_layer.norm_final(x.flatten(0, 1)[rows])

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """Weight [V, D] and bias [V]."""
        linear = self.output_layer.linear
        return self.vocab_embed.embedding if self.shape.tied else linear.weight, linear.bias

    def leave(self, body: Mapping[str, Tensor]) -> None:
        """Become an early exit of a tied model with these tensors: its first blocks, which do not learn, and a norm and
        a head that begin as its last ones."""
        self.load_state_dict({name: body[name] for name in self.state_dict() if name in body}, strict=False)
        self.output_layer.linear.weight.data.copy_(body["vocab_embed.embedding"])
        for part in (self.vocab_embed, self.blocks):
            part.requires_grad_(False)

    def trained(self) -> dict[str, nn.Parameter]:
        """What learns, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


class _Embedding(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(shape.vocab_size, shape.hidden_dim))


class _Output(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(shape.hidden_dim, bias=False)
        self.linear = nn.Module()
        if not shape.tied:
            self.linear.weight = nn.Parameter(torch.empty(shape.vocab_size, shape.hidden_dim))
        self.linear.bias = nn.Parameter(torch.empty(shape.vocab_size))


class _Block(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.n_heads = shape.n_heads
        self.norm1 = nn.LayerNorm(shape.hidden_dim, bias=False)
        self.attn_qkv = nn.Linear(shape.hidden_dim, 3 * shape.hidden_dim, bias=False)
        self.attn_out = nn.Linear(shape.hidden_dim, shape.hidden_dim, bias=False)
        self.norm2 = nn.LayerNorm(shape.hidden_dim, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(shape.hidden_dim, shape.mlp_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(shape.mlp_dim, shape.hidden_dim),
        )

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        num, length, size = x.shape
        qkv = self.attn_qkv(self.norm1(x)).view(num, length, 3, self.n_heads, -1)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed = _attend(_rotate(query, rotary), _rotate(key, rotary), value)
        x = x + self.attn_out(mixed.transpose(1, 2).reshape(num, length, size))
        return x + self.mlp(self.norm2(x))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # At training lengths on a CPU the scores are small, and plain products beat torch's flash kernel.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return torch.softmax(scores, -1, dtype=scores.dtype) @ value


def _rotary(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    inverse = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(length)[:, None] * inverse
    angles = torch.cat([angles, angles], 1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (part.to(x.dtype) for part in rotary)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
