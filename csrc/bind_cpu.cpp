// The border between Python and the CPU kernels: checks and raw pointers, nothing else.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/divergence.h"
#include "cpu/expected_embedding.h"
#include "cpu/isa.h"
#include "cpu/sample_head.h"
#include "noise.h"

namespace py = pybind11;
using namespace unmask;

namespace {

void require(bool condition, const std::string& message) {
    if (!condition) throw py::value_error(message);
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// (address, "float32" | "bfloat16" | "float16", (rows, cols), (row stride, column stride))
Matrix matrix(const char* name, const py::tuple& t) {
    const auto given = t[1].cast<std::string>();
    const bool f32 = given == "float32", bf16 = given == "bfloat16", f16 = given == "float16";
    require(f32 || bf16 || f16, name + (" must be float32, bfloat16 or float16, got " + given));
    const Type type = f32 ? Type::f32 : bf16 ? Type::bf16 : Type::f16;
    const auto shape = t[2].cast<std::pair<int64_t, int64_t>>(), stride = t[3].cast<std::pair<int64_t, int64_t>>();
    Matrix m{pointer<void>(t[0].cast<uintptr_t>()), type, shape.first, shape.second, stride.first, stride.second};
    require(m.rows >= 0 && m.cols > 0, name + std::string(" must have at least one column"));
    require(m.data || m.rows == 0, name + std::string(" must have an address"));
    return m;
}

// rows: the address of int64 [num_rows], or 0 for every row of hidden.
Head head(const py::tuple& hidden, const py::object& weight, uintptr_t rows, int64_t num_rows) {
    Head h;
    h.hidden = matrix("hidden", hidden);
    if (!weight.is_none()) {
        h.weight = matrix("weight", weight.cast<py::tuple>());
        require(h.weight.rows > 0 && h.weight.cols == h.hidden.cols, "weight must be [V, D], V > 0, as hidden");
        require(h.weight.col_stride == 1, "weight must have contiguous columns");
    }
    h.rows = pointer<const int64_t>(rows);
    h.num_rows = num_rows;
    require(rows ? num_rows >= 0 : num_rows == h.hidden.rows, "rows must be given unless num_rows is that of hidden");
    for (int64_t r = 0; rows && r < num_rows; ++r)
        require(h.rows[r] >= 0 && h.rows[r] < h.hidden.rows, "rows must be rows of hidden");
    return h;
}

const Kernels& kernels_of(const std::string& isa) {
    std::string supported;
    for (const Kernels* one = kernels(); one->isa; ++one) {
        if (one->supported && (isa.empty() || isa == one->isa)) return *one;
        if (one->supported) supported += std::string(supported.empty() ? "" : ", ") + one->isa;
    }
    throw py::value_error("isa must be one of " + supported + ", got " + isa);
}

// (hidden, weight, rows, number of rows, address of the offset or 0, address of the temperatures)
TemperedHead tempered(const py::tuple& t) {
    TemperedHead law;
    law.head = head(t[0].cast<py::tuple>(), t[1], t[2].cast<uintptr_t>(), t[3].cast<int64_t>());
    law.offset = pointer<const float>(t[4].cast<uintptr_t>());
    law.temperature = pointer<const float>(t[5].cast<uintptr_t>());
    require(law.temperature || law.head.num_rows == 0, "temperature must have an address");
    return law;
}

// Addresses, 0 for none. allow: (address, row stride).
void sample_head(const py::tuple& logits, std::pair<uintptr_t, int64_t> allow, uintptr_t keys, uint64_t seed,
                 int64_t top_k, float top_p, int threads, uintptr_t tokens, uintptr_t logprob, uintptr_t lse,
                 uintptr_t max_prob, uintptr_t argmax, uintptr_t margin, uintptr_t entropy, const std::string& isa) {
    HeadCall call{};
    call.logits = tempered(logits);
    const int64_t num_rows = call.logits.head.num_rows;
    for (int64_t r = 0; r < num_rows; ++r)
        require(call.logits.temperature[r] >= 0 && call.logits.temperature[r] < kInfinity,
                "temperature must be finite and not negative");
    require(top_k >= 0, "top_k must be positive, or 0 for no limit");
    require(top_p > 0 && top_p <= 1, "top_p must satisfy 0 < top_p <= 1");
    require(threads > 0, "threads must be positive");
    const auto run = kernels_of(isa).sample_head;
    if (num_rows == 0) return;
    require(keys && tokens && logprob && lse, "keys, tokens, logprob and lse must have an address");
    call.allow = pointer<const int32_t>(allow.first);
    call.allow_stride = allow.second;
    call.keys = pointer<const int64_t>(keys);
    call.seed = seed;
    call.top_k = top_k;
    call.top_p = top_p;
    call.threads = threads;
    call.tokens = pointer<int64_t>(tokens);
    call.logprob = pointer<float>(logprob);
    call.lse = pointer<float>(lse);
    call.max_prob = pointer<float>(max_prob);
    call.argmax = pointer<int64_t>(argmax);
    call.margin = pointer<float>(margin);
    call.entropy = pointer<float>(entropy);
    py::gil_scoped_release release;
    run(call);
}

void expected_embedding(const py::tuple& logits, const py::tuple& table, int threads, uintptr_t embedding,
                        uintptr_t lse, const std::string& isa) {
    EmbeddingCall call{tempered(logits), matrix("table", table), threads, pointer<float>(embedding),
                       pointer<float>(lse)};
    require(call.table.rows == call.logits.head.vocab(), "table must be [V, E]");
    require(threads > 0, "threads must be positive");
    if (call.logits.head.num_rows == 0) return;
    require(embedding && lse, "embedding and lse must have an address");
    const auto run = kernels_of(isa).expected_embedding;
    py::gil_scoped_release release;
    run(call);
}

void divergence(const py::tuple& a, const py::tuple& b, int threads, uintptr_t kl, uintptr_t entropy, uintptr_t lse_a,
                uintptr_t lse_b, const std::string& isa) {
    DivergenceCall call{tempered(a), tempered(b), threads, pointer<float>(kl), pointer<float>(entropy),
                        pointer<float>(lse_a), pointer<float>(lse_b)};
    require(call.a.head.num_rows == call.b.head.num_rows, "a and b must have as many rows");
    require(call.a.head.vocab() == call.b.head.vocab(), "a and b must have as many ids");
    require(threads > 0, "threads must be positive");
    if (call.a.head.num_rows == 0) return;
    require(kl && entropy && lse_a && lse_b, "kl, entropy, lse_a and lse_b must have an address");
    const auto run = kernels_of(isa).divergence;
    py::gil_scoped_release release;
    run(call);
}

py::list isas() {
    py::list names;
    for (const Kernels* one = kernels(); one->isa; ++one)
        if (one->supported) names.append(one->isa);
    return names;
}

py::tuple words(uint32_t index, uint32_t position, uint32_t sequence, uint32_t stream_draw, uint64_t seed) {
    const Words w = philox(index, position, sequence, stream_draw, static_cast<uint32_t>(seed),
                           static_cast<uint32_t>(seed >> 32));
    return py::make_tuple(w.w0, w.w1, w.w2, w.w3);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of unmask. Addresses and strides come checked from unmask.kernels.";
    m.def("isas", &isas, "Instruction sets this build has and this processor runs, fastest first.");
    m.def("sample_head", &sample_head, py::kw_only(), py::arg("logits"), py::arg("allow"), py::arg("keys"),
          py::arg("seed"), py::arg("top_k"), py::arg("top_p"), py::arg("threads"), py::arg("tokens"),
          py::arg("logprob"), py::arg("lse"), py::arg("max_prob"), py::arg("argmax"), py::arg("margin"),
          py::arg("entropy"), py::arg("isa") = "");
    m.def("expected_embedding", &expected_embedding, py::kw_only(), py::arg("logits"), py::arg("table"),
          py::arg("threads"), py::arg("embedding"), py::arg("lse"), py::arg("isa") = "");
    m.def("divergence", &divergence, py::kw_only(), py::arg("a"), py::arg("b"), py::arg("threads"), py::arg("kl"),
          py::arg("entropy"), py::arg("lse_a"), py::arg("lse_b"), py::arg("isa") = "");
    m.def("philox", &words, "The four words of one counter; csrc/noise.h seen from Python.");
    m.def("gumbel32", [](uint32_t word) { return gumbel(word); });
    m.def("gumbel64", [](uint32_t high, uint32_t low) { return gumbel(high, low); });
}
