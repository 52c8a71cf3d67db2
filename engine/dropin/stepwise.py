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

_PIECE = 4 << 20  # logits that exist at once
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
    """What is done in a step.

    law: float32 logits [R, V] of masked positions -> what the tokens weigh [R, V], 0 for the mask id.
    scores: the law need not sum to one, and what it sums to scales the chance of being revealed, as in SEDD's samplers.
    doubting: a trajectory's `remask` is shared out among the revealed positions of a sequence by softmax(-p), p the
        weight that a token had when it was drawn, as in ReMDM-conf; given tokens have no share.
    hook: called with the tokens int64 [B, L] before each step and before what follows the last, returns them.
    """

    denoiser: Denoiser
    law: Law
    arithmetic: Arithmetic
    scores: bool = False
    doubting: bool = False
    hook: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def sample(self, template: Tensor, trajectory: Trajectory, options: Options, *, last: str) -> Tensor:
        """Tokens int64 [B, L]; last: as for `absorbing.sample`."""
        run = _Run(self, template, options)
        for rate, reveal, remask in zip(trajectory.rates, trajectory.reveal, trajectory.remask, strict=False):
            run.call_hook()
            again = run.again(float(remask)) if remask > 0 else None  # of those that are revealed before the step
            run.reveal(float(rate), float(reveal))
            if again is not None:
                run.mask(again)
        if last != "leave":
            run.call_hook()
            run.finish(float(trajectory.rates[-1]), greedy=last == "argmax")
        return run.tokens


class _Run:
    """tokens: int64 [B, L]. doubts: float64 [B, L], -p of each revealed position, -inf of the others."""

    def __init__(self, path: Stepwise, template: Tensor, options: Options):
        self.path, self.max_batch, self.mask_id = path, options.max_batch, path.denoiser.spec.mask_id
        self.tokens = template.clone()
        self.doubts = torch.full(template.shape, -torch.inf, dtype=torch.float64, device=template.device)
        self.generator = torch.Generator(template.device).manual_seed(seeds.resolve(options.seed))
        size = self.max_batch * template.shape[1]
        self.workspace = Workspace([path.denoiser.buffers(size, size, self.max_batch)], path.denoiser.device)

    def call_hook(self) -> None:
        if self.path.hook is not None:
            self.tokens = self.path.hook(self.tokens)

    def again(self, chance: float) -> Tensor:
        """bool [B, L]: which of the revealed positions are masked again."""
        share = self.doubts.softmax(1).nan_to_num(0) if self.path.doubting else 1.0
        return (self.tokens != self.mask_id) & (self._uniform() < chance * share)

    def mask(self, chosen: Tensor) -> None:
        self.tokens[chosen], self.doubts[chosen] = self.mask_id, -torch.inf

    def reveal(self, rate: float, chance: float) -> None:
        arithmetic, chosen = self.path.arithmetic, self.tokens == self.mask_id
        if not arithmetic.competes:
            chosen &= self._uniform() < chance
        tokens = self.tokens.clone()
        for rows, law in self._laws(chosen, rate):
            weights = law
            if arithmetic.competes:
                weights = law.to(arithmetic.products) * chance
                weights[:, self.mask_id] = 1 - (weights.sum(-1) if self.path.scores else chance)
            drawn = arithmetic.draw(weights, self.generator)
            tokens.view(-1)[rows] = drawn
            doubts = -law.gather(1, drawn[:, None])[:, 0].double()
            self.doubts.view(-1)[rows] = doubts.where(drawn != self.mask_id, -torch.inf)
        self.tokens = tokens

    def finish(self, rate: float, *, greedy: bool) -> None:
        """Reveal everything."""
        for rows, law in self._laws(self.tokens == self.mask_id, rate):
            self.tokens.view(-1)[rows] = law.argmax(-1) if greedy else self.path.arithmetic.draw(law, self.generator)

    def _uniform(self) -> Tensor:
        options = {"device": self.tokens.device, "generator": self.generator}
        return torch.rand(self.tokens.shape, dtype=torch.float64, **options)

    def _laws(self, chosen: Tensor, rate: float) -> Iterator[tuple[Tensor, Tensor]]:
        """(flat indices of chosen positions, weights of their tokens), a piece at a time."""
        denoiser, length = self.path.denoiser, self.tokens.shape[1]
        sequences = chosen.any(1).nonzero().flatten()
        for some in sequences.split(self.max_batch) if len(sequences) else ():
            wanted = chosen[some]
            batch = Batch(
                self.tokens[some].flatten(),
                (length,) * len(some),
                wanted.flatten().nonzero().flatten(),
                tuple(wanted.sum(1).tolist()),
                torch.full((len(some),), rate, device=chosen.device),
            )
            flat = some[batch.rows // length] * length + batch.rows % length
            for part, hidden in denoiser.chunks(batch, self.workspace):
                head = Logits(hidden, denoiser.head.weight, denoiser.head.bias)
                for rows in torch.arange(len(hidden)).split(max(1, _PIECE // head.vocab_size)):
                    piece = slice(int(rows[0]), int(rows[-1]) + 1)
                    yield flat[part][piece], self.path.law(head.compute(piece, torch.float32))


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
