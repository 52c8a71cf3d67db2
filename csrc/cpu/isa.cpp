// Which compilations of the kernels this processor can run.
#include "isa.h"

namespace unmask {

#define UNMASK_DECLARE(isa)                              \
    void add_norm_##isa(const AddNormCall&);             \
    void attention_##isa(const AttentionCall&);          \
    void divergence_##isa(const DivergenceCall&);        \
    void expected_embedding_##isa(const EmbeddingCall&); \
    void sample_head_##isa(const HeadCall&);             \
    void swiglu_##isa(const SwigluCall&);
#define UNMASK_KERNELS(isa, supported)                                   \
    {#isa, supported, add_norm_##isa, attention_##isa, divergence_##isa, \
     expected_embedding_##isa, sample_head_##isa, swiglu_##isa}

UNMASK_DECLARE(portable)
#if defined(__x86_64__)
UNMASK_DECLARE(avx2)
UNMASK_DECLARE(avx512)
UNMASK_DECLARE(avx512_bf16)
#endif

const Kernels* kernels() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                 __builtin_cpu_supports("f16c");
    static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    static const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    static const Kernels table[] = {
#if defined(__x86_64__)
        UNMASK_KERNELS(avx512_bf16, has_bf16),
        UNMASK_KERNELS(avx512, has_avx512),
        UNMASK_KERNELS(avx2, has_avx2),
#endif
        UNMASK_KERNELS(portable, true),
        {},
    };
    return table;
}

}  // namespace unmask
