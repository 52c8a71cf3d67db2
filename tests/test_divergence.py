"""divergence: its values near and far, ends, row invariance, memory, and its error texts."""

import math
from types import SimpleNamespace

import pytest
import torch
from laws import (
    BF16,
    F16,
    F32,
    ROW_ORDERS,
    check_compiled_launches,
    compiled,
    each_implementation,
    each_isa,
    exact_logits,
    normal,
    numpy_remarks,
    on,
    peak_memory,
    with_triton,
    workspace,
)

from unmask.kernels import NonFiniteLogits, dispatch, divergence
from unmask.kernels.dispatch import UnsupportedImplementation
from unmask.kernels.divergence import cpu
from unmask.kernels.divergence.call import DivergenceCall
from unmask.kernels.logits import Logits

pytestmark = numpy_remarks
SUMMED = 2e-6  # how right fp32 sums of about a hundred terms are


def run(impl, *heads, **options):
    result = divergence(*on(impl, heads), **on(impl, options), impl=impl)
    return type(result)(*(field.cpu() for field in result))


def exact_of(logits_a, logits_b):
    """(kl, cross-entropy, entropy) by definition, in fp64."""
    log_p, log_q = logits_a.double().log_softmax(1), logits_b.double().log_softmax(1)
    p = log_p.exp()
    expect = lambda value: torch.where(logits_a == -math.inf, 0, p * value).sum(1)  # noqa: E731
    return expect(log_p - log_q), -expect(log_q), -expect(log_p)


def given(*logits):
    """How right fp32 differences of these logits are."""
    return 1e-7 * max(x[x.isfinite()].abs().max().item() for x in logits)


def allowed_error(kl, eta):
    """What the docstring states."""
    return eta * (2 * kl).sqrt() + eta**2 + (eta + 2e-6) * kl


def check(result, logits_a, logits_b, eta):
    """Close enough to fp64, given logits that are right to eta."""
    kl, cross_entropy, entropy = exact_of(logits_a, logits_b)
    error, allowed = (result.kl - kl).abs(), allowed_error(kl, eta)
    assert (error <= allowed).all(), f"kl {kl.tolist()}, errors {error.tolist()}, allowed {allowed.tolist()}"
    assert (result.kl >= 0).all()
    allowed_entropy = 2e-6 * entropy + 1e-6 + 5 * eta
    assert ((result.entropy - entropy).abs() <= allowed_entropy).all()
    assert ((result.cross_entropy - cross_entropy).abs() <= allowed + allowed_entropy).all()


# --- values ---------------------------------------------------------------------------------------------------------

CASES = [
    ("reference", F32, F32),
    ("reference", BF16, F16),
    ("cpu", F32, F32),
    ("cpu", BF16, BF16),
    ("cpu", BF16, F32),
    ("cpu", F16, F16),
    ("triton", F32, F32),
    ("triton", BF16, BF16),
    ("triton", F16, BF16),
]
MARKS = {"reference": (), "cpu": compiled, "triton": with_triton}


@pytest.mark.parametrize("impl, dtype_a, dtype_b", [pytest.param(*case, marks=MARKS[case[0]]) for case in CASES])
def test_two_models_against_fp64(impl, dtype_a, dtype_b):
    """Hidden sizes 133 and 40, one bias, a forbidden id, rows gathered, one temperature by row."""
    hidden_a, weight_a = normal(9, 133, dtype=dtype_a), normal(700, 133, seed=1, scale=0.2, dtype=dtype_a)
    hidden_b, weight_b = normal(9, 40, seed=2, dtype=dtype_b), normal(700, 40, seed=3, scale=0.2, dtype=dtype_b)
    bias = normal(700, seed=4)
    options = {"forbid": torch.tensor([699]), "rows": torch.tensor([8, 1, 1]), "temperature": torch.tensor([0.7, 1, 2])}
    result = run(impl, hidden_a, (weight_a, bias), hidden_b, (weight_b, None), **options)
    exact_a = exact_logits(hidden_a, weight_a, bias, **options)[:, :699]
    exact_b = exact_logits(hidden_b, weight_b, None, **options)[:, :699]
    assert all(field.dtype == F32 for field in result)
    check(result, exact_a, exact_b, SUMMED)


@each_implementation
@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-2, 1e-3, 1e-4])
def test_a_small_divergence_keeps_its_leading_digits(impl, scale):
    """The definition in fp32 fails here by more than a factor of ten from 1e-3 on."""
    a = normal(3, 3000, scale=2)
    b = a + normal(3, 3000, seed=1) * scale
    check(run(impl, a, (None, None), b, (None, None)), a, b, given(a, b))
    definition = (a.softmax(1) * (a.log_softmax(1) - b.log_softmax(1))).sum(1)
    kl = exact_of(a, b)[0]
    assert scale > 1e-3 or ((definition - kl).abs() > 10 * allowed_error(kl, given(a, b))).any()


@each_implementation
def test_equal_laws(impl):
    """Exactly 0 for equal logits; and a shift of all of them changes no law."""
    hidden, weight, bias = normal(3, 50), normal(400, 50, seed=1), normal(400, seed=2)
    same = run(impl, hidden, (weight, bias), hidden, (weight, bias), temperature=0.3)
    assert (same.kl == 0).all() and (same.entropy > 0).all() and torch.equal(same.cross_entropy, same.entropy)
    shifted = run(impl, hidden, (weight, bias), hidden, (weight, bias + 3))
    assert (shifted.kl < 1e-10).all()


@each_implementation
def test_laws_far_apart(impl):
    """Nearly certain of different ids; ids that only one of the laws gives any weight."""
    a, b = torch.zeros(3, 900), torch.zeros(3, 900)
    a[0, 3], b[0, 890] = 60, 70
    a[1], b[1] = torch.arange(900) * 0.2, torch.arange(900) * -0.2
    a[2, :450] = -500
    result = run(impl, a, (None, None), b, (None, None))
    check(result, a, b, given(a, b))
    torch.testing.assert_close(result.kl[2], torch.tensor(math.log(2)))


@each_implementation
def test_chunks_of_rows(impl, monkeypatch):
    """Rows that do not fit into one chunk, each with its own temperature."""
    if impl == "triton":
        from unmask.kernels.divergence import triton_kernel

        monkeypatch.setattr(triton_kernel, "_TABLE", 1)
    a, b = normal(35, 50_000, scale=2), normal(35, 50_000, seed=1)
    a, b = (a[:, :300], b[:, :300]) if impl == "triton" else (a, b)
    temperature = torch.linspace(0.5, 2, 35)
    tempered = (x / temperature[:, None] for x in (a, b))
    check(run(impl, a, (None, None), b, (None, None), temperature=temperature), *tempered, 2 * given(a, b))


@each_implementation
@pytest.mark.parametrize("vocab_size", [1, 127, 128, 129, 2000])
def test_odd_vocabularies(impl, vocab_size):
    a, b = normal(1, vocab_size), normal(1, vocab_size, seed=1)
    check(run(impl, a, (None, None), b, (None, None)), a, b, given(a, b))


@each_implementation
def test_no_rows(impl):
    result = run(impl, normal(0, 5), (normal(9, 5), None), normal(0, 3), (normal(9, 3), None))
    assert [field.shape for field in result] == [(0,)] * 3


@each_implementation
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strided_inputs(impl, dtype):
    holes = torch.zeros(5, 3, 150, dtype=dtype)
    holes[:, 1, ::2] = normal(5, 75, dtype=dtype)
    hidden, weight = holes[:, 1, ::2], normal(300, 90, seed=1, scale=0.3, dtype=dtype)[20:, 3:78]
    logits, bias = normal(280, 5, seed=2, dtype=dtype).T, normal(280, 2, seed=3)[:, 0]
    check(run(impl, hidden, (weight, bias), logits, (None, None)), exact_logits(hidden, weight, bias), logits, SUMMED)


def test_reference_computes_in_fp64_when_an_input_is():
    a, b = normal(3, 500), normal(3, 500, seed=1)
    exact = exact_of(a, b)
    for inputs in ((a.double(), b), (a, b.double())):
        result = divergence(inputs[0], (None, None), inputs[1], (None, None))
        for ours, theirs in zip(result, exact, strict=True):
            assert ours.dtype == torch.float64
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@each_implementation
def test_heads_may_be_objects(impl):
    hidden, weight, bias = normal(2, 5), normal(9, 5, seed=1), normal(9, seed=2)
    head = on(impl, SimpleNamespace(weight=on(impl, weight), bias=on(impl, bias)))
    pair = run(impl, hidden, (weight, bias), hidden, (weight, None))
    result = divergence(on(impl, hidden), head, on(impl, hidden), (on(impl, weight), None), impl=impl)
    assert torch.equal(result.kl.cpu(), pair.kl)


# --- ends -----------------------------------------------------------------------------------------------------------


@each_implementation
def test_impossible_ids(impl):
    """Row 0: under b alone; 1: under a alone; 2: as 0, in a block whose weight under a rounds to 0; 3: whole blocks."""
    a, b = normal(4, 600), normal(4, 600, seed=1)
    b[0, [7, 130]] = -math.inf
    a[1, [7, 130]] = -math.inf
    a[2, :128], b[2, 7] = -400, -math.inf
    a[3, :256] = -math.inf
    result = run(impl, a, (None, None), b, (None, None))
    assert result.kl[[0, 2]].tolist() == [math.inf] * 2 and result.cross_entropy[[0, 2]].tolist() == [math.inf] * 2
    kept = [1, 3]
    check(type(result)(*(field[kept] for field in result)), a[kept], b[kept], given(a, b))
    torch.testing.assert_close(result.entropy.double(), exact_of(a, b)[2], rtol=2e-6, atol=2e-6)


@each_implementation
def test_forbidden_ids_are_left_out_of_both_laws(impl):
    a, b = normal(2, 300), normal(2, 300, seed=1)
    forbid = torch.tensor([299, 5, 130])
    kept = [i for i in range(300) if i not in forbid]
    a_left, b_left = a[:, kept].clone(), b[:, kept].clone()
    a[:, forbid], b[:, forbid] = math.nan, torch.tensor([math.inf, 50, -math.inf])
    check(run(impl, a, (None, None), b, (None, None), forbid=forbid), a_left, b_left, given(a_left, b_left))


@each_implementation
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["hidden_a", "hidden_b"])
@pytest.mark.parametrize("column", [0, 299])
def test_non_finite_logits_name_the_row_and_the_side(impl, bad, side, column):
    a, b = normal(4, 300), normal(4, 300, seed=1)
    whole = run(impl, a, (None, None), b, (None, None))
    {"hidden_a": a, "hidden_b": b}[side][2, column] = bad
    with pytest.raises(NonFiniteLogits, match=rf"^row 2 of {side}: a logit is NaN or \+inf$"):
        run(impl, a, (None, None), b, (None, None))
    for ours, good in zip(run(impl, a, (None, None), b, (None, None), check=False), whole, strict=True):
        assert ours[2].isnan() and torch.equal(ours[[0, 1, 3]], good[[0, 1, 3]])


@each_implementation
@pytest.mark.parametrize("side", ["hidden_a", "hidden_b"])
def test_everything_forbidden(impl, side):
    a, b = normal(3, 200), normal(3, 200, seed=1)
    {"hidden_a": a, "hidden_b": b}[side][1] = -math.inf
    with pytest.raises(NonFiniteLogits, match=f"^row 1 of {side}: every id is forbidden$"):
        run(impl, a, (None, None), b, (None, None))
    result = run(impl, a, (None, None), b, (None, None), check=False)
    assert all(field.isnan().tolist() == [False, True, False] for field in result)


# --- row invariance and memory --------------------------------------------------------------------------------------


@compiled
@each_isa
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_does_not_depend_on_its_company(isa, dtype):
    hidden_a, weight_a = normal(140, 40, dtype=dtype), normal(2500, 40, seed=1, scale=0.5, dtype=dtype)
    hidden_b, weight_b = normal(140, 30, seed=2, dtype=dtype), normal(2500, 30, seed=3, scale=0.5, dtype=dtype)
    temperature = torch.linspace(0.5, 2, 140)

    def answer(rows):
        a = Logits(hidden_a, weight_a, None, temperature[rows], rows)
        return torch.stack(
            cpu.on_isa(isa, DivergenceCall(a, Logits(hidden_b, weight_b, None, temperature[rows], rows)))
        )

    torch.set_num_threads(3)
    everything = answer(torch.arange(140))
    exact_a, exact_b = (
        exact_logits(hidden, weight, temperature=temperature)
        for hidden, weight in ((hidden_a, weight_a), (hidden_b, weight_b))
    )
    torch.testing.assert_close(everything[0], exact_of(exact_a, exact_b)[0].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(everything[3], exact_b.logsumexp(1).float(), rtol=1e-5, atol=1e-6)
    shuffled = torch.randperm(140, generator=torch.Generator().manual_seed(0))
    assert torch.equal(answer(shuffled), everything[:, shuffled])
    torch.set_num_threads(1)
    assert torch.equal(answer(torch.arange(140)), everything)
    for size in (1, 5, 7, 64):
        split = torch.cat([answer(rows) for rows in torch.arange(24).split(size)], dim=1)
        assert torch.equal(split, everything[:, :24])


@with_triton
def test_a_row_of_triton_does_not_depend_on_its_company():
    heads = [(normal(256, dim, seed=dim), (normal(300, dim, seed=1 + dim, scale=0.5), None)) for dim in (40, 30)]
    everything = torch.stack(run("triton", *heads[0], *heads[1]))
    for rows in ROW_ORDERS:
        assert torch.equal(torch.stack(run("triton", *heads[0], *heads[1], rows=rows)), everything[:, rows])


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled)])
def test_memory_is_bounded(impl):
    """The logits would take 2 x 200 MB."""
    hidden, weight = normal(500, 4), normal(100_000, 4, seed=1)
    run(impl, hidden[:100], (weight, None), hidden[100:200], (weight, None))
    grown = peak_memory(lambda: run(impl, hidden, (weight, None), hidden, (weight, None)))
    assert grown < 16 << 20, f"{grown / 2**20:.1f} MB"


@with_triton
@pytest.mark.parametrize("num_rows, dim, vocab_size", [(65536, 768, 50258), (8192, 4096, 126_464), (1, 8192, 262_144)])
def test_memory_of_triton_is_bounded(monkeypatch, num_rows, dim, vocab_size):
    from unmask.kernels.divergence import triton_kernel

    hidden, weight = (torch.empty(n, dim, dtype=BF16, device="meta") for n in (num_rows, vocab_size))
    call = DivergenceCall(Logits(hidden, weight, None), Logits(hidden, weight, None))
    used = workspace(monkeypatch, triton_kernel, lambda: triton_kernel.divergence(call), (hidden, weight))
    assert 0 < used < 64 << 20, f"{used / 2**20:.1f} MB"


# --- errors ---------------------------------------------------------------------------------------------------------


def good():
    heads = {"head_a": (normal(50, 6), normal(50)), "head_b": (normal(50, 7), None)}
    return {"hidden_a": normal(4, 6), "hidden_b": normal(4, 7)} | heads


BAD = [
    ({"hidden_a": [1.0]}, TypeError, r"hidden_a must be a tensor \[N, D\], got list"),
    ({"hidden_b": torch.zeros(4)}, ValueError, r"hidden_b must be a dense tensor \[N, D\], got shape \[4\]"),
    ({"hidden_b": torch.zeros(3, 7)}, ValueError, r"hidden_b must have the 4 rows of hidden_a, got shape \[3, 7\]"),
    ({"hidden_b": torch.zeros(4, 6)}, ValueError, r"weight_b must be \[V, 6\] for this hidden_b, got shape \[50, 7\]"),
    ({"head_a": (torch.zeros(50, 7), None)}, ValueError, r"weight_a must be \[V, 6\] for this hidden_a"),
    ({"head_a": (torch.zeros(49, 6), None)}, ValueError, "head_b must have the 49 ids of head_a, got 50"),
    ({"head_b": (torch.zeros(50, 7), torch.zeros(49))}, ValueError, r"bias_b must be \[50\], one number per id"),
    ({"head_a": torch.zeros(50, 6)}, TypeError, r"head_a must be a pair \(weight, bias\) or have these .*, got Tensor"),
    ({"head_b": None}, TypeError, r"head_b must be a pair .*, got NoneType"),
    ({"head_b": (None,)}, TypeError, r"head_b must be a pair .*, got tuple"),
    (
        {"hidden_b": torch.zeros(4, 7, device="meta"), "head_b": (torch.zeros(50, 7, device="meta"), None)},
        ValueError,
        "hidden_b must be on the device of hidden_a, cpu, got meta",
    ),
    (
        {"head_b": (torch.zeros(50, 7, device="meta"), None)},
        ValueError,
        "weight_b must be on the device of hidden_b, cpu, got meta",
    ),
    ({"temperature": 0.0}, ValueError, "temperature must be a positive normal fp32 number, got 0.0"),
    ({"temperature": torch.ones(3)}, ValueError, r"temperature must be a number or \[4\], got shape \[3\]"),
    ({"temperature": torch.full((4,), -1.0)}, ValueError, "temperature must be a positive .*got -1.0 in row 0"),
    ({"forbid": torch.tensor([-1])}, ValueError, r"forbid must be in \[0, 50\), got -1"),
    ({"rows": torch.tensor([0, -1])}, ValueError, r"rows must be in \[0, 4\), got -1"),
    (
        {"impl": "cuda"},
        ValueError,
        "impl of divergence must be None or one of 'triton', 'cpu', 'reference', got 'cuda'",
    ),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        divergence(**good() | change)


@pytest.mark.parametrize(
    "impl, change, message",
    [
        ("cpu", {"hidden_a": normal(4, 6).double()}, "needs hidden_a in float32, bfloat16 or float16, got float64"),
        ("cpu", {"head_b": (normal(7, 50).T, None)}, "needs the columns of weight_b contiguous, got strides"),
        ("cpu", {"hidden_b": normal(4, 7).double()}, "needs hidden_b in float32, bfloat16 or float16, got float64"),
        ("triton", {"hidden_b": normal(4, 7).double()}, "needs hidden_b in float32, bfloat16 or float16, got float64"),
        (
            "triton",
            {"head_a": (normal(50, 6).half(), None)},
            "needs weight_a in the dtype of hidden, float32, got float16",
        ),
    ],
)
def test_what_others_refuse_reference_serves(impl, change, message):
    if not MARKS[impl].args[0]:
        with pytest.raises(UnsupportedImplementation, match=message + ".*supported here: .*reference"):
            divergence(**on(impl, good() | change), impl=impl)
    assert divergence(**good() | change, impl="reference").kl.shape == (4,)


@compiled
def test_the_border_of_the_extension_checks_for_itself():
    def head(rows=1, cols=4, temperature=1):
        return (1, "float32", (rows, cols), (cols, 1)), None, 0, rows, 0, temperature

    good = {"a": head(), "b": head(), "threads": 1, "kl": 1, "entropy": 1, "lse_a": 1, "lse_b": 1}
    for change, message in [
        ({"a": head(rows=2)}, "a and b must have as many rows"),
        ({"b": head(cols=5)}, "a and b must have as many ids"),
        ({"b": head(temperature=0)}, "temperature must have an address"),
        ({"threads": 0}, "threads must be positive"),
        ({"lse_b": 0}, "must have an address"),
    ]:
        with pytest.raises(ValueError, match=message):
            cpu.extension._cpu.divergence(**good | change)


# --- dispatch -------------------------------------------------------------------------------------------------------


def test_explain_lists_every_implementation_with_a_reason():
    lines = [line for line in dispatch.explain() if line.operator == "divergence"]
    assert [line.implementation for line in lines] == ["triton", "cpu", "reference"]
    assert all(line.reason for line in lines) and sum(line.picked for line in lines) == 1


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled)])
def test_torch_compile_takes_it_whole(impl):
    whole = torch.compile(divergence, fullgraph=True, backend="eager")
    arguments = good() | {"forbid": torch.tensor([3]), "temperature": 0.7, "rows": torch.tensor([1, 0]), "impl": impl}
    for ours, theirs in zip(whole(**arguments), divergence(**arguments), strict=True):
        assert torch.equal(ours, theirs)


@with_triton
def test_triton_compiles_for_every_target():
    kernels = check_compiled_launches("divergence")
    assert set(kernels) == {"blocks_kernel", "rows_kernel"}
    assert "HGMMA" in kernels["blocks_kernel"]["instructions"]
