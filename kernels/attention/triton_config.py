"""What attention's Triton kernels take, their tile sizes, and when torch's own attention is the better choice."""

from dataclasses import dataclass

import torch

from unmask.kernels.attention.call import AttentionCall
from unmask.kernels.dispatch import architecture, interpreted, triton_status
from unmask.kernels.logits import triton_refuses
from unmask.kernels.offsets import Offsets, longest

MAX_DIM = 128
ROTATED_FROM = 5500  # tokens


@dataclass(frozen=True)
class Tile:
    block_m: int  # queries of a program: rows times the heads that share keys
    block_n: int  # keys of a step
    num_warps: int
    num_stages: int
    block_k: int | None = None  # columns of a product of queries and keys; None: all

    @property
    def options(self) -> dict[str, int | bool]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Tiles:
    """By the most queries that one sequence brings to a key head."""

    few: Tile  # up to 16
    some: Tile  # up to 64
    many: Tile

    def choose(self, most: int) -> Tile:
        return self.few if most <= self.few.block_m else self.some if most <= self.some.block_m else self.many


# By columns, padded to one of these numbers. fp32, in fp32 arithmetic:
SINGLE = {
    64: Tiles(Tile(16, 32, 4, 1, 32), Tile(64, 32, 8, 1, 16), Tile(64, 32, 8, 1, 16)),
    128: Tiles(Tile(16, 16, 4, 1, 32), Tile(32, 32, 8, 1, 16), Tile(32, 32, 8, 1, 16)),
}
_LARGE = {
    64: Tiles(Tile(16, 128, 4, 3), Tile(64, 128, 4, 3), Tile(128, 128, 8, 3)),
    128: Tiles(Tile(16, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)),
}
# bf16 and fp16, on tensor cores:
HALF = {
    "sm_90": _LARGE,
    "sm_100": _LARGE,
    "sm_80": {
        64: Tiles(Tile(16, 128, 4, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
        128: Tiles(Tile(16, 64, 4, 3), Tile(64, 64, 8, 3), Tile(128, 64, 8, 3)),
    },
    # 64 KB of shared memory or a little more: gfx942, consumer GPUs, whatever comes.
    "other": {
        64: Tiles(Tile(16, 64, 4, 1), Tile(64, 64, 4, 1), Tile(128, 64, 4, 1)),
        128: Tiles(Tile(16, 64, 4, 1), Tile(64, 64, 4, 1), Tile(128, 64, 8, 1)),
    },
}
_INTERPRETED = Tiles(Tile(16, 64, 4, 1, 64), Tile(64, 128, 4, 1, 64), Tile(128, 128, 4, 1, 64))


def choose_tile(call: AttentionCall) -> Tile:
    """By architecture, dtype, columns and the most queries that a sequence of the call brings to a key head."""
    most = longest(call.row_counts) * (call.query.shape[1] // call.key.shape[1])
    where = architecture(call.query.device)
    if where == "interpreter":
        return _INTERPRETED.choose(most)
    columns = next(columns for columns in (64, 128) if call.query.shape[2] <= columns)
    table = SINGLE if call.query.dtype is torch.float32 else HALF.get(where, HALF["other"])
    return table[columns].choose(most)


def refuses(call: AttentionCall) -> str | None:
    dim = call.query.shape[2]
    return f"needs at most {MAX_DIM} columns, got {dim}" if dim > MAX_DIM else triton_refuses({"query": call.query})


def status() -> tuple[bool, str]:
    usable, reason = triton_status()
    preference = (
        "; leaves full sequences of equal length with D = 128 to sdpa on sm_90, unrotated or from "
        f"{ROTATED_FROM} tokens on: published times on H100, not measured here"
    )
    return usable, reason + (preference if usable and not interpreted() else "")


def defers_to_sdpa(call: AttentionCall) -> bool:
    """Whether torch's attention should be faster: 570 TFLOP/s to 370 for D = 128 on an H100, in the figures published
    with FlashAttention-3 (Shah et al., arXiv 2407.08608), in one call for sequences of one length. It reads rotated
    rows, which plain torch makes at 48 bytes of memory traffic for each number of queries and keys in 16 bits; that is
    made up for from ROTATED_FROM tokens on."""
    lengths = call.lengths
    if any(isinstance(counts, Offsets) for counts in (lengths, call.row_counts)):
        return False  # sdpa does not serve what only the device knows
    if call.block is not None or lengths != call.row_counts or len(set(lengths)) > 1:
        return False
    half = call.query.dtype in (torch.bfloat16, torch.float16)
    if not half or call.query.shape[2] != 128 or architecture(call.query.device) != "sm_90":
        return False
    return call.rope is None or longest(lengths) >= ROTATED_FROM
