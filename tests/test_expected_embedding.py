"""expected_embedding: its values, ends, row invariance, memory, and its error texts."""

import math

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

from unmask.kernels import NonFiniteLogits, dispatch, expected_embedding
from unmask.kernels.dispatch import UnsupportedImplementation
from unmask.kernels.expected_embedding import cpu
from unmask.kernels.expected_embedding.call import EmbeddingCall
from unmask.kernels.logits import Logits

pytestmark = numpy_remarks
ROUNDING = {F32: 4e-6, BF16: 2.0**-8, F16: 2.0**-11}  # of the probabilities by Triton, to the table's dtype


def run(impl, hidden, weight, bias, table, **options):
    arguments = on(impl, (hidden, weight, bias, table))
    return expected_embedding(*arguments, **on(impl, options), impl=impl).cpu()


def check(impl, hidden, weight, bias, table, **options):
    """As close to fp64 as fp32 sums of these sizes are, where Triton rounds no probability; never worse than torch."""
    given = {name: value for name, value in options.items() if name != "check"}
    law = exact_logits(hidden, weight, bias, **given).softmax(1)
    ours, exact = run(impl, hidden, weight, bias, table, **options), law @ table.double()
    assert ours.dtype == F32 and ours.shape == exact.shape
    slack = ROUNDING[table.dtype if impl == "triton" else F32]
    excess = (ours - exact).abs() / (law @ table.double().abs())
    assert excess.max() <= slack, f"{excess.max():.2e} of the mean size of a term, {slack:.2e} allowed"
    return ours, exact


# --- values ---------------------------------------------------------------------------------------------------------

CASES = [
    ("reference", F32, F32, F32),
    ("reference", BF16, F32, F16),
    ("cpu", F32, F32, F32),
    ("cpu", BF16, BF16, BF16),
    ("cpu", F32, BF16, F32),
    ("cpu", BF16, F32, BF16),
    ("cpu", F16, F16, F16),
    ("triton", F32, F32, F32),
    ("triton", BF16, BF16, BF16),
    ("triton", F16, F16, F16),
    ("triton", F32, F32, BF16),
]
MARKS = {"reference": (), "cpu": compiled, "triton": with_triton}


@pytest.mark.parametrize(
    "impl, hidden_dtype, weight_dtype, table_dtype", [pytest.param(*case, marks=MARKS[case[0]]) for case in CASES]
)
def test_against_fp64(impl, hidden_dtype, weight_dtype, table_dtype):
    hidden, weight = normal(9, 133, dtype=hidden_dtype), normal(700, 133, seed=1, scale=0.2, dtype=weight_dtype)
    bias, table = normal(700, seed=2), normal(700, 130, seed=3, dtype=table_dtype)
    ours, exact = check(
        impl, hidden, weight, bias, table, temperature=1.3, forbid=torch.tensor([3, 699]), rows=torch.tensor([5, 5, 0])
    )
    if hidden_dtype == weight_dtype == table_dtype:
        logits = (hidden[[5, 5, 0]] @ weight.T + bias.to(hidden_dtype)) / 1.3
        logits[:, [3, 699]] = -math.inf
        torch_error, error = (((x - exact).abs().max()) for x in (logits.softmax(1) @ table, ours))
        assert error <= torch_error + 1e-6, f"{error:.2e}, same-dtype torch {torch_error:.2e}"


def test_reference_computes_in_fp64_when_an_input_is():
    hidden, weight, table = normal(3, 40), normal(500, 40, seed=1), normal(500, 7, seed=2)
    exact = (hidden.double() @ weight.double().T).softmax(1) @ table.double()
    for wide in range(3):
        inputs = [x.double() if i == wide else x for i, x in enumerate((hidden, weight, table))]
        ours = expected_embedding(inputs[0], inputs[1], None, inputs[2])
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-14)


@each_implementation
@pytest.mark.parametrize("temperature", [0.4, torch.tensor([0.4, 2.5, 1.0])])
def test_temperature_divides_the_logits(impl, temperature):
    check(impl, normal(3, 300, scale=3), None, None, normal(300, 33, seed=1), temperature=temperature)


@each_implementation
def test_chunks_of_rows(impl, monkeypatch):
    """Rows that do not fit into one chunk, each with its own temperature."""
    if impl == "triton":
        from unmask.kernels.expected_embedding import triton_kernel

        monkeypatch.setattr(triton_kernel, "_WORKSPACE", 1)
    logits, table = normal(35, 50_000, scale=2), normal(50_000, 3, seed=1)
    logits, table = (logits[:, :300], table[:300]) if impl == "triton" else (logits, table)
    check(impl, logits, None, None, table, temperature=torch.linspace(0.5, 2, 35))


@each_implementation
@pytest.mark.parametrize("vocab_size, width", [(1, 1), (127, 3), (128, 64), (129, 65), (3000, 129)])
def test_odd_sizes(impl, vocab_size, width):
    check(impl, normal(1, 5), normal(vocab_size, 5, seed=1), None, normal(vocab_size, width, seed=2))


@each_implementation
def test_no_rows(impl):
    assert run(impl, normal(0, 5), normal(9, 5), None, normal(9, 4)).shape == (0, 4)
    rows = torch.zeros(0, dtype=torch.int64)
    assert run(impl, normal(2, 5), normal(9, 5), None, normal(9, 4), rows=rows).shape == (0, 4)


@each_implementation
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strided_inputs(impl, dtype):
    holes = torch.zeros(13, 3, 150, dtype=dtype)
    holes[:, 1, ::2] = normal(13, 75, dtype=dtype)
    weight, table = normal(300, 90, seed=1, scale=0.3, dtype=dtype)[20:, 3:78], normal(40, 280, seed=2, dtype=dtype).T
    check(impl, holes[:, 1, ::2], weight, normal(280, 2, seed=3)[:, 0], table)
    check(impl, weight, weight, None, weight[:, 1::3])


@each_implementation
def test_an_equal_law_over_a_constant_table(impl):
    table = torch.full((1000, 5), 1.2345)
    for dtype in (F32, BF16):
        ours = run(impl, torch.zeros(2, 1000, dtype=dtype), None, None, table.to(dtype))
        torch.testing.assert_close(ours, torch.full((2, 5), float(table[0, 0].to(dtype))), rtol=1e-5, atol=0)


@each_implementation
def test_logits_far_apart(impl):
    """One id has everything; then a rising staircase, in which every block shrinks what came before."""
    logits = torch.zeros(2, 1500)
    logits[0, 700] = 300
    logits[1] = torch.arange(1500) * 0.05 - 4000
    check(impl, logits, None, None, normal(1500, 20, seed=1))


# --- ends -----------------------------------------------------------------------------------------------------------


@each_implementation
def test_forbidden_ids_weigh_nothing_whatever_their_logit(impl):
    logits = normal(2, 300)
    logits[:, [5, 130, 299]] = torch.tensor([50, math.inf, math.nan])
    forbid, table = torch.tensor([299, 5, 130]), normal(300, 9, seed=1)
    ours = run(impl, logits, None, None, table, forbid=forbid)
    kept = [i for i in range(300) if i not in (5, 130, 299)]
    torch.testing.assert_close(ours, logits[:, kept].softmax(1) @ table[kept], rtol=1e-5, atol=1e-6)
    bias = torch.zeros(300).index_fill(0, forbid, -math.inf)
    assert torch.equal(run(impl, logits, None, bias, table), ours)


@each_implementation
def test_blocks_without_a_possible_id(impl):
    logits = torch.full((2, 1500), -math.inf)
    logits[:, [3, 1400]] = torch.tensor([[-500.0, -501.0], [7.0, 9.0]])
    check(impl, logits, None, None, normal(1500, 9, seed=1))


@each_implementation
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 999])
def test_non_finite_logits_name_the_row(impl, bad, column):
    logits, table = torch.zeros(5, 1000), normal(1000, 4)
    logits[2:, column] = bad
    with pytest.raises(NonFiniteLogits, match=r"^row 2: a logit is NaN or \+inf$"):
        run(impl, logits, None, None, table)
    ours = run(impl, logits, None, None, table, check=False)
    assert ours[2:].isnan().all()
    assert torch.equal(ours[:2], run(impl, logits[:2], None, None, table))


@each_implementation
def test_everything_forbidden(impl):
    logits = torch.zeros(3, 200)
    logits[1] = -math.inf
    with pytest.raises(NonFiniteLogits, match=r"^row 1: every id is forbidden$"):
        run(impl, logits, None, None, normal(200, 4))
    assert run(impl, logits, None, None, normal(200, 4), check=False).isnan().any(1).tolist() == [False, True, False]


@each_implementation
def test_overflow_by_a_tiny_temperature_is_named(impl):
    with pytest.raises(NonFiniteLogits, match=r"row 0: .* after division by temperature 2e-38"):
        run(impl, torch.full((1, 9), 10.0), None, None, normal(9, 4), temperature=2e-38)


# --- row invariance and memory --------------------------------------------------------------------------------------


@compiled
@each_isa
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_does_not_depend_on_its_company(isa, dtype):
    hidden, weight = normal(140, 40, dtype=dtype), normal(2500, 40, seed=1, scale=0.5, dtype=dtype)
    table, temperature = normal(2500, 70, seed=2, dtype=dtype), torch.linspace(0.5, 2, 140)

    def answer(rows):
        logits = Logits(hidden, weight, None, temperature[rows], rows)
        return cpu.on_isa(isa, EmbeddingCall(logits, table)).embedding

    torch.set_num_threads(3)
    everything = answer(torch.arange(140))
    exact = exact_logits(hidden, weight, temperature=temperature).softmax(1) @ table.double()
    torch.testing.assert_close(everything, exact.float(), rtol=1e-5, atol=2e-6)
    shuffled = torch.randperm(140, generator=torch.Generator().manual_seed(0))
    assert torch.equal(answer(shuffled), everything[shuffled])
    torch.set_num_threads(1)
    assert torch.equal(answer(torch.arange(140)), everything)
    for size in (1, 5, 7, 64):
        assert torch.equal(torch.cat([answer(rows) for rows in torch.arange(24).split(size)]), everything[:24])


@compiled
def test_waves_do_not_change_a_row():
    """A wide table leaves room for two of the three spans at a time, and three threads for 34 of the 40 rows."""
    hidden, weight, table = normal(40, 4), normal(2100, 4, seed=1), normal(2100, 100, seed=2, dtype=BF16)
    narrow = run("cpu", hidden, weight, None, table)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(run("cpu", hidden, weight, None, table.repeat(1, 200)), narrow.repeat(1, 200))


@with_triton
def test_a_row_of_triton_does_not_depend_on_its_company():
    hidden, weight, table = normal(256, 40), normal(300, 40, seed=1, scale=0.5), normal(300, 70, seed=2)
    everything = run("triton", hidden, weight, None, table)
    for rows in ROW_ORDERS:
        assert torch.equal(run("triton", hidden, weight, None, table, rows=rows), everything[rows])


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled)])
def test_memory_is_bounded(impl):
    """The logits would take 200 MB."""
    hidden, weight, table = normal(500, 4), normal(100_000, 4, seed=1), normal(100_000, 4, seed=2)
    run(impl, hidden[:100], weight, None, table)
    grown = peak_memory(lambda: run(impl, hidden, weight, None, table))
    assert grown < 16 << 20, f"{grown / 2**20:.1f} MB"


@compiled
def test_memory_is_bounded_for_wide_tables():
    """The sums of all spans would take 50 MB."""
    hidden, weight, table = normal(128, 4), normal(25_000, 4, seed=1), normal(1, 4096).expand(25_000, 4096)
    run("cpu", hidden, weight[:2000], None, table[:2000])
    grown = peak_memory(lambda: run("cpu", hidden, weight, None, table))
    assert grown < 16 << 20, f"{grown / 2**20:.1f} MB"


@with_triton
@pytest.mark.parametrize("num_rows, dim, vocab_size", [(65536, 768, 50258), (8192, 4096, 126_464), (1, 8192, 262_144)])
def test_memory_of_triton_is_bounded(monkeypatch, num_rows, dim, vocab_size):
    from unmask.kernels.expected_embedding import triton_kernel

    hidden, weight = (torch.empty(n, dim, dtype=BF16, device="meta") for n in (num_rows, vocab_size))
    call = EmbeddingCall(Logits(hidden, weight, None), weight)
    used = workspace(monkeypatch, triton_kernel, lambda: triton_kernel.expected_embedding(call), (hidden, weight))
    assert 0 < used < 64 << 20, f"{used / 2**20:.1f} MB"


# --- errors ---------------------------------------------------------------------------------------------------------


def good():
    return {"hidden": normal(4, 6), "weight": normal(50, 6), "bias": None, "table": normal(50, 3)}


BAD = [
    ({"hidden": [1.0]}, TypeError, r"hidden must be a tensor \[N, D\], got list"),
    ({"hidden": torch.zeros(4)}, ValueError, r"hidden must be a dense tensor \[N, D\], got shape \[4\]"),
    ({"weight": torch.zeros(50, 7)}, ValueError, r"weight must be \[V, 6\] for this hidden, got shape \[50, 7\]"),
    ({"bias": torch.zeros(49)}, ValueError, r"bias must be \[50\], one number per id, got shape \[49\]"),
    ({"table": None}, TypeError, r"table must be a tensor \[V, E\], got NoneType"),
    ({"table": torch.zeros(50, 3, dtype=torch.int64)}, TypeError, "table must be float32 or .*, got int64"),
    ({"table": torch.zeros(49, 3)}, ValueError, r"table must be \[50, E\], one vector per id, got shape \[49, 3\]"),
    ({"table": torch.zeros(50, 0)}, ValueError, r"table must be \[50, E\], one vector per id, got shape \[50, 0\]"),
    ({"table": torch.zeros(50)}, ValueError, r"table must be a dense tensor \[V, E\], got shape \[50\]"),
    ({"table": torch.zeros(50, 3, device="meta")}, ValueError, "table must be on the device of hidden, cpu, got meta"),
    ({"temperature": 0}, ValueError, "temperature must be a positive normal fp32 number, got 0"),
    ({"temperature": math.nan}, ValueError, "temperature must be a positive normal fp32 number, got nan"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
    ({"temperature": torch.ones(3)}, ValueError, r"temperature must be a number or \[4\], got shape \[3\]"),
    ({"temperature": torch.ones(4).double()}, TypeError, "temperature must be float32, got float64"),
    ({"temperature": torch.tensor([1, 1, 0.0, 1])}, ValueError, "temperature must be a positive .*got 0.0 in row 2"),
    ({"forbid": torch.tensor([50])}, ValueError, r"forbid must be in \[0, 50\), got 50"),
    ({"forbid": [1]}, TypeError, r"forbid must be a tensor \[K\], got list"),
    ({"rows": torch.tensor([4])}, ValueError, r"rows must be in \[0, 4\), got 4"),
    ({"rows": torch.tensor([0]).int()}, TypeError, "rows must be int64, got int32"),
    ({"impl": "gpu"}, ValueError, "impl of expected_embedding must be None or one of 'triton', 'cpu', 'reference'"),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        expected_embedding(**good() | change)


@pytest.mark.parametrize(
    "impl, change, message",
    [
        ("cpu", {"hidden": normal(4, 6).double()}, "needs hidden in float32, bfloat16 or float16, got float64"),
        ("cpu", {"table": normal(50, 3).double()}, "needs table in float32, bfloat16 or float16, got float64"),
        ("cpu", {"weight": normal(6, 50).T}, r"needs the columns of weight contiguous, got strides \(1, 50\)"),
        ("cpu", {"bias": normal(50).double()}, "needs bias narrower than float64"),
        ("triton", {"table": normal(50, 3).double()}, "needs table in float32, bfloat16 or float16, got float64"),
        ("triton", {"weight": normal(50, 6).half()}, "needs weight in the dtype of hidden, float32, got float16"),
    ],
)
def test_what_others_refuse_reference_serves(impl, change, message):
    if not MARKS[impl].args[0]:
        with pytest.raises(UnsupportedImplementation, match=message + ".*supported here: .*reference"):
            expected_embedding(**on(impl, good() | change), impl=impl)
    assert expected_embedding(**good() | change, impl="reference").shape == (4, 3)


@compiled
def test_the_border_of_the_extension_checks_for_itself():
    hidden = (1, "float32", (1, 4), (4, 1))
    good = {"logits": (hidden, None, 0, 1, 0, 1), "table": hidden, "threads": 1, "embedding": 1, "lse": 1}
    for change, message in [
        ({"logits": (hidden, None, 0, 1, 0, 0)}, "temperature must have an address"),
        ({"table": (1, "float32", (5, 4), (4, 1))}, "table must be"),
        ({"table": (1, "float64", (4, 4), (4, 1))}, "table must be float32, bfloat16 or float16"),
        ({"table": (1, "float32", (4, 4), (4, 1)), "threads": 0}, "threads must be positive"),
        ({"table": (1, "float32", (4, 4), (4, 1)), "lse": 0}, "must have an address"),
    ]:
        with pytest.raises(ValueError, match=message):
            cpu.extension._cpu.expected_embedding(**good | change)


# --- dispatch -------------------------------------------------------------------------------------------------------


def test_explain_lists_every_implementation_with_a_reason():
    lines = [line for line in dispatch.explain() if line.operator == "expected_embedding"]
    assert [line.implementation for line in lines] == ["triton", "cpu", "reference"]
    assert all(line.reason for line in lines) and sum(line.picked for line in lines) == 1


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled)])
def test_torch_compile_takes_it_whole(impl):
    whole = torch.compile(expected_embedding, fullgraph=True, backend="eager")
    arguments = good() | {"forbid": torch.tensor([3]), "temperature": 0.7, "rows": torch.tensor([1, 0]), "impl": impl}
    assert torch.equal(whole(**arguments), expected_embedding(**arguments))


@with_triton
def test_triton_compiles_for_every_target():
    kernels = check_compiled_launches("expected_embedding")
    assert set(kernels) == {"weights_kernel", "factors_kernel", "product_kernel", "add_kernel"}
    assert all("HGMMA" in kernels[name]["instructions"] for name in ("weights_kernel", "product_kernel"))
