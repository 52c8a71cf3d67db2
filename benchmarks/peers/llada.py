"""LLaDA's `generate`, github.com/ML-GSAI/LLaDA, imported from a checkout and run as it is on our weights."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.peers.checkout import Checkout, importable, quiet
from benchmarks.peers.run import Run
from benchmarks.workloads import Job

CHECKOUT = Checkout("llada", "a checkout of github.com/ML-GSAI/LLaDA", ("generate.py",))


class Model(nn.Module):
    """Our network as `generate` calls it."""

    def __init__(self, network: nn.Module, device: torch.device):
        super().__init__()
        self.network, self.device = network, device

    def forward(self, tokens: Tensor, attention_mask: None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.network(tokens))


def refuses(job: Job) -> str | None:
    """Why it does not serve the job, or None: with a remainder its first steps reveal one more each, ours do not."""
    _, length, num_steps, _ = job.size
    if length % num_steps:
        return f"its steps must divide the length for a law of ours, got {num_steps} steps and {length} tokens"
    return None


def prepare(job: Job, checkout: Path) -> Run:
    """One block, temperature 1, positions at random."""
    with quiet(), importable(checkout, ("generate",)):
        module = importlib.import_module("generate")
    batch, length, num_steps, _ = job.size
    model, prompt = Model(job.plain, job.device), torch.empty(batch, 0, dtype=torch.int64, device=job.device)

    def generate() -> Tensor:
        return module.generate(
            model,
            prompt,
            steps=num_steps,
            gen_length=length,
            block_length=length,
            temperature=1.0,
            remasking="random",
            mask_id=job.network.mask_id,
        )

    return Run(generate, job.plain)
