"""Which positions each block of dllm's loop may reveal, and how many of them each of its steps does."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unmask.adaptive import Confidence
from unmask.canvas import Canvas


@dataclass(frozen=True)
class Transferred(Confidence):
    """A step reveals its share of what is still masked, rounded. Steps that reveal nothing are left out.

    steps: their number. shares: one for each; the last is 1.
    """

    shares: tuple[float, ...] = ()

    def counts(self, num_masked: int) -> np.ndarray:
        return rounded(num_masked, self.shares)


def rounded(num_masked: int, shares: tuple[float, ...]) -> np.ndarray:
    """int64 [S], how many of `num_masked` positions each step reveals that reveals any; halves become even numbers."""
    counts = []
    for share in shares:
        counts.append(int(np.round((num_masked - sum(counts)) * share)))
    return np.array([count for count in counts if count], np.int64)


def binomial(num_masked: int, shares: tuple[float, ...], generator: torch.Generator | None) -> np.ndarray:
    """As `rounded`, where each masked position is revealed independently."""
    counts = []
    for share in shares:
        left = torch.tensor(float(num_masked - sum(counts)))
        counts.append(int(torch.binomial(left, torch.tensor(share), generator)))
    return np.array([count for count in counts if count], np.int64)


def linear(s: float, t: float) -> float:
    """Of what is masked at time t, the share that still is at s, under the linear schedule; in fp32, as published."""
    left, right = 1 - (1 - np.float32([s, t]))
    return float(left / right)


@dataclass(frozen=True, eq=False)
class Block:
    """num_masked: int64 [B], positions of the block to be revealed. window: bool [B, T], where it may reveal. counts:
    int64 [B, S], how many of each row in each step."""

    num_masked: Tensor
    window: Tensor
    counts: Tensor

    def __len__(self) -> int:
        """S, the steps."""
        return self.counts.shape[1]


def cut(
    canvas: Canvas, starts: Tensor, length: int, size: int, counts: Callable[[int], np.ndarray], *, before: bool
) -> list[Block]:
    """Blocks of `size`, the last maybe smaller, of the `length` positions of each row from int64 [B] `starts` on.

    counts: how many of so many masked positions each step reveals. before: what is still masked before a block may be
    revealed in it as well.
    """
    place, blocks = torch.arange(canvas.tokens.shape[1], device=starts.device), []
    for first in range(0, length, size):
        ended = place < starts[:, None] + first + size
        own = ended & (place >= starts[:, None] + first)
        num_masked = (own & canvas.masked).sum(1)
        rows = [torch.from_numpy(counts(number)) for number in num_masked.tolist()]
        rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        blocks.append(Block(num_masked, ended if before else own, rows))
    return blocks


def even(blocks: list[Block], size: int) -> bool:
    """Whether the blocks are groups of `size` masked positions of each row, the last maybe smaller."""
    for row in torch.stack([block.num_masked for block in blocks], 1).tolist():
        filled = [number for number in row if number]
        if any(number != size for number in filled[:-1]):
            return False
    return True


def common_steps(blocks: list[Block], steps: Tensor) -> Tensor:
    """int64 [B, T]: steps counted over the batch, which goes from block to block together, of steps that each row
    counted for itself; -1 stays."""
    common, offset = [[] for _ in steps], 0
    for block in blocks:
        for row, count in zip(common, (block.counts > 0).sum(1).tolist(), strict=True):
            row += range(offset, offset + count)
        offset += len(block)
    tables = torch.nn.utils.rnn.pad_sequence([torch.tensor([*row, -1]) for row in common], batch_first=True)
    places = steps.where(steps >= 0, torch.tensor([len(row) for row in common], device=steps.device)[:, None])
    return tables.to(steps.device).gather(1, places)
