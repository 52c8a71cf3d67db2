"""attention: its values against fp64, rotation, spans, offsets, invariance, agreement, error texts."""

import math
from copy import copy
from dataclasses import replace

import pytest
import torch
from laws import compiled, compiled_launches, each_isa, numpy_remarks, offsets, on, with_triton

from unmask.kernels import Offsets, attention, dispatch
from unmask.kernels.attention import OPERATOR, cpu, sdpa, triton_config
from unmask.kernels.attention.call import AttentionCall
from unmask.kernels.dispatch import Implementation, UnsupportedImplementation

pytestmark = numpy_remarks
TORCH_AND_CPU = ["reference", "sdpa", pytest.param("cpu", marks=compiled)]
each_implementation = pytest.mark.parametrize("impl", [*TORCH_AND_CPU, pytest.param("triton", marks=with_triton)])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# head counts of query and key, columns: as in MDLM and LLaDA, grouped, and nothing a tile likes
SHAPES = [(3, 3, 64), (4, 2, 128), (2, 1, 24), (1, 1, 6)]
LENGTHS, ROW_COUNTS = (5, 300, 1, 300, 257, 9), (5, 200, 1, 200, 3, 0)
# For Triton's interpreter. By heads that share a key head, more queries than one tile holds, as many as the middle tile
# holds and as the smallest holds; keys of whole tiles, of a part of one, of both.
SMALL = (5, 128, 1, 0, 131, 9)
SMALL_ROWS = (5, 128, 1, 0, 67, 0), (5, 2, 1, 0, 30, 9), (5, 8, 1, 0, 1, 0)


def inputs(heads, groups, dim, dtype=torch.float32, seed=0, lengths=LENGTHS, row_counts=ROW_COUNTS):
    """query, key and value as views into one buffer of packed rows, positions of the queries, rotation tables."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(sum(row_counts), heads, dim, generator=generator).to(dtype)
    packed = torch.randn(sum(lengths), 2 * groups, dim, generator=generator).to(dtype)
    drawn = [
        torch.randperm(n, generator=generator)[:rows].sort().values for n, rows in zip(lengths, row_counts, strict=True)
    ]
    angles = torch.arange(320)[:, None] * torch.rand(dim // 2, generator=generator)
    return query, packed[:, :groups], packed[:, groups:], torch.cat(drawn), (angles.cos(), angles.sin())


def exact(query, key, value, lengths, row_counts, positions=None, rope=None, scale=None, block=None):
    """The definition, in fp64, a sequence at a time."""
    results, row, token = [], 0, 0
    for n, count in zip(lengths, row_counts, strict=True):
        q, (k, v) = query[row : row + count].double(), (x[token : token + n].double() for x in (key, value))
        at = torch.arange(count) if positions is None else positions[row : row + count]
        if rope is not None:
            q, k = turn(q, at, rope), turn(k, torch.arange(n), rope)
        k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (1 / math.sqrt(query.shape[2]) if scale is None else scale)
        if block is not None:
            scores[:, torch.arange(n) // block > at[:, None] // block] = -math.inf
        results.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        row, token = row + count, token + n
    return torch.cat(results)


def turn(x, positions, rope):
    """Each pair of columns (i, i + D / 2) as a complex number, times exp(i * angle)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(*(table[positions].double()[:, None] for table in rope))
    return torch.cat((turned.real, turned.imag), dim=-1)


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


# What rounding costs: the result alone in bf16 is off by 1.5e-3; rotated rows and shares are rounded too.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def run(impl, query, key, value, **options):
    """attention where the implementation reads its tensors."""
    return attention(*on(impl, (query, key, value)), **on(impl, options), impl=impl).cpu()


def check(impl, dtype, shape, rotated, lengths, row_counts):
    query, key, value, positions, rope = inputs(*shape, dtype, lengths=lengths, row_counts=row_counts)
    options = {"positions": positions, "rope": rope} if rotated else {}
    found = run(impl, query, key, value, lengths=lengths, row_counts=row_counts, **options)
    expected = exact(query, key, value, lengths, row_counts, **options)
    assert found.dtype == dtype and found.shape == query.shape
    print(f"\n    {impl} {dtype}: error {error(found, expected):.1e}")
    assert error(found, expected) < TOLERANCE[dtype]
    wrong = exact(query, key, value, lengths, row_counts, scale=0.7 / math.sqrt(shape[2]), **options)
    assert error(found, wrong) > 4 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("impl", TORCH_AND_CPU)
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rotated", [False, True])
def test_values_against_fp64(impl, dtype, shape, rotated):
    check(impl, dtype, shape, rotated, LENGTHS, ROW_COUNTS)


TRITON_CASES = [
    *((dtype, shape, True, SMALL_ROWS[0]) for dtype in TOLERANCE for shape in SHAPES),
    *((torch.bfloat16, shape, False, SMALL_ROWS[0]) for shape in SHAPES),
    *((torch.bfloat16, shape, True, row_counts) for shape in SHAPES[:2] for row_counts in SMALL_ROWS[1:]),
]


@with_triton
@pytest.mark.parametrize(("dtype", "shape", "rotated", "row_counts"), TRITON_CASES, ids=str)
def test_values_of_triton(dtype, shape, rotated, row_counts):
    check("triton", dtype, shape, rotated, SMALL, row_counts)


@with_triton
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_of_triton(scale):
    query, key, value, _, _ = inputs(2, 1, 16, lengths=(70, 3), row_counts=(9, 3))
    found = run("triton", query, key, value, lengths=(70, 3), row_counts=(9, 3), scale=scale)
    assert error(found, exact(query, key, value, (70, 3), (9, 3), scale=scale)) < 1e-6


@with_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_query_of_triton_does_not_depend_on_its_company(dtype):
    """Sequences change places and company while the longest brings as many queries."""
    query, key, value, positions, rope = inputs(2, 1, 32, dtype, lengths=SMALL, row_counts=SMALL_ROWS[0])
    counts = {"lengths": SMALL, "row_counts": SMALL_ROWS[0]}
    together = run("triton", query, key, value, **counts, positions=positions, rope=rope)
    rows, tokens = torch.arange(201).split(SMALL_ROWS[0]), torch.arange(274).split(SMALL)
    for chosen in ([4], [4, 2, 0], [2, 4]):
        row, token = (torch.cat([parts[s] for s in chosen]) for parts in (rows, tokens))
        counts = {"lengths": tuple(SMALL[s] for s in chosen), "row_counts": tuple(SMALL_ROWS[0][s] for s in chosen)}
        parts = query[row], key[token], value[token]
        assert torch.equal(run("triton", *parts, **counts, positions=positions[row], rope=rope), together[row])


@each_isa
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_isa(isa, dtype, shape):
    query, key, value, positions, rope = inputs(*shape, dtype)
    out = torch.full_like(query, math.nan)
    cpu.on_isa(isa, AttentionCall(query, key, value, LENGTHS, ROW_COUNTS, positions, rope, 0.2, out))
    expected = exact(query, key, value, LENGTHS, ROW_COUNTS, positions, rope, 0.2)
    assert error(out, expected) < TOLERANCE[dtype]


@each_implementation
def test_defaults_are_every_token_at_its_position(impl):
    query, key, value, _, rope = inputs(2, 2, 16, lengths=SMALL, row_counts=SMALL)
    found = run(impl, query, key, value, lengths=SMALL, rope=rope)
    assert error(found, exact(query, key, value, SMALL, SMALL, rope=rope)) < 1e-6


@each_implementation
def test_output_buffers_and_strides(impl):
    options = {"lengths": SMALL, "row_counts": SMALL_ROWS[0]}
    *packed, options["positions"], options["rope"] = inputs(2, 2, 16, **options)
    query, key, value = on(impl, tuple(packed))
    plain = run(impl, query, key.contiguous(), value.contiguous(), **options)
    strided = torch.cat((key, value), dim=1).split(2, dim=1)
    wide = on(impl, torch.full((len(query), 3, 32), math.nan))
    assert attention(query, *strided, out=wide[:, 1], **on(impl, options), impl=impl) is not None
    assert torch.equal(wide[:, 1].cpu().view_as(plain), plain)
    assert wide[:, [0, 2]].isnan().all()


@each_implementation
@pytest.mark.parametrize("names", [("lengths",), ("row_counts",), ("lengths", "row_counts")], ids=str)
def test_offsets_give_the_bits_of_tuples(impl, names):
    """Tokens and queries past the end are NaN, their positions impossible; their part of `out` stays as it was."""
    counts = {"lengths": SMALL, "row_counts": SMALL_ROWS[0]}
    query, key, value, positions, rope = inputs(4, 2, 16, **counts)
    plain = run(impl, query, key, value, **counts, positions=positions, rope=rope)
    if "lengths" in names:
        key, value = (torch.cat((x, torch.full((40, *x.shape[1:]), math.nan))) for x in (key, value))
    if "row_counts" in names:
        query = torch.cat((query, torch.full((9, 4, 16), math.nan)))
        positions = torch.cat((positions, torch.full((9,), 10**6)))
    counts |= {name: offsets(counts[name], 140) for name in names}
    out = run(impl, query, key, value, **counts, positions=positions, rope=rope, out=torch.full_like(query, -7))
    assert torch.equal(out[: len(plain)], plain) and (out[len(plain) :] == -7).all()


@with_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_reads_offsets_itself(dtype):
    """As on a GPU, where the operator leaves them as they are; the rotated keys' NaN past the end stay there."""
    counts = {"lengths": SMALL, "row_counts": SMALL_ROWS[0]}
    *rows, positions, rope = on("triton", inputs(4, 2, 24, dtype, **counts))
    plain = run("triton", *rows, **counts, positions=positions, rope=rope)
    query, key, value = (torch.cat((x, torch.full_like(x[:40], math.nan))) for x in rows)
    positions = torch.cat((positions, torch.zeros_like(positions[:40])))
    starts = on("triton", {name: offsets(numbers, 140) for name, numbers in counts.items()})
    out = torch.full_like(query, -7)
    call = AttentionCall(query, key, value, **starts, positions=positions, rope=rope, scale=24**-0.5, out=out)
    OPERATOR.pick("triton", call).run(call)
    assert torch.equal(out[: len(plain)].cpu(), plain) and (out[len(plain) :] == -7).all()


@each_implementation
def test_offsets_of_every_token(impl):
    query, key, value, _, rope = inputs(2, 2, 16, lengths=SMALL, row_counts=SMALL)
    plain = run(impl, query, key, value, lengths=SMALL, rope=rope)
    assert torch.equal(run(impl, query, key, value, lengths=offsets(SMALL), rope=rope), plain)


def test_torch_compile_takes_it_whole():
    query, key, value, positions, rope = inputs(2, 2, 16)

    def attend(query, lengths, row_counts, out):
        options = {"positions": positions, "rope": rope, "out": out}
        attention(2 * query, key, value, lengths=lengths, row_counts=row_counts, **options)
        return out + 1

    whole = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for lengths, row_counts in ((LENGTHS, ROW_COUNTS), (offsets(LENGTHS), ROW_COUNTS), (LENGTHS, offsets(ROW_COUNTS))):
        out, found = torch.zeros(2, *query.shape).unbind(0)
        plain = attend(query, LENGTHS, ROW_COUNTS, out)
        assert torch.equal(whole(query, lengths, row_counts, found), plain) and torch.equal(found, out)


@each_implementation
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_stays_in_its_sequence(impl, bad):
    query, key, value, _, _ = inputs(2, 2, 16, lengths=SMALL, row_counts=SMALL_ROWS[0])
    key = key.clone()
    key[6, 0, 3] = bad  # second sequence, first head
    found = run(impl, query, key, value, lengths=SMALL, row_counts=SMALL_ROWS[0])
    spoilt = torch.zeros(found.shape[:2], dtype=torch.bool)
    spoilt[5:133, 0] = True
    assert found[~spoilt].isfinite().all() and found[spoilt].isnan().any()


@each_implementation
def test_large_scores_and_single_keys(impl):
    """One key dominates by far more than fp32's exponent holds; a sequence of one token returns its value."""
    query, key, value = torch.full((3, 1, 8), 30.0), torch.zeros(5, 1, 8), torch.arange(40.0).view(5, 1, 8)
    key[1], key[2] = 30.0, -30.0
    found = run(impl, query, key, value, lengths=(4, 1), row_counts=(2, 1), scale=1.0)
    torch.testing.assert_close(found, value[[1, 1, 4]])


@each_implementation
def test_keys_of_score_minus_infinity_count_for_nothing(impl):
    query, key, value, _, _ = inputs(1, 1, 8, lengths=(300,), row_counts=(7,))
    key = key.clone()
    query[..., 0], key[:290, :, 0], key[290:, :, 0] = 1, -math.inf, 0
    found = run(impl, query, key, value, lengths=(300,), row_counts=(7,))
    assert error(found, exact(query, key[290:], value[290:], (10,), (7,))) < 1e-6


@compiled
@each_isa
@each_dtype
def test_a_query_does_not_depend_on_its_company(isa, dtype):
    """Bit for bit: alone, with other queries, in other sequences' company, on other numbers of threads."""
    query, key, value, positions, rope = inputs(4, 2, 64, dtype)

    def alone(rows, tokens, lengths, row_counts):
        out = torch.full_like(query[rows], math.nan)
        call = AttentionCall(
            query[rows], key[tokens], value[tokens], lengths, row_counts, positions[rows], rope, 0.1, out
        )
        cpu.on_isa(isa, call)
        return out

    everything = alone(slice(None), slice(None), LENGTHS, ROW_COUNTS)
    torch.set_num_threads(3)
    assert torch.equal(alone(slice(None), slice(None), LENGTHS, ROW_COUNTS), everything)
    torch.set_num_threads(1)
    second = slice(5, 305)
    for rows in (slice(5, 205), slice(5, 6), slice(17, 19), slice(103, 205)):
        assert torch.equal(alone(rows, second, (300,), (rows.stop - rows.start,)), everything[rows])


@each_implementation
def test_nothing_to_do(impl):
    query, key = torch.zeros(0, 2, 8), torch.zeros(7, 2, 8)
    assert run(impl, query, key, key, lengths=(3, 4), row_counts=(0, 0)).shape == (0, 2, 8)


def good():
    query, key, value, positions, rope = inputs(4, 2, 8)
    options = {"lengths": LENGTHS, "row_counts": ROW_COUNTS, "positions": positions, "rope": rope}
    return {"query": query, "key": key, "value": value} | options


BAD = [
    ({"query": [1.0]}, TypeError, r"query must be a tensor \[Q, H, D\], got list"),
    ({"query": torch.zeros(409, 32)}, ValueError, r"query must be a dense tensor \[Q, H, D\], got shape \[409, 32\]"),
    ({"query": torch.zeros(409, 3, 8)}, ValueError, r"query must have columns and a multiple of 2 heads"),
    ({"key": torch.zeros(872, 2, 8).double()}, TypeError, "key must be float32, got float64"),
    ({"value": torch.zeros(872, 2, 9)}, ValueError, r"value must be \[872, 2, 8\] .* got shape \[872, 2, 9\]"),
    ({"value": torch.zeros(872, 8, 2).mT}, ValueError, "value must have contiguous columns, got strides"),
    ({"lengths": (872,)}, ValueError, "row_counts must have one number per sequence, 1, got 6"),
    ({"lengths": (5, 300)}, ValueError, "lengths must be integers.* sum to the 872 tokens of key"),
    ({"row_counts": (409, 0, 0, 0, 0, 1)}, ValueError, "row_counts must be integers.* sum to the 409 rows of query"),
    ({"row_counts": (410, 0, 0, 0, 0, -1)}, ValueError, "row_counts must be integers, not negative"),
    ({"lengths": (0, 305, 1, 300, 257, 9)}, ValueError, "lengths must be positive .* got 0 for sequence 0"),
    ({"row_counts": None}, ValueError, "row_counts must be given unless all 872 tokens query, got None for 409"),
    ({"lengths": offsets((872,))}, ValueError, "row_counts must have one number per sequence, 1, got 6"),
    ({"lengths": offsets(LENGTHS, 299)}, ValueError, "lengths.longest must be at least 300, got 299"),
    ({"lengths": offsets((*LENGTHS[:-1], 10))}, ValueError, "lengths.starts must go from 0 to at most 872 and never"),
    ({"row_counts": offsets((9, 0, 0, -1, 0, 0))}, ValueError, r"row_counts.starts must go .* got \[0, 9, 9, 9, 8, 8"),
    ({"row_counts": offsets(ROW_COUNTS, -1)}, ValueError, "row_counts.longest must not be negative, got -1"),
    ({"row_counts": offsets(ROW_COUNTS, 1.5)}, TypeError, "row_counts.longest must be an integer, got 1.5"),
    ({"row_counts": Offsets(torch.zeros(7), 0)}, TypeError, "row_counts.starts must be int32, got float32"),
    ({"row_counts": Offsets([0], 0)}, TypeError, r"row_counts.starts must be a tensor \[B \+ 1\], got list"),
    ({"positions": torch.zeros(3, dtype=torch.int64)}, ValueError, r"positions must be \[409\], one per query"),
    ({"positions": torch.full((409,), 320)}, ValueError, r"positions must be in \[0, 320\), got 320"),
    ({"rope": torch.zeros(2, 320, 4)}, TypeError, r"rope must be a pair \(cos, sin\), got Tensor"),
    ({"rope": (torch.zeros(320, 4), torch.zeros(320, 5))}, ValueError, r"rope's sin must be \[P, 4\]"),
    ({"rope": (torch.zeros(299, 4),) * 2}, ValueError, "rope must have a row for each position, 300, got 299"),
    ({"block": 0}, ValueError, "block must be at least 1, got 0"),
    ({"block": 1.5}, TypeError, r"block must be an integer or None, got 1.5 \(float\)"),
    (
        {"block": 4, "rope": None, "positions": torch.full((409,), -1)},
        ValueError,
        r"positions must be in \[0, 300\), got -1",
    ),
    ({"out": torch.zeros(409, 4, 8).double()}, TypeError, "out must be float32 on cpu as query, got float64 on cpu"),
    ({"out": torch.zeros(409, 31)}, ValueError, r"out must be \[409, 4, 8\] or \[409, 32\], got shape \[409, 31\]"),
    (
        {"impl": "flash"},
        ValueError,
        "impl of attention .* None or one of 'triton', 'cpu', 'sdpa', 'reference', got 'flash'",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_write_nothing(change, error, message):
    out = torch.full((409, 4, 8), -7.0)
    with pytest.raises(error, match=message):
        attention(**{"out": out} | good() | change)
    assert (out == -7).all()


@compiled
def test_what_cpu_refuses_others_serve():
    arguments = {name: x.half() if name in ("query", "key", "value") else x for name, x in good().items()}
    with pytest.raises(UnsupportedImplementation, match=r"got float16.*supported here: .*sdpa, ref"):
        attention(**arguments, impl="cpu")
    assert attention(**arguments).dtype == torch.float16
    wide = {name: x.double() if name in ("query", "key", "value") else x for name, x in good().items()}
    assert error(attention(**wide), exact(*wide.values())) < 1e-12


@with_triton
def test_what_triton_refuses_others_serve():
    query, key, value, _, _ = inputs(1, 1, 130, lengths=SMALL, row_counts=SMALL_ROWS[2])
    counts = {"lengths": SMALL, "row_counts": SMALL_ROWS[2]}
    with pytest.raises(UnsupportedImplementation, match=r"needs at most 128 columns, got 130.*sdpa, reference"):
        run("triton", query, key, value, **counts)
    assert error(attention(query, key, value, **counts), exact(query, key, value, **counts)) < 1e-6


def test_sdpa_needs_to_know_the_lengths():
    query = torch.empty(6, 2, 128, device="meta")
    starts = Offsets(torch.empty(3, dtype=torch.int32, device="meta"), 4)
    call = AttentionCall(query, query, query, (4, 2), starts, None, None, 1.0, query)
    assert sdpa.refuses(call) == "needs row_counts known to the host, got offsets on meta"
    assert sdpa.refuses(replace(call, row_counts=(4, 2))) is None


DENSE = {"lengths": (4, 4), "row_counts": (4, 4), "rope": None}
LONG = {"lengths": (6000,), "row_counts": (6000,)}
TABLES = torch.zeros(8, 64), torch.zeros(8, 64)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"lengths": (5, 3), "row_counts": (5, 3)}, False),
        ({"row_counts": (1, 2)}, False),
        ({"lengths": offsets((4, 4))}, False),
        ({"row_counts": offsets((4, 4))}, False),
        ({"block": 1}, False),
        ({"rope": TABLES}, False),
        (LONG, True),
        (LONG | {"rope": TABLES}, True),
        ({"query": torch.zeros(8, 2, 64).half()}, False),
        ({"query": torch.zeros(8, 2, 128)}, False),
    ],
)
def test_triton_defers_to_sdpa_where_that_is_published_to_be_faster(monkeypatch, change, expected):
    query = torch.zeros(8, 2, 128, dtype=torch.float16)
    call = AttentionCall(query, query, query, positions=None, scale=1.0, out=query, **DENSE)
    call = replace(call, **change)
    assert not triton_config.defers_to_sdpa(call)  # no such GPU
    monkeypatch.setattr(triton_config, "architecture", lambda device: "sm_90")
    assert triton_config.defers_to_sdpa(call) == expected


def test_an_implementation_that_defers_is_taken_after_the_others():
    first, second = (Implementation(name, None, lambda: (True, "")) for name in ("first", "second"))
    operator = copy(OPERATOR)
    for defers, picked in ((True, "second"), (False, "first")):
        operator.implementations = replace(first, defers=lambda call, defers=defers: defers), second
        assert operator.pick(None, "call").name == picked
        assert operator.pick("first", "call").name == "first"


def test_explain_lists_every_implementation_with_a_reason():
    lines = {line.implementation: line for line in dispatch.explain() if line.operator == "attention"}
    assert list(lines) == ["triton", "cpu", "sdpa", "reference"]
    assert all(line.reason for line in lines.values())
    assert [line.picked for line in lines.values()].count(True) == 1


@with_triton
def test_triton_compiles_for_every_target():
    lines = compiled_launches("attention")
    assert {line["kernel"] for line in lines} == {"attention_kernel", "rotate_kernel"}
    for line in lines:
        if line["target"] == "sm_90":
            print(f"\n{line}", end="")
        if line["target"] == "sm_90" and line["kernel"] == "attention_kernel":
            tensor_cores = {"HMMA"} if line["run"] == "attend_few" else {"HGMMA"}
            products = {"HMMA", "HGMMA"} & set(line["instructions"])
            assert products == (set() if line["dtype"] == "fp32" else tensor_cores), line
