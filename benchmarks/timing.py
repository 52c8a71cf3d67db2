"""One timer for every benchmark: interleaved variants, medians and their spread, cold and warm cache, graph replays."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Run = Callable[[], object]
Clock = Callable[[Run], float]  # seconds of one run

_GRAPH_WARMUPS = 3
_HEAD_START = 1_000_000  # cycles for which the GPU sleeps, about half a millisecond


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: the median and the 20th and 80th percentile of `rounds` runs."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        if min(seconds) <= 0:
            raise ValueError(f"seconds must be positive, got {min(seconds)}: the clock is too coarse for this run")
        p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 4
        return cls(statistics.median(seconds), p20, p80, len(seconds))


@dataclass(frozen=True)
class Effort:
    """How often to run: `max_rounds`, or fewer once the variants have taken `seconds` each, but `min_rounds`."""

    warmups: int = 2
    min_rounds: int = 5
    max_rounds: int = 50
    seconds: float = 0.5


def interleave(
    variants: Mapping[str, Run], clock: Clock, effort: Effort, before: Callable[[str], object] = lambda name: None
) -> dict[str, Timing]:
    """The timing of every variant, run as `take_turns` does."""
    return {name: Timing.of(seconds) for name, seconds in take_turns(variants, clock, effort, before).items()}


def take_turns(
    variants: Mapping[str, Run], clock: Clock, effort: Effort, before: Callable[[str], object] = lambda name: None
) -> dict[str, list[float]]:
    """Time every variant once a round, the order rotated by one from round to round; before(name) runs unclocked.

    So a machine that becomes busy or slow slows all of them, and none always begins or ends a round. Seconds by round.
    """
    names, seconds = list(variants), {name: [] for name in variants}
    for name in names * effort.warmups:
        variants[name]()
    for turn in range(effort.max_rounds if names else 0):
        if turn >= effort.min_rounds and sum(map(sum, seconds.values())) >= effort.seconds * len(names):
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            before(name)
            seconds[name].append(clock(variants[name]))
    return seconds


def host_clock(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def device_clock(run: Run) -> float:
    """CUDA events around one run.

    The GPU sleeps first so that the host has queued the run, or a good part of it, when it begins: what is timed is the
    device's work and not the launching of it.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def clock(device: torch.device) -> Clock:
    return device_clock if device.type == "cuda" else host_clock


class Flush:
    """Evicts the last-level cache by reading a buffer four times its size.

    It reads and does not write: written lines would have to go back to memory while the next run is timed.
    """

    def __init__(self, device: torch.device):
        self.buffer = torch.randn(4 * cache_bytes(device) // 4, device=device)

    def __call__(self) -> None:
        self.buffer.sum()


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; where the system does not tell, more than most have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes if size[-1] in "KM"), default=64 << 20)


def capture(run: Run) -> Run:
    """The replay of a CUDA graph of `run`; RuntimeError if it waits for the device or cannot be captured.

    The waiting is looked for before: a capture that fails can leave torch's generator unusable.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            for _ in range(_GRAPH_WARMUPS):
                run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
