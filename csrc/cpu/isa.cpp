// Which compilations of the kernels this processor can run.
#include "sample_head.h"

namespace unmask {

void sample_head_portable(const HeadCall&);
#if defined(__x86_64__)
void sample_head_avx2(const HeadCall&);
void sample_head_avx512(const HeadCall&);
void sample_head_avx512_bf16(const HeadCall&);
#endif

const HeadKernel* head_kernels() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    static const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    static const HeadKernel kernels[] = {
#if defined(__x86_64__)
        {"avx512_bf16", bf16, sample_head_avx512_bf16},
        {"avx512", avx512, sample_head_avx512},
        {"avx2", avx2, sample_head_avx2},
#endif
        {"portable", true, sample_head_portable},
        {nullptr, false, nullptr},
    };
    return kernels;
}

}  // namespace unmask
