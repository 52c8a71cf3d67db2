"""Where sequences begin among packed rows: numbers that the host knows, or offsets that only the device does."""

import operator
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.kernels import checks


class Offsets(NamedTuple):
    """Rows of B sequences back to back: those of sequence s are starts[s] to starts[s + 1], that one excluded.

    starts: int32 [B + 1] on the rows' device, from 0 on, never falling. Rows from starts[B] on belong to no sequence.
    longest: no sequence has more rows. The host knows this number and B, and nothing else: an operator that takes
    offsets on a GPU does not wait for their values, so a CUDA graph that was captured with one set serves all others.
    """

    starts: Tensor
    longest: int


Counts = tuple[int, ...] | Offsets  # rows of each sequence


def check_counts(name: str, counts: Counts, rows: Tensor, of: str) -> Counts:
    """Rows of each sequence among `rows`; of offsets everything but their values, which known_counts looks at."""
    if not isinstance(counts, Offsets):
        return checks.check_counts(name, counts, len(rows), of)
    checks.check_tensor(f"{name}.starts", counts.starts, ("B + 1",), (torch.int32,), rows.device, of.split()[-1])
    if not len(counts.starts) or not counts.starts.is_contiguous():
        got = f"shape {list(counts.starts.shape)}, strides {counts.starts.stride()}"
        raise ValueError(f"{name}.starts must have at least one number and be contiguous, got {got}")
    try:
        longest = operator.index(counts.longest)
    except TypeError:
        raise TypeError(f"{name}.longest must be an integer, got {counts.longest!r}") from None
    if longest < 0:
        raise ValueError(f"{name}.longest must not be negative, got {longest}")
    return Offsets(counts.starts, longest)


def known_counts(name: str, counts: Counts, num_rows: int) -> tuple[int, ...]:
    """The rows of each sequence; those of offsets are checked, and their device is waited for."""
    if not isinstance(counts, Offsets):
        return counts
    starts = counts.starts.tolist()
    numbers = tuple(end - start for start, end in pairwise(starts))
    if starts[0] or min(numbers, default=0) < 0 or starts[-1] > num_rows:
        raise ValueError(f"{name}.starts must go from 0 to at most {num_rows} and never fall, got {starts}")
    if max(numbers, default=0) > counts.longest:
        raise ValueError(f"{name}.longest must be at least {max(numbers)}, got {counts.longest}")
    return numbers


def num_sequences(counts: Counts) -> int:
    return len(counts.starts) - 1 if isinstance(counts, Offsets) else len(counts)


def longest(counts: Counts) -> int:
    """No sequence has more rows."""
    return counts.longest if isinstance(counts, Offsets) else max(counts, default=0)


def device_offsets(counts: Counts, device: torch.device) -> Offsets:
    """Equally long sequences need no copy from the host, so that such a call can be captured in a CUDA graph."""
    if isinstance(counts, Offsets):
        return counts
    if counts and counts[0] and counts.count(counts[0]) == len(counts):
        end = counts[0] * len(counts) + 1
        return Offsets(torch.arange(0, end, counts[0], dtype=torch.int32, device=device), counts[0])
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
    return Offsets(starts, longest(counts))


def split(counts: Counts | None) -> tuple[list[int] | None, Tensor | None, int]:
    """As a registered operator takes them: numbers, or starts and longest."""
    if isinstance(counts, Offsets):
        return None, counts.starts, counts.longest
    return None if counts is None else list(counts), None, 0


def join(counts: list[int] | None, starts: Tensor | None, longest: int) -> Counts | None:
    """What split took apart."""
    if starts is not None:
        return Offsets(starts, longest)
    return None if counts is None else tuple(counts)
