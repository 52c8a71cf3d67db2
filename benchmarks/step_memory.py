"""The memory of one step beyond its weights, in a process of its own: see `benchmarks.memory.in_a_process`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.memory import peak
from benchmarks.network import NETWORKS, denoiser, half_masked, random_tensors
from benchmarks.peers.mdlm import Published
from benchmarks.ticks import tick_seconds
from unmask import Ancestral, Sampler

_CPU = torch.device("cpu")
_SMALL = 16  # tokens: loads code, starts threads


def _ours(name: str, dtype: str, num_steps: int) -> Callable[[int, int], object]:
    network = NETWORKS[name]
    model = denoiser(network, random_tensors(network, _CPU), getattr(torch, dtype), _CPU)

    def run(batch: int, length: int) -> None:
        tick_seconds(Sampler(model, reveal=Ancestral(num_steps), max_batch=batch), batch, length, 2)

    return run


def _published(name: str, dtype: str, num_steps: int, checkout: str) -> Callable[[int, int], object]:
    network = NETWORKS[name]
    published = Published(Path(checkout), network, random_tensors(network, _CPU), _CPU)

    def run(batch: int, length: int) -> None:
        published.step(half_masked(network, batch, _CPU)[:, :length], num_steps, dtype == "bfloat16")

    return run


def _answer(network: str, dtype: str, num_steps: int, batch: int, threads: int, checkout: str | None) -> int:
    torch.set_num_threads(threads)
    run = _published(network, dtype, num_steps, checkout) if checkout else _ours(network, dtype, num_steps)
    run(1, _SMALL)
    return peak(lambda: run(batch, NETWORKS[network].length))


if __name__ == "__main__":
    print(_answer(**json.loads(sys.argv[1])))
