"""FlashSampling's idea in a kernel of our own: the product by tiles of vocabulary and rows, noise from tl.rand for each
logit in the epilogue, the best (score, id) of each tile stored, and a second stage that takes the best tile.

Without the original's bulk loads and warp specialisation. The tile is the fastest of CONFIGS at each size. The noise is
a function of row and id, numbered in 32 bits as the original's is.
"""

from contextlib import suppress
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.timing import Effort, clock, interleave

# rows, ids and hidden columns of a tile, warps, stages
CONFIGS = (
    (16, 128, 128, 8, 4),
    (32, 128, 128, 8, 3),
    (64, 128, 64, 8, 4),
    (64, 256, 64, 8, 3),
    (128, 128, 64, 8, 4),
)
_SEED = 12345
_GROUP = 8
_TUNING = Effort(warmups=1, min_rounds=3, max_rounds=3)


def draw(hidden: Tensor, weight: Tensor) -> Tensor:
    if hidden.device.type != "cuda":
        return launch(hidden, weight, CONFIGS[-1])  # Triton's interpreter wants few programs
    return launch(hidden, weight, _fastest(len(hidden), weight.shape, weight.dtype, weight.device))


def launch(hidden: Tensor, weight: Tensor, config: tuple[int, ...]) -> Tensor:
    (num_rows, hidden_size), vocab_size = hidden.shape, len(weight)
    tile_rows, tile_ids, tile_columns, num_warps, num_stages = config
    row_tiles, id_tiles = triton.cdiv(num_rows, tile_rows), triton.cdiv(vocab_size, tile_ids)
    score = torch.empty(num_rows, id_tiles, device=hidden.device)
    best = torch.empty(num_rows, id_tiles, dtype=torch.int32, device=hidden.device)
    _tiles[(row_tiles * id_tiles,)](
        hidden, weight, score, best, num_rows, vocab_size, hidden_size, id_tiles, hidden.stride(0), weight.stride(0),
        _SEED, tile_rows, tile_ids, tile_columns, _GROUP, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return best.gather(1, score.argmax(1, keepdim=True)).squeeze(1).long()


@cache
def _fastest(num_rows: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[int, ...]:
    """The tile that is fastest on random data of this size, among those whose stages fit into shared memory."""
    hidden = torch.randn(num_rows, shape[1], device=device).to(dtype)
    weight = torch.randn(shape, device=device).to(dtype)
    variants = {}
    for config in CONFIGS:
        run = partial(launch, hidden, weight, config)
        with suppress(triton.TritonError):
            run()
            variants[config] = run
    timings = interleave(variants, clock(device), _TUNING)
    return min(timings, key=lambda config: timings[config].median)


@triton.jit
def _tiles(
    hidden, weight, score, best, num_rows, vocab_size, hidden_size, id_tiles, hidden_stride, weight_stride, seed,
    TILE_ROWS: tl.constexpr, TILE_IDS: tl.constexpr, TILE_COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(num_rows, TILE_ROWS)
    program = tl.program_id(0)
    row_tile, id_tile = tl.swizzle2d(program // id_tiles, program % id_tiles, row_tiles, id_tiles, GROUP)
    rows = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    ids = id_tile * TILE_IDS + tl.arange(0, TILE_IDS)
    columns = tl.arange(0, TILE_COLUMNS)
    row_offsets = tl.minimum(rows, num_rows - 1).to(tl.int64) * hidden_stride
    id_offsets = tl.minimum(ids, vocab_size - 1).to(tl.int64) * weight_stride
    logits = tl.zeros((TILE_IDS, TILE_ROWS), tl.float32)  # ids first: a tensor core's tile has 64 or more of those
    for first in range(0, hidden_size, TILE_COLUMNS):
        inside = columns + first < hidden_size
        a = tl.load(weight + id_offsets[:, None] + (columns + first)[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(hidden + row_offsets[None, :] + (columns + first)[:, None], mask=inside[:, None], other=0.0)
        logits = tl.dot(a, b, logits, input_precision="ieee")
    uniform = tl.rand(seed, rows[None, :] * vocab_size + ids[:, None])
    scores = logits - tl.log(-tl.log(tl.maximum(uniform, 1e-10)))
    scores = tl.where((ids < vocab_size)[:, None], scores, float("-inf"))
    top, place = tl.max(scores, axis=0, return_indices=True)
    slots = rows.to(tl.int64) * id_tiles + id_tile
    tl.store(score + slots, top, mask=rows < num_rows)
    tl.store(best + slots, id_tile * TILE_IDS + place, mask=rows < num_rows)
