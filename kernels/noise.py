"""The random numbers of a run: pure functions of (seed, sequence, position, draw), never of a batch, a slot or a tile.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch integer operations. Every
implementation of every operator draws exactly these words; `csrc/noise.h` is the same page in C++.

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (index, position, sequence, stream << 24 | draw)

    stream 0   index 0               w0, w1       reveal time of a position
    stream 1   index noise block b   w0, w1       Gumbel of block b, 128 consecutive token ids
    stream 2   index id // 4         w[id % 4]    Gumbel of one token inside the winning block
    stream 3   a policy's own count  w0, w1       further random numbers of reveal policies

Keys are int64 rows `(sequence, position, draw)`: the request's own ids, `draw` counting earlier draws at that position.
"""

import operator

import torch
from torch import Tensor

BLOCK = 128
REVEAL, BLOCK_RACE, TOKEN_RACE, POLICY = range(4)

_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85


def check_seed(seed: int) -> int:
    """The seed as a Python int. TypeError unless it is an integer, ValueError unless 0 <= seed < 2**64."""
    try:
        if isinstance(seed, bool):
            raise TypeError
        value = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer, got {seed!r} ({type(seed).__name__})") from None
    if not 0 <= value < 2**64:
        raise ValueError(f"seed must satisfy 0 <= seed < 2**64, got {value}")
    return value


def philox(
    index: Tensor | int, position: Tensor | int, sequence: Tensor | int, stream_draw: Tensor | int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter: int64 tensors holding uint32 values, of the arguments' broadcast shape.

    The counter's parts are int64 tensors or ints in [0, 2**32); `stream_draw` is `stream << 24 | draw`.
    """
    seed = check_seed(seed)
    k0, k1 = seed & _MASK, seed >> 32
    c0, c1, c2, c3 = index, position, sequence, stream_draw
    for _ in range(10):
        # 64-bit products wrap, so their upper halves come out of an arithmetic shift with copies of the sign bit.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return tuple(torch.broadcast_tensors(*map(torch.as_tensor, (c0, c1, c2, c3))))


def reveal_times(seed: int, sequence: Tensor, position: Tensor) -> Tensor:
    """Reveal time of each (sequence, position): fp64 in (0, 1), uniform, of the arguments' broadcast shape.

    t = (k + 1/2) / 2**53 rounded to nearest even, k the top 53 bits of w0 << 32 | w1. Half the values need a 54th bit;
    rounding would make the very last one 1, so it is held at the largest double below.
    """
    return _double(*philox(0, position, sequence, REVEAL << 24, seed)[:2])


def policy_uniforms(seed: int, sequence: Tensor, position: Tensor, count: Tensor | int) -> Tensor:
    """Further numbers like `reveal_times`, independent of these and of each other, for a policy to count: fp64 in
    (0, 1) of the arguments' broadcast shape."""
    return _double(*philox(count, position, sequence, POLICY << 24, seed)[:2])


def block_gumbel(seed: int, keys: Tensor, num_blocks: int) -> Tensor:
    """Gumbel noise of the noise blocks 0 … num_blocks - 1: keys int64 [R, 3] -> fp32 [R, num_blocks]."""
    sequence, position, draw = keys.unsqueeze(-1).unbind(1)
    blocks = torch.arange(num_blocks, device=keys.device)
    w0, w1, _, _ = philox(blocks, position, sequence, BLOCK_RACE << 24 | draw, seed)
    return _gumbel(_unit(w0, w1), _unit(w0 ^ _MASK, w1 ^ _MASK))


def token_gumbel(seed: int, keys: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise of single tokens: keys int64 [R, 3], ids int64 [R, K] -> fp32 [R, K]."""
    sequence, position, draw = keys.unsqueeze(-1).unbind(1)
    words = torch.stack(philox(ids >> 2, position, sequence, TOKEN_RACE << 24 | draw, seed), dim=-1)
    word = words.gather(-1, (ids & 3).unsqueeze(-1)).squeeze(-1)
    return _gumbel(_unit(word), _unit(word ^ _MASK))


def winner_gumbel(seed: int, keys: Tensor, block: Tensor) -> Tensor:
    """token_gumbel of all 128 ids of one block per row: keys int64 [R, 3], block int64 [R] -> fp32 [R, 128]."""
    sequence, position, draw = keys.unsqueeze(-1).unbind(1)
    index = block.unsqueeze(-1) * (BLOCK // 4) + torch.arange(BLOCK // 4, device=keys.device)
    words = torch.stack(philox(index, position, sequence, TOKEN_RACE << 24 | draw, seed), dim=-1).flatten(1)
    return _gumbel(_unit(words), _unit(words ^ _MASK))


def order_gumbel(seed: int, keys: Tensor) -> Tensor:
    """Gumbel noise of whole positions, for the orders of adaptive policies: keys int64 [R, 3] -> fp32 [R]."""
    sequence, position, draw = keys.unbind(1)
    w0, w1, _, _ = philox(0, position, sequence, POLICY << 24 | draw, seed)
    return _gumbel(_unit(w0, w1), _unit(w0 ^ _MASK, w1 ^ _MASK))


def _double(w0: Tensor, w1: Tensor) -> Tensor:
    k = w0 << 21 | w1 >> 11
    return ((k.double() + 0.5) * 2.0**-53).clamp_(max=1 - 2.0**-53)


def _unit(word: Tensor, low: Tensor | None = None) -> Tensor:
    """(k + 1/2) / 2**32 of one word, (k + 1/2) / 2**64 of two, in fp32 with full relative precision near zero."""
    if low is None:
        return (word.float() + 0.5) * 2.0**-32
    return word.float() * 2.0**-32 + (low.float() + 0.5) * 2.0**-64


def _gumbel(v: Tensor, u: Tensor) -> Tensor:
    """-log(-log1p(-v)) for v and its exact complement u = 1 - v, which keeps log finite where v rounds to one."""
    exponential = -torch.where(v < 0.25, torch.log1p(-v), torch.log(u))
    return -torch.log(exponential)
