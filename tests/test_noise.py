"""The noise against Random123's published vectors, a slow pure-Python Philox, the C++ page and its own law."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from unmask.kernels import noise

ONES = 2**32 - 1
VECTORS = [  # counter, key, words: kat_vectors of Random123, philox4x32 10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = 0, 1, 2**32 - 1, 2**32, 0x299F31D0A4093822, 2**64 - 1


def philox(counter, seed):
    c, k = list(counter), [seed % 2**32, seed // 2**32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b // 2**32 ^ c[1] ^ k[0], b % 2**32, a // 2**32 ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def random_counters(n, seed=0):
    return torch.randint(0, 2**32, (n, 4), generator=torch.Generator().manual_seed(seed))


def gumbel64(k, bits):
    v = (k + 0.5) / 2**bits if k < 2 ** (bits - 1) else None
    u = (2**bits - 1 - k + 0.5) / 2**bits
    return -math.log(-math.log1p(-v) if v is not None else -math.log(u))


@pytest.mark.parametrize("counter, key, words", VECTORS)
def test_known_answers(counter, key, words):
    seed = key[1] << 32 | key[0]
    assert philox(counter, seed) == words
    assert tuple(int(w) for w in noise.philox(*counter, seed)) == words
    assert tuple(int(w) for w in noise.philox(*map(torch.tensor, counter), seed)) == words


@pytest.mark.parametrize("seed", SEEDS)
def test_words_equal_pure_python(seed):
    counters = random_counters(100)
    words = torch.stack(noise.philox(*counters.unbind(1), seed), dim=1)
    assert [tuple(row) for row in words.tolist()] == [philox(row, seed) for row in counters.tolist()]


def test_arguments_broadcast():
    words = noise.philox(torch.arange(3)[:, None], torch.arange(4), 5, 2 << 24 | 7, 9)
    assert all(w.shape == (3, 4) and w.dtype == torch.int64 for w in words)
    assert [int(w[2, 1]) for w in words] == list(philox((2, 1, 5, 2 << 24 | 7), 9))


def test_reveal_times_are_the_stated_doubles():
    sequence, position = torch.arange(20)[:, None], torch.arange(30)
    times = noise.reveal_times(7, sequence, position)
    assert times.dtype == torch.float64 and times.shape == (20, 30)
    for s, p in [(0, 0), (3, 29), (19, 11)]:
        w0, w1, _, _ = philox((0, p, s, 0), 7)
        assert times[s, p].item() == ((w0 << 32 | w1) // 2**11 + 0.5) / 2**53


def test_reveal_times_stay_inside_the_unit_interval(monkeypatch):
    words = torch.tensor([0, ONES])
    monkeypatch.setattr(noise, "philox", lambda *arguments: (words,) * 4)
    assert noise.reveal_times(0, words, words).tolist() == [0.5 / 2**53, 1 - 2.0**-53]


def test_reveal_times_are_uniform():
    times = noise.reveal_times(3, torch.arange(200)[:, None], torch.arange(500)).flatten()
    assert stats.kstest(times.numpy(), "uniform").pvalue > 1e-3


def keys(n):
    return torch.stack([torch.arange(n) % 7, torch.arange(n), torch.arange(n) % 3], dim=1)


def test_gumbels_are_those_of_the_stated_words():
    blocks = noise.block_gumbel(11, keys(20), 40)
    ids = random_counters(20)[:, :3]
    tokens = noise.token_gumbel(11, keys(20), ids)
    assert blocks.dtype == tokens.dtype == torch.float32
    for row, (sequence, position, draw) in enumerate(keys(20).tolist()):
        for block in range(40):
            w0, w1, _, _ = philox((block, position, sequence, 1 << 24 | draw), 11)
            assert close(blocks[row, block].item(), gumbel64(w0 << 32 | w1, 64))
        for column, token in enumerate(ids[row].tolist()):
            word = philox((token // 4, position, sequence, 2 << 24 | draw), 11)[token % 4]
            assert close(tokens[row, column].item(), gumbel64(word, 32))


def close(got, exact):
    return abs(got - exact) <= 4 * 2**-24 * max(1, abs(exact))


def test_winner_gumbels_are_the_tokens_gumbels():
    block = torch.arange(20) * 1000
    ids = block[:, None] * noise.BLOCK + torch.arange(noise.BLOCK)
    assert torch.equal(noise.winner_gumbel(8, keys(20), block), noise.token_gumbel(8, keys(20), ids))


EDGES = 0, 1, 2, 1000, 2**16, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 3 * 2**30, ONES - 1000, ONES - 1, ONES


def test_gumbels_are_finite_and_exact_at_the_ends():
    words = torch.tensor(EDGES)
    one = noise._gumbel(noise._unit(words), noise._unit(ONES - words))
    two = noise._gumbel(noise._unit(words, words), noise._unit(ONES - words, ONES - words))
    assert one.isfinite().all() and two.isfinite().all()
    assert all(close(g, gumbel64(w, 32)) for g, w in zip(one.tolist(), EDGES, strict=True))
    assert all(close(g, gumbel64(w << 32 | w, 64)) for g, w in zip(two.tolist(), EDGES, strict=True))


@pytest.mark.parametrize("draw", ["block", "token"])
def test_gumbels_follow_their_law(draw):
    ids = torch.arange(200).expand(500, -1)
    many = noise.block_gumbel(5, keys(500), 200) if draw == "block" else noise.token_gumbel(5, keys(500), ids)
    assert stats.kstest(many.flatten().numpy(), "gumbel_r").pvalue > 1e-3


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=f"seed must satisfy.*got {seed}"):
        noise.check_seed(seed)


@pytest.mark.parametrize("seed", [True, 1.0, "1", None])
def test_seed_of_the_wrong_type(seed):
    with pytest.raises(TypeError, match="seed must be an integer"):
        noise.check_seed(seed)


def test_seed_accepts_integers_of_other_libraries():
    assert noise.check_seed(np.uint64(2**64 - 1)) == 2**64 - 1


@pytest.fixture
def extension():
    missing = "the compiled CPU kernels are not built"
    return pytest.importorskip("unmask.kernels._cpu", reason=missing, exc_type=ImportError)


@pytest.mark.parametrize("seed", SEEDS)
def test_cpp_words_equal(extension, seed):
    counters = random_counters(200, seed=1)
    words = torch.stack(noise.philox(*counters.unbind(1), seed), dim=1)
    assert [list(extension.philox(*row, seed)) for row in counters.tolist()] == words.tolist()


def test_cpp_gumbels_agree(extension):
    words = [*EDGES, *random_counters(500, seed=2).flatten().tolist()]
    assert all(close(extension.gumbel32(w), gumbel64(w, 32)) for w in words)
    pairs = [(a, b) for a in EDGES for b in EDGES] + list(zip(words, reversed(words), strict=True))
    assert all(close(extension.gumbel64(a, b), gumbel64(a << 32 | b, 64)) for a, b in pairs)
