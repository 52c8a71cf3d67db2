"""Timings beside peers, by hand: `python -m benchmarks` and `benchmarks.step`. Never part of the tests."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
