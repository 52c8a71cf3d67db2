"""Rows of token ids with padding, as published functions take and return them, and packed ones, as samplers do."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.sampler import Sampler
from unmask.samples import Stats


@dataclass(frozen=True, eq=False)
class Canvas:
    """B rows of T positions, some of them padding.

    tokens: int64 [B, T], the mask id wherever a token is to be sampled. valid: bool [B, T], False on padding: no
    network sees it, and only valid positions count.
    """

    tokens: Tensor
    valid: Tensor
    mask_id: int

    @property
    def masked(self) -> Tensor:
        """bool [B, T]"""
        return self.valid & (self.tokens == self.mask_id)

    def repeat(self, times: int) -> "Canvas":
        """Each row so many times, next to each other."""
        return Canvas(self.tokens.repeat_interleave(times, 0), self.valid.repeat_interleave(times, 0), self.mask_id)

    def sample(self, sampler: Sampler, seed: int) -> "Filled":
        """Every masked position sampled. Row i is sample i of the run, counted among the rows that hold mask ids."""
        tokens, steps = self.tokens.clone(), torch.full_like(self.tokens, -1)
        logprobs, stats = torch.zeros_like(self.tokens, dtype=torch.float32), None
        rows = self.masked.any(1).nonzero().flatten().tolist()
        if rows:
            templates = [self.tokens[row][self.valid[row]].cpu().numpy() for row in rows]
            samples = sampler.sample(len(rows), list(map(len, templates)), seed=seed, prompt=templates)
            stats = samples.stats
            for row, sample in zip(rows, samples, strict=True):
                tokens[row, self.valid[row]] = sample.tokens.to(tokens)
                steps[row, self.valid[row]] = sample.reveal_step.to(steps)
                logprobs[row, self.valid[row]] = sample.logprobs.to(logprobs)
        return Filled(tokens, steps, logprobs, self.mask_id, stats)


@dataclass(frozen=True, eq=False)
class Filled:
    """A canvas whose masked positions were sampled.

    tokens: int64 [B, T]. steps: int64 [B, T], the step that revealed a position, -1 where none did. logprobs: float32
    [B, T], see `Sample`. stats: None where nothing was masked.
    """

    tokens: Tensor
    steps: Tensor
    logprobs: Tensor
    mask_id: int
    stats: Stats | None

    def history(self, steps: Tensor, num_steps: int) -> list[Tensor]:
        """int64 [B, T] after each step, given the step [B, T] that counts as the one of each position."""
        return [self.tokens.where(steps <= step, self.mask_id) for step in range(num_steps)]


def valid_of(attention_mask: Tensor | None, prompt: Tensor, *, left: bool) -> Tensor:
    """bool [B, P] of an attention mask, all True without one. `left`: padding stands on the left of each row only."""
    if attention_mask is None:
        return torch.ones_like(prompt, dtype=torch.bool)
    if attention_mask.shape != prompt.shape:
        raise ValueError(
            f"attention_mask must have the shape of the prompt, {list(prompt.shape)}, got {list(attention_mask.shape)}"
        )
    valid = attention_mask.to(prompt.device) != 0
    broken = (valid[:, :-1] & ~valid[:, 1:]).any(1)
    if left and broken.any():
        row = int(broken.nonzero()[0])
        raise ValueError(f"attention_mask must be zeros on the left of a row only, got a zero after a one in row {row}")
    return valid


def check_ids(name: str, ids: object) -> Tensor:
    """`ids` if they are integers [B, L] with a row at least, as int64."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or not len(ids):
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{name} must be a tensor of token ids [batch, length], got {got}")
    return ids.long()
