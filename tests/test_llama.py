"""The Llama trunk against its equations, written out in llama_reference.py, and against `transformers`."""

from collections import Counter
from dataclasses import replace

import llama_reference as reference
import numpy as np
import pytest
import torch
from test_calibration import KNOWN

from unmask import Ancestral, Sampler
from unmask.denoiser import Batch, DenoiserSpec
from unmask.kernels import Offsets
from unmask.models import trunk
from unmask.models.linear import Linear, SideBySide
from unmask.models.llama import Llama, Shape, tensor_shapes
from unmask.models.rope import Linear as LinearScaling
from unmask.models.rope import Llama3, rope_tables
from unmask.models.weights import Weights
from unmask.work import AddNorm, Attention, Load, Product, SwiGLU
from unmask.workspace import Workspace

VOCAB, DIM, BLOCKS, MLP, LENGTH, BASE = 101, 48, 3, 80, 64, 5_000.0
LENGTHS = (7, 7, 64, 1, 33, 33, 33)
PLAIN = Shape(VOCAB, DIM, BLOCKS, MLP, num_heads=4, num_kv_heads=4, head_dim=12)

# The kinds of checkpoint that share this trunk: shape, whether rows are shifted, positions of a block.
KINDS = {
    "llada": (PLAIN, False, None),
    "diffullama": (PLAIN, True, None),
    "dream": (PLAIN._replace(num_kv_heads=2, qkv_bias=True), True, None),
    "tied": (PLAIN._replace(num_kv_heads=1, tied=True), False, None),
    "every bias": (PLAIN._replace(qkv_bias=True, out_bias=True, mlp_bias=True), True, None),
    "narrow heads": (PLAIN._replace(num_heads=6, num_kv_heads=2, head_dim=4), False, None),
    "qwen3": (PLAIN._replace(num_heads=6, num_kv_heads=3, head_dim=16, head_norms=True), True, None),
    "sdar": (PLAIN._replace(num_heads=6, num_kv_heads=3, head_dim=16, head_norms=True), False, 4),
}


def make(kind, dtype=torch.float32, **options):
    shape, shift, block = KINDS[kind]
    state = reference.random_state(tensor_shapes(shape))
    sizes = (shape.num_blocks, shape.num_heads, shape.intermediate_size, LENGTH)
    heads = {"num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
    spec = DenoiserSpec(kind, VOCAB, VOCAB - 1, DIM, *sizes, shift=shift, **heads)
    return state, Llama(spec, state, rope_base=BASE, block=block, dtype=dtype, **options)


def make_batch(lengths=LENGTHS, rows=None, seed=0):
    """Random tokens; `rows` gives the queried positions of each sequence, by default a few, the first among them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (sum(lengths),), generator=generator)
    if rows is None:
        drawn = [torch.randperm(n, generator=generator)[: max(1, n // 3)] for n in lengths]
        rows = [sorted({0, min(1, n - 1), *one.tolist()}) for n, one in zip(lengths, drawn, strict=True)]
    flat = [sum(lengths[:i]) + position for i, positions in enumerate(rows) for position in positions]
    counts = tuple(len(positions) for positions in rows)
    return Batch(tokens, tuple(lengths), torch.tensor(flat, dtype=torch.int64), counts, torch.ones(len(lengths)))


def run(model, batch):
    workspace = Workspace([model.buffers(len(batch.tokens), len(batch.rows), len(batch.lengths))])
    workspace.poison()
    return model.hidden(batch, workspace).clone()


def logits(model, hidden):
    return hidden.float() @ model.head.weight.float().t()


def expected(state, model, batch, dtype=torch.float64):
    """Hidden rows and logits of the equations, one sequence at a time; a shifted row is that of the position before."""
    state, found = {name: tensor.to(dtype) for name, tensor in state.items()}, []
    heads = model.spec.num_heads, model.spec.num_kv_heads
    for tokens in batch.tokens.split(batch.lengths):
        hidden, scores = reference.forward(state, tokens, *heads, base=BASE, block=model.style.block)
        order = torch.arange(len(tokens))
        order = (order - 1).clamp(min=0) if model.spec.shift else order
        found.append((hidden[order], scores[order]))
    return tuple(torch.cat(each)[batch.rows] for each in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_equations(kind):
    state, model = make(kind)
    batch = make_batch()
    hidden, scores = expected(state, model, batch)
    found = run(model, batch)
    torch.testing.assert_close(found, hidden.float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(model, found), scores.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_good_as_bf16_torch(kind):
    """The measuring stick is fp64; plain torch, with everything in bf16, sets how wrong bf16 may be. The residual
    stream, norms and rotation are fp32 here."""
    state, model = make(kind, torch.bfloat16)
    batch = make_batch()
    exact, plain = (expected(state, model, batch, dtype)[0].double() for dtype in (torch.float64, torch.bfloat16))
    ours, plain = ((each - exact).square().mean().sqrt() for each in (run(model, batch).double(), plain))
    assert ours <= 0.7 * plain, f"{ours:.2e} against {plain:.2e} of plain bf16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_change_what_they_hold(kind, dtype):
    """Pruning the last block: any subset of rows equals the same rows of a call that queries every position."""
    _, model = make(kind, dtype)
    subset, everything = make_batch(), make_batch(rows=[range(n) for n in LENGTHS])
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(run(model, subset), run(model, everything)[subset.rows], atol=tolerance, rtol=0)


def test_positions_0_and_1_are_predicted_by_one_row_when_shifted():
    _, model = make("dream")
    rows = run(model, make_batch((5,), rows=[[0, 1, 2]]))
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[1], rows[2])


@pytest.mark.parametrize("kind", ["dream", "sdar"])
def test_a_sequence_does_not_see_its_neighbours(kind):
    _, model = make(kind)
    batch = make_batch()
    starts = torch.tensor([sum(LENGTHS[:i]) for i in range(len(LENGTHS))])
    packed = run(model, batch).split(batch.row_counts)
    for i, rows in enumerate(batch.rows.split(batch.row_counts)):
        tokens = batch.tokens.split(batch.lengths)[i]
        alone = Batch(tokens, (len(tokens),), rows - starts[i], (len(rows),), torch.ones(1))
        torch.testing.assert_close(packed[i], run(model, alone), atol=1e-5, rtol=1e-6)


def test_a_block_does_not_see_those_behind_it():
    _, model = make("sdar")
    batch = make_batch((11,), rows=[range(11)])
    before = run(model, batch)
    batch.tokens[8:] = 3
    after = run(model, batch)
    assert torch.equal(before[:8], after[:8]) and (before[8:] != after[8:]).any(dim=1).all()


def test_sequences_without_rows_are_allowed():
    state, model = make("dream")
    batch = make_batch((5, 9, 9, 4), rows=[[1], [], [2, 8], []])
    torch.testing.assert_close(run(model, batch), expected(state, model, batch)[0].float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["dream", "qwen3"])
def test_the_mlp_and_the_norms_of_heads_in_pieces(kind, monkeypatch):
    _, model = make(kind)
    batch = make_batch()
    whole = run(model, batch)
    monkeypatch.setattr(trunk, "ROWS", 16)
    torch.testing.assert_close(run(model, batch), whole, atol=1e-5, rtol=0)


def test_samples_do_not_depend_on_their_batch():
    """The sampler over a shifted model: ragged lengths, infilling, one sequence of a call or many."""
    _, model = make("dream")
    arguments = {"num_samples": 4, "length": [20, 9, 20, 20], "seed": 5, "prompt": [[3, 1, 4]] * 4}
    alone, together = (Sampler(model, reveal=Ancestral(8), max_batch=n).sample(**arguments) for n in (1, 4))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.tokens, other.tokens) and model.spec.mask_id not in one.tokens
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=0)


# Positions of a rotary embedding


def test_scaled_frequencies():
    """Llama 3's: short wavelengths stay, long ones are divided by the factor, between them a blend."""

    def frequencies(scaling):
        return torch.asin(rope_tables(64, 2, 500_000.0, scaling)[1][1].double())  # angles of position 1

    plain, scaled, halved = map(frequencies, (None, Llama3(8.0, 1.0, 4.0, 256), LinearScaling(2.0)))
    turns = 256 * plain / (2 * torch.pi)
    fast, slow = turns > 4, turns < 1
    blended = ~fast & ~slow
    assert fast.sum() > 4 and slow.sum() > 4 and blended.sum() > 2
    torch.testing.assert_close(scaled[fast], plain[fast], atol=0, rtol=1e-6)
    torch.testing.assert_close(scaled[slow] * 8, plain[slow], atol=0, rtol=1e-6)
    share = (turns[blended] - 1) / 3
    torch.testing.assert_close(scaled[blended] / plain[blended], share + (1 - share) / 8, atol=0, rtol=1e-6)
    torch.testing.assert_close(halved * 2, plain, atol=0, rtol=1e-6)


# Work


def test_its_work_is_what_a_call_does(monkeypatch):
    """Every product, norm, gate and attention of a call, recorded where it happens."""
    _, model = make("dream")
    done = Counter()
    product, norm, attend, gate = Linear._product, trunk.add_norm, trunk.attention, trunk.swiglu

    def record_product(self, x, out, gelu):
        done[Product(len(x), *self.weight.t().shape, gelu)] += 1
        return product(self, x, out, gelu)

    def record_norm(residual, *arguments, **options):
        done[AddNorm(*residual.shape)] += 1
        return norm(residual, *arguments, **options)

    def record_attention(query, key, value, *, lengths, row_counts=None, **options):
        num_pairs, (heads, dim) = int(np.dot(lengths, row_counts or lengths)), query.shape[1:]
        done[Attention(len(lengths), len(query), len(key), num_pairs, heads, dim, key.shape[1])] += 1
        return attend(query, key, value, lengths=lengths, row_counts=row_counts, **options)

    def record_gate(gate_up, out):
        done[SwiGLU(*out.shape)] += 1
        return gate(gate_up, out=out)

    monkeypatch.setattr(Linear, "_product", record_product)
    monkeypatch.setattr(trunk, "add_norm", record_norm)
    monkeypatch.setattr(trunk, "attention", record_attention)
    monkeypatch.setattr(trunk, "swiglu", record_gate)
    batch = make_batch((9, 4, 9), rows=[[0, 4], [1], [2, 3, 8]])
    run(model, batch)
    load = Load.of(batch.lengths, batch.row_counts)
    said = Counter()
    for times, operation in model.work(load).body:
        said[operation] += times
    assert said == done
    alone = [model.flops(*shape) for shape in zip(batch.lengths, batch.row_counts, strict=True)]
    assert model.work(load).flops == alone[0] + alone[1] + alone[2]


def test_its_runs_are_predicted():
    _, model = make("sdar")
    plan = Sampler(model, reveal=Ancestral(4)).plan(3, 16, calibration=KNOWN)
    assert plan.seconds.of("body") > 0 and plan.cost.total.attention > 0


# Weights


def test_the_denoiser_owns_its_weights():
    state, model = make("tied")
    batch = make_batch()
    before = run(model, batch)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(run(model, batch), before)
    assert model.head.weight is model.layers.embedding


def test_shared_weights_are_not_copied():
    state, model = make("dream", share=True)
    assert model.layers.embedding is state["model.embed_tokens.weight"]
    assert model.head.weight is state["lm_head.weight"]
    assert model.layers.final_norm.weight is state["model.norm.weight"]
    narrow = Llama(model.spec, state, dtype=torch.bfloat16, share=True)
    assert narrow.layers.embedding is not state["model.embed_tokens.weight"]


def test_layers_side_by_side_are_one_layer():
    """What a GPU does with shared weights."""
    state, _ = make("dream")
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    fused = Weights(state, dtype=torch.float32, device="cpu").linear(*names)
    apart = SideBySide(tuple(Linear(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names))
    x, out = torch.randn(5, DIM, generator=torch.Generator().manual_seed(0)), torch.empty(2, 5, 2 * DIM)
    assert apart(x, out=out[0]) is not None
    torch.testing.assert_close(out[0], fused(x, out=out[1]), atol=1e-5, rtol=0)


def test_errors():
    state, model = make("dream")
    with pytest.raises(ValueError, match="dtype must be one of"):
        Llama(model.spec, state, dtype=torch.float16)
    with pytest.raises(ValueError, match="at most 64 tokens, got 65"):
        run(model, make_batch((65,)))
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads = 4, got 3"):
        replace(model.spec, num_kv_heads=3)
    with pytest.raises(ValueError, match="head_dim must be positive, got 0"):
        replace(model.spec, head_dim=0)


def test_offsets_that_only_the_device_knows():
    """The same rows from starts with unused places behind them, as a captured tick has them."""
    _, model = make("dream")
    lengths, row_counts = (9, 4), (3, 2)
    batch = make_batch(lengths, rows=[[0, 4, 8], [1, 3]])
    starts, row_starts = (torch.tensor([0, a, a + b, a + b], dtype=torch.int32) for a, b in (lengths, row_counts))
    padded = Batch(
        torch.cat([batch.tokens, torch.zeros(3, dtype=torch.int64)]),
        Offsets(starts, 9),
        torch.cat([batch.rows, torch.zeros(2, dtype=torch.int64)]),
        Offsets(row_starts, 3),
        torch.ones(3),
        torch.cat([batch.row_positions, torch.zeros(2, dtype=torch.int64)]),
    )
    workspace = Workspace([model.buffers(16, 7, 3)])
    torch.testing.assert_close(model.hidden(padded, workspace)[:5], run(model, batch), atol=1e-6, rtol=0)
