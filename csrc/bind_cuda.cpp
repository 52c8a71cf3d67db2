// The border between Python and the CUDA kernels: checks and raw pointers, nothing else.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/sample_head.h"

namespace py = pybind11;
using namespace unmask::cuda;

namespace {

void require(bool condition, const std::string& message) {
    if (!condition) throw py::value_error(message);
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// (address, row stride) of rows that the kernel reads sixteen bytes at a time.
const void* rows_of(const char* name, const py::tuple& t, int64_t& stride) {
    const auto address = t[0].cast<uintptr_t>();
    stride = t[1].cast<int64_t>();
    require(address && address % 16 == 0, name + std::string(" must have an address that is a multiple of 16"));
    require(stride >= 0 && stride % 8 == 0, name + std::string(" must have a row stride that is a multiple of 8"));
    return pointer<const void>(address);
}


HeadCall sized(int rows, int vocab, const py::tuple& extras) {
    require(rows > 0 && rows <= kMaxRows, "rows must be in [1, " + std::to_string(kMaxRows) + "]");
    require(vocab > 0 && vocab <= kMaxVocab, "vocab must be in [1, " + std::to_string(kMaxVocab) + "]");
    HeadCall call{};
    call.rows = rows;
    call.vocab = vocab;
    call.logprob = pointer<float>(extras[0].cast<uintptr_t>());
    call.max_prob = pointer<float>(extras[1].cast<uintptr_t>());
    call.argmax = pointer<int64_t>(extras[2].cast<uintptr_t>());
    call.margin = pointer<float>(extras[3].cast<uintptr_t>());
    call.entropy = pointer<float>(extras[4].cast<uintptr_t>());
    return call;
}

void run(const std::string& type, const py::tuple& hidden, const py::tuple& weight, int rows, int vocab, int dim,
         uintptr_t gather, uintptr_t offset, const py::tuple& allow, uintptr_t keys, uint64_t seed, float temperature,
         uintptr_t temperatures, uintptr_t tokens, uintptr_t lse, const py::tuple& extras, uintptr_t out,
         uintptr_t positions, uintptr_t workspace, size_t size, uintptr_t state, int device, uintptr_t stream,
         int ctas) {
    HeadCall call = sized(rows, vocab, extras);
    require(type == "bfloat16" || type == "float16", "type must be bfloat16 or float16, got " + type);
    call.type = type == "bfloat16" ? Type::bf16 : Type::fp16;
    call.hidden = rows_of("hidden", hidden, call.hidden_stride);
    call.weight = rows_of("weight", weight, call.weight_stride);
    require(dim > 0 && call.weight_stride >= (vocab > 1 ? dim : 0), "dim must be in [1, row stride of weight]");
    call.dim = dim;
    call.gather = pointer<const int64_t>(gather);
    call.offset = pointer<const float>(offset);
    call.allow = pointer<const int32_t>(allow[0].cast<uintptr_t>());
    call.allow_stride = allow[1].cast<int64_t>();
    call.seed = seed;
    require(temperature >= 0, "temperature must not be negative");
    call.temperature = temperature;
    call.temperatures = pointer<const float>(temperatures);
    require(keys && tokens && lse, "keys, tokens and lse must have an address");
    call.keys = pointer<const int64_t>(keys);
    call.tokens = pointer<int64_t>(tokens);
    call.lse = pointer<float>(lse);
    require(!out == !positions, "out must come with positions");
    call.out = pointer<int64_t>(out);
    call.positions = pointer<const int64_t>(positions);
    require(workspace && workspace % 16 == 0 && size >= workspace_bytes(call),
            "workspace must be on 16 bytes and hold " + std::to_string(workspace_bytes(call)));
    call.workspace = pointer<void>(workspace);
    require(state && state % 16 == 0, "state must be on 16 bytes");
    call.state = pointer<void>(state);
    py::gil_scoped_release release;
    sample_head(call, device, pointer<void>(stream), ctas);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of unmask. Addresses and strides come checked from unmask.kernels.";
    m.attr("MAX_ROWS") = kMaxRows;
    m.attr("MAX_VOCAB") = kMaxVocab;
    m.attr("STATE_BYTES") = kStateBytes;
    m.def("max_rows", &max_rows, "Rows that the shared memory of a device allows.");
    m.def(
        "workspace_bytes",
        [](int rows, int vocab, const py::tuple& extras) { return workspace_bytes(sized(rows, vocab, extras)); },
        py::kw_only(), py::arg("rows"), py::arg("vocab"), py::arg("extras"));
    m.def("sample_head", &run, py::kw_only(), py::arg("type"), py::arg("hidden"), py::arg("weight"), py::arg("rows"),
          py::arg("vocab"), py::arg("dim"), py::arg("gather"), py::arg("offset"), py::arg("allow"), py::arg("keys"),
          py::arg("seed"), py::arg("temperature"), py::arg("temperatures"), py::arg("tokens"), py::arg("lse"),
          py::arg("extras"), py::arg("out"), py::arg("positions"), py::arg("workspace"), py::arg("size"),
          py::arg("state"), py::arg("device"), py::arg("stream"), py::arg("ctas") = 0);
}
