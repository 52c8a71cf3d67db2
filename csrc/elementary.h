// exp and log in fp32: branch-free and free of libm, so that loops over them vectorise and host and device agree.
// Polynomials: Cephes expf and logf (S. Moshier). About one ulp on the stated domains.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define UNMASK_INLINE __host__ __device__ __forceinline__
#else
#define UNMASK_INLINE inline __attribute__((always_inline))
#endif
#define UNMASK_FN static UNMASK_INLINE  // no copy is shared between objects compiled for different instruction sets

#define UNMASK_LANES _Pragma("omp simd")  // the iterations are lanes of one vector

namespace unmask {

UNMASK_FN float as_float(uint32_t bits) {
    union { uint32_t u; float f; } cast = {bits};
    return cast.f;
}

UNMASK_FN uint32_t as_bits(float value) {
    union { float f; uint32_t u; } cast = {value};
    return cast.u;
}

constexpr float kInfinity = __builtin_huge_valf();

// exp(x) for x <= 0; below -87 it stays at exp(-87), 1.6e-38. NaN stays NaN.
UNMASK_FN float exp_nonpositive(float x) {
    const float clamped = x < -87.0f ? -87.0f : x;
    const float shifted = clamped * 1.44269504f + 12582912.0f;  // the integer nearest to x / ln 2, in the low bits
    const float n = shifted - 12582912.0f;
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float y = (p * (r * r) + r) + 1.0f;
    return y * as_float((as_bits(shifted) << 23) + 0x3f800000u);
}

// x = 2^exponent * (1 + rest), sqrt(1/2) <= 1 + rest < sqrt(2), for positive normal x.
struct Split {
    float rest, exponent;
};

UNMASK_FN Split split(float x) {
    const int32_t exponent = static_cast<int32_t>(as_bits(x) - 0x3f3504f3u) >> 23;
    return {as_float(as_bits(x) - (static_cast<uint32_t>(exponent) << 23)) - 1.0f, static_cast<float>(exponent)};
}

// log(2^exponent * (1 + rest)); full relative precision as rest -> 0 with exponent 0, where it is log1p.
UNMASK_FN float log_split(Split x) {
    const float f = x.rest, f2 = f * f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const float tail = (p * (f * f2) - 2.12194440e-4f * x.exponent) - 0.5f * f2;
    return (f + tail) + 0.693359375f * x.exponent;
}

UNMASK_FN float log_positive(float x) { return log_split(split(x)); }

}  // namespace unmask
