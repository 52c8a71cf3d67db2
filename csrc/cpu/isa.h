// The kernels of each instruction set: every operator's source is compiled once per row of this table.
#pragma once

namespace unmask {

struct DivergenceCall;
struct EmbeddingCall;
struct HeadCall;

struct Kernels {
    const char* isa;
    bool supported;  // by this processor
    void (*sample_head)(const HeadCall&);
    void (*expected_embedding)(const EmbeddingCall&);
    void (*divergence)(const DivergenceCall&);
};

// Fastest first; ends with a row whose isa is null.
const Kernels* kernels();

}  // namespace unmask
