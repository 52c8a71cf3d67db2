"""csrc/noise.h and csrc/online.h, compiled for the host: bit for bit the same steps in NumPy."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from unmask.kernels import noise

ROOT = Path(__file__).parent.parent
SHIM = """
#include "noise.h"
#include "online.h"
using namespace unmask;
extern "C" {
void c_philox(const uint32_t* c, uint32_t k0, uint32_t k1, uint32_t* w, int n) {
    for (int i = 0; i < n; ++i, c += 4, w += 4) {
        const Words words = philox(c[0], c[1], c[2], c[3], k0, k1);
        w[0] = words.w0, w[1] = words.w1, w[2] = words.w2, w[3] = words.w3;
    }
}
void c_keyed(uint32_t stream, uint32_t index, const uint32_t* key, uint32_t* w) {
    const Words words = philox(RowKey{key[0], key[1], key[2], key[3], key[4]}, static_cast<Stream>(stream), index);
    w[0] = words.w0, w[1] = words.w1, w[2] = words.w2, w[3] = words.w3;
}
void c_unit(const uint32_t* w, float* one, float* two, int n) {
    for (int i = 0; i < n; ++i) one[i] = unit(w[2 * i]), two[i] = unit(w[2 * i], w[2 * i + 1]);
}
void c_gumbel(const uint32_t* w, float* one, float* two, int n) {
    for (int i = 0; i < n; ++i) one[i] = gumbel(w[2 * i]), two[i] = gumbel(w[2 * i], w[2 * i + 1]);
}
void c_exp(const float* x, float* y, int n) {
    for (int i = 0; i < n; ++i) y[i] = exp_nonpositive(x[i]);
}
void c_log(const float* x, float* y, int n) {
    for (int i = 0; i < n; ++i) y[i] = log_positive(x[i]);
}
void c_summary(const float* x, int n, float* out) {
    out[0] = maximum(x, n);
    out[1] = sum_exp(x, n, out[0]);
    out[2] = logsumexp(out[0], out[1]);
}
}
"""
EDGES = 0, 1, 2, 1000, 2**24 - 1, 2**24 + 1, 2**30 - 1, 2**30, 2**31, 3 * 2**30, 2**32 - 1000, 2**32 - 2, 2**32 - 1
f32 = np.float32


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing: the headers are C++")
    folder = tmp_path_factory.mktemp("headers")
    (folder / "shim.cpp").write_text(SHIM)
    flags = ["-O2", "-std=c++17", "-ffp-contract=off", "-fopenmp-simd", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, folder / "shim.cpp", "-o", folder / "shim.so"], check=True)
    return ctypes.CDLL(str(folder / "shim.so"))


def address(array):
    return ctypes.c_void_p(array.ctypes.data)


def on_values(function, x):
    x, y = np.ascontiguousarray(x, dtype=f32), np.empty(len(x), dtype=f32)
    function(address(x), address(y), len(x))
    return y


def same_bits(a, b):
    """Equal to the bit; any NaN equals any NaN."""
    a, b = np.asarray(a, dtype=f32), np.asarray(b, dtype=f32)
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


def random_words(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32)


# --- the same steps -------------------------------------------------------------------------------------------------


def exp_nonpositive(x):
    with np.errstate(invalid="ignore", over="ignore"):
        x = np.where(x < f32(-87), f32(-87), x)
        shifted = x * f32(1.44269504) + f32(12582912)
        n = shifted - f32(12582912)
        r = (x - n * f32(0.693359375)) + n * f32(2.12194440e-4)
        p = np.full_like(x, 1.9875691500e-4)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = p * r + f32(c)
        y = (p * (r * r) + r) + f32(1)
        return y * ((shifted.view(np.uint32) << 23) + np.uint32(0x3F800000)).view(f32)


def split(x):
    bits = np.ascontiguousarray(x, dtype=f32).view(np.uint32)
    exponent = (bits - np.uint32(0x3F3504F3)).view(np.int32) >> 23
    return (bits - (exponent.view(np.uint32) << 23)).view(f32) - f32(1), exponent.astype(f32)


def log_split(f, exponent):
    f2 = f * f
    p = np.full_like(f, 7.0376836292e-2)
    for c in (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1,
              -2.4999993993e-1, 3.3333331174e-1):  # fmt: skip
        p = p * f + f32(c)
    tail = (p * (f * f2) - f32(2.12194440e-4) * exponent) - f32(0.5) * f2
    return (f + tail) + f32(0.693359375) * exponent


def log_positive(x):
    return log_split(*split(x))


def gumbel_of(v, u):
    f, exponent = split(u)
    return -log_positive(-log_split(np.where(v < f32(0.25), -v, f), np.where(v < f32(0.25), f32(0), exponent)))


def fold(lanes, join):
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = join(lanes[half:], lanes[:half])
    return lanes[0]


def larger(a, b):
    with np.errstate(invalid="ignore"):
        return np.where(a > b, a, b)


def summary(x):
    """maximum, sum_exp and logsumexp in sixteen lanes."""
    rows = x.reshape(-1, 16)
    lanes = np.full(16, -np.inf, dtype=f32)
    for row in rows:
        lanes = larger(row, lanes)
    top = fold(lanes, larger)
    lanes = np.zeros(16, dtype=f32)
    with np.errstate(invalid="ignore"):
        for row in rows:
            lanes = lanes + exp_nonpositive(row - (f32(0) if top == -np.inf else top))
        total = fold(lanes, np.add)
        return top, total, total if np.isnan(total) else top + log_positive(total[None])[0]


# --- tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**32, 0x299F31D0A4093822, 2**64 - 1])
def test_words(headers, seed):
    counters = np.concatenate([random_words((500, 4)), np.array([[0] * 4, [2**32 - 1] * 4], dtype=np.uint32)])
    words = np.empty_like(counters)
    headers.c_philox(address(counters), seed % 2**32, seed >> 32, address(words), len(counters))
    expected = noise.philox(*torch.from_numpy(counters.astype(np.int64)).unbind(1), seed)
    assert np.array_equal(words, torch.stack(expected, dim=1).numpy())


def test_keys_take_their_places(headers):
    sequence, position, draw, seed = 7, 2**32 - 5, 2**24 - 1, 3 << 32 | 9
    key, words = np.array([position, sequence, draw, seed % 2**32, seed >> 32], dtype=np.uint32), random_words(4)
    for stream in (noise.REVEAL, noise.BLOCK_RACE, noise.TOKEN_RACE, noise.POLICY):
        headers.c_keyed(stream, 123, address(key), address(words))
        assert words.tolist() == [int(w) for w in noise.philox(123, position, sequence, stream << 24 | draw, seed)]


def test_units(headers):
    words = np.concatenate([random_words((2000, 2)), [[a, b] for a in EDGES for b in EDGES]]).astype(np.uint32)
    one, two = np.empty((2, len(words)), dtype=f32)
    headers.c_unit(address(words), address(one), address(two), len(words))
    high, low = torch.from_numpy(words.astype(np.int64)).unbind(1)
    assert same_bits(one, noise._unit(high).numpy()) and same_bits(two, noise._unit(high, low).numpy())


def test_gumbels(headers):
    words = np.concatenate([random_words((2000, 2)), [[a, b] for a in EDGES for b in EDGES]]).astype(np.uint32)
    one, two = np.empty((2, len(words)), dtype=f32)
    headers.c_gumbel(address(words), address(one), address(two), len(words))
    high, low = torch.from_numpy(words.astype(np.int64)).unbind(1)
    flipped = high ^ 2**32 - 1, low ^ 2**32 - 1
    assert same_bits(one, gumbel_of(noise._unit(high).numpy(), noise._unit(flipped[0]).numpy()))
    assert same_bits(two, gumbel_of(noise._unit(high, low).numpy(), noise._unit(*flipped).numpy()))
    assert np.isfinite(one).all() and np.isfinite(two).all()


def test_exp_and_log(headers):
    x = -np.abs(np.random.default_rng(0).standard_normal(5000).astype(f32)) * f32(30)
    x[:8] = 0, -0.0, -87, -87.5, -1e30, -math.inf, math.nan, -1e-30
    assert same_bits(on_values(headers.c_exp, x), exp_nonpositive(x))
    inside = x[(x > -87) & ~np.isnan(x)]
    assert np.abs(on_values(headers.c_exp, inside) / np.exp(inside.astype(np.float64)) - 1).max() < 2e-7
    y = np.exp(x[8:].clip(-80, 0))
    assert same_bits(on_values(headers.c_log, y), log_positive(y))
    exact = np.log(y.astype(np.float64))
    assert (np.abs(on_values(headers.c_log, y) - exact) <= 2e-7 * np.maximum(1, np.abs(exact))).all()


INF = math.inf
ALL = slice(None)
SPECIAL = {
    "plain": [],
    "all -inf": [(ALL, -INF)],
    "one value": [(ALL, -INF), (5, 3.5)],
    "NaN": [(5, math.nan)],
    "NaN among -inf": [(ALL, -INF), (15, math.nan)],
    "+inf": [(10, INF)],
    "+inf and NaN": [(3, INF), (9, math.nan)],
    "all equal": [(ALL, -1e4)],
    "far apart": [(slice(0, 8), -300.0)],
}


@pytest.mark.parametrize("n", [16, 32, 128, 400])
@pytest.mark.parametrize("special", SPECIAL)
def test_log_sum_exp(headers, n, special):
    x = np.random.default_rng(n).standard_normal(n).astype(f32) * f32(5)
    for place, value in SPECIAL[special]:
        x[place] = value
    found = np.empty(3, dtype=f32)
    headers.c_summary(address(x), n, address(found))
    assert same_bits(found, summary(x)), f"{found} {summary(x)}"
    exact = torch.from_numpy(x).double().logsumexp(0).item()
    if math.isfinite(exact) or exact == -INF:
        assert found[2] == pytest.approx(exact, rel=1e-6, abs=1e-6)
    else:
        assert math.isnan(found[2])
