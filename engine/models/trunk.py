"""A packed bidirectional pre-norm transformer, for inference. Its families are `llama` and `gpt2`.

x += out(attention(rope(norm_heads(qkv(norm1(x))))))
x += down(activation(up(norm2(x))))
logits = head(final_norm(x))
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from unmask.denoiser import Batch, Denoiser, DenoiserSpec, Head
from unmask.dtype import short
from unmask.kernels import Offsets, add_norm, attention, swiglu
from unmask.kernels.attention.triton_config import MAX_DIM
from unmask.kernels.dispatch import triton_status
from unmask.models.linear import Linear, SideBySide
from unmask.models.weights import Norm
from unmask.work import AddNorm, Attention, Count, Draw, Flops, Load, Operation, Product, SwiGLU, Work
from unmask.workspace import Workspace

ROWS = 4096  # rows of the widest activations that exist at once


class Block(NamedTuple):
    """projections: queries, keys and values in one product; in the last block queries, then keys and values.
    head_norms: of each query and of each key, before they are rotated. up: gate and up side by side in a gated one."""

    norm1: Norm
    projections: tuple[Linear | SideBySide, ...]
    head_norms: tuple[Norm, Norm] | None
    out: Linear
    norm2: Norm
    up: Linear | SideBySide
    down: Linear


class Layers(NamedTuple):
    """The weights of a trunk. positions [P, D]: learned ones, added to the embedding; rope: tables of a rotary one."""

    embedding: Tensor
    blocks: list[Block]
    final_norm: Norm
    head: Head
    positions: Tensor | None = None
    rope: tuple[Tensor, Tensor] | None = None


class Style(NamedTuple):
    """What differs between families. rms: root-mean-square norms, else layer norms. gated: SwiGLU, else GELU (tanh).
    block: attention is bidirectional in groups of so many positions and causal between them; None: it sees all."""

    rms: bool
    eps: float
    gated: bool
    block: int | None = None


class Trunk(Denoiser):
    """`hidden` does no work on padding (there is none), and in the last block only keys and values are computed for all
    positions; queries, attention output, MLP and final norm for the rows asked for. With `spec.shift` these are the
    rows before; position 0 is predicted by its own.

    Weight matrices and activations have `dtype`, fp32 or bf16; the residual stream, norms and rotation are fp32 in
    both. Activations live in the workspace; outside it a call allocates what `DiT` does, and with learned positions two
    numbers per token.
    """

    def __init__(
        self,
        spec: DenoiserSpec,
        layers: Layers,
        style: Style,
        *,
        dtype: torch.dtype,
        tokenizer: Tokenizer | None,
        name: str,
    ):
        self.spec, self.layers, self.style, self.dtype = spec, layers, style, dtype
        self.tokenizer, self.name = tokenizer, name
        self.head, self.device = layers.head, layers.embedding.device

    # Buffers whose dtype is that of the activations carry it in their name: two denoisers of one run may differ in it.
    def _name(self, name: str) -> str:
        return f"{name}:{short(self.dtype)}"

    def _view(self, workspace: Workspace, name: str, *shape: int) -> Tensor:
        return workspace.view(self._name(name), *shape)

    @property
    def _widths(self) -> tuple[int, int]:
        """Columns of all queries, and of all keys."""
        num_heads, num_kv_heads, head_dim = self.spec.heads
        return num_heads * head_dim, num_kv_heads * head_dim

    def buffers(self, max_tokens: int, max_rows: int, max_batch: int) -> dict[str, tuple[int, torch.dtype]]:
        (a, k), d, m = self._widths, self.spec.hidden_size, self.spec.intermediate_size
        pieces = min(max_tokens, ROWS)
        activations = {
            "normed": max_tokens * max(d, a),
            "qkv": max_tokens * max(d, a + 2 * k),
            "mlp": pieces * m * (2 if self.style.gated else 1),
            "row_query": max_rows * max(d, a),
            "hidden": max_rows * max(d, a),
        }
        wide = {"residual": max_tokens * d, "row_residual": max_rows * d}
        if self.style.gated:
            activations["gated"] = pieces * m
        if self.layers.blocks[0].head_norms is not None:
            activations |= {"query": max_tokens * a, "key": max_tokens * k}
            wide["heads"] = pieces * a
        wanted = {self._name(name): (numel, self.dtype) for name, numel in activations.items()}
        return wanted | {name: (numel, torch.float32) for name, numel in wide.items()}

    @property
    def capturable(self) -> bool:
        usable, _ = triton_status()
        return usable and self.spec.heads[2] <= MAX_DIM

    @property
    def cacheable(self) -> bool:
        return True

    @torch.no_grad()
    def hidden(self, batch: Batch, workspace: Workspace) -> Tensor:
        """Rows [R, D] in `dtype`, a view into the workspace that stays valid until the next call."""
        if batch.longest > self.spec.max_length:
            raise ValueError(f"sequences must have at most {self.spec.max_length} tokens, got {batch.longest}")
        return _Call(self, batch, workspace).hidden()

    def flops(self, length: int, num_rows: int) -> Flops:
        """The products of one call: the last block's queries, attention and MLP at `num_rows` rows only. Block-causal
        attention counts as if it saw all."""
        return self.work(Load.of((length,), (num_rows,))).flops

    def work(self, load: Load) -> Work:
        """Copies, gathers and the norms of heads are left out."""
        (a, k), d, m, full = self._widths, self.spec.hidden_size, self.spec.intermediate_size, self.spec.num_blocks - 1
        batch, tokens, rows = load.num_sequences, load.num_tokens, load.num_rows
        num_heads, num_kv_heads, head_dim = self.spec.heads
        heads = num_heads, head_dim, num_kv_heads

        def finish(times: int, rows: Count) -> list[tuple[int, Operation]]:
            pieces = -(-rows // ROWS)
            if self.style.gated:
                wide = Product(rows, d, 2 * m, calls=pieces), SwiGLU(rows, m, calls=pieces)
            else:
                wide = (Product(rows, d, m, gelu=True, calls=pieces),)
            mlp = *wide, Product(rows, m, d, calls=pieces)
            return [(times, operation) for operation in (Product(rows, a, d), AddNorm(rows, d), *mlp)]

        body = (
            (full, AddNorm(tokens, d)),
            (full, Product(tokens, d, a + 2 * k)),
            (full, Attention(batch, tokens, tokens, load.num_pairs, *heads)),
            *finish(full, tokens),
            (1, AddNorm(tokens, d)),
            (1, Product(rows, d, a)),
            (1, Product(tokens, d, 2 * k)),
            (1, Attention(batch, rows, tokens, load.num_row_pairs, *heads)),
            *finish(1, rows),
            (1, AddNorm(rows, d)),
        )
        return Work(body, Draw(rows, d, self.spec.vocab_size))


class _Call:
    """One network call: the batch and its buffers."""

    def __init__(self, model: Trunk, batch: Batch, workspace: Workspace):
        self.model, self.batch, self.workspace, self.spans = model, batch, workspace, batch.spans
        self.dim, (self.num_heads, self.num_kv_heads, self.head_dim) = model.spec.hidden_size, model.spec.heads
        self.norm = {"rms": model.style.rms, "eps": model.style.eps}

    def view(self, name: str, *shape: int) -> Tensor:
        return self.model._view(self.workspace, name, *shape)

    def hidden(self) -> Tensor:
        residual, delta = self.embed(), None
        *full, last = self.model.layers.blocks
        for self.index, block in enumerate(full):
            with self.spans("block", self.index):
                delta = self.full_block(block, residual, delta)
        self.index = len(full)
        with self.spans("block", self.index):
            return self.last_block(last, residual, delta)

    def embed(self) -> Tensor:
        """The residual stream, float32 [T, D]."""
        layers, tokens = self.model.layers, self.batch.tokens
        residual = self.workspace.view("residual", len(tokens), self.dim)
        looked_up = self.view("normed", *residual.shape)
        residual.copy_(torch.index_select(layers.embedding, 0, tokens, out=looked_up))
        if layers.positions is not None:
            residual += torch.index_select(layers.positions, 0, self.token_positions(), out=looked_up)
        return residual

    def token_positions(self) -> Tensor:
        """int64 [T]: where each token stands in its own sequence; that of an unused token is any."""
        lengths, tokens = self.batch.lengths, self.batch.tokens
        if self.batch.context is not None:
            return self.batch.context.positions
        place = torch.arange(len(tokens), device=tokens.device)
        if not isinstance(lengths, Offsets) and len(set(lengths)) == 1:
            return place % lengths[0]
        if isinstance(lengths, Offsets):
            starts = lengths.starts.long()
        else:
            starts = torch.tensor([0, *accumulate(lengths)], device=tokens.device)
        place -= starts[torch.searchsorted(starts, place, right=True) - 1]
        return place.clamp_(max=self.model.spec.max_length - 1)

    def full_block(self, block: Block, residual: Tensor, delta: Tensor | None) -> Tensor:
        """Adds the delta of the block before to the residual; returns its own, which is yet to be added."""
        num, (num_queries, num_keys) = len(residual), self.model._widths
        normed = add_norm(residual, delta, *block.norm1, **self.norm, out=self.view("normed", num, self.dim))
        (linear,) = block.projections
        qkv = linear(normed, out=self.view("qkv", num, num_queries + 2 * num_keys))
        heads = qkv.view(num, -1, self.head_dim).split((self.num_heads, self.num_kv_heads, self.num_kv_heads), 1)
        attended = self.attend(block, *heads, out=self.view("normed", num, num_queries))
        return self.finish(block, residual, attended, "qkv", "normed")

    def last_block(self, block: Block, residual: Tensor, delta: Tensor | None) -> Tensor:
        """Keys and values of all tokens; everything else, up to the final norm, at the rows only."""
        num, rows, positions = len(residual), self.batch.rows, self.batch.row_positions
        if self.model.spec.shift:
            rows, positions = self.batch.shifted_rows(), (positions - 1).clamp_(min=0)
        num_rows, (num_queries, num_keys) = len(rows), self.model._widths
        normed = add_norm(residual, delta, *block.norm1, **self.norm, out=self.view("normed", num, self.dim))
        state = torch.index_select(normed, 0, rows, out=self.view("hidden", num_rows, self.dim))
        of_rows, of_tokens = block.projections
        query = of_rows(state, out=self.view("row_query", num_rows, num_queries)).view(num_rows, -1, self.head_dim)
        kv = of_tokens(normed, out=self.view("qkv", num, 2 * num_keys)).view(num, 2, -1, self.head_dim)
        options = {"row_counts": self.batch.row_counts, "positions": positions}
        attended = self.attend(block, query, *kv.unbind(1), out=self.view("hidden", num_rows, num_queries), **options)
        wide = self.workspace.view("row_residual", num_rows, self.dim)
        torch.index_select(residual, 0, rows, out=wide)
        delta = self.finish(block, wide, attended, "row_query", "hidden")
        return add_norm(wide, delta, *self.model.layers.final_norm, **self.norm, out=delta)

    def attend(self, block: Block, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        if block.head_norms is not None:
            of_queries, of_keys = block.head_norms
            query, key = self.norm_heads(query, of_queries, "query"), self.norm_heads(key, of_keys, "key")
        lengths, context = self.batch.lengths, self.batch.context
        if context is not None:
            options = {"row_counts": lengths, "positions": context.positions} | options
            key, value = context.exchange(self.index, key, value)
            lengths = context.lengths
        options |= {"lengths": lengths, "rope": self.model.layers.rope, "block": self.model.style.block}
        with self.spans("attention"):
            return attention(query, key, value, **options)

    def norm_heads(self, heads: Tensor, norm: Norm, name: str) -> Tensor:
        """Each head of [T, H, C] normed by itself, in a buffer of its own."""
        out = self.view(name, *heads.shape)
        for piece, written in zip(heads.split(ROWS), out.split(ROWS), strict=True):
            wide = self.workspace.view("heads", *piece.shape).copy_(piece)
            add_norm(wide.flatten(0, 1), None, *norm, **self.norm, out=written.flatten(0, 1))
        return out

    def finish(self, block: Block, residual: Tensor, attended: Tensor, scratch: str, name: str) -> Tensor:
        """What follows attention, for any set of rows: the MLP's delta in the buffer `name`, yet to be added to the
        residual. The buffer `scratch` is overwritten; `attended` may lie in `name`."""
        delta = block.out(attended, out=self.view(scratch, *residual.shape))
        normed = add_norm(residual, delta, *block.norm2, **self.norm, out=self.view(name, *residual.shape))
        for rows in normed.split(ROWS):
            block.down(self.activated(block, rows), out=rows)
        return normed

    def activated(self, block: Block, rows: Tensor) -> Tensor:
        width = self.model.spec.intermediate_size
        if not self.model.style.gated:
            return block.up.gelu(rows, out=self.view("mlp", len(rows), width))
        gate_up = block.up(rows, out=self.view("mlp", len(rows), 2 * width))
        return swiglu(gate_up, out=self.view("gated", len(rows), width))
