"""LLaDA's `generate` (github.com/ML-GSAI/LLaDA; Nie et al. 2025, arXiv 2502.09992), without its logits."""

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from unmask.canvas import Canvas, check_ids, valid_of
from unmask.denoiser import Denoiser
from unmask.dropin import patching, plain, seeds
from unmask.dropin.rule import Rule
from unmask.sources import Model, denoiser_of

EOS, EOT = 126081, 126348  # the ids that the published code has written out


@torch.no_grad()
def generate(
    model: Model,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    *,
    seed: int | None = None,
) -> Tensor:
    """Prompts int64 [B, P] with `gen_length` tokens after each, int64 [B, P + gen_length], on the model's device.

    At temperature 0 and with low_confidence these are the tokens of the published function, but for scores that differ
    by less than the rounding of the logits; otherwise they have its law.

    model: a live module (see `unmask.wrap`), a denoiser, or where one is stored. attention_mask: zeros on the left of a
    row are padding, which no network sees. steps: in all; each block of `block_length` tokens takes an equal share of
    them. remasking: "low_confidence" reveals the tokens with the highest probability, "random" any. logits_eos_inf:
    never draw id 126081. confidence_eos_eot_inf: reveal id 126348 last, and at temperature 0 id 126081 too, as
    published. seed: unsigned 64-bit; None draws it from torch's generator.

    Mask ids in the prompt take the slow path, with a `SlowPathWarning`.

    Raises ValueError where `gen_length` is no multiple of `block_length`, or `steps` none of the number of blocks.
    """
    prompt = check_ids("prompt", prompt)
    num_blocks, block_steps = share_steps(steps, gen_length, block_length)
    denoiser = denoiser_of(model, mask_id, shift=False)
    suppress = (EOS,) * logits_eos_inf
    doubted = (EOT, *(EOS,) * (temperature == 0)) * confidence_eos_eot_inf
    _check_known(denoiser, suppress + doubted)
    rule = Rule(temperature, remasking, suppress, doubted, cfg_scale)
    canvas = canvas_of(prompt.to(denoiser.device), attention_mask, gen_length, mask_id)
    if canvas.masked[:, : prompt.shape[1]].any():
        plain.warn("mask ids in the prompt")
        blocks = _plain_blocks(canvas, prompt.shape[1], num_blocks, block_length, block_steps)
        *_, tokens = plain.reveal_blocks(denoiser, canvas, blocks, rule, plain.generator_of(seed))
        return tokens
    sampler = rule.sampler(denoiser, block_length, len(prompt), steps=block_steps)
    return canvas.sample(sampler, seeds.resolve(seed)).tokens


def share_steps(steps: int, gen_length: int, block_length: int) -> tuple[int, int]:
    """How many blocks, and the steps of each."""
    for name, value in (("steps", steps), ("gen_length", gen_length), ("block_length", block_length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if gen_length % block_length:
        raise ValueError(f"gen_length must be a multiple of block_length = {block_length}, got {gen_length}")
    num_blocks = gen_length // block_length
    if steps % num_blocks:
        raise ValueError(f"steps must be a multiple of the {num_blocks} blocks of {block_length} tokens, got {steps}")
    return num_blocks, steps // num_blocks


def _check_known(denoiser: Denoiser, ids: tuple[int, ...]) -> None:
    vocab_size = denoiser.spec.vocab_size
    if any(id >= vocab_size for id in ids):
        raise ValueError(
            f"logits_eos_inf and confidence_eos_eot_inf must have a model with the ids {EOS} and {EOT} of LLaDA, "
            f"got one with {vocab_size} ids"
        )


def canvas_of(prompt: Tensor, attention_mask: Tensor | None, gen_length: int, mask_id: int) -> Canvas:
    """Prompts with `gen_length` mask ids after each."""
    fresh = prompt.new_full((len(prompt), gen_length), mask_id)
    valid = valid_of(attention_mask, prompt, left=True)
    return Canvas(
        torch.cat([prompt, fresh], 1), torch.cat([valid, torch.ones_like(fresh, dtype=torch.bool)], 1), mask_id
    )


def _plain_blocks(canvas: Canvas, start: int, num_blocks: int, length: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """As `plain.reveal_blocks` takes them: all that is masked before a block's end, and equal counts."""
    place = torch.arange(canvas.tokens.shape[1], device=canvas.tokens.device).expand_as(canvas.tokens)
    counts = torch.full((len(canvas.tokens), steps), length // steps)
    counts[:, : length % steps] += 1
    return [(place < start + (block + 1) * length, counts) for block in range(num_blocks)]


def fits(obj: Any) -> bool:
    """Whether `obj` is the module with LLaDA's `generate`."""
    return isinstance(obj, ModuleType) and patching.has(obj, "generate", "add_gumbel_noise", "get_num_transfer_tokens")


def patch(obj: Any, *, seed: int | None = None) -> None:
    """Serve the module's `generate` here. Names that were imported from it before are not reached."""
    patching.replace(obj, {"generate": partial(generate, seed=seed)})


unpatch = patching.restore
