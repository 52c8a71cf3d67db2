// The random numbers of a run; the same page as kernels/noise.py, which says what the words are used for.
// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "elementary.h"

namespace unmask {

constexpr int kNoiseBlock = 128;
enum Stream : uint32_t { kReveal = 0, kBlockRace = 1, kTokenRace = 2, kPolicy = 3 };

struct Words {
    uint32_t w0, w1, w2, w3;
};

// Whose noise: everything but the stream and the index.
struct RowKey {
    uint32_t position, sequence, draw, key0, key1;
};

UNMASK_FN Words philox(uint32_t index, uint32_t position, uint32_t sequence, uint32_t stream_draw, uint32_t key0,
                       uint32_t key1) {
    uint32_t c0 = index, c1 = position, c2 = sequence, c3 = stream_draw;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
        c1 = static_cast<uint32_t>(p1);
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
        c3 = static_cast<uint32_t>(p0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

UNMASK_FN Words philox(const RowKey& row, Stream stream, uint32_t index) {
    return philox(index, row.position, row.sequence, static_cast<uint32_t>(stream) << 24 | row.draw, row.key0, row.key1);
}

// -log(-log1p(-v)) from v and its exact complement u = 1 - v, which keeps the logarithm finite where v rounds to one.
UNMASK_FN float gumbel_of(float v, float u) {
    Split x = split(u);
    x.rest = v < 0.25f ? -v : x.rest;
    x.exponent = v < 0.25f ? 0.0f : x.exponent;
    return -log_positive(-log_split(x));
}

// (k + 1/2) / 2^32 of one word, (k + 1/2) / 2^64 of two, with full relative precision near zero.
UNMASK_FN float unit(uint32_t word) { return (static_cast<float>(word) + 0.5f) * 0x1p-32f; }
UNMASK_FN float unit(uint32_t high, uint32_t low) {
    return static_cast<float>(high) * 0x1p-32f + (static_cast<float>(low) + 0.5f) * 0x1p-64f;
}

UNMASK_FN float gumbel(uint32_t word) { return gumbel_of(unit(word), unit(~word)); }
UNMASK_FN float gumbel(uint32_t high, uint32_t low) { return gumbel_of(unit(high, low), unit(~high, ~low)); }

}  // namespace unmask
