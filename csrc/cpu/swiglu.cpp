// out = silu(gate) * up, number by number. Compiled once per instruction set, which UNMASK_ISA names.
#include "swiglu.h"

#include "pack.h"
#include "parallel.h"

namespace unmask {
namespace {

constexpr int64_t kNumbers = 4096;  // of one unit of work, in whole rows

inline float silu(float x) {
    const float e = x < -87 ? 0 : exp_nonpositive(x < 0 ? x : -x);  // which does not fall below exp(-87)
    return (x < 0 ? x * e : x) / (1 + e);
}

template <class In, class Out>
inline void row(const In* gate, const In* up, Out* out, int64_t n) {
    float line[256];
    for (int64_t start = 0; start < n; start += 256) {
        const int64_t count = smaller(256, n - start);
        UNMASK_LANES for (int64_t i = 0; i < count; ++i) line[i] = silu(widen(gate[start + i])) * widen(up[start + i]);
        for (int64_t i = 0; i < count; ++i) out[start + i] = narrow_to<Out>(line[i]);
    }
}

template <class In, class Out>
void rows(const SwigluCall& call) {
    const int64_t n = call.out.cols, step = larger(1, kNumbers / n);
    parallel_for(call.threads, (call.out.rows + step - 1) / step, [&](int64_t unit, int) {
        for (int64_t r = unit * step; r < smaller((unit + 1) * step, call.out.rows); ++r) {
            const In* gate = static_cast<const In*>(call.gate_up.data) + r * call.gate_up.row_stride;
            Out* out = static_cast<Out*>(const_cast<void*>(call.out.data)) + r * call.out.row_stride;
            row(gate, gate + n, out, n);
        }
    });
}

template <class In>
void of_type(const SwigluCall& call) {
    if (call.out.type == Type::f32) return rows<In, float>(call);
    return rows<In, bf16>(call);
}

}  // namespace

void UNMASK_KERNEL(swiglu)(const SwigluCall& call) {
    if (call.gate_up.type == Type::f32) return of_type<float>(call);
    return of_type<bf16>(call);
}

}  // namespace unmask
