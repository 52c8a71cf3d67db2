"""Dream's `diffusion_generate`, imported from the model code on its hub page and run as it is on our weights.

The code, generation_utils.py, lies beside the weights in Dream-org/Dream-v0-Base-7B and its kin, not in the project's
repository. It builds on transformers, which must be installed.
"""

import importlib
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.peers.checkout import Checkout, importable, quiet
from benchmarks.peers.run import Run
from benchmarks.workloads import Job
from unmask import Ancestral

CHECKOUT = Checkout(
    "dream",
    "the model code of the hub's Dream-org/Dream-v0-Base-7B (generation_utils.py)",
    ("generation_utils.py",),
    ("transformers",),
)
EPS = 1e-3  # where its time ends by default; the last step reveals what is left


def reveal(job: Job) -> Ancestral:
    """Ours on its grid."""
    num_steps = job.size.num_steps
    rates = (1 - (1 - EPS) * step / num_steps for step in range(num_steps))
    return Ancestral(num_steps, (*rates, 0.0))


def prepare(job: Job, checkout: Path) -> Run:
    """`alg="origin"` at temperature 1."""
    with quiet(), importable(checkout, ("generation_utils",), stand_ins=()):
        module = importlib.import_module("generation_utils")
    batch, length, num_steps, _ = job.size
    model = _model(module.DreamGenerationMixin, job)
    config = module.DreamGenerationConfig(
        alg="origin",
        steps=num_steps,
        eps=EPS,
        temperature=1.0,
        max_new_tokens=length,
        mask_token_id=job.network.mask_id,
        pad_token_id=-1,
        bos_token_id=-1,
        eos_token_id=-1,
    )
    prompt = torch.empty(batch, 0, dtype=torch.int64, device=job.device)

    def generate() -> Tensor:
        with quiet():
            return model.diffusion_generate(prompt, config, generation_logits_hook_func=model.in_place)

    return Run(generate, job.plain)


def _model(mixin: type, job: Job) -> object:
    class Model(mixin):
        """Our network as `diffusion_generate` calls it. There row i - 1 predicts position i, with ours row i does: a
        hook, which it has, puts the logits back in their place after it has shifted them."""

        device, config, generation_config = job.device, SimpleNamespace(), None

        def __call__(self, tokens: Tensor, attention_mask: str, positions: None) -> SimpleNamespace:
            self.logits = job.plain(tokens)
            return SimpleNamespace(logits=self.logits)

        def in_place(self, step: int, tokens: Tensor, shifted: Tensor) -> Tensor:
            return self.logits

    return Model()
