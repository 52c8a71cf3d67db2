"""Cases of the operators: there are some for each of the registry, and what is counted of them is right."""

import pytest
import torch

from benchmarks import variants, verify
from benchmarks.cases import family, operators, points
from benchmarks.models import SHAPES, shape_of
from benchmarks.shapes import Shape
from unmask import load_all
from unmask.kernels import dispatch
from unmask.options import named_sources

CPU = torch.device("cpu")
SMALL = Shape(24, 700, num_heads=2, num_kv_heads=1, length=20)
FEW = {"rows": [3], "sequences": [2]}
F32, BF16 = torch.float32, torch.bfloat16


def cases(dtype=F32, shape=SMALL, sizes=FEW):
    """Of every operator, by name and part."""
    found = points(operators(), {"small": shape}, "cpu", sizes)
    return {(point.operator, point.part): point.prepare(dtype, CPU) for point in found}


def test_every_operator_of_the_registry_has_cases():
    assert set(operators()) == set(dispatch._OPERATORS)
    for name, implementations in operators().items():
        assert implementations == [one.name for one in variants.registered(name).implementations]
        assert {family(name).usual.keys() >= {"cpu", "cuda"} for name in operators()} == {True}
        assert any(point.operator == name for point in points([name], SHAPES, "cuda", dict.fromkeys(FEW)))


def test_an_operator_without_cases_is_noticed(monkeypatch):
    monkeypatch.setattr(dispatch, "_OPERATORS", dict(dispatch._OPERATORS))
    dispatch.Operator("new", (dispatch.Implementation("reference", print, lambda: (True, "plain")),))
    with pytest.raises(ModuleNotFoundError, match=r"benchmarks\.cases\.new"):
        points(operators(), {"small": SMALL}, "cpu", FEW)


def test_the_bundled_pair_has_the_shape_of_its_models():
    shapes = {shape_of(model.spec) for model in load_all(named_sources(None)).values()}
    assert shapes == {SHAPES["bundled"]} and len(set(SHAPES.values())) == len(SHAPES)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("operator", operators())
def test_implementations_that_serve_here_agree(operator, dtype):
    for (name, part), case in cases(dtype).items():
        if name != operator:
            continue
        for variant in variants.implementations(operator):
            if variant.lacks is None:
                verdict = variant.check(case, 2000)
                assert verdict.passed, f"{part} {variant.name}: {verdict.detail}"


def test_a_wrong_result_of_any_operator_is_found():
    def spoilt(found, output):
        return {name: values * (1 + 2e-5) if name == output else values for name, values in found.items()}

    for (name, part), case in cases().items():
        if name == "sample_head":
            continue
        found, expected = case.compare("reference")
        assert verify.check_agreement(found, expected, case.allowed).passed
        for output in expected:
            wrong = verify.check_agreement(spoilt(found, output), expected, case.allowed)
            assert not wrong.passed and wrong.detail.startswith(output), (name, part, output)


def test_the_sum_with_delta_is_held_to_fp32_in_any_dtype():
    case = cases(BF16)["add_norm", "plain"]
    found, expected = case.compare("reference")
    unadded = found | {"residual": case.residual}
    assert not verify.check_agreement(unadded, expected, case.allowed).passed


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bytes_and_flops_by_hand(dtype):
    size, found = dtype.itemsize, cases(dtype)
    d, v, rows = 24, 700, 3
    whole, given = found["sample_head", "whole"], found["sample_head", "sampling"]
    assert whole.num_bytes == size * (v * d + rows * d) + rows * (3 + 1) * 8 and whole.flops == 2 * rows * v * d
    assert given.num_bytes == size * rows * v + rows * (3 + 1) * 8 and given.flops == 0
    embedding = found["expected_embedding", "whole"]
    assert embedding.num_bytes == size * (2 * v * d + rows * d) + 4 * rows * d and embedding.flops == 4 * rows * v * d
    both = found["divergence", "whole"]
    assert both.num_bytes == size * 2 * (v * d + rows * d) + 3 * 4 * rows and both.flops == 4 * rows * v * d


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bytes_and_flops_of_a_body_by_hand(dtype):
    size, found = dtype.itemsize, cases(dtype)
    heads, groups, dim, length, batch = 2, 1, 12, 20, 2
    rope = 2 * 4 * length * dim // 2
    keys = size * batch * length * 2 * groups * dim
    full, rows = found["attention", "full"], found["attention", "rows"]
    assert full.num_bytes == 2 * size * batch * length * heads * dim + keys + rope
    assert full.flops == batch * length * length * heads * dim * 2 * 2
    assert rows.num_bytes == 2 * size * batch * 8 * heads * dim + keys + rope + 8 * batch * 8
    assert rows.flops == batch * 8 * length * heads * dim * 2 * 2
    activated = found["swiglu", "whole"]
    assert activated.num_bytes == size * 3 * 3 * 72 and activated.flops == 5 * 3 * 72
    plain, modulated = found["add_norm", "plain"], found["add_norm", "modulated"]
    assert plain.num_bytes == 3 * 24 * (2 * 4 + 2 * size) + 24 * 4 and plain.flops == 7 * 3 * 24
    assert modulated.num_bytes == plain.num_bytes + 3 * 24 * 4 and modulated.flops == 10 * 3 * 24


def test_rows_of_a_norm_belong_to_equally_long_sequences():
    for rows, sequences in ((3, 1), (40, 2), (41, 1), (100, 5)):
        case = cases(sizes={"rows": [rows], "sequences": [1]})["add_norm", "modulated"]
        assert case.num_sequences == sequences


@pytest.mark.parametrize("num_rows", [1, 8])
def test_inputs_are_neither_zeros_nor_decided(num_rows):
    case = cases(sizes={"rows": [num_rows], "sequences": [1]})["sample_head", "whole"]
    p = (case.hidden @ case.weight.T).softmax(1)
    assert case.hidden.count_nonzero() == case.hidden.numel() and 2 / SMALL.vocab_size < p.max() < 0.9


def test_logits_that_no_machine_holds_are_no_case():
    found = points(["sample_head"], {"llada-8b": SHAPES["llada-8b"]}, "cuda", {"rows": [8192, 65536]})
    assert [(point.part, point.count) for point in found] == [("whole", 8192), ("whole", 65536), ("sampling", 8192)]


def test_every_case_and_variant_has_a_name_of_its_own():
    found = points(operators(), SHAPES, "cuda", dict.fromkeys(FEW))
    assert len({(point.operator, point.name) for point in found}) == len(found)
    for operator in operators():
        known = [*variants.implementations(operator), *variants.beside(operator, "whole", "cuda", "copy")]
        assert len({variant.name for variant in known}) == len(known)


def test_the_tiny_twin_is_of_the_same_kind_and_small():
    for point in points(operators(), {"bundled": SHAPES["bundled"], "llada-8b": SHAPES["llada-8b"]}, "cpu", FEW):
        tiny = point.tiny().prepare(F32, CPU)
        assert tiny.num_bytes < 8 << 20
        if point.model == "bundled":
            case = point.prepare(F32, CPU)
            assert type(tiny) is type(case) and tiny.sizes.keys() == case.sizes.keys()
