"""The slow path: published loops as they stand, on logits that are stored whole. It serves what the fast path cannot.

Its random numbers are torch's, as the published ones are.
"""

import math
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from unmask.canvas import Canvas
from unmask.denoiser import Batch, Denoiser
from unmask.dropin.patching import SlowPathWarning
from unmask.dropin.rule import Rule
from unmask.kernels.logits import Logits
from unmask.workspace import Workspace


def warn(reason: str) -> None:
    """The one warning of a call that takes the slow path, shown where the drop-in function was called."""
    warnings.warn(f"{reason}; the slow path serves this call and stores all logits", SlowPathWarning, stacklevel=4)


def generator_of(seed: int | None) -> torch.Generator | None:
    """A CPU generator, so that a seed gives the same numbers everywhere; None, which is torch's own, without a seed."""
    return None if seed is None else torch.Generator().manual_seed(seed)


def uniform(like: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Random numbers from [0, 1) of a tensor's shape and on its device."""
    device = like.device if generator is None else generator.device
    return torch.rand(like.shape, dtype=dtype, device=device, generator=generator).to(like.device)


@torch.no_grad()
def whole_logits(denoiser: Denoiser, canvas: Canvas) -> Tensor:
    """float32 [B, T, V], 0 on padding."""
    lengths = tuple(canvas.valid.sum(1).tolist())
    tokens, places = canvas.tokens[canvas.valid], canvas.valid.flatten().nonzero().flatten()
    rate = canvas.masked.sum(1) / canvas.valid.sum(1)
    batch = Batch(tokens, lengths, torch.arange(len(tokens), device=tokens.device), lengths, rate.float())
    workspace = Workspace([denoiser.buffers(len(tokens), len(tokens), len(lengths))], denoiser.device)
    logits = torch.zeros(canvas.valid.numel(), denoiser.spec.vocab_size, device=tokens.device)
    for rows, hidden in denoiser.chunks(batch, workspace):
        source = Logits(hidden, denoiser.head.weight, denoiser.head.bias)
        logits[places[rows]] = source.compute(slice(None), torch.float32)
    return logits.view(*canvas.valid.shape, -1)


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """An id [...] from softmax(logits / temperature), the likeliest at temperature 0; by Gumbel-max in fp64."""
    if temperature == 0:
        return logits.argmax(-1)
    noise = uniform(logits, torch.float64, generator)
    return (logits.double() - temperature * torch.log(-torch.log(noise))).argmax(-1)


def reveal_blocks(
    denoiser: Denoiser,
    canvas: Canvas,
    blocks: Iterable[tuple[Tensor, Tensor]],
    rule: Rule,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Tokens int64 [B, T] after each step of LLaDA's loop: Nie et al. 2025, arXiv 2502.09992.

    blocks: pairs of bool [B, T], where positions may be revealed, and int64 [B, S], how many of each row are in each
    step. A position that draws the mask id counts as revealed and stays masked.
    """
    rule.check(denoiser.spec.vocab_size)
    x, mask_id = canvas.tokens.clone(), canvas.mask_id
    given = canvas.valid & (x != mask_id) & ~torch.isin(x, torch.tensor(rule.kept, dtype=x.dtype, device=x.device))
    for window, counts in blocks:
        for count in counts.T.tolist():
            if not any(count):
                continue
            logits = _guided(denoiser, Canvas(x, canvas.valid, mask_id), given, rule.guidance)
            logits[..., list(rule.suppress)] = -math.inf
            drawn = draw(logits, rule.temperature, generator)
            confidence = _confidence(logits, drawn, rule, generator)
            masked = canvas.valid & (x == mask_id)
            confidence = confidence.where(masked & window, -math.inf)
            drawn = drawn.where(masked, x)
            for row, number in enumerate(count):
                chosen = confidence[row].topk(number).indices
                x[row, chosen] = drawn[row, chosen]
            yield x.clone()


def _guided(denoiser: Denoiser, canvas: Canvas, given: Tensor, scale: float) -> Tensor:
    logits = whole_logits(denoiser, canvas)
    if scale <= 0:
        return logits
    tokens = canvas.tokens.masked_fill(given, canvas.mask_id)
    unconditional = whole_logits(denoiser, Canvas(tokens, canvas.valid, canvas.mask_id))
    return unconditional + (scale + 1) * (logits - unconditional)


def _confidence(logits: Tensor, drawn: Tensor, rule: Rule, generator: torch.Generator | None) -> Tensor:
    if rule.remasking == "random":
        return uniform(drawn, torch.float32, generator)
    logits[..., list(rule.doubted)] = -math.inf
    return logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]
