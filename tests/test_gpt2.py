"""The GPT-2 trunk against its equations, written out in gpt2_reference.py."""

from dataclasses import replace

import gpt2_reference as reference
import pytest
import torch
from llama_reference import random_state
from test_llama import LENGTHS, logits, make_batch, run

from unmask.denoiser import Batch, DenoiserSpec
from unmask.kernels import Offsets
from unmask.models.gpt2 import GPT2, Shape, tensor_shapes
from unmask.work import Load, Product, SwiGLU
from unmask.workspace import Workspace

VOCAB, DIM, BLOCKS, HEADS, MLP, LENGTH = 101, 48, 3, 4, 96, 64


def make(shift=True, tied=True, dtype=torch.float32, **options):
    state = random_state(tensor_shapes(Shape(VOCAB, DIM, BLOCKS, MLP, LENGTH, tied)))
    spec = DenoiserSpec("gpt2", VOCAB, VOCAB - 1, DIM, BLOCKS, HEADS, MLP, LENGTH, shift=shift)
    return state, GPT2(spec, state, dtype=dtype, **options)


def expected(state, model, batch, dtype=torch.float64):
    state, found = {name: tensor.to(dtype) for name, tensor in state.items()}, []
    for tokens in batch.tokens.split(batch.lengths):
        hidden, scores = reference.forward(state, tokens, HEADS)
        order = torch.arange(len(tokens))
        order = (order - 1).clamp(min=0) if model.spec.shift else order
        found.append((hidden[order], scores[order]))
    return tuple(torch.cat(each)[batch.rows] for each in zip(*found, strict=True))


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lengths", [LENGTHS, (9, 9, 9)], ids=["ragged", "equal"])
def test_matches_the_equations(shift, tied, lengths):
    state, model = make(shift, tied)
    batch = make_batch(lengths)
    hidden, scores = expected(state, model, batch)
    found = run(model, batch)
    torch.testing.assert_close(found, hidden.float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(model, found), scores.float(), atol=1e-4, rtol=0)
    assert (model.head.weight is model.layers.embedding) is tied


def test_bf16_is_as_good_as_bf16_torch():
    state, model = make(dtype=torch.bfloat16)
    batch = make_batch()
    exact, plain = (expected(state, model, batch, dtype)[0].double() for dtype in (torch.float64, torch.bfloat16))
    ours, plain = ((each - exact).square().mean().sqrt() for each in (run(model, batch).double(), plain))
    assert ours <= 0.7 * plain, f"{ours:.2e} against {plain:.2e} of plain bf16"


def test_positions_from_offsets_that_only_the_device_knows():
    _, model = make()
    lengths = 9, 4
    batch = make_batch(lengths, rows=[[0, 4, 8], [1, 3]])
    starts, row_starts = (torch.tensor(each, dtype=torch.int32) for each in ([0, 9, 9, 13], [0, 3, 3, 5]))
    # A sequence without tokens between the two, and more unused tokens behind them than there are positions.
    spare = torch.zeros(LENGTH + 9, dtype=torch.int64)
    padded = Batch(
        torch.cat([batch.tokens, spare]),
        Offsets(starts, 9),
        torch.cat([batch.rows, spare[:2]]),
        Offsets(row_starts, 3),
        torch.ones(3),
        torch.cat([batch.row_positions, spare[:2]]),
    )
    workspace = Workspace([model.buffers(len(padded.tokens), 7, 3)])
    torch.testing.assert_close(model.hidden(padded, workspace)[:5], run(model, batch), atol=1e-6, rtol=0)


def test_work():
    _, model = make()
    operations = [operation for _, operation in model.work(Load.of((9, 4), (2, 1))).body]
    assert Product(13, DIM, 3 * DIM) in operations and Product(3, DIM, MLP, gelu=True) in operations
    assert not any(isinstance(operation, SwiGLU) for operation in operations)


def test_the_denoiser_owns_its_weights_unless_shared():
    state, model = make()
    batch = make_batch()
    before = run(model, batch)
    shared = GPT2(model.spec, state, share=True)
    assert shared.layers.embedding is state["transformer.wte.weight"]
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(run(model, batch), before)


def test_errors():
    _, model = make()
    with pytest.raises(ValueError, match="at most 64 tokens, got 65"):
        run(model, make_batch((65,)))
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_heads = 5, got 48"):
        replace(model.spec, num_heads=5)
