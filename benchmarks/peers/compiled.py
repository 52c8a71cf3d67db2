"""The straightforward ancestral sampler, ours, under torch.compile: all logits, Gumbel noise, argmax, where."""

import os
import shutil
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.peers.run import Run
from benchmarks.workloads import Job


def refuses(job: Job) -> str | None:
    """Why nothing can be compiled here, or None."""
    if job.device.type == "cuda":
        return None if find_spec("triton") else "triton is not installed (pip install triton)"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, and {compiler} is not on the PATH"


def prepare(job: Job) -> Run:
    """One compiled function a step, no graph break in it; on a GPU it is replayed as a CUDA graph."""
    network, mask_id, (batch, length, num_steps, _) = job.plain, job.network.mask_id, job.size

    def step(tokens: Tensor, chance: Tensor) -> Tensor:
        logits = network(tokens).float()
        gumbel = -(-torch.rand_like(logits).log()).log()
        drawn = (logits + gumbel).argmax(-1)
        revealed = (tokens == mask_id) & (torch.rand(tokens.shape, device=tokens.device) < chance)
        return torch.where(revealed, drawn, tokens)

    mode = "reduce-overhead" if job.device.type == "cuda" else "default"
    compiled = torch.compile(step, fullgraph=True, dynamic=False, mode=mode)
    chances = 1 / torch.arange(num_steps, 0, -1, device=job.device)  # of a masked position, the last one 1

    @torch.no_grad()
    def generate() -> Tensor:
        tokens = torch.full((batch, length), mask_id, device=job.device)
        for chance in chances:
            tokens = compiled(tokens, chance).clone()  # a replay writes where the one before did
        return tokens

    return Run(generate, num_steps)
