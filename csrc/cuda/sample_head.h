// sample_head on a GPU: one call's pointers, sizes and strides (in elements). All memory is the device's.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace unmask::cuda {

constexpr int kMaxRows = 256;
constexpr int kMaxVocab = 1 << 21;

enum class Type { bf16, fp16 };

// Outputs that are null are not computed; tokens and lse always are.
struct HeadCall {
    Type type;           // of hidden and weight
    const void* hidden;  // [*, dim], columns contiguous, every row on 16 bytes
    const void* weight;  // [vocab, dim], likewise
    int64_t hidden_stride, weight_stride;
    int rows, vocab, dim;
    const int64_t* gather;  // [rows] or null: row r is row gather[r] of hidden
    const float* offset;    // [vocab] or null: added to the logits, -inf for an id that cannot be drawn
    const int32_t* allow;   // [rows, words] or null: id i may be drawn if bit i % 32 of word i / 32 is set
    int64_t allow_stride;
    const int64_t* keys;  // [rows, 3] contiguous: sequence, position, draw
    uint64_t seed;
    float temperature;          // 0: the largest logit
    const float* temperatures;  // [rows] or null: instead of it
    int64_t* tokens;            // [rows]; -1 for a row with a NaN or +inf logit or with nothing to draw
    float* lse;                 // [rows]; not finite for such a row
    float *logprob, *max_prob, *margin, *entropy;
    int64_t* argmax;
    int64_t* out;  // or null; the tokens of good rows are written to out[positions[row]] too
    const int64_t* positions;
    void* workspace;  // workspace_bytes(call), on 16 bytes, uninitialised
    void* state;      // kStateBytes, on 16 bytes: zero before the first call that uses it, zero again after each

    bool ranked() const { return max_prob || margin || argmax; }
};

constexpr size_t kStateBytes = 4112;

size_t workspace_bytes(const HeadCall& call);

// The most rows for which the device has the memory.
int max_rows(int device);

// Starts the call on a stream of the device; `ctas` > 0 asks for that many instead of one per multiprocessor.
void sample_head(const HeadCall& call, int device, void* stream, int ctas);

}  // namespace unmask::cuda
