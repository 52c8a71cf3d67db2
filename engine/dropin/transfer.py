"""Which positions each block of dllm's loop may reveal, and how many of them each of its steps does."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unmask.dropin.canvas import Canvas

StillMasked = Callable[..., float]


@dataclass(frozen=True, eq=False)
class Block:
    """own: bool [B, T], the positions that the block is cut from. window: bool [B, T], where it may reveal. counts:
    int64 [B, S], how many of each row are revealed in each step."""

    own: Tensor
    window: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Transfer:
    """The schedule of a call: `steps` in all, shared equally among blocks of `size`.

    still_masked(s=, t=): of what is masked at time t, the share that still is at s. stochastic: counts are binomial, and
    otherwise their rounded means. generator: of the binomial draws; None is torch's own.
    """

    steps: int
    size: int
    still_masked: StillMasked
    stochastic: bool
    generator: torch.Generator | None

    def blocks(self, canvas: Canvas, starts: Tensor, length: int, *, before: bool) -> list[Block]:
        """The blocks of `length` positions of each row, from int64 [B] `starts` on.

        before: what is still masked before a block may be revealed in it as well.
        """
        num_blocks = math.ceil(length / self.size)
        shares = self.shares(math.ceil(self.steps / num_blocks))
        place, blocks = torch.arange(canvas.tokens.shape[1], device=starts.device), []
        for first in range(0, num_blocks * self.size, self.size):
            ended = place < starts[:, None] + first + self.size
            own = ended & (place >= starts[:, None] + first)
            counts = [self.counts(number, shares) for number in (own & canvas.masked).sum(1).tolist()]
            counts = torch.nn.utils.rnn.pad_sequence(counts, batch_first=True)
            blocks.append(Block(own, ended if before else own, counts))
        return blocks

    def shares(self, steps: int) -> list[float]:
        """Of what is still masked, the share that each of so many steps reveals."""
        return [1 - self.still_masked(s=(steps - 1 - i) / steps, t=(steps - i) / steps) for i in range(steps)]

    def counts(self, number: int, shares: list[float]) -> Tensor:
        """int64 [S]: how many of `number` masked positions each step reveals; steps that reveal none are left out."""
        counts, left = [], torch.tensor(float(number), dtype=torch.float64)
        for share in shares:
            mean = left * share
            drawn = torch.binomial(left, left.new_tensor(share), self.generator) if self.stochastic else mean.round()
            counts.append(int(drawn.clamp(max=left)))
            left = left - counts[-1]
        return torch.tensor([count for count in counts if count], dtype=torch.int64)


def linear(s: float, t: float) -> float:
    """The share under the linear schedule; in fp32, as published."""
    left, right = 1 - (1 - np.float32([s, t]))
    return float(left / right)
