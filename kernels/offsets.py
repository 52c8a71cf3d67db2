"""Where sequences begin among packed rows, when only the device knows."""

from typing import NamedTuple

from torch import Tensor


class Offsets(NamedTuple):
    """Rows of B sequences back to back: those of sequence s are starts[s] to starts[s + 1], that one excluded.

    starts: int32 [B + 1] on the rows' device, from 0 on, never falling. Rows from starts[B] on belong to no sequence.
    longest: no sequence has more rows. The host knows this number and B, and nothing else: an operator that takes
    offsets on a GPU does not wait for their values, so a CUDA graph that was captured with one set serves all others.
    """

    starts: Tensor
    longest: int
