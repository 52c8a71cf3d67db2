"""The functions of Fast-dLLM for LLaDA (github.com/NVlabs/Fast-dLLM, v1; Wu et al. 2025, arXiv 2505.22618)."""

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from unmask.adaptive import Confidence
from unmask.caching import Caching
from unmask.canvas import check_ids
from unmask.choose import Categorical
from unmask.dropin import patching, seeds
from unmask.dropin.llada import canvas_of, share_steps
from unmask.dropin.rule import score_of
from unmask.reveal import Blocks
from unmask.sampler import Sampler
from unmask.sources import Model, denoiser_of


@torch.no_grad()
def generate(
    model: Model,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    *,
    caching: Caching | None = None,
    seed: int | None = None,
) -> tuple[Tensor, int]:
    """Prompts int64 [B, P] with `gen_length` tokens after each, int64 [B, P + gen_length], and the network calls that
    the row which took most of them took.

    threshold: reveal every token with at least this probability, and at least the most probable one, until a block is
    complete; None: as many as `steps` ask for. caching: see `Caching`. All else as in `unmask.dropin.llada.generate`;
    the mask id is never drawn, which the published loop would not survive. Raises ValueError as there.
    """
    prompt = check_ids("prompt", prompt)
    _, block_steps = share_steps(steps, gen_length, block_length)
    denoiser = denoiser_of(model, mask_id, shift=False)
    canvas = canvas_of(prompt.to(denoiser.device), None, gen_length, mask_id)
    if canvas.masked[:, : prompt.shape[1]].any():
        raise ValueError(f"prompt must hold no mask ids, got {mask_id} in it; unmask.dropin.llada.generate fills them")
    counts = {"steps": block_steps} if threshold is None else {"threshold": threshold}
    sampler = Sampler(
        denoiser,
        reveal=Blocks(Confidence(**score_of(remasking), **counts), block_length),
        choose=Categorical(temperature),
        caching=caching,
        max_batch=len(prompt),
    )
    filled = canvas.sample(sampler, seeds.resolve(seed))
    return filled.tokens, max(len(set(row)) - 1 for row in filled.steps.tolist())


generate_with_prefix_cache = partial(generate, caching=Caching("prefix"))
generate_with_dual_cache = partial(generate, caching=Caching("dual"))

_FUNCTIONS = {
    "generate": generate,
    "generate_with_prefix_cache": generate_with_prefix_cache,
    "generate_with_dual_cache": generate_with_dual_cache,
}


def fits(obj: Any) -> bool:
    """Whether `obj` is the module with Fast-dLLM's functions for LLaDA."""
    return isinstance(obj, ModuleType) and patching.has(obj, *_FUNCTIONS, "get_num_transfer_tokens")


def patch(obj: Any, *, seed: int | None = None) -> None:
    """Serve the module's functions here. Names that were imported from it before are not reached."""
    patching.replace(obj, {name: partial(function, seed=seed) for name, function in _FUNCTIONS.items()})


unpatch = patching.restore
