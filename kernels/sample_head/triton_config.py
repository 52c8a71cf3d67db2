"""Tile sizes of sample_head's Triton kernels: a fixed table, so that one head always runs the same code."""

from dataclasses import dataclass

import torch

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


def choose_config(call: HeadCall) -> Config:
    return Config(64, 256, 64, 4, 2, 8, 32, 16)
