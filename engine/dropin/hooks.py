"""Dream's loop with a user's hooks, which read and change tokens and logits between its steps."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.canvas import Canvas
from unmask.denoiser import Denoiser
from unmask.dropin.plain import draw, uniform, whole_logits

Hook = Callable[[int | None, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Hooks:
    """`generation_tokens_hook_func(step, x, logits) -> x` and `generation_logits_hook_func(step, x, logits) -> logits`.

    The first is also called before the first step, with step and logits None.
    """

    tokens: Hook | None = None
    logits: Hook | None = None

    def on_tokens(self, step: int | None, x: Tensor, logits: Tensor | None) -> Tensor:
        if self.tokens is None:
            return x
        return _checked("generation_tokens_hook_func", self.tokens(step, x, logits), x, "token ids")

    def on_logits(self, step: int, x: Tensor, logits: Tensor) -> Tensor:
        if self.logits is None:
            return logits
        return _checked("generation_logits_hook_func", self.logits(step, x, logits), logits, "logits")


def _checked(name: str, got: object, like: Tensor, what: str) -> Tensor:
    if isinstance(got, Tensor) and got.shape == like.shape and got.is_floating_point() == like.is_floating_point():
        return got.to(like)
    words = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
    raise ValueError(f"{name} must return {what} of shape {list(like.shape)}, got {words}")


@dataclass(frozen=True)
class Steps:
    """The published options of Dream's loop."""

    steps: int
    eps: float
    alg: str
    alg_temp: float | None
    temperature: float
    top_p: float | None
    top_k: int | None

    @property
    def times(self) -> Tensor:
        """float32 [steps + 1], falling from 1 to eps."""
        return torch.linspace(1, self.eps, self.steps + 1)

    def chance(self, step: int) -> float | Tensor:
        """The share of masked positions that a step reveals."""
        times = self.times
        return 1 - times[step + 1] / times[step] if step < self.steps - 1 else 1.0


def dream_loop(
    denoiser: Denoiser, canvas: Canvas, options: Steps, hooks: Hooks, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Tokens int64 [B, T] after each step; Ye et al. 2025, arXiv 2508.15487. How many are revealed is counted by row.

    With `alg="origin"` masked positions are revealed independently of each other, otherwise the most confident ones.
    The mask id takes part in the law: a position that draws it stays masked.
    """
    x = hooks.on_tokens(None, canvas.tokens.clone(), None)
    for step in range(options.steps):
        now = Canvas(x, canvas.valid, canvas.mask_id)
        logits = hooks.on_logits(step, x, whole_logits(denoiser, now))
        law = _truncated(logits, options)
        drawn = draw(law, 1.0 if options.temperature else 0.0, generator)
        chance = options.chance(step)
        if options.alg == "origin":
            chosen = now.masked & (uniform(x, torch.float32, generator) < chance)
        else:
            counts = (now.masked.sum(1).float().cpu() * chance).long()
            chosen = _most(_confidence(law.softmax(-1), drawn, options.alg), now.masked, counts, options, generator)
        x = hooks.on_tokens(step, drawn.where(chosen, x), logits)
        yield x.clone()


def _truncated(logits: Tensor, options: Steps) -> Tensor:
    """Logits of the law that is drawn from: of the temperature, then of the nucleus, then of the likeliest k."""
    logits = logits / (options.temperature or 1)
    if options.top_p is not None and options.top_p < 1:
        ordered, ids = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[..., 0] = 0
        beyond = (before > options.top_p).scatter(-1, ids, before > options.top_p)
        logits = logits.masked_fill(beyond, -math.inf)
    if options.top_k is not None:
        least = logits.topk(min(options.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


def _confidence(law: Tensor, drawn: Tensor, alg: str) -> Tensor:
    if alg == "entropy":
        return law.xlogy(law).sum(-1)
    if alg == "topk_margin":
        first, second = law.topk(2).values.unbind(-1)
        return first - second
    return law.gather(-1, drawn[..., None])[..., 0]


def _most(
    confidence: Tensor, masked: Tensor, counts: Tensor, options: Steps, generator: torch.Generator | None
) -> Tensor:
    """bool [B, T]: the most confident of each row, or as many drawn by confidence where `alg_temp` says so."""
    chosen = torch.zeros_like(masked)
    for row, number in enumerate(counts.tolist()):
        scores = confidence[row].where(masked[row], -math.inf)
        if number and options.alg_temp:
            law = (scores / options.alg_temp).softmax(-1)
            law = law if generator is None else law.to(generator.device)
            chosen[row, torch.multinomial(law, number, generator=generator)] = True
        elif number:
            chosen[row, scores.topk(number).indices] = True
    return chosen
