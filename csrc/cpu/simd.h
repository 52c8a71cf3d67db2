// Vectors of the compiler (GCC, Clang), as wide as this object's target allows, and dot-product steps over them.
#pragma once

#include <stdint.h>

#include "../elementary.h"

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // about GCC's own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define UNMASK_JOIN(a, b) a##_##b
#define UNMASK_EXPAND(a, b) UNMASK_JOIN(a, b)
#define UNMASK_KERNEL(operator) UNMASK_EXPAND(operator, UNMASK_ISA)  // its name in this compilation

namespace unmask {
namespace {

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kWidth = 16, kRowTile = 6;  // 6 x 4 accumulators fill 32 registers
#elif defined(__AVX2__)
constexpr int kWidth = 8, kRowTile = 3;  // 3 x 4 accumulators fill 16 registers
#else
constexpr int kWidth = 4, kRowTile = 2;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef float Four __attribute__((vector_size(16)));

template <class V, class T>
inline V load_as(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

inline Vec load(const float* p) { return load_as<Vec>(p); }

inline Vec load(const bf16* p) {
    typedef uint16_t Narrow __attribute__((vector_size(2 * kWidth)));
    typedef uint32_t Wide __attribute__((vector_size(4 * kWidth)));
    return (Vec)(__builtin_convertvector(load_as<Narrow>(p), Wide) << 16);
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(fp16 x) {
    const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13, exponent = magnitude & 0x0f800000u;
    const float normal = as_float(magnitude + (exponent == 0x0f800000u ? 0x70000000u : 0x38000000u));  // or inf, NaN
    const float subnormal = as_float(magnitude + 0x38800000u) - 0x1p-14f;
    return as_float(as_bits(exponent ? normal : subnormal) | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

inline Vec load(const fp16* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
    float wide[kWidth];
    for (int i = 0; i < kWidth; ++i) wide[i] = widen(p[i]);
    return load(wide);
#endif
}

// A dot product advances kStep columns at a time: acc + h * w in fp32, one fused operation where the target has it.
template <class T>
struct Widened {
    using Hidden = float;
    using Weight = T;
    using Lanes = Vec;
    static constexpr int kStep = kWidth;
    static Lanes lanes(const Hidden* p) { return load(p); }
    static Vec step(Vec acc, Lanes h, const Weight* w) { return h * load(w) + acc; }
};

#if defined(__AVX512BF16__)
struct Paired {  // bf16 pairs: products are exact, sums are fp32
    using Hidden = bf16;
    using Weight = bf16;
    using Lanes = __m512bh;
    static constexpr int kStep = 2 * kWidth;
    static Lanes lanes(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Vec step(Vec acc, Lanes h, const Weight* w) { return (Vec)_mm512_dpbf16_ps((__m512)acc, h, lanes(w)); }
};
using Bf16Dot = Paired;
#else
using Bf16Dot = Widened<bf16>;
#endif

#if defined(__clang__)
#define UNMASK_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define UNMASK_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (Int4){i, j, k, l})
typedef int Int4 __attribute__((vector_size(16)));
#endif

// Sums of each row's four accumulators, to out[r * stride + 0 … 3]. The order of a sum's additions is fixed: the upper
// half of the lanes onto the lower until four are left, then (0 + 2) + (1 + 3).
#if defined(__AVX512F__)
inline Vec join(Vec a, Vec b) {  // halves (a0, a1), (b0, b1) to (a0 + a1, b0 + b1)
    return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
}
inline Vec quarters(const Vec (&v)[4]) {  // four lanes of each in turn
    const Vec ab = join(v[0], v[1]), cd = join(v[2], v[3]);
    return _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
}

template <int kRows>
inline void store_sums(const Vec (&acc)[kRows][4], float* out, int64_t stride) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
#pragma GCC unroll 4  // keeps acc in registers
    for (int r = 0; r < kRows; r += 2) {  // an odd last row twice
        const int next = r + 1 < kRows ? r + 1 : r;
        const Vec a = quarters(acc[r]), b = quarters(acc[next]);
        const Vec pairs = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
        const Vec sum = pairs + (Vec)_mm512_shuffle_ps(pairs, pairs, 0xee);
        const __m256 both = _mm512_castps512_ps256(_mm512_permutexvar_ps(order, sum));
        _mm_storeu_ps(out + r * stride, _mm256_castps256_ps128(both));
        _mm_storeu_ps(out + next * stride, _mm256_extractf128_ps(both, 1));
    }
}
#else
inline Four fold(Four v) { return v; }
#if defined(__AVX2__)
inline Four fold(__m256 v) { return (Four)_mm256_castps256_ps128(v) + (Four)_mm256_extractf128_ps(v, 1); }
#endif

template <int kRows>
inline void store_sums(const Vec (&acc)[kRows][4], float* out, int64_t stride) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
        const Four a = fold(acc[r][0]), b = fold(acc[r][1]), c = fold(acc[r][2]), d = fold(acc[r][3]);
        const Four ab = UNMASK_SHUFFLE(a, b, 0, 4, 1, 5) + UNMASK_SHUFFLE(a, b, 2, 6, 3, 7);
        const Four cd = UNMASK_SHUFFLE(c, d, 0, 4, 1, 5) + UNMASK_SHUFFLE(c, d, 2, 6, 3, 7);
        const Four sum = UNMASK_SHUFFLE(ab, cd, 0, 1, 4, 5) + UNMASK_SHUFFLE(ab, cd, 2, 3, 6, 7);
        __builtin_memcpy(out + r * stride, &sum, sizeof sum);
    }
}
#endif

}  // namespace
}  // namespace unmask
