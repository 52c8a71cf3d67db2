"""The DiT trunk against the published equations, written out in published_forward.py."""

from dataclasses import replace

import published_forward as published
import pytest
import torch

from unmask import Ancestral, Sampler
from unmask.denoiser import Batch, DenoiserSpec
from unmask.models import dit
from unmask.models.dit import DiT, Shape, tensor_shapes
from unmask.models.linear import Linear
from unmask.workspace import Workspace

VOCAB, DIM, BLOCKS, HEADS, MLP, COND, LENGTH = 101, 64, 3, 2, 160, 24, 64
LENGTHS = (7, 7, 64, 1, 33, 33, 33)

# name -> (cond_dim, tied, time_conditioned): the kinds of checkpoint that share this trunk
FAMILIES = {
    "mdlm": (COND, False, False),
    "mdlm time-conditioned": (COND, False, True),
    "sedd": (COND, False, True),
    "unmask": (None, True, False),
    "unmask untied": (None, False, False),
}


def make(family, dtype=torch.float32, num_blocks=BLOCKS):
    cond_dim, tied, time_conditioned = FAMILIES[family]
    state = published.random_state(VOCAB, DIM, num_blocks, MLP, HEADS, cond_dim, tied)
    spec = DenoiserSpec(
        family.split()[0], VOCAB, VOCAB - 1, DIM, num_blocks, HEADS, MLP, LENGTH, time_conditioned=time_conditioned
    )
    state.pop("rotary_emb.inv_freq", None)
    return state, DiT(spec, state, dtype=dtype)


def make_batch(lengths=LENGTHS, rows=None, seed=0):
    """Random tokens; `rows` gives the queried positions of each sequence, by default a few chosen at random."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (sum(lengths),), generator=generator)
    mask_rate = torch.rand(len(lengths), generator=generator).clamp(1e-3, 1)
    if rows is None:
        counts = [max(1, n // 3) for n in lengths]
        drawn = [torch.randperm(n, generator=generator)[:k] for n, k in zip(lengths, counts, strict=True)]
        rows = [positions.sort().values.tolist() for positions in drawn]
    flat = [sum(lengths[:i]) + position for i, positions in enumerate(rows) for position in positions]
    flat = torch.tensor(flat, dtype=torch.int64)
    return Batch(tokens, tuple(lengths), flat, tuple(len(r) for r in rows), mask_rate)


def run(model, batch):
    workspace = Workspace([model.buffers(len(batch.tokens), len(batch.rows), len(batch.lengths))])
    workspace.poison()
    return model.hidden(batch, workspace).clone()


def logits(model, hidden):
    result = hidden.float() @ model.head.weight.float().t()
    return result if model.head.bias is None else result + model.head.bias.float()


def expected(state, model, batch, dtype=torch.float64):
    """Hidden rows and log-probabilities of the published equations, one sequence at a time."""
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    hidden, scores = [], []
    for tokens, rate in zip(batch.tokens.split(batch.lengths), batch.mask_rate.tolist(), strict=True):
        sigma = published.sigma_of(rate) if model.spec.time_conditioned else 0.0
        h, z = published.forward(state, tokens, HEADS, sigma)
        hidden.append(h)
        scores.append(published.log_probs(z, model.spec.mask_id))
    return torch.cat(hidden)[batch.rows], torch.cat(scores)[batch.rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_the_published_equations(family):
    state, model = make(family)
    batch = make_batch()
    hidden = run(model, batch)
    want_hidden, want_scores = expected(state, model, batch)
    scores = published.log_probs(logits(model, hidden), model.spec.mask_id)
    allowed = torch.arange(VOCAB) != model.spec.mask_id
    torch.testing.assert_close(hidden, want_hidden.float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores[:, allowed], want_scores[:, allowed].float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_good_as_bf16_torch(family):
    """The measuring stick is fp64. Plain torch, with everything in bf16, sets how wrong bf16 may be.

    Allowed: its largest error, and 0.7 of its root-mean-square error, as the residual stream stays fp32 here.
    """
    state, model = make(family, torch.bfloat16)
    batch = make_batch()
    exact, _ = expected(state, model, batch)
    plain, _ = expected(state, model, batch, torch.bfloat16)
    ours, plain = (run(model, batch).double() - exact).abs(), (plain.double() - exact).abs()
    message = f"rms {ours.square().mean().sqrt():.2e} against {plain.square().mean().sqrt():.2e} of plain bf16, "
    message += f"max {ours.max():.2e} against {plain.max():.2e}"
    print(family, message)
    assert ours.square().mean().sqrt() <= 0.7 * plain.square().mean().sqrt(), message
    assert ours.max() <= plain.max(), message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_after_every_block(family, dtype, monkeypatch):
    """Against fp64, and no worse than plain torch that does everything in the same dtype, but for a rounding."""
    state, model = make(family, dtype)
    batch, found, finish = make_batch(rows=[range(n) for n in LENGTHS]), [], dit._Call.finish

    def record(call, block, vectors, residual, *others):
        delta, gate = finish(call, block, vectors, residual, *others)
        by_row = 1 if gate is None else gate.repeat_interleave(torch.tensor(LENGTHS), 0)
        found.append(residual + by_row * delta)
        return delta, gate

    monkeypatch.setattr(dit._Call, "finish", record)
    run(model, batch)
    exact, plain = (after_each_block(state, model, batch, kind) for kind in (torch.float64, dtype))
    assert len(found) == BLOCKS
    slack = 4 * torch.finfo(dtype).eps
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        ours, theirs, size = (ours - right).abs(), (theirs - right).abs(), right.abs()
        assert ours.square().mean().sqrt() <= theirs.square().mean().sqrt() + slack * size.square().mean().sqrt() / 4
        assert ours.max() <= theirs.max() + slack * size.max()


def after_each_block(state, model, batch, dtype):
    """The published residual streams of the whole batch [T, D], one for each block."""
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    streams = []
    for tokens, rate in zip(batch.tokens.split(batch.lengths), batch.mask_rate.tolist(), strict=True):
        sigma = published.sigma_of(rate) if model.spec.time_conditioned else 0.0
        streams.append(published.residuals(state, tokens, HEADS, sigma))
    return [torch.cat(each) for each in zip(*streams, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_is_time_conditioning_at_sigma_zero(dtype):
    state, folded = make("mdlm", dtype)
    conditioned = DiT(replace(folded.spec, time_conditioned=True), state, dtype=dtype)
    assert not folded.sigma_map and conditioned.sigma_map
    batch = replace(make_batch(), mask_rate=torch.zeros(len(LENGTHS)))  # sigma = -log(1 - 0)
    difference = (run(folded, batch) - run(conditioned, batch)).float()
    exact, _ = expected(state, folded, batch)
    # In bf16 the two round different matrices, each as well as plain bf16 does.
    plain = (expected(state, folded, batch, dtype)[0] - exact).square().mean().sqrt()
    assert difference.abs().max() <= 2e-5 if dtype is torch.float32 else difference.square().mean().sqrt() <= plain


class Unpruned(DiT):
    """Queries every position in the last block, too."""

    def hidden(self, batch, workspace):
        every = torch.arange(len(batch.tokens))
        everything = replace(batch, rows=every, row_counts=batch.lengths, row_positions=None)
        return super().hidden(everything, workspace)[batch.rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mdlm", "sedd", "unmask"])
def test_pruning_the_last_block_draws_the_same_tokens(family, dtype):
    state, model = make(family, dtype)
    options = {"reveal": Ancestral(20), "max_batch": 3}
    lengths = [64, 64, 17, 40, 64, 5]
    pruned, unpruned = (
        Sampler(each, **options).sample(len(lengths), lengths, seed=3, prompt=[[1, 2, 3]] * len(lengths))
        for each in (model, Unpruned(model.spec, state, dtype=dtype))
    )
    for one, other in zip(pruned, unpruned, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4 if dtype is torch.float32 else 0.1, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_do_not_change_what_they_hold(family, dtype):
    """Pruning the last block: any subset of rows equals the same rows of a call that queries every position."""
    _, model = make(family, dtype)
    subset = make_batch()
    everything = make_batch(rows=[range(n) for n in LENGTHS])
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(run(model, subset), run(model, everything)[subset.rows], atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_does_not_see_its_neighbours(family):
    _, model = make(family)
    batch = make_batch()
    packed = run(model, batch).split(batch.row_counts)
    starts = torch.tensor([sum(LENGTHS[:i]) for i in range(len(LENGTHS))])
    for i, rows in enumerate(batch.rows.split(batch.row_counts)):
        tokens = batch.tokens.split(batch.lengths)[i]
        alone = Batch(tokens, (len(tokens),), rows - starts[i], (len(rows),), batch.mask_rate[i : i + 1])
        torch.testing.assert_close(packed[i], run(model, alone), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("family", ["mdlm", "sedd"])
def test_sequences_without_rows_are_allowed(family):
    state, model = make(family)
    batch = make_batch((5, 9, 9, 4), rows=[[1], [], [2, 8], []])
    torch.testing.assert_close(run(model, batch), expected(state, model, batch)[0].float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_of_rows_do_not_change_the_result(family, dtype, monkeypatch):
    _, model = make(family, dtype)
    batch = make_batch()
    whole = run(model, batch)
    monkeypatch.setattr(dit, "ROWS", 10)
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(run(model, batch), whole, atol=tolerance, rtol=0)


def test_small_activations_meet_the_epsilon_of_layer_norm():
    state, model = make("unmask untied")
    state["vocab_embed.embedding"] *= 1e-3
    batch = make_batch()
    hidden = run(DiT(model.spec, state), batch)
    torch.testing.assert_close(hidden, expected(state, model, batch)[0].float(), atol=1e-4, rtol=0)


def test_one_block():
    state, model = make("mdlm", num_blocks=1)
    batch = make_batch()
    torch.testing.assert_close(run(model, batch), expected(state, model, batch)[0].float(), atol=1e-4, rtol=0)


def test_mask_rate_matters_only_with_time_conditioning():
    for family, (_, _, time_conditioned) in FAMILIES.items():
        _, model = make(family)
        batch = make_batch()
        later = replace(batch, mask_rate=batch.mask_rate / 2)
        assert torch.equal(run(model, batch), run(model, later)) is not time_conditioned


def test_a_dirty_and_oversized_workspace_gives_the_same_bits():
    _, model = make("sedd")
    small, large = make_batch((5, 3), seed=1), make_batch()
    workspace = Workspace([model.buffers(500, 300, 20)])
    workspace.poison()
    first = model.hidden(small, workspace).clone()
    model.hidden(large, workspace)
    assert torch.equal(model.hidden(small, workspace), first)
    assert not first.isnan().any()


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_count_the_products_really_done(family, monkeypatch):
    _, model = make(family)
    length, num_rows = 40, 7
    attended, attend = [], dit.attention

    def count_attention(query, key, value, **options):
        attended.append(2 * query.numel() * len(key) + 2 * len(query) * value.numel())
        return attend(query, key, value, **options)

    monkeypatch.setattr(dit, "attention", count_attention)
    linear, product = [], Linear._product

    def count_product(self, x, out, gelu):
        linear.append(2 * len(x) * self.weight.numel())
        return product(self, x, out, gelu)

    monkeypatch.setattr(Linear, "_product", count_product)
    condition = [model.sigma_map[f"sigma_map.mlp.{i}.weight"].numel() * 2 for i in (0, 2) if model.sigma_map]
    run(model, make_batch((length,), rows=[range(num_rows)]))
    flops = model.flops(length, num_rows)
    assert flops.blocks == sum(linear) + sum(condition)
    assert flops.attention == sum(attended)
    assert flops.head == 2 * num_rows * DIM * VOCAB


def test_flops_add_up():
    _, model = make("mdlm")
    flops = model.flops(10, 2) * 3 + model.flops(5, 5)
    assert flops.total == 3 * model.flops(10, 2).total + model.flops(5, 5).total


def test_tensor_shapes_describe_a_checkpoint():
    for cond_dim, tied, _ in FAMILIES.values():
        state = published.random_state(VOCAB, DIM, BLOCKS, MLP, HEADS, cond_dim, tied)
        state.pop("rotary_emb.inv_freq", None)
        shapes = tensor_shapes(Shape(VOCAB, DIM, BLOCKS, MLP, cond_dim, tied))
        assert list(shapes) == list(state)
        assert shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_a_tied_head_is_the_embedding_itself():
    _, model = make("unmask")
    assert model.head.weight is model.embedding


def test_the_denoiser_owns_its_weights():
    state, model = make("unmask")
    batch = make_batch()
    before = run(model, batch)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(run(model, batch), before)


def test_errors():
    state, model = make("mdlm")
    with pytest.raises(ValueError, match="shift=True"):
        DiT(replace(model.spec, shift=True), state)
    with pytest.raises(ValueError, match="num_blocks must be positive, got 0"):
        DiT(replace(model.spec, num_blocks=0), state)
    with pytest.raises(ValueError, match="dtype must be one of"):
        DiT(model.spec, state, dtype=torch.float16)
    with pytest.raises(ValueError, match="at most 64 tokens, got 65"):
        run(model, make_batch((65,)))
    batch = make_batch()
    with pytest.raises(ValueError, match="max_tokens"):
        model.hidden(batch, Workspace([model.buffers(10, 10, 10)]))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_and_its_epilogue(device, dtype, biased):
    """Against fp64, with values where the tanh approximation and the exact GELU differ by 4e-4."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((33, 64), (48, 64), (48,)))
    x, weight, bias = (tensor.to(device, dtype) for tensor in (x, weight / 8, bias))
    linear, out = Linear(weight, bias if biased else None), torch.empty(33, 48, dtype=dtype, device=device)
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(linear(x, out=out).double(), exact, atol=tolerance, rtol=tolerance)
    wide = torch.nn.functional.gelu(exact, approximate="tanh")
    assert linear.gelu(x, out=out) is out
    torch.testing.assert_close(out.double(), wide, atol=tolerance, rtol=tolerance)
