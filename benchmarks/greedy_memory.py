"""The memory of a greedy step beyond its weights, in a process of its own: see `benchmarks.memory.in_a_process`."""

import importlib
import json
import sys
from pathlib import Path

import torch

from benchmarks.memory import peak
from benchmarks.peers.checkout import importable, quiet
from benchmarks.peers.plain_llama import PlainLlama
from unmask.dropin import llada
from unmask.models.llama import Shape


def _answer(batch: int, length: int, vocab_size: int, threads: int, checkout: str | None = None) -> int:
    """Of one step of one block: 32 candidates in each sequence, the rest of which is given."""
    torch.set_num_threads(threads)
    module = PlainLlama(Shape(vocab_size, 128, 2, 256, num_heads=2, num_kv_heads=2, head_dim=64, tied=True), length)
    options = {"steps": 1, "gen_length": 32, "block_length": 32, "temperature": 0.5, "mask_id": vocab_size - 1}
    generate = llada.generate
    if checkout is not None:
        with quiet(), importable(Path(checkout), ("generate",)):
            generate = importlib.import_module("generate").generate

    def run(batch: int, length: int) -> None:
        generate(module, torch.zeros(batch, length - 32, dtype=torch.int64), **options)

    run(1, 48)  # loads code, starts threads
    return peak(lambda: run(batch, length))


if __name__ == "__main__":
    print(_answer(**json.loads(sys.argv[1])))
