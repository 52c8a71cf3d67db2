"""Tile sizes of sample_head's Triton kernels: a fixed table, so that one head always runs the same code."""

from dataclasses import dataclass

import torch

from unmask.kernels.dispatch import architecture
from unmask.kernels.sample_head.call import HeadCall


@dataclass(frozen=True)
class Config:
    """How a launch cuts its work; no value of a row depends on it."""

    block_r: int  # rows of a tile
    block_v: int  # ids of a tile, a multiple of 128
    block_k: int  # columns of hidden per step
    num_warps: int
    num_stages: int
    programs: int  # as many as run at once on the whole device
    finish_r: int = 32  # rows merged and drawn at a time
    finish_splits: int = 32  # records of a row compared at a time
    group: int = 16  # tiles of rows that pass over the vocabulary together

    def splits(self, num_rows: int, spans: int) -> int:
        """Over how many programs the vocabulary, `spans` tiles wide, is split for each tile of rows."""
        tiles = min(-(-num_rows // self.block_r), self.group)
        splits = max(1, min(self.programs // tiles, spans))
        return -(-spans // -(-spans // splits))  # as few as finish as soon

    def tile(self, call: HeadCall) -> dict[str, int]:
        dim = 1 if call.weight is None else call.hidden.shape[1]
        return {"dim": dim, "block_r": self.block_r, "block_v": self.block_v, "block_k": self.block_k}

    @property
    def options(self) -> dict[str, int | bool]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


TRUNCATE = {"block_v": 8192, "num_warps": 16, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Table:
    """The configurations of one architecture, for bf16 and fp16 products unless it says otherwise."""

    few: Config  # up to 64 rows, which wait for the weights
    many: Config
    lean: Config  # many rows, one temperature, no allow, at most logprob and lse wanted: registers for a larger tile
    single: Config  # fp32 products, in fp32 arithmetic throughout
    logits: Config  # no product: hidden holds the logits


_FEW_ROWS = 64
_SMALL = Config(64, 128, 32, num_warps=4, num_stages=3, programs=256, finish_r=16)
_SINGLE = Config(32, 128, 32, num_warps=8, num_stages=3, programs=132, finish_r=16)
_LOGITS = Config(16, 128, 16, num_warps=4, num_stages=1, programs=528, finish_r=16)
_INTERPRETED = Config(64, 512, 128, num_warps=4, num_stages=1, programs=4)
TABLES = {
    # Two programs of `few` and one of `many` or `lean` fit on a multiprocessor, by registers and by shared memory.
    "sm_90": Table(
        few=Config(64, 128, 64, num_warps=4, num_stages=4, programs=264, finish_r=16),
        many=Config(128, 128, 64, num_warps=8, num_stages=4, programs=132),
        lean=Config(128, 256, 32, num_warps=8, num_stages=6, programs=132),
        single=_SINGLE,
        logits=_LOGITS,
    ),
    "sm_80": Table(
        few=Config(64, 128, 32, num_warps=4, num_stages=4, programs=216, finish_r=16),
        many=Config(128, 128, 32, num_warps=8, num_stages=4, programs=108),
        lean=Config(128, 128, 32, num_warps=8, num_stages=4, programs=108),
        single=_SINGLE,
        logits=_LOGITS,
    ),
    "sm_100": Table(
        few=Config(64, 128, 64, num_warps=4, num_stages=4, programs=296, finish_r=16),
        many=Config(128, 128, 64, num_warps=8, num_stages=4, programs=148),
        lean=Config(128, 128, 64, num_warps=8, num_stages=4, programs=148),
        single=_SINGLE,
        logits=_LOGITS,
    ),
    # 64 KB of shared memory or a little more: gfx942, consumer GPUs, whatever comes.
    "other": Table(few=_SMALL, many=_SMALL, lean=_SMALL, single=_SINGLE, logits=_LOGITS),
    "interpreter": Table(_INTERPRETED, _INTERPRETED, _INTERPRETED, _INTERPRETED, _INTERPRETED),
}


def choose_config(call: HeadCall) -> Config:
    table = TABLES.get(architecture(call.hidden.device), TABLES["other"])
    if call.weight is None:
        return table.logits
    if call.hidden.dtype == torch.float32:
        return table.single
    if call.num_rows <= _FEW_ROWS:
        return table.few
    wide = isinstance(call.temperature, torch.Tensor) or call.allow is not None or set(call.want) - {"logprob", "lse"}
    return table.many if wide else table.lean
