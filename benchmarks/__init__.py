"""Timings beside peers, by hand: `python -m benchmarks.sample_head` and `benchmarks.step`. Never part of the tests."""
