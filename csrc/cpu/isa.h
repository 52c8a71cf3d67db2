// The kernels of each instruction set: every operator's source is compiled once per row of this table.
#pragma once

namespace unmask {

struct AddNormCall;
struct AttentionCall;
struct DivergenceCall;
struct EmbeddingCall;
struct HeadCall;
struct SwigluCall;

struct Kernels {
    const char* isa;
    bool supported;  // by this processor
    void (*add_norm)(const AddNormCall&);
    void (*attention)(const AttentionCall&);
    void (*divergence)(const DivergenceCall&);
    void (*expected_embedding)(const EmbeddingCall&);
    void (*sample_head)(const HeadCall&);
    void (*swiglu)(const SwigluCall&);
};

// Fastest first; ends with a row whose isa is null.
const Kernels* kernels();

}  // namespace unmask
