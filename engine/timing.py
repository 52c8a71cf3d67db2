"""Timing on a machine that others may use too: short repeats, taken in turns."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def in_turns(
    runs: Mapping[Name, Callable[[], object]],
    *,
    seconds: float,
    device: torch.device | str = "cpu",
    min_rounds: int = 5,
    max_rounds: int = 40,
) -> dict[Name, list[float]]:
    """Seconds of repeated runs, ascending. They take turns, so that a busy moment of the machine meets all of them.

    A first turn warms up and sorts them by what they take: so each runs after one of its size, as in a network, and not
    with the caches full of a larger one's memory. Then each runs `max_rounds` times, or fewer once it has taken its
    share of `seconds`, but `min_rounds`. A GPU is waited for after each run, so a run of few operations shows what it
    takes to launch them.
    """
    on_gpu = torch.device(device).type == "cuda"

    def clock(run: Callable[[], object]) -> float:
        begin = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    share = seconds / len(runs)
    first = {name: clock(run) for name, run in runs.items()}
    taken = {name: [] for name in sorted(runs, key=first.get)}
    for turn in range(max_rounds):
        for name, each in taken.items():
            if turn < min_rounds or sum(each) < share:
                each.append(clock(runs[name]))
    return {name: sorted(each) for name, each in taken.items()}
