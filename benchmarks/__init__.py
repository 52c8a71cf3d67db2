"""Timings beside peers, by hand: `python -m benchmarks` and `benchmarks.step`. Never part of the tests."""
