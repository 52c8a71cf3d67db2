"""What the peers of this folder share: trajectories from all masked to none, and how one is run here."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unmask.choose import Categorical
from unmask.denoiser import Denoiser
from unmask.dropin import seeds
from unmask.prompt import check_count
from unmask.reveal import Ancestral, Reveal, RevealPlan
from unmask.sampler import Sampler


@dataclass(frozen=True)
class Options:
    """The options of every drop-in.

    seed: of all draws, unsigned 64-bit; None draws one from torch's generator at each call, so that
        `torch.manual_seed` governs.
    compat: None, or the peer's name for its published arithmetic, see docs/dropin.md.
    dtype: of the network's products; None as published, bf16 on a GPU and fp32 elsewhere.
    max_batch: sequences of one network call.
    """

    peer: str
    seed: int | None = None
    compat: str | None = None
    dtype: torch.dtype | None = None
    max_batch: int = 16

    def __post_init__(self) -> None:
        if self.seed is not None:
            seeds.resolve(self.seed)
        if self.compat not in (None, self.peer):
            raise ValueError(f"compat must be None or {self.peer!r}, got {self.compat!r}")
        if self.dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be None, torch.float32 or torch.bfloat16, got {self.dtype}")
        check_count("max_batch", self.max_batch)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """N steps, in each of which masked positions are revealed independently, and revealed ones masked again.

    rates: float64 [N + 1], the share of masked positions that the network is told at the start of each step and after
    the last. reveal: float64 [N], the chance of a masked position. remask: float64 [N], that of a revealed one.
    policy: has the same law, and reveals in step N what is masked after the last; None where none of ours has.
    """

    rates: np.ndarray
    reveal: np.ndarray
    remask: np.ndarray
    policy: Reveal | None

    @classmethod
    def ancestral(cls, rates: np.ndarray) -> "Trajectory":
        """Rates that fall strictly from 1 decide the chances, and nothing is masked again."""
        policy = Ancestral(len(rates) - 1, tuple(rates.tolist()))
        return cls(rates, 1 - rates[1:] / rates[:-1], np.zeros(len(rates) - 1), policy)

    @property
    def num_steps(self) -> int:
        return len(self.reveal)


@dataclass(frozen=True)
class AtOnce:
    """All positions in one step, in which the network is told this mask rate."""

    mask_rate: float

    def num_steps(self, num_masked: int) -> int:
        return 1

    def plan(self, times: np.ndarray, positions: np.ndarray) -> RevealPlan:
        return RevealPlan(np.zeros(times.shape, np.int32), np.full(times.shape, self.mask_rate))


def linear_times(num_steps: int, eps: float) -> Tensor:
    """float64 [N + 1], evenly from 1 to eps."""
    check_count("num_steps", num_steps)
    if not 0 <= eps < 1:
        raise ValueError(f"eps must satisfy 0 <= eps < 1, got {eps}")
    return torch.linspace(1, eps, num_steps + 1, dtype=torch.float64)


def sample(
    denoiser: Denoiser,
    template: Tensor,
    trajectory: Trajectory,
    options: Options,
    *,
    last: str = "draw",
    choose: Categorical | None = None,
) -> Tensor:
    """Tokens int64 [B, L]: `template` with its masked positions sampled, each sequence in its own network calls.

    trajectory: one with a policy. last: what becomes of positions that are masked after its steps: "draw" draws them
    from the law, "argmax" takes the likeliest tokens, "leave" leaves the mask id.
    """
    seed = seeds.resolve(options.seed)

    def sampler(reveal: Reveal, choose: Categorical | None) -> Sampler:
        return Sampler(denoiser, reveal=reveal, choose=choose, max_batch=options.max_batch)

    tokens, steps = _fill(sampler(trajectory.policy, choose), template, seed)
    if last == "draw":
        return tokens
    tokens = tokens.where(steps < trajectory.num_steps, denoiser.spec.mask_id)
    if last == "leave":
        return tokens
    return _fill(sampler(AtOnce(float(trajectory.rates[-1])), Categorical(temperature=0)), tokens, seed)[0]


def _fill(sampler: Sampler, template: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(tokens, the step that revealed each, -1 where it was given), both int64 [B, L]."""
    tokens, steps = template.clone(), torch.full_like(template, -1)
    masked = template == sampler.mask_id
    rows, length = masked.any(1).nonzero().flatten(), template.shape[1]
    if len(rows):
        prompt = None if masked.all() else template[rows].cpu().numpy()
        samples = sampler.sample(len(rows), length, seed=seed, prompt=prompt)
        tokens[rows], steps[rows] = samples.tokens.to(tokens), samples.reveal_step.to(steps)
    return tokens, steps


def check_tokens(name: str, got: object, shape: tuple[int, ...], vocab_size: int) -> Tensor:
    """Token ids that a user's hook has returned, as int64."""
    if not isinstance(got, Tensor) or got.shape != shape or got.is_floating_point() or got.dtype is torch.bool:
        words = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(f"{name} must return token ids {list(shape)}, got {words}")
    if got.numel() and not 0 <= int(got.min()) <= int(got.max()) < vocab_size:
        raise ValueError(f"{name} must return ids from 0 to {vocab_size - 1}, got {int(got.min())} to {int(got.max())}")
    return got.long()
