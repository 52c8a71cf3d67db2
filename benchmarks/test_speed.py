"""The CPU implementations under pytest-benchmark, which keeps runs and compares them.

    pytest benchmarks --benchmark-only --benchmark-autosave
    pytest benchmarks --benchmark-only --benchmark-compare --benchmark-compare-fail=median:10%

One case of each part of each operator, at the shape of the bundled pair. What fails its check is not timed.
"""

import pytest
import torch

from benchmarks.cases import Point, operators, points
from benchmarks.models import SHAPES
from benchmarks.variants import Variant, implementations

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COUNTS = {"rows": [32], "sequences": [4]}
DRAWS = 20_000
POINTS = points(operators(), {"bundled": SHAPES["bundled"]}, "cpu", COUNTS)
TIMED = [(point, one) for point in POINTS for one in implementations(point.operator) if one.lacks is None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("point", "variant"), TIMED, ids=[f"{point.operator} {point.name} {one.name}" for point, one in TIMED]
)
def test_speed(benchmark, point: Point, variant: Variant, dtype: str):
    case = point.prepare(DTYPES[dtype], torch.device("cpu"))
    verdict = variant.check(case, DRAWS)
    assert verdict.passed, verdict.detail
    benchmark.group = f"{point.operator} {point.name} {dtype}"
    benchmark.extra_info = {"bytes": case.num_bytes, "flops": case.flops, "law": verdict.detail, **case.sizes}
    benchmark(variant.bind(case))
