"""The diffusion transformer of MDLM, SEDD and of this library's own checkpoints, for inference.

The equations are those of the published `DIT` (github.com/kuleshov-group/mdlm, models/dit.py) and `SEDD`
(github.com/louaaron/Score-Entropy-Discrete-Diffusion, model/transformer.py), which share names and arithmetic:

    x += gate * attn_out(attention(rope(attn_qkv(norm1(x) * (1 + scale) + shift))))
    x += gate * mlp.2(gelu_tanh(mlp.0(norm2(x) * (1 + scale) + shift)))
    logits = linear(norm_final(x) * (1 + scale) + shift)

with shift, scale and gate linear in c = silu(sigma_map(sigma)). Without time conditioning sigma is 0 and c a constant:
`fold` moves the modulation into the weights and a plain pre-norm transformer remains, which is also what family
"unmask" is natively.

SEDD (absorbing graph). The network's log-score for revealing a masked position as y is logits_y - log(e^sigma - 1)
- log(V - 1), and the true score of the absorbing graph is p(x0 = y | xt) / (e^sigma - 1). So the logits are log
p(x0 | xt) up to a constant, and their softmax over the non-mask ids is the categorical law that is sampled here. A
trained score does not sum to one exactly, and SEDD's own samplers do not normalise it: there the excess changes how
many positions are revealed. Here the reveal times keep their exact law and only the normalised ratios choose tokens.
"""

import math
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from unmask.denoiser import Batch, Denoiser, DenoiserSpec, Head
from unmask.dtype import DTYPES, short
from unmask.kernels import Offsets, add_norm, attention
from unmask.kernels.add_norm import MAX_COLUMNS
from unmask.kernels.attention.triton_config import MAX_DIM
from unmask.kernels.dispatch import triton_status
from unmask.models.linear import Linear
from unmask.models.rope import rope_tables
from unmask.work import AddNorm, Attention, Count, Draw, Flops, Load, Operation, Product, Work
from unmask.workspace import Workspace

EPS = 1e-5  # of every layer norm
NOISE_EPS = 1e-3  # of the published LogLinearNoise (noise_lib.py of SEDD, noise_schedule.py of MDLM)
FREQUENCIES = 256  # features of the sinusoidal embedding of sigma
ROWS = 4096  # rows of the widest activations that exist at once


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor | None = None


class Block(NamedTuple):
    """projections: queries, keys and values in one product; in the last block queries, then keys and values."""

    norm1: Norm
    projections: tuple[Linear, ...]
    out: Linear
    norm2: Norm
    up: Linear
    down: Linear
    modulation: Linear | None


class Vectors(NamedTuple):
    """What adaLN gives a block, [B, D] each; None without time conditioning. A final norm has the first two."""

    shift1: Tensor | None = None
    scale1: Tensor | None = None
    gate1: Tensor | None = None
    shift2: Tensor | None = None
    scale2: Tensor | None = None
    gate2: Tensor | None = None

    @property
    def first(self) -> dict[str, Tensor | None]:
        return {"shift": self.shift1, "scale": self.scale1}

    @property
    def second(self) -> dict[str, Tensor | None]:
        return {"shift": self.shift2, "scale": self.scale2}


class Shape(NamedTuple):
    """Sizes that fix the names and shapes of a checkpoint. cond_dim None: no adaLN and no sigma_map at all."""

    vocab_size: int
    hidden_size: int
    num_blocks: int
    intermediate_size: int
    cond_dim: int | None = None
    tied: bool = False


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every parameter of a checkpoint in its published order, with its shape."""
    v, d, num_blocks, m, c, tied = shape
    shapes: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (v, d)}
    if c is not None:
        shapes |= {"sigma_map.mlp.0.weight": (c, FREQUENCIES), "sigma_map.mlp.0.bias": (c,)}
        shapes |= {"sigma_map.mlp.2.weight": (c, c), "sigma_map.mlp.2.bias": (c,)}
    for i in range(num_blocks):
        block = {"norm1.weight": (d,), "attn_qkv.weight": (3 * d, d), "attn_out.weight": (d, d), "norm2.weight": (d,)}
        block |= {"mlp.0.weight": (m, d), "mlp.0.bias": (m,), "mlp.2.weight": (d, m), "mlp.2.bias": (d,)}
        if c is not None:
            block |= {"adaLN_modulation.weight": (6 * d, c), "adaLN_modulation.bias": (6 * d,)}
        shapes |= {f"blocks.{i}.{name}": size for name, size in block.items()}
    shapes["output_layer.norm_final.weight"] = (d,)
    if not tied:
        shapes["output_layer.linear.weight"] = (v, d)
    shapes["output_layer.linear.bias"] = (v,)
    if c is not None:
        shapes |= {"output_layer.adaLN_modulation.weight": (2 * d, c), "output_layer.adaLN_modulation.bias": (2 * d,)}
    return shapes


def condition(tensors: Mapping[str, Tensor], sigma: Tensor) -> Tensor:
    """c = silu(sigma_map(sigma)): float32 [B] -> [B, cond_dim]. Cosines come first, as in the published code."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=sigma.device) / half)
    angles = sigma[:, None] * frequencies
    x = torch.cat([angles.cos(), angles.sin()], dim=-1)
    x = F.silu(F.linear(x, tensors["sigma_map.mlp.0.weight"], tensors["sigma_map.mlp.0.bias"]))
    return F.silu(F.linear(x, tensors["sigma_map.mlp.2.weight"], tensors["sigma_map.mlp.2.bias"]))


def fold(tensors: Mapping[str, Tensor], num_blocks: int) -> dict[str, Tensor]:
    """The same function at sigma = 0 without adaLN, in fp32: scale into norm weights, shift into norm biases (new
    names, `norm1.bias` and so on), gates into the output products."""
    plain = {k: t.float() for k, t in tensors.items()}
    c = condition(plain, torch.zeros(1))
    plain = {k: t for k, t in plain.items() if not k.startswith("sigma_map.")}

    def chunks(prefix: str, num: int) -> tuple[Tensor, ...]:
        weight, bias = plain.pop(f"{prefix}.adaLN_modulation.weight"), plain.pop(f"{prefix}.adaLN_modulation.bias")
        return F.linear(c, weight, bias)[0].chunk(num)

    def fold_norm(name: str, shift: Tensor, scale: Tensor) -> None:
        plain[f"{name}.weight"] = plain[f"{name}.weight"] * (1 + scale)
        plain[f"{name}.bias"] = shift

    for block in (f"blocks.{i}" for i in range(num_blocks)):
        shift1, scale1, gate1, shift2, scale2, gate2 = chunks(block, 6)
        fold_norm(f"{block}.norm1", shift1, scale1)
        fold_norm(f"{block}.norm2", shift2, scale2)
        plain[f"{block}.attn_out.weight"] = gate1[:, None] * plain[f"{block}.attn_out.weight"]
        plain[f"{block}.mlp.2.weight"] = gate2[:, None] * plain[f"{block}.mlp.2.weight"]
        plain[f"{block}.mlp.2.bias"] = gate2 * plain[f"{block}.mlp.2.bias"]
    fold_norm("output_layer.norm_final", *chunks("output_layer", 2))
    return plain


class DiT(Denoiser):
    """Packed bidirectional transformer. `hidden` does no work on padding (there is none), and in the last block only
    keys and values are computed for all positions; queries, attention output, MLP and final norm for `rows`.

    `tensors`: a checkpoint's parameters by the names of `tensor_shapes`, copied unless `share`: then those that have
    their dtype and device already are used as they are. Weight matrices and activations have
    `dtype`, fp32 or bf16; the residual stream, layer norms and modulation are fp32 in both. A checkpoint with adaLN is
    folded unless `spec.time_conditioned`; then sigma = -log(1 - (1 - 1e-3) mask_rate), the published log-linear noise.

    Activations live in the workspace. Outside it a call allocates vectors per sequence; where plain torch or its SDPA
    serve `add_norm` and `attention`, temporaries of at most 4096 rows and of a span of equally long sequences; on a
    GPU, Triton's attention a rotated copy of the keys, in fp32 of the queries too; on a CPU, oneDNN at most 24 MiB of a
    product at a time before it is copied.
    """

    BLOCKS = "blocks"
    VOCABULARY = "vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias"

    def __init__(
        self,
        spec: DenoiserSpec,
        tensors: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tokenizer: Tokenizer | None = None,
        name: str = "dit",
        share: bool = False,
    ):
        if spec.shift:
            raise ValueError("a DiT predicts each position from its own row, got a spec with shift=True")
        if spec.num_blocks < 1:
            raise ValueError(f"num_blocks must be positive, got {spec.num_blocks}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {[str(d) for d in DTYPES]}, got {dtype}")
        self.spec, self.tokenizer, self.name, self.dtype = spec, tokenizer, name, dtype
        self.device, self._share = torch.device(device), share
        if "sigma_map.mlp.0.weight" in tensors and not spec.time_conditioned:
            tensors = fold(tensors, spec.num_blocks)
        self._place(tensors)

    def leave(
        self,
        spec: DenoiserSpec,
        tensors: Mapping[str, Tensor],
        *,
        tokenizer: Tokenizer | None = None,
        name: str = "exit",
    ) -> "DiT":
        """An early exit: the model that is this one after its first `spec.num_blocks` blocks, whose weights it shares,
        with the final norm and the head in `tensors`."""
        if not 1 <= spec.num_blocks < self.spec.num_blocks:
            raise ValueError(
                f"an early exit must leave after 1 to {self.spec.num_blocks - 1} blocks, got {spec.num_blocks}"
            )
        if self.sigma_map or self.final_norm.bias is not None:
            raise ValueError("an early exit needs a body without time conditioning, got one with it")
        if spec.max_length > self.spec.max_length or not self._begins_with(tensors, spec.num_blocks):
            raise ValueError(f"an early exit must be one of its own body, got {name!r} for {self.name!r}")
        made = copy(self)
        made.spec, made.tokenizer, made.name = spec, tokenizer, name
        last = self.blocks[spec.num_blocks - 1]
        (fused,) = last.projections
        made.blocks = [*self.blocks[: spec.num_blocks - 1], last._replace(projections=fused.split(self._projections))]
        made._place_end(tensors)
        return made

    def _begins_with(self, tensors: Mapping[str, Tensor], num_blocks: int) -> bool:
        """Whether the first blocks are these, by the embedding and the norms, which are kept as they came."""
        wide, narrow = self._readers(tensors)
        norms = ((block, f"blocks.{i}") for i, block in enumerate(self.blocks[:num_blocks]))
        pairs = [(self.embedding, narrow("vocab_embed.embedding"))]
        for block, name in norms:
            pairs += [
                (block.norm1.weight, wide(f"{name}.norm1.weight")),
                (block.norm2.weight, wide(f"{name}.norm2.weight")),
            ]
        return all(theirs is not None and torch.equal(mine, theirs) for mine, theirs in pairs)

    @property
    def _projections(self) -> list[int]:
        """Rows of queries, and of keys and values, in the matrix of a block."""
        return [self.spec.hidden_size, 2 * self.spec.hidden_size]

    def _place(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the weights to their device and dtype: matrices in `dtype`, norms and modulation in fp32."""
        wide, narrow = self._readers(tensors)

        def linear(name: str) -> Linear:
            return Linear(narrow(f"{name}.weight"), narrow(f"{name}.bias"))

        def projections(i: int) -> tuple[Linear, ...]:
            weight = narrow(f"blocks.{i}.attn_qkv.weight")
            return tuple(map(Linear, weight.split(self._projections) if i == self.spec.num_blocks - 1 else (weight,)))

        def norm(name: str) -> Norm:
            return Norm(wide(f"{name}.weight"), wide(f"{name}.bias"))

        self.embedding = narrow("vocab_embed.embedding")
        self.device = self.embedding.device  # with its index: "cuda" is then "cuda:0"
        self.sigma_map = {name: wide(name) for name in tensors if name.startswith("sigma_map.")}
        self.blocks = [
            Block(
                norm(f"blocks.{i}.norm1"),
                projections(i),
                linear(f"blocks.{i}.attn_out"),
                norm(f"blocks.{i}.norm2"),
                linear(f"blocks.{i}.mlp.0"),
                linear(f"blocks.{i}.mlp.2"),
                self._modulation(tensors, f"blocks.{i}"),
            )
            for i in range(self.spec.num_blocks)
        ]
        self._place_end(tensors)
        tables = rope_tables(self.spec.hidden_size // self.spec.num_heads, self.spec.max_length)
        self.rope = tuple(table.to(self.device) for table in tables)

    def _place_end(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the final norm and the head."""
        wide, narrow = self._readers(tensors)
        self.final_norm = Norm(*(wide(f"output_layer.norm_final.{kind}") for kind in ("weight", "bias")))
        self.final_modulation = self._modulation(tensors, "output_layer")
        weight = narrow("output_layer.linear.weight")
        self.head = Head(self.embedding if weight is None else weight, narrow("output_layer.linear.bias"))

    def _readers(self, tensors: Mapping[str, Tensor]) -> tuple[Callable[[str], Tensor | None], ...]:
        """Functions that place a tensor by name: in fp32, and in `dtype`; None where there is none."""

        def copied(name: str, dtype: torch.dtype) -> Tensor | None:
            return tensors[name].to(self.device, dtype, copy=not self._share) if name in tensors else None

        return partial(copied, dtype=torch.float32), partial(copied, dtype=self.dtype)

    def _modulation(self, tensors: Mapping[str, Tensor], prefix: str) -> Linear | None:
        wide, _ = self._readers(tensors)
        weight, bias = (wide(f"{prefix}.adaLN_modulation.{kind}") for kind in ("weight", "bias"))
        return None if weight is None else Linear(weight, bias)

    # Buffers whose dtype is that of the activations carry it in their name: two denoisers of one run may differ in it.
    def _name(self, name: str) -> str:
        return f"{name}:{short(self.dtype)}"

    def _view(self, workspace: Workspace, name: str, *shape: int) -> Tensor:
        return workspace.view(self._name(name), *shape)

    def buffers(self, max_tokens: int, max_rows: int, max_batch: int) -> dict[str, tuple[int, torch.dtype]]:
        d, m = self.spec.hidden_size, self.spec.intermediate_size
        activations = {
            "normed": max_tokens * d,
            "qkv": max_tokens * 3 * d,
            "mlp": min(max_tokens, ROWS) * m,
            "row_query": max_rows * d,
            "hidden": max_rows * d,
        }
        wanted = {self._name(name): (numel, self.dtype) for name, numel in activations.items()}
        wide = {"residual": max_tokens * d, "row_residual": max_rows * d}
        if self.spec.time_conditioned:
            wide |= {"modulation0": max_batch * 6 * d, "modulation1": max_batch * 6 * d}
        return wanted | {name: (numel, torch.float32) for name, numel in wide.items()}

    @property
    def capturable(self) -> bool:
        head_dim, fits = self.spec.hidden_size // self.spec.num_heads, self.spec.hidden_size <= MAX_COLUMNS
        usable, _ = triton_status()
        return usable and head_dim <= MAX_DIM and (fits or not self.spec.time_conditioned)

    @torch.no_grad()
    def hidden(self, batch: Batch, workspace: Workspace) -> Tensor:
        """Rows [R, D] in `dtype`, a view into the workspace that stays valid until the next call."""
        if batch.longest > self.spec.max_length:
            raise ValueError(f"sequences must have at most {self.spec.max_length} tokens, got {batch.longest}")
        return _Call(self, batch, workspace).hidden()

    def flops(self, length: int, num_rows: int) -> Flops:
        """Exactly the products of one call: the last block's queries, attention and MLP at `num_rows` rows only."""
        return self.work(Load.of((length,), (num_rows,))).flops

    def work(self, load: Load) -> Work:
        """Copies and gathers are left out."""
        d, m, full = self.spec.hidden_size, self.spec.intermediate_size, self.spec.num_blocks - 1
        batch, tokens, rows = load.num_sequences, load.num_tokens, load.num_rows
        heads = self.spec.num_heads, d // self.spec.num_heads

        def finish(times: int, rows: Count) -> list[tuple[int, Operation]]:
            pieces = -(-rows // ROWS)
            mlp = Product(rows, d, m, gelu=True, calls=pieces), Product(rows, m, d, calls=pieces)
            return [(times, operation) for operation in (Product(rows, d, d), AddNorm(rows, d), *mlp)]

        body = [
            (full, AddNorm(tokens, d)),
            (full, Product(tokens, d, 3 * d)),
            (full, Attention(batch, tokens, tokens, load.num_pairs, *heads)),
            *finish(full, tokens),
            (1, AddNorm(tokens, d)),
            (1, Product(rows, d, d)),
            (1, Product(tokens, d, 2 * d)),
            (1, Attention(batch, rows, tokens, load.num_row_pairs, *heads)),
            *finish(1, rows),
            (1, AddNorm(rows, d)),
        ]
        if self.sigma_map:
            c = self.sigma_map["sigma_map.mlp.2.bias"].numel()
            body += [(1, Product(batch, FREQUENCIES, c)), (1, Product(batch, c, c)), (1, Product(batch, c, 2 * d))]
            body += [(self.spec.num_blocks, Product(batch, c, 6 * d))]
        return Work(tuple(body), Draw(rows, d, self.spec.vocab_size))


class _Call:
    """One network call: the batch, its buffers, and c when the network is time-conditioned."""

    def __init__(self, model: DiT, batch: Batch, workspace: Workspace):
        self.model, self.batch, self.workspace, self.spans = model, batch, workspace, batch.spans
        self.num_heads, self.dim = model.spec.num_heads, model.spec.hidden_size
        self.c = None
        if model.sigma_map:
            self.c = condition(model.sigma_map, -torch.log1p(-(1 - NOISE_EPS) * batch.mask_rate))

    def view(self, name: str, *shape: int) -> Tensor:
        return self.model._view(self.workspace, name, *shape)

    def hidden(self) -> Tensor:
        residual, delta, gate = self.embed(), None, None
        *full, last = self.model.blocks
        for index, block in enumerate(full):
            with self.spans("block", index):
                vectors = self.modulation(block.modulation, 6, index)
                delta, gate = self.full_block(block, vectors, residual, delta, gate)
        with self.spans("block", len(full)):
            return self.last_block(last, residual, delta, gate)

    def embed(self) -> Tensor:
        """The residual stream, float32 [T, D]."""
        tokens, embedding = self.batch.tokens, self.model.embedding
        residual = self.workspace.view("residual", len(tokens), self.dim)
        if embedding.dtype is residual.dtype:
            return torch.index_select(embedding, 0, tokens, out=residual)
        return residual.copy_(torch.index_select(embedding, 0, tokens, out=self.view("normed", *residual.shape)))

    def full_block(
        self, block: Block, vectors: Vectors, residual: Tensor, delta: Tensor | None, gate: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Adds gate * delta of the block before to the residual; returns its own two, which are yet to be added."""
        num, lengths = len(residual), self.batch.lengths
        out = self.view("normed", num, self.dim)
        normed = add_norm(residual, delta, *block.norm1, gate=gate, **vectors.first, **self.of(lengths), out=out)
        (linear,) = block.projections
        qkv = linear(normed, out=self.view("qkv", num, 3 * self.dim)).view(num, 3, self.num_heads, -1)
        with self.spans("attention"):
            attention(*qkv.unbind(1), lengths=lengths, rope=self.model.rope, out=normed)
        return self.finish(block, vectors, residual, normed, self.view("qkv", num, self.dim), lengths)

    def last_block(self, block: Block, residual: Tensor, delta: Tensor | None, gate: Tensor | None) -> Tensor:
        """Keys and values of all tokens; everything else, up to the final norm, at the rows only."""
        num, rows, num_rows, d = len(residual), self.batch.rows, len(self.batch.rows), self.dim
        lengths, row_counts = self.batch.lengths, self.batch.row_counts
        vectors = self.modulation(block.modulation, 6, self.model.spec.num_blocks - 1)
        out = self.view("normed", num, d)
        normed = add_norm(residual, delta, *block.norm1, gate=gate, **vectors.first, **self.of(lengths), out=out)
        state = torch.index_select(normed, 0, rows, out=self.view("hidden", num_rows, d))
        of_rows, of_tokens = block.projections
        query = of_rows(state, out=self.view("row_query", num_rows, d))
        kv = of_tokens(normed, out=self.view("qkv", num, 2 * d))
        with self.spans("attention"):
            attention(
                query.view(num_rows, self.num_heads, -1),
                *kv.view(num, 2, self.num_heads, -1).unbind(1),
                lengths=lengths,
                row_counts=row_counts,
                positions=self.batch.row_positions,
                rope=self.model.rope,
                out=state,
            )
        wide = torch.index_select(residual, 0, rows, out=self.workspace.view("row_residual", num_rows, d))
        delta, gate = self.finish(block, vectors, wide, state, query, row_counts)
        final = self.modulation(self.model.final_modulation, 2, self.model.spec.num_blocks)
        return add_norm(wide, delta, *self.model.final_norm, gate=gate, **final.first, **self.of(row_counts), out=state)

    def finish(
        self,
        block: Block,
        vectors: Vectors,
        residual: Tensor,
        attended: Tensor,
        scratch: Tensor,
        counts: tuple[int, ...] | Offsets,
    ) -> tuple[Tensor, Tensor | None]:
        """What follows attention, for any set of rows: the MLP's delta and its gate, yet to be added to the residual.
        `attended` becomes the delta, `scratch` is overwritten."""
        delta = block.out(attended, out=scratch)
        options = {"gate": vectors.gate1, **vectors.second, **self.of(counts)}
        normed = add_norm(residual, delta, *block.norm2, **options, out=attended)
        for rows in normed.split(ROWS):
            wide = block.up.gelu(rows, out=self.view("mlp", len(rows), self.model.spec.intermediate_size))
            block.down(wide, out=rows)
        return normed, vectors.gate2

    def of(self, row_counts: tuple[int, ...] | Offsets) -> dict[str, tuple[int, ...] | Offsets]:
        """Whose rows are whose, where modulation asks for it."""
        return {} if self.c is None else {"row_counts": row_counts}

    def modulation(self, linear: Linear | None, num: int, index: int) -> Vectors:
        """`num` vectors [B, D] per sequence; none in a network without time conditioning. Calls of even and odd index
        write to different buffers: a block's last gate is used by the next."""
        if linear is None:
            return Vectors()
        buffer = self.workspace.view(f"modulation{index % 2}", len(self.c), num * self.dim)
        return Vectors(*linear(self.c, out=buffer).chunk(num, dim=1))
