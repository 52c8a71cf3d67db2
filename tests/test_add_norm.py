"""add_norm: its values against fp64, its buffers, invariance, agreement of implementations, error texts."""

import math

import pytest
import torch
from laws import check_compiled_launches, compiled, each_implementation, each_isa, offsets, on, usable, with_triton

from unmask.kernels import add_norm, dispatch
from unmask.kernels.add_norm import OPERATOR, cpu
from unmask.kernels.add_norm.call import AddNormCall
from unmask.kernels.dispatch import UnsupportedImplementation

NARROW = torch.float32, torch.bfloat16
ROW_COUNTS = (5, 0, 30, 1)
SPANS = range(5), range(0), range(5, 35), range(35, 36)  # the rows of each sequence
EPS = 1e-3  # large enough that leaving it out would show


def inputs(dim=70, dtype=torch.float32, out_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(ROW_COUNTS)
    residual, delta = (3 + 2 * torch.randn(rows, dim, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(dim, generator=generator) for _ in range(2))
    vectors = {name: torch.randn(len(ROW_COUNTS), dim, generator=generator) for name in ("gate", "shift", "scale")}
    out = torch.full((rows, dim), math.nan, dtype=out_dtype or dtype)
    return {"residual": residual, "delta": delta.to(dtype), "weight": weight, "bias": bias, "out": out}, vectors


def exact(residual, delta, weight, bias, out, gate=None, shift=None, scale=None, row_counts=None, rms=False):
    """The new residual and the result in fp64."""
    owner = torch.arange(len(row_counts or ())).repeat_interleave(torch.tensor(row_counts or (), dtype=torch.int64))
    gate, shift, scale = (None if x is None else x.double()[owner] for x in (gate, shift, scale))
    total = residual.double() + (0 if delta is None else delta.double() * (1 if gate is None else gate))
    centred = total if rms else total - total.mean(1, keepdim=True)
    normed = centred / ((centred**2).mean(1, keepdim=True) + EPS).sqrt()
    normed = normed * weight.double() + (0 if bias is None else bias.double())
    return total, normed * (1 if scale is None else 1 + scale) + (0 if shift is None else shift)


CASES = {
    "plain": {"delta": None},
    "added": {},
    "without a bias": {"bias": None},
    "gated": {"vectors": ("gate",)},
    "shifted": {"vectors": ("shift",), "delta": None},
    "modulated": {"vectors": ("gate", "shift", "scale")},
    "by the root mean square": {"bias": None, "rms": True},
    "by the root mean square, modulated": {"vectors": ("gate", "shift", "scale"), "bias": None, "rms": True},
}
each_norm = pytest.mark.parametrize("name", ["modulated", "by the root mean square, modulated"])


def case(name, **options):
    arguments, vectors = inputs(**options)
    change = dict(CASES[name])
    chosen = {key: vectors[key] for key in change.pop("vectors", ())}
    return arguments | change | chosen | ({"row_counts": ROW_COUNTS} if chosen else {})


def run(impl, arguments, **options):
    """add_norm where the implementation reads its tensors; what it writes is written to those of `arguments`."""
    there = on(impl, arguments)
    if arguments["out"] is arguments["delta"]:
        there["out"] = there["delta"]
    assert add_norm(**there, **options, impl=impl) is there["out"]
    for name in ("residual", "out"):
        arguments[name].copy_(there[name])
    return arguments["out"]


@each_implementation
@pytest.mark.parametrize("dtypes", [(a, b) for a in NARROW for b in NARROW], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_against_fp64(impl, dtypes, name):
    arguments = case(name, dtype=dtypes[0], out_dtype=dtypes[1])
    total, expected = exact(**arguments)
    run(impl, arguments, eps=EPS)
    torch.testing.assert_close(arguments["residual"].double(), total, rtol=1e-6, atol=1e-6)
    rounding = 2**-8 if dtypes[1] is torch.bfloat16 else 1e-5
    torch.testing.assert_close(arguments["out"].double(), expected, rtol=rounding, atol=rounding)


@each_isa
@each_norm
@pytest.mark.parametrize("dim", [1, 15, 16, 64, 300, 768])
def test_each_isa_and_width(isa, name, dim):
    arguments = case(name, dim=dim)
    total, expected = exact(**arguments)
    cpu.on_isa(isa, AddNormCall(**arguments, eps=EPS))
    torch.testing.assert_close(arguments["residual"].double(), total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(arguments["out"].double(), expected, rtol=1e-5, atol=2e-5)


@with_triton
@pytest.mark.parametrize("dim", [1, 15, 16, 300, 768, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@each_norm
def test_widths_of_triton(dim, dtype, name):
    arguments = case(name, dim=dim, dtype=dtype)
    total, expected = exact(**arguments)
    run("triton", arguments, eps=EPS)
    torch.testing.assert_close(arguments["residual"].double(), total, rtol=1e-6, atol=1e-6)
    rounding = 1e-5 if dtype is torch.float32 else 2**-11
    torch.testing.assert_close(arguments["out"].double(), expected, rtol=rounding, atol=2e-5)


@each_implementation
@pytest.mark.parametrize("num_sequences", [1, 2, 7, 8, 9, 100])
def test_every_row_finds_its_sequence(impl, num_sequences):
    counts = tuple(torch.randint(4, (num_sequences,), generator=torch.Generator().manual_seed(num_sequences)).tolist())
    owner = torch.arange(num_sequences).repeat_interleave(torch.tensor(counts))
    rows = torch.zeros(sum(counts), 4)
    shift = torch.arange(num_sequences).float()[:, None].repeat(1, 4)
    for row_counts in (counts, offsets(counts)):
        options = {"weight": torch.ones(4), "shift": shift, "row_counts": row_counts, "out": rows.clone()}
        found = run(impl, {"residual": rows, "delta": None, **options})
        assert torch.equal(found, shift[owner])


@each_implementation
@pytest.mark.parametrize("dtype", NARROW)
def test_the_result_may_take_the_place_of_delta(impl, dtype):
    apart, together = case("modulated", dtype=dtype), case("modulated", dtype=dtype)
    together["out"] = together["delta"]
    assert torch.equal(run(impl, together), run(impl, apart))


@each_implementation
def test_strided_rows(impl):
    arguments = case("modulated")
    wide = {name: on(impl, torch.full((36, 3, 70), math.nan)) for name in ("residual", "delta", "out")}
    for name, x in wide.items():
        x[:, 1] = arguments[name]
    add_norm(**on(impl, arguments) | {name: x[:, 1] for name, x in wide.items()}, impl=impl)
    assert torch.equal(wide["out"][:, 1].cpu(), run(impl, arguments))
    assert torch.equal(wide["residual"][:, 1].cpu(), arguments["residual"])
    assert all(x[:, [0, 2]].isnan().all() for x in wide.values())


@each_implementation
@each_norm
def test_offsets_give_the_bits_of_tuples(impl, name):
    """Rows past the end are NaN in `residual` and `delta`, and stay as they are in `residual` and `out`."""
    plain, longer = case(name), case(name)
    run(impl, plain)
    for name, rest in (("residual", math.nan), ("delta", math.nan), ("out", -7.0)):
        longer[name] = torch.cat((longer[name], torch.full((5, 70), rest)))
    longer["row_counts"] = offsets(ROW_COUNTS, 40)
    run(impl, longer)
    assert torch.equal(longer["residual"][:36], plain["residual"]) and longer["residual"][36:].isnan().all()
    assert torch.equal(longer["out"][:36], plain["out"]) and (longer["out"][36:] == -7).all()


@with_triton
@each_norm
def test_triton_reads_offsets_itself(name):
    """As on a GPU, where the operator leaves them as they are."""
    plain, longer = case(name), case(name)
    run("triton", plain)
    for name, rest in (("residual", math.nan), ("delta", math.nan), ("out", -7.0)):
        longer[name] = torch.cat((longer[name], torch.full((5, 70), rest)))
    call = AddNormCall(**on("triton", longer | {"row_counts": offsets(ROW_COUNTS, 40)}), eps=1e-5)
    OPERATOR.pick("triton", call).run(call)
    assert torch.equal(call.residual[:36].cpu(), plain["residual"]) and call.residual[36:].isnan().all()
    assert torch.equal(call.out[:36].cpu(), plain["out"]) and (call.out[36:] == -7).all()


@pytest.mark.parametrize("together", [False, True])
def test_torch_compile_takes_it_whole(together):
    def modulate(residual, delta, out, **rest):
        out = delta if together else out
        return add_norm(residual, delta, out=out, **rest) + 1

    whole = torch.compile(modulate, fullgraph=True, backend="aot_eager")
    for counts in (ROW_COUNTS, offsets(ROW_COUNTS)):
        plain, found = case("modulated"), case("modulated") | {"row_counts": counts}
        assert torch.equal(whole(**found), modulate(**plain))
        assert all(torch.equal(found[name], plain[name]) for name in ("residual", "delta"))
        assert torch.equal(found["out"].nan_to_num(), plain["out"].nan_to_num())


@compiled
@each_isa
@pytest.mark.parametrize("name", ["added", "by the root mean square"])
def test_a_row_does_not_depend_on_its_company(isa, name):
    together, again = case(name, dim=333), case(name, dim=333)
    torch.set_num_threads(3)
    cpu.on_isa(isa, AddNormCall(**together, gate=None, shift=None, scale=None, row_counts=None, eps=EPS))
    torch.set_num_threads(1)
    for row in range(36):
        alone = {name: x[row : row + 1] if name in ("residual", "delta", "out") else x for name, x in again.items()}
        cpu.on_isa(isa, AddNormCall(**alone, gate=None, shift=None, scale=None, row_counts=None, eps=EPS))
    assert torch.equal(again["out"], together["out"]) and torch.equal(again["residual"], together["residual"])


@with_triton
@pytest.mark.parametrize("name", ["gated", "by the root mean square, modulated"])
def test_a_row_of_triton_does_not_depend_on_its_company(name):
    together, again = case(name, dim=333), case(name, dim=333)
    run("triton", together)
    for row in (0, 4, 5, 34, 35):
        alone = {name: x[row : row + 1] if name in ("residual", "delta", "out") else x for name, x in again.items()}
        run("triton", alone | {"row_counts": tuple(int(row in span) for span in SPANS)})
        assert torch.equal(again["out"][row], together["out"][row])


@each_implementation
def test_no_rows(impl):
    run(impl, {"residual": torch.empty(0, 8), "delta": None, "weight": torch.ones(8), "out": torch.empty(0, 8)})


BAD = [
    ({"residual": torch.zeros(36, 70).double()}, TypeError, "residual must be float32, got float64"),
    ({"delta": torch.zeros(36, 69)}, ValueError, r"delta must be \[36, 70\] as residual, got shape \[36, 69\]"),
    ({"delta": torch.zeros(36, 70).long()}, TypeError, "delta must be float32 or bfloat16 or float16, got int64"),
    ({"delta": None}, ValueError, "gate must be None when delta is None"),
    ({"weight": torch.ones(69)}, ValueError, r"weight must be \[70\], one number per column, got shape \[69\]"),
    ({"bias": torch.ones(70).bfloat16()}, TypeError, "bias must be float32, got bfloat16"),
    ({"rms": True}, ValueError, "bias must be None with rms=True, got a tensor"),
    ({"row_counts": None}, ValueError, "row_counts must be given with gate and shift and scale, got None"),
    ({"row_counts": (5, 30)}, ValueError, "row_counts must be integers.* sum to the 36 rows of residual, got"),
    ({"row_counts": (40, 0, -5, 1)}, ValueError, "row_counts must be integers, not negative"),
    ({"row_counts": offsets((6, 30))}, ValueError, r"gate must be \[2, 70\], got shape \[4, 70\]"),
    ({"row_counts": offsets(ROW_COUNTS, 29)}, ValueError, "row_counts.longest must be at least 30, got 29"),
    ({"row_counts": offsets((5, 0, 30, 2))}, ValueError, "row_counts.starts must go from 0 to at most 36 and never"),
    ({"row_counts": (6, 30)}, ValueError, r"gate must be \[2, 70\], got shape \[4, 70\]"),
    ({"gate": None, "shift": None, "scale": None}, ValueError, "row_counts must be None without gate, shift and scale"),
    ({"out": torch.zeros(70, 36).T}, ValueError, r"out must have contiguous columns, got strides \(1, 36\)"),
    ({"impl": "fused"}, ValueError, "impl of add_norm .* None or one of 'triton', 'cpu', 'reference', got 'fused'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_write_nothing(change, error, message):
    arguments = case("modulated")
    before = arguments["residual"].clone()
    with pytest.raises(error, match=message):
        add_norm(**arguments | change)
    assert torch.equal(arguments["residual"], before) and arguments["out"].isnan().all()


@compiled
def test_what_cpu_refuses_reference_serves():
    arguments = case("added", dtype=torch.float16)
    with pytest.raises(UnsupportedImplementation, match=r"needs delta in float32 or bfloat16, got float16.*reference"):
        add_norm(**arguments, impl="cpu")
    assert add_norm(**arguments).isfinite().all()


@with_triton
def test_what_triton_refuses_reference_serves():
    arguments = case("added", dim=8193)
    with pytest.raises(UnsupportedImplementation, match=r"needs at most 8192 columns, got 8193.*reference"):
        run("triton", arguments)
    assert add_norm(**arguments).isfinite().all()


def test_explain_lists_every_implementation_with_a_reason():
    lines = {line.implementation: line for line in dispatch.explain() if line.operator == "add_norm"}
    assert list(lines) == ["triton", "cpu", "reference"]
    assert all(line.reason for line in lines.values())
    gpu = "cuda" if "cuda" in lines and lines["cuda"].usable else "triton"
    fastest = gpu if torch.cuda.is_available() else "cpu" if usable else "reference"
    assert [name for name, line in lines.items() if line.picked] == [fastest]


@with_triton
def test_triton_compiles_for_every_target():
    kernels = check_compiled_launches("add_norm")
    assert set(kernels) == {"add_norm_kernel"}
