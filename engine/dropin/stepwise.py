"""The slow path: one step after another for the whole batch, laws computed as published or exactly, in plain torch.

It serves hooks that may change any token between steps, and the arithmetic of the published samplers, which their
drop-ins leave out unless it is asked for. Logits exist for a piece of the rows at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.denoiser import Batch, Denoiser
from unmask.dropin import seeds
from unmask.dropin.absorbing import Options, Trajectory
from unmask.kernels.logits import Logits
from unmask.workspace import Workspace

_PIECE = 16 << 20  # logits that exist at once
_NEVER = -1e6  # what the published code adds to the mask id's logit

Law = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Arithmetic:
    """How laws are computed and tokens drawn: by default exactly, up to the rounding of fp64.

    log_probs, products, uniforms: dtypes of log p(x0 | xt) and its exponential, of p times a step's chance, and of the
    noise. bias: what the published code adds to uniforms and exponentials to keep them from 0.
    competes: the mask id takes part in the draw with the weight of staying masked; else it is drawn first which
    positions are revealed, and the network runs for those.
    """

    log_probs: torch.dtype = torch.float64
    products: torch.dtype = torch.float64
    uniforms: torch.dtype = torch.float64
    bias: float = 0.0
    competes: bool = False

    def exponential(self, uniform: Tensor) -> Tensor:
        """What weights are divided by in their race. From fp32 uniforms none is below 6e-8, so that a token which is
        about as rare as that against the mask id almost never wins (Zheng et al. 2024, arXiv 2409.02908)."""
        return self.bias - (uniform + self.bias).log()

    def draw(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """int64 [R] by weights [R, V]."""
        uniform = torch.rand(weights.shape, dtype=self.uniforms, device=weights.device, generator=generator)
        return (weights / self.exponential(uniform)).argmax(-1)


@dataclass(frozen=True, eq=False)
class Stepwise:
    """A run of the slow path.

    law: float32 logits [R, V] of masked positions -> what the tokens weigh [R, V], 0 for the mask id.
    scores: the law need not sum to one, and what it sums to scales the chance of being revealed, as in SEDD's samplers.
    hook: called with the tokens int64 [B, L] before each step and before what follows the last, returns them.
    """

    denoiser: Denoiser
    law: Law
    arithmetic: Arithmetic
    scores: bool = False
    hook: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def sample(self, template: Tensor, trajectory: Trajectory, options: Options, *, last: str) -> Tensor:
        """Tokens int64 [B, L]; last: see `absorbing.LAST`."""
        generator = torch.Generator(template.device).manual_seed(seeds.resolve(options.seed))
        tokens = template.clone()
        for rate, reveal, remask in zip(trajectory.rates, trajectory.reveal, trajectory.remask, strict=False):
            before = self._hooked(tokens)
            tokens = self._revealed(before, float(rate), float(reveal), options.max_batch, generator)
            if remask > 0:
                again = (
                    torch.rand(before.shape, dtype=torch.float64, device=before.device, generator=generator) < remask
                )
                tokens[again & (before != self.mask_id)] = self.mask_id
        if last == "leave":
            return tokens
        tokens, rate = self._hooked(tokens), float(trajectory.rates[-1])
        for rows, weights in self._laws(tokens, tokens == self.mask_id, rate, options.max_batch):
            drawn = weights.argmax(-1) if last == "argmax" else self.arithmetic.draw(weights, generator)
            tokens.view(-1)[rows] = drawn
        return tokens

    @property
    def mask_id(self) -> int:
        return self.denoiser.spec.mask_id

    def _hooked(self, tokens: Tensor) -> Tensor:
        return tokens if self.hook is None else self.hook(tokens)

    def _revealed(
        self, tokens: Tensor, rate: float, reveal: float, max_batch: int, generator: torch.Generator
    ) -> Tensor:
        chosen, after = tokens == self.mask_id, tokens.clone()
        if not self.arithmetic.competes:
            chosen &= _uniform(tokens, generator) < reveal
        for rows, law in self._laws(tokens, chosen, rate, max_batch):
            weights = law
            if self.arithmetic.competes:
                weights = law.to(self.arithmetic.products) * reveal
                weights[:, self.mask_id] = 1 - (weights.sum(-1) if self.scores else reveal)
            after.view(-1)[rows] = self.arithmetic.draw(weights, generator)
        return after

    def _laws(self, tokens: Tensor, chosen: Tensor, rate: float, max_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(flat indices of chosen positions, weights of their tokens), a piece at a time."""
        sequences, length = chosen.any(1).nonzero().flatten(), tokens.shape[1]
        size = max_batch * length
        workspace = Workspace([self.denoiser.buffers(size, size, max_batch)], self.denoiser.device)
        for some in sequences.split(max_batch) if len(sequences) else ():
            local, wanted = tokens[some], chosen[some]
            batch = Batch(
                local.flatten(),
                (length,) * len(some),
                wanted.flatten().nonzero().flatten(),
                tuple(wanted.sum(1).tolist()),
                torch.full((len(some),), rate, device=tokens.device),
            )
            flat = some[batch.rows // length] * length + batch.rows % length
            for part, hidden in self.denoiser.chunks(batch, workspace):
                head = Logits(hidden, self.denoiser.head.weight, self.denoiser.head.bias)
                for piece in torch.arange(len(hidden)).split(max(1, _PIECE // head.vocab_size)):
                    rows = slice(int(piece[0]), int(piece[-1]) + 1)
                    yield flat[part][rows], self.law(head.compute(rows, torch.float32))


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, dtype=torch.float64, device=like.device, generator=generator)


def probabilities(mask_id: int, arithmetic: Arithmetic) -> Law:
    """softmax without the mask id, computed as published in the dtype of `arithmetic.log_probs`."""

    def law(logits: Tensor) -> Tensor:
        logits = logits.to(arithmetic.log_probs)
        logits[:, mask_id] += _NEVER
        return (logits - logits.logsumexp(-1, keepdim=True)).exp()

    return law


def nucleus(law: Law, top_p: float, *, crossing: bool = True) -> Law:
    """`law` at its likeliest tokens alone, normalised: those whose mass together does not exceed `top_p`, and with
    `crossing` the one that makes it do so; the likeliest in any case."""
    if not top_p < 1:
        return law

    def kept(logits: Tensor) -> Tensor:
        ordered, ids = law(logits).sort(descending=True)
        mass = ordered.cumsum(-1) - (ordered if crossing else 0)
        beyond = mass > top_p
        beyond[:, 0] = False
        ordered = ordered.masked_fill(beyond, 0)
        return torch.zeros_like(ordered).scatter(-1, ids, ordered / ordered.sum(-1, keepdim=True))

    return kept
