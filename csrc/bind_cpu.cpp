// The border between Python and the CPU kernels: checks and raw pointers, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/add_norm.h"
#include "cpu/attention.h"
#include "cpu/divergence.h"
#include "cpu/expected_embedding.h"
#include "cpu/isa.h"
#include "cpu/sample_head.h"
#include "cpu/swiglu.h"
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

Matrix matrix_or_none(const char* name, const py::object& t) {
    return t.is_none() ? Matrix{} : matrix(name, t.cast<py::tuple>());
}

void add_norm(const py::tuple& residual, const py::object& delta, const py::tuple& out, uintptr_t weight,
              uintptr_t bias, const py::object& gate, const py::object& shift, const py::object& scale,
              const std::vector<int64_t>& row_counts, float eps, bool rms, int threads,
              const std::string& isa) {
    AddNormCall call{};
    call.residual = matrix("residual", residual);
    call.delta = matrix_or_none("delta", delta);
    call.out = matrix("out", out);
    require(call.residual.type == Type::f32, "residual must be float32");
    for (const Matrix* one : {&call.delta, &call.out})
        require(!one->data || (one->rows == call.residual.rows && one->cols == call.residual.cols),
                "delta and out must have the shape of residual");
    call.gate = matrix_or_none("gate", gate);
    call.shift = matrix_or_none("shift", shift);
    call.scale = matrix_or_none("scale", scale);
    call.num_sequences = static_cast<int64_t>(row_counts.size());
    int64_t rows = 0;
    for (int64_t n : row_counts) {
        require(n >= 0, "row_counts must not be negative");
        rows += n;
    }
    require(rows == call.residual.rows, "row_counts must sum to the rows of residual");
    for (const Matrix* one : {&call.gate, &call.shift, &call.scale})
        require(!one->data || (one->type == Type::f32 && one->rows == call.num_sequences &&
                               one->cols == call.residual.cols),
                "gate, shift and scale must be float32, one row per sequence");
    require(weight, "weight must have an address");
    require(threads > 0, "threads must be positive");
    call.weight = pointer<const float>(weight);
    call.bias = pointer<const float>(bias);
    call.row_counts = row_counts.data();
    call.eps = eps;
    call.rms = rms;
    call.threads = threads;
    if (rows == 0) return;
    const auto run = kernels_of(isa).add_norm;
    py::gil_scoped_release release;
    run(call);
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

// (address, token stride, head stride)
Heads heads(const char* name, const std::tuple<uintptr_t, int64_t, int64_t>& t) {
    require(std::get<0>(t), name + std::string(" must have an address"));
    return {pointer<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}

void attention(const std::tuple<uintptr_t, int64_t, int64_t>& query, const std::tuple<uintptr_t, int64_t, int64_t>& key,
               const std::tuple<uintptr_t, int64_t, int64_t>& value, const std::tuple<uintptr_t, int64_t, int64_t>& out,
               const std::string& type, const std::tuple<int64_t, int64_t, int64_t>& shape, float scale, int64_t block,
               const std::vector<int64_t>& lengths, const std::vector<int64_t>& row_counts, uintptr_t cos,
               uintptr_t sin, uintptr_t positions, int threads, const std::string& isa) {
    require(type == "float32" || type == "bfloat16", "type must be float32 or bfloat16, got " + type);
    AttentionCall call{};
    call.type = type == "float32" ? Type::f32 : Type::bf16;
    call.query = heads("query", query);
    call.key = heads("key", key);
    call.value = heads("value", value);
    call.out = heads("out", out);
    std::tie(call.num_heads, call.num_groups, call.dim) = shape;
    require(call.num_groups > 0 && call.dim > 0 && call.num_heads > 0 && call.num_heads % call.num_groups == 0,
            "shape must be (heads, a divisor of heads, columns)");
    require(lengths.size() == row_counts.size(), "lengths and row_counts must have one number per sequence");
    for (size_t s = 0; s < lengths.size(); ++s)
        require(lengths[s] >= 0 && row_counts[s] >= 0 && (lengths[s] > 0 || row_counts[s] == 0),
                "lengths must be positive where there are queries, and nothing negative");
    require(!cos == !sin && (!cos || call.dim % 2 == 0), "cos and sin must be given together, for an even dim");
    require(threads > 0, "threads must be positive");
    require(block >= 0, "block must be positive, or 0 for all keys");
    call.scale = scale;
    call.block = block;
    call.num_sequences = static_cast<int64_t>(lengths.size());
    call.lengths = lengths.data();
    call.row_counts = row_counts.data();
    call.cos = pointer<const float>(cos);
    call.sin = pointer<const float>(sin);
    call.positions = pointer<const int64_t>(positions);
    call.threads = threads;
    const auto run = kernels_of(isa).attention;
    py::gil_scoped_release release;
    run(call);
}

void swiglu(const py::tuple& gate_up, const py::tuple& out, int threads, const std::string& isa) {
    SwigluCall call{matrix("gate_up", gate_up), matrix("out", out), threads};
    require(call.gate_up.rows == call.out.rows && call.gate_up.cols == 2 * call.out.cols,
            "out must have the rows of gate_up and half its columns");
    for (const Matrix* one : {&call.gate_up, &call.out})
        require(one->type != Type::f16 && one->col_stride == 1,
                "gate_up and out must be float32 or bfloat16 with contiguous columns");
    require(threads > 0, "threads must be positive");
    if (call.out.rows == 0) return;
    const auto run = kernels_of(isa).swiglu;
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
    m.def("add_norm", &add_norm, py::kw_only(), py::arg("residual"), py::arg("delta"), py::arg("out"),
          py::arg("weight"), py::arg("bias"), py::arg("gate"), py::arg("shift"), py::arg("scale"),
          py::arg("row_counts"), py::arg("eps"), py::arg("rms"), py::arg("threads"), py::arg("isa") = "");
    m.def("attention", &attention, py::kw_only(), py::arg("query"), py::arg("key"), py::arg("value"), py::arg("out"),
          py::arg("type"), py::arg("shape"), py::arg("scale"), py::arg("block"), py::arg("lengths"),
          py::arg("row_counts"), py::arg("cos"), py::arg("sin"), py::arg("positions"), py::arg("threads"),
          py::arg("isa") = "");
    m.def("sample_head", &sample_head, py::kw_only(), py::arg("logits"), py::arg("allow"), py::arg("keys"),
          py::arg("seed"), py::arg("top_k"), py::arg("top_p"), py::arg("threads"), py::arg("tokens"),
          py::arg("logprob"), py::arg("lse"), py::arg("max_prob"), py::arg("argmax"), py::arg("margin"),
          py::arg("entropy"), py::arg("isa") = "");
    m.def("expected_embedding", &expected_embedding, py::kw_only(), py::arg("logits"), py::arg("table"),
          py::arg("threads"), py::arg("embedding"), py::arg("lse"), py::arg("isa") = "");
    m.def("divergence", &divergence, py::kw_only(), py::arg("a"), py::arg("b"), py::arg("threads"), py::arg("kl"),
          py::arg("entropy"), py::arg("lse_a"), py::arg("lse_b"), py::arg("isa") = "");
    m.def("swiglu", &swiglu, py::kw_only(), py::arg("gate_up"), py::arg("out"), py::arg("threads"),
          py::arg("isa") = "");
    m.def("philox", &words, "The four words of one counter; csrc/noise.h seen from Python.");
    m.def("gumbel32", [](uint32_t word) { return gumbel(word); });
    m.def("gumbel64", [](uint32_t high, uint32_t low) { return gumbel(high, low); });
}
