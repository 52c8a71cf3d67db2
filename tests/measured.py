"""Rows of results that no clock has seen."""

from benchmarks.ceilings import Ceilings
from benchmarks.rows import WAYS, Row
from benchmarks.timing import Timing

CEILINGS = Ceilings("cpu", "float32", 100, bandwidth=1e9, by="sum", product=1e10)


def row(implementation, role="implementation", count=2, times=None, spread=0.0, **fields):
    """A row of sample_head with these seconds by way of timing, p20 and p80 this share away from the median."""
    timings = {
        way: Timing(seconds, seconds * (1 - spread), seconds * (1 + spread), 9)
        for way, seconds in (times or {}).items()
    }
    given = {
        "operator": "sample_head",
        "case": f"whole bundled R={count}",
        "part": "whole",
        "model": "bundled",
        "unit": "R",
        "count": count,
        "implementation": implementation,
        "role": role,
        "device": "cpu",
        "dtype": "float32",
        "shape": {"num_rows": count, "hidden_size": 4, "vocab_size": 10},
        "num_bytes": 1000,
        "flops": 20_000,
        "timings": dict.fromkeys(WAYS) | timings,
    }
    return Row(**given | fields)
