// Turning and rounding numbers while they are packed for a product.
#pragma once

#include "simd.h"

namespace unmask {
namespace {

// To nearest even; NaN stays NaN.
inline bf16 to_bf16(float x) {
    const uint32_t bits = load_as<uint32_t>(&x);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}

template <class T>
inline T narrow_to(float x) {
    if constexpr (sizeof(T) == 4)
        return x;
    else
        return to_bf16(x);
}

inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)
// out[i * out_stride + j] = in[j * in_stride + i] for kWidth x kWidth items of 32 bits; only the first num_rows rows of
// out are written.
inline void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride, int64_t num_rows) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * in_stride);
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
    for (int64_t i = 0; i < num_rows; ++i) _mm512_storeu_si512(out + i * out_stride, r[i]);
}
#elif defined(__AVX2__)
inline void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride, int64_t num_rows) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * in_stride);
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        const __m256 *from = t + 4 * i;
        r[4 * i] = _mm256_shuffle_ps(from[0], from[2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(from[0], from[2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(from[1], from[3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(from[1], from[3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int64_t i = 0; i < num_rows; ++i) _mm256_storeu_ps(out + i * out_stride, t[i]);
}
#else
inline void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride, int64_t num_rows) {
    for (int64_t i = 0; i < num_rows; ++i)
        for (int64_t j = 0; j < kWidth; ++j) out[i * out_stride + j] = in[j * in_stride + i];
}
#endif

}  // namespace
}  // namespace unmask
