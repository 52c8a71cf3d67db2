"""Block-causal attention: its values against fp64 under an explicit mask, queries anywhere, invariance."""

import math

import pytest
import torch
from laws import compiled, each_isa, numpy_remarks, offsets, on, with_triton
from test_attention import TOLERANCE, error, exact, inputs, run

from unmask.kernels import attention
from unmask.kernels.attention import OPERATOR, cpu
from unmask.kernels.attention.call import AttentionCall

pytestmark = numpy_remarks
IMPLS = ["reference", "sdpa", pytest.param("cpu", marks=compiled), pytest.param("triton", marks=with_triton)]
each_implementation = pytest.mark.parametrize("impl", IMPLS)
each_block = pytest.mark.parametrize("block", [1, 4, 32, None])
# Keys of whole tiles and blocks of keys, of parts of one, of several; as many queries, a few of them, or none.
LENGTHS, ROW_COUNTS = (5, 130, 1, 0, 300, 9), (5, 70, 1, 0, 7, 0)


def scattered(heads, groups, dim, dtype=torch.float32):
    """As `inputs`, the queries of a sequence in no order."""
    query, key, value, positions, rope = inputs(heads, groups, dim, dtype, 0, LENGTHS, ROW_COUNTS)
    return query, key, value, torch.cat([at.flip(0) for at in positions.split(ROW_COUNTS)]), rope


@each_implementation
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 72), (torch.bfloat16, 16)], ids=str)
@each_block
def test_values_against_fp64(impl, dtype, dim, block):
    query, key, value, positions, rope = scattered(2, 1, dim, dtype)
    options = {"lengths": LENGTHS, "row_counts": ROW_COUNTS, "positions": positions, "rope": rope, "block": block}
    found = run(impl, query, key, value, **options)
    assert error(found, exact(query, key, value, **options)) < TOLERANCE[dtype]
    other = 16 if block is None else block + 1
    assert error(found, exact(query, key, value, **options | {"block": other})) > 4 * TOLERANCE[torch.bfloat16]


@each_implementation
@each_block
@pytest.mark.parametrize("row_counts", [None, (3, 70, 1, 0, 40, 9)])
def test_queries_without_positions_stand_in_order(impl, block, row_counts):
    query, key, value, _, _ = inputs(2, 1, 16, lengths=LENGTHS, row_counts=row_counts or LENGTHS)
    options = {"lengths": LENGTHS, "row_counts": row_counts, "block": block}
    expected = exact(query, key, value, **options | {"row_counts": row_counts or LENGTHS})
    assert error(run(impl, query, key, value, **options), expected) < 2e-6


@each_implementation
@pytest.mark.parametrize("block", [300, 301, 2**70])
def test_a_block_of_the_longest_sequence_hides_nothing(impl, block):
    query, key, value, positions, rope = scattered(2, 1, 16)
    options = {"lengths": LENGTHS, "row_counts": ROW_COUNTS, "positions": positions, "rope": rope}
    expected = exact(query, key, value, **options)
    assert error(run(impl, query, key, value, **options, block=block), expected) < 2e-6


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_block
def test_each_isa(isa, dtype, block):
    """Columns that nothing is a multiple of."""
    query, key, value, positions, rope = scattered(3, 1, 6, dtype)
    out = torch.full_like(query, math.nan)
    cpu.on_isa(isa, AttentionCall(query, key, value, LENGTHS, ROW_COUNTS, positions, rope, 0.2, out, block))
    expected = exact(query, key, value, LENGTHS, ROW_COUNTS, positions, rope, 0.2, block)
    assert error(out, expected) < TOLERANCE[dtype]


@each_implementation
@pytest.mark.parametrize("block", [1, 4])
def test_keys_that_no_query_sees_change_no_bit(impl, block):
    """Queries in the first 60 positions of 130, and the keys and values from 60 on."""
    query, key, value, positions, rope = inputs(2, 2, 16, lengths=(130,), row_counts=(130,))
    options = {"lengths": (130,), "row_counts": (130,), "positions": positions, "rope": rope, "block": block}
    before = run(impl, query, key, value, **options)
    key, value = (torch.cat((x[:60], 40 * x[60:].flip(0))) for x in (key, value))
    after = run(impl, query, key, value, **options)
    assert torch.equal(after[:60], before[:60]) and not torch.isclose(after[60:], before[60:]).all(-1).any()


@each_implementation
@pytest.mark.parametrize("names", [("lengths",), ("row_counts",), ("lengths", "row_counts")], ids=str)
def test_offsets_give_the_bits_of_tuples(impl, names):
    query, key, value, positions, rope = scattered(4, 2, 16)
    counts = {"lengths": LENGTHS, "row_counts": ROW_COUNTS}
    options = {"positions": positions, "rope": rope, "block": 4}
    plain = run(impl, query, key, value, **counts, **options)
    counts |= {name: offsets(counts[name], 310) for name in names}
    assert torch.equal(run(impl, query, key, value, **counts, **options), plain)


@with_triton
def test_triton_reads_offsets_itself():
    """As on a GPU: tokens and queries past their end are not looked at."""
    *rows, positions, rope = on("triton", scattered(4, 2, 16))
    counts = {"lengths": LENGTHS, "row_counts": ROW_COUNTS}
    plain = run("triton", *rows, **counts, positions=positions, rope=rope, block=4)
    query, key, value = (torch.cat((x, torch.full_like(x[:40], math.nan))) for x in rows)
    positions = torch.cat((positions, torch.zeros_like(positions[:40])))
    starts = on("triton", {name: offsets(numbers, 310) for name, numbers in counts.items()})
    out = torch.full_like(query, -7)
    call = AttentionCall(query, key, value, **starts, positions=positions, rope=rope, scale=0.25, out=out, block=4)
    OPERATOR.pick("triton", call).run(call)
    assert torch.equal(out[: len(plain)].cpu(), plain) and (out[len(plain) :] == -7).all()


@with_triton
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_of_triton(scale):
    query, key, value, _, _ = inputs(2, 1, 16, lengths=(70, 3), row_counts=(70, 3))
    options = {"lengths": (70, 3), "row_counts": (70, 3), "scale": scale, "block": 4}
    assert error(run("triton", query, key, value, **options), exact(query, key, value, **options)) < 1e-6


@compiled
@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_block
def test_a_query_does_not_depend_on_its_company(isa, dtype, block):
    """Bit for bit: alone, with queries that see less or more, on other numbers of threads."""
    query, key, value, positions, rope = inputs(2, 1, 32, dtype, lengths=(600,), row_counts=(600,))
    scattered = torch.randperm(600, generator=torch.Generator().manual_seed(1))

    def of(rows):
        out = torch.full_like(query[rows], math.nan)
        call = AttentionCall(query[rows], key, value, (600,), (len(rows),), positions[rows], rope[:], 0.1, out, block)
        cpu.on_isa(isa, call)
        return out

    rope = tuple(torch.cat((table, table)) for table in rope)
    everything = of(torch.arange(600))
    torch.set_num_threads(3)
    assert torch.equal(of(scattered), everything[scattered])
    torch.set_num_threads(1)
    for rows in ([0], [599], [3, 500], [255, 256, 257], [*range(250, 262)]):
        assert torch.equal(of(torch.tensor(rows)), everything[rows])


@with_triton
@pytest.mark.parametrize("block", [1, 4])
def test_a_query_of_triton_does_not_depend_on_its_company(block):
    """While it stands at the same place of a tile: every other query moves to where it sees more or less."""
    query, key, value, positions, rope = inputs(2, 1, 16, lengths=(256,), row_counts=(256,))
    options = {"lengths": (256,), "row_counts": (256,), "rope": rope, "block": block}
    together = run("triton", query, key, value, positions=positions, **options)
    moved = positions.clone()
    moved[1::2] = positions[1::2].roll(50)
    found = run("triton", query, key, value, positions=moved, **options)
    assert torch.equal(found[::2], together[::2]) and not torch.equal(found[1::2], together[1::2])


def test_torch_compile_takes_it_whole():
    query, key, value, positions, rope = scattered(2, 2, 16)
    options = {"lengths": LENGTHS, "row_counts": ROW_COUNTS, "positions": positions, "rope": rope, "block": 4}

    def attend(query):
        return attention(2 * query, key, value, **options)

    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(query), attend(query))
