"""The benchmarks' timer: turns, statistics, what is not timed."""

import pytest
import torch

from benchmarks.cases.inputs import head_weight
from benchmarks.ceilings import readers
from benchmarks.timing import Effort, Flush, Timing, cache_bytes, interleave

CPU = torch.device("cpu")


class FakeClock:
    """Every run takes the seconds it returns, plus a drift that grows with each measurement."""

    def __init__(self, drift=0.0):
        self.now, self.drift = 0, drift

    def __call__(self, run):
        self.now += 1
        return run() + self.drift * self.now


def test_median_and_percentiles():
    timing = Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.median, timing.p20, timing.p80, timing.rounds) == (3.5, 2.0, 5.0, 6)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        Timing.of([1.0, 0.0])


def test_variants_take_turns_and_the_order_rotates():
    order = []
    variants = {name: lambda name=name: order.append(name) or 1.0 for name in "ABC"}
    interleave(variants, FakeClock(), Effort(warmups=1, min_rounds=1, max_rounds=4, seconds=1e9))
    assert "".join(order) == "ABC" + "ABC" + "BCA" + "CAB" + "ABC"


def test_a_machine_that_slows_down_slows_all_variants():
    found = interleave({name: lambda: 1.0 for name in "ABC"}, FakeClock(drift=1.0), Effort(max_rounds=30, seconds=1e9))
    medians = [timing.median for timing in found.values()]
    assert max(medians) - min(medians) <= 1.0 < max(medians) / 10  # one after the other they would differ by 30


def test_rounds_end_when_the_time_is_spent_but_not_before_the_least():
    effort = Effort(min_rounds=3, max_rounds=10, seconds=4.0)
    assert interleave({"A": lambda: 1.0}, FakeClock(), effort)["A"].rounds == 4
    assert interleave({"A": lambda: 9.0}, FakeClock(), effort)["A"].rounds == 3
    assert interleave({"A": lambda: 0.1}, FakeClock(), effort)["A"].rounds == 10
    assert interleave({}, FakeClock(), effort) == {}


def test_what_comes_before_a_run_is_not_timed():
    seen = []
    interleave({"A": lambda: seen.append("run") or 1.0}, FakeClock(), Effort(0, 1, 1), before=seen.append)
    assert seen == ["A", "run"]


def test_the_flush_is_larger_than_the_cache_and_holds_no_zeros():
    flush = Flush(CPU)
    assert (
        flush.buffer.nbytes >= 2 * cache_bytes(CPU) > 0 and flush.buffer.count_nonzero() > 0.99 * flush.buffer.numel()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_readers_run_over_weights(dtype):
    for read in readers(head_weight(24, 700, dtype, CPU)).values():
        read()
