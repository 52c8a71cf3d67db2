// Vectors of the compiler (GCC, Clang), as wide as this object's target allows, and dot-product steps over them.
#pragma once

#include <stdint.h>

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // about GCC's own _mm256_undefined_ps
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace unmask {
namespace {

struct bf16 {
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
inline float widen(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    return load_as<float>(&bits);
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

// Sixteen, eight or four lanes to four: the upper half onto the lower.
inline Four fold(Four v) { return v; }
#if defined(__AVX2__)
inline Four fold(__m256 v) { return (Four)_mm256_castps256_ps128(v) + (Four)_mm256_extractf128_ps(v, 1); }
#endif
#if defined(__AVX512F__)
inline Four fold(__m512 v) { return fold(_mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1)); }
#endif

// The sums of four vectors, in a fixed order of additions.
inline Four sums(const Vec (&v)[4]) {
    Four a[4];
    for (int i = 0; i < 4; ++i) a[i] = fold(v[i]);
    const Four ab = UNMASK_SHUFFLE(a[0], a[1], 0, 4, 1, 5) + UNMASK_SHUFFLE(a[0], a[1], 2, 6, 3, 7);
    const Four cd = UNMASK_SHUFFLE(a[2], a[3], 0, 4, 1, 5) + UNMASK_SHUFFLE(a[2], a[3], 2, 6, 3, 7);
    return UNMASK_SHUFFLE(ab, cd, 0, 1, 4, 5) + UNMASK_SHUFFLE(ab, cd, 2, 3, 6, 7);
}

}  // namespace
}  // namespace unmask
