"""Timings of the operators beside their peers, by hand: `python -m benchmarks.sample_head`. Never part of the tests."""
