"""swiglu: its values against fp64, buffers, invariance, agreement of implementations, error texts."""

import math

import pytest
import torch
from laws import check_compiled_launches, compiled, each_implementation, each_isa, normal, on, with_triton

from unmask.kernels import dispatch, swiglu
from unmask.kernels.dispatch import UnsupportedImplementation
from unmask.kernels.swiglu import cpu
from unmask.kernels.swiglu.call import SwigluCall

NARROW = torch.float32, torch.bfloat16
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DIMS = 1, 15, 16, 255, 300, 2049


def inputs(dim, dtype=torch.float32, rows=9):
    return normal(rows, 2 * dim, seed=dim, scale=4.0, dtype=dtype)


def exact(gate_up):
    gate, up = gate_up.double().chunk(2, dim=1)
    return gate / (1 + (-gate).exp()) * up


def check(found, gate_up):
    """Relative to every number; of fp16 those below its normal ones are not."""
    smallest = 2**-14 if found.dtype is torch.float16 else 1e-30
    rounding = ROUNDING[found.dtype]
    torch.testing.assert_close(found.double(), exact(gate_up), rtol=rounding, atol=rounding * smallest)


def run(impl, gate_up, **options):
    return swiglu(on(impl, gate_up), **on(impl, options), impl=impl).cpu()


@each_implementation
@pytest.mark.parametrize("dtypes", [(a, b) for a in NARROW for b in NARROW], ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_values_against_fp64(impl, dtypes, dim):
    gate_up = inputs(dim, dtypes[0])
    check(run(impl, gate_up, out=torch.full((9, dim), math.nan, dtype=dtypes[1])), gate_up)


@each_isa
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_each_isa(isa, dtype, dim):
    gate_up, out = inputs(dim, dtype), torch.full((9, dim), math.nan, dtype=dtype)
    cpu.on_isa(isa, SwigluCall(gate_up, out))
    check(out, gate_up)


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=with_triton)])
def test_fp16(impl):
    gate_up = inputs(70, torch.float16)
    check(run(impl, gate_up), gate_up)


@each_implementation
def test_large_gates_overflow_nothing(impl):
    gate = torch.tensor([[-3e38, -200.0, -50.0, -0.0, 0.0, 50.0, 200.0, 3e38, math.inf]])
    found = run(impl, torch.cat((gate, torch.ones_like(gate)), dim=1))
    torch.testing.assert_close(found, gate.clamp(min=0), rtol=1e-6, atol=1e-19)


@each_implementation
def test_nan_stays_in_its_number(impl):
    gate_up = inputs(40)
    gate_up[2, 3] = gate_up[4, 45] = math.nan
    bad = run(impl, gate_up).isnan()
    assert bad.nonzero().tolist() == [[2, 3], [4, 5]]


@each_implementation
def test_strided_rows(impl):
    gate_up = inputs(70)
    wide, out = on(impl, torch.full((9, 3, 140), math.nan)), on(impl, torch.full((9, 2, 70), math.nan))
    wide[:, 1] = gate_up
    assert swiglu(wide[:, 1], out=out[:, 0], impl=impl) is not None
    assert torch.equal(out[:, 0].cpu(), run(impl, gate_up)) and out[:, 1].isnan().all()


@each_implementation
@pytest.mark.parametrize("dim", [37, 2049])
def test_a_row_does_not_depend_on_its_company(impl, dim):
    gate_up = inputs(dim, rows=33)
    torch.set_num_threads(3)
    together = run(impl, gate_up)
    torch.set_num_threads(1)
    for rows in (slice(0, 1), slice(7, 9), slice(32, 33)):
        assert torch.equal(run(impl, gate_up[rows]), together[rows])


@each_implementation
def test_a_new_result_is_like_gate_up_and_may_have_no_rows(impl):
    found = run(impl, torch.empty(0, 8, dtype=torch.bfloat16))
    assert found.shape == (0, 4) and found.dtype is torch.bfloat16


def test_torch_compile_takes_it_whole():
    def activate(gate_up, out):
        return swiglu(2 * gate_up, out=out) + 1, swiglu(gate_up)

    whole = torch.compile(activate, fullgraph=True, backend="aot_eager")
    gate_up, (out, found) = inputs(40), torch.zeros(2, 9, 40).unbind(0)
    for left, right in zip(whole(gate_up, found), activate(gate_up, out), strict=True):
        assert torch.equal(left, right)
    assert torch.equal(found, out)


BAD = [
    ({"gate_up": [1.0]}, TypeError, r"gate_up must be a tensor \[T, 2 M\], got list"),
    (
        {"gate_up": torch.zeros(9, 80).double()},
        TypeError,
        "gate_up must be float32 or bfloat16 or float16, got float64",
    ),
    ({"gate_up": torch.zeros(9, 81)}, ValueError, r"gate_up must have an even, positive number .* got shape \[9, 81\]"),
    ({"gate_up": torch.zeros(9, 0)}, ValueError, r"gate_up must have an even, positive number .* got shape \[9, 0\]"),
    ({"gate_up": torch.zeros(80, 9).T}, ValueError, r"gate_up must have contiguous columns, got strides \(1, 9\)"),
    ({"out": torch.zeros(9, 80)}, ValueError, r"out must be \[9, 40\] for this gate_up, got shape \[9, 80\]"),
    ({"out": torch.zeros(9, 40).long()}, TypeError, "out must be float32 or bfloat16 or float16, got int64"),
    ({"out": torch.zeros(1, 40).expand(9, 40)}, ValueError, "out must not overlap itself"),
    ({"impl": "fused"}, ValueError, "impl of swiglu must be None or one of 'triton', 'cpu', 'reference', got 'fused'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_write_nothing(change, error, message):
    arguments = {"gate_up": inputs(40), "out": torch.full((9, 40), math.nan)}
    with pytest.raises(error, match=message):
        swiglu(**arguments | change)
    assert arguments["out"].isnan().all()


@compiled
def test_what_cpu_refuses_reference_serves():
    gate_up = inputs(40, torch.float16)
    with pytest.raises(
        UnsupportedImplementation, match=r"needs gate_up in float32 or bfloat16, got float16.*reference"
    ):
        swiglu(gate_up, impl="cpu")
    assert swiglu(gate_up).isfinite().all()


def test_explain_lists_every_implementation_with_a_reason():
    lines = {line.implementation: line for line in dispatch.explain() if line.operator == "swiglu"}
    assert list(lines) == ["triton", "cpu", "reference"]
    assert all(line.reason for line in lines.values())
    assert [line.picked for line in lines.values()].count(True) == 1


@with_triton
def test_triton_compiles_for_every_target():
    assert set(check_compiled_launches("swiglu")) == {"swiglu_kernel"}
