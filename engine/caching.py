"""Keys and values that are kept between the steps of a window: faster, and no longer the network's own law."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.arguments import checked_whole
from unmask.denoiser import Denoiser
from unmask.timeline import Limits

KINDS = ("prefix", "dual")


@dataclass(frozen=True)
class Caching:
    """Block-wise reuse of keys and values, an approximation (Wu et al. 2025, Fast-dLLM, arXiv 2505.22618).

    The first step of a window computes all positions and keeps their keys and values; the steps after it compute only a
    part, and attend to what was kept of the rest. In a bidirectional network keys and values of every position change
    whenever a token is revealed anywhere, so what was kept is out of date from the second step on: tokens differ from
    those of a run without it.

    kind: what is computed anew. "prefix": the window and all that follows it. "dual": the window alone.
    refresh: compute everything each so many steps of a window too; None: at its first step only. 1 changes nothing
        against a run without caching, and saves nothing.
    """

    kind: str = "prefix"
    refresh: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.refresh is not None:
            checked_whole("refresh", self.refresh, least=1)

    def __str__(self) -> str:
        return self.kind if self.refresh is None else f"{self.kind}:{self.refresh}"


class KeyValues:
    """Keys and values of all resident sequences, [num_blocks, 2, slots * length, key heads, head_dim] in the dtype of
    the denoiser."""

    def __init__(self, denoiser: Denoiser, limits: Limits) -> None:
        num_places, num_heads, head_dim = self._shape(denoiser, limits)
        shape = denoiser.spec.num_blocks, 2, num_places, num_heads, head_dim
        self.stored = torch.empty(shape, dtype=denoiser.dtype, device=denoiser.device)

    @staticmethod
    def _shape(denoiser: Denoiser, limits: Limits) -> tuple[int, int, int]:
        _, num_kv_heads, head_dim = denoiser.spec.heads
        return limits.max_resident * limits.max_length, num_kv_heads, head_dim

    @classmethod
    def nbytes(cls, denoiser: Denoiser, limits: Limits) -> int:
        places, num_heads, head_dim = cls._shape(denoiser, limits)
        return denoiser.spec.num_blocks * 2 * places * num_heads * head_dim * denoiser.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Context:
    """What the tokens of a batch attend to beside themselves.

    stored: of `KeyValues`. places: int64 [T], where keys and values of the batch's own tokens go. around: int64 [K],
    where those of whole sequences lie then, back to back, of `lengths`. positions: int64 [T], of the batch's tokens in
    their sequences.
    """

    stored: Tensor
    places: Tensor
    around: Tensor
    lengths: tuple[int, ...]
    positions: Tensor

    def exchange(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values [T, G, D] of a block; those [K, G, D] of the whole sequences."""
        kept = self.stored[block]
        for mine, new in zip(kept, (key, value), strict=True):
            mine.index_copy_(0, self.places, new)
        return kept[0].index_select(0, self.around), kept[1].index_select(0, self.around)
