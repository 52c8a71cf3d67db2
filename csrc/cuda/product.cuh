// The product of a few rows of hidden with a stream of weights. A stage of shared memory holds kDepth columns of one or
// two noise blocks of weight and of every row of hidden; several stages are on their way while one is multiplied.
// The ids are the long side of the tensor-core product, so every weight is read from memory once. A logit is one chain
// of products over the columns in order, whatever rows surround it.
#pragma once

#include "../noise.h"
#include "primitives.cuh"
#include "sample_head.h"

namespace unmask::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kDepth = 64;              // columns in a stage
constexpr int kLineBytes = 2 * kDepth;  // of one id or row in a stage, eight pieces of 16 bytes
constexpr int kLinesAtOnce = kThreads / 8;

// How the CTA shares the work for up to kRows rows.
template <class OperandType, int rows>
struct Shape {
    using Operand = OperandType;
    static constexpr int kRows = rows;
    static constexpr int kBlocks = kRows <= 128 ? 2 : 1;  // noise blocks multiplied at a time
    static constexpr int kIds = kBlocks * kNoiseBlock;
    static constexpr int kPart = kRows <= 64 ? kRows : 64;  // rows of one warp, and of one turn of the race
    static constexpr int kParts = kRows / kPart;
    static constexpr int kWarpsPerPart = kWarps / kParts;
    static constexpr int kIdTiles = kNoiseBlock / 16 / kWarpsPerPart;  // of 16 ids, per warp and noise block
    static constexpr int kRowTiles = kPart / 8;                        // of 8 rows, per warp
    static constexpr int kStageBytes = (kIds + kRows) * kLineBytes;
    using Sums = float[kBlocks][kIdTiles][kRowTiles][4];
};

struct Row {
    int64_t start;  // of its hidden numbers; -1: no such row, all zeros
    uint32_t position, sequence, draw;
    float scale;  // of its logits: one over the temperature
    bool random;  // or the largest logit
};

// Pieces of eight lines in a column of shared memory fall into different banks.
UNMASK_DEVICE uint32_t piece_offset(int line, int piece) { return line * kLineBytes + ((piece ^ (line & 7)) << 4); }

UNMASK_FN int smaller(int a, int b) { return a < b ? a : b; }

// Fills the stages of a ring, block by block and column by column.
template <class S>
struct Loader {
    int block, end;  // noise blocks not yet loaded
    int column, slot;

    UNMASK_DEVICE void advance(const HeadCall& call, const Row* rows, uint32_t ring, int stages) {
        if (block < end) {
            load(call, rows, ring + slot * S::kStageBytes);
            slot = slot + 1 == stages ? 0 : slot + 1;
            column += kDepth;
            if (column >= call.dim) column = 0, block += S::kBlocks;
        }
        commit_copies();  // an empty group too: the waits count groups
    }

    UNMASK_DEVICE void load(const HeadCall& call, const Row* rows, uint32_t stage) const {
        const int line = thread_index() / 8, piece = thread_index() % 8, first = column + 8 * piece;
        const int left = 2 * (call.dim - first), bytes = left < 0 ? 0 : smaller(left, 16);
        const uint32_t to = stage + piece_offset(line, piece);
        const int id = block * kNoiseBlock + line;
        const int64_t step = 2 * kLinesAtOnce * call.weight_stride;
        const char* weight = static_cast<const char*>(call.weight) + 2 * (id * call.weight_stride + first);
        const int ids = smaller(end - block, S::kBlocks) * kNoiseBlock;
#pragma unroll
        for (int i = 0; i < S::kIds; i += kLinesAtOnce)
            if (i < ids) {
                const int present = id + i < call.vocab ? bytes : 0;
                copy_async(to + i * kLineBytes, present ? weight : static_cast<const char*>(call.weight), present);
                weight += step;
            }
        const char* hidden = static_cast<const char*>(call.hidden) + 2 * first;
#pragma unroll
        for (int i = 0; i < S::kRows; i += kLinesAtOnce)
            if (S::kRows >= kLinesAtOnce || line < S::kRows) {
                const int64_t start = rows[line + i].start;
                const int present = start >= 0 ? bytes : 0;
                const char* from = present ? hidden + 2 * start : static_cast<const char*>(call.hidden);
                copy_async(to + (S::kIds + i) * kLineBytes, from, present);
            }
    }
};

// Waits for all but the latest `pending` groups of this thread.
UNMASK_DEVICE void wait_for_stage(int pending) {
    switch (pending) {
        case 0: return wait_copies<0>();
        case 1: return wait_copies<1>();
        case 2: return wait_copies<2>();
        case 3: return wait_copies<3>();
        default: return wait_copies<4>();
    }
}
constexpr int kMaxStages = 6;  // wait_for_stage knows up to kMaxStages - 2 pending groups

// Adds the products of a stage's columns, of its first kCount noise blocks.
template <class S, int kCount>
UNMASK_DEVICE void multiply(typename S::Sums& sums, uint32_t stage) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int id = warp % S::kWarpsPerPart * S::kIdTiles * 16 + lane % 16;
    const int row = warp / S::kWarpsPerPart * S::kPart + lane / 16 * 8 + lane % 8;
    const uint32_t ids = stage + id * kLineBytes, rows = stage + (S::kIds + row) * kLineBytes;
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
        const uint32_t id_piece = (2 * step + lane / 16 ^ lane & 7) << 4;
        const uint32_t row_piece = (2 * step + lane / 8 % 2 ^ lane & 7) << 4;
        uint32_t a[kCount][S::kIdTiles][4];
#pragma unroll
        for (int block = 0; block < kCount; ++block)
#pragma unroll
            for (int tile = 0; tile < S::kIdTiles; ++tile)
                load_matrices(a[block][tile], ids + (block * kNoiseBlock + tile * 16) * kLineBytes + id_piece);
        constexpr int kPair = S::kRowTiles == 1 ? 1 : 2;  // row tiles loaded together
#pragma unroll
        for (int across = 0; across < S::kRowTiles; across += kPair) {
            uint32_t b[2 * kPair];
            load_matrices(b, rows + across * 8 * kLineBytes + row_piece);
#pragma unroll
            for (int block = 0; block < kCount; ++block)
#pragma unroll
                for (int tile = 0; tile < S::kIdTiles; ++tile)
#pragma unroll
                    for (int i = 0; i < kPair; ++i)
                        multiply_add(typename S::Operand{}, sums[block][tile][across + i], a[block][tile], b[2 * i],
                                     b[2 * i + 1]);
        }
    }
}

// Writes this warp's logits of one noise block to logits[row in the part * stride + id in the block].
template <class S>
UNMASK_DEVICE void store_logits(const float (&sums)[S::kIdTiles][S::kRowTiles][4], float* logits, int stride) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int id = warp % S::kWarpsPerPart * S::kIdTiles * 16 + lane / 4, row = lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < S::kIdTiles; ++tile)
#pragma unroll
        for (int across = 0; across < S::kRowTiles; ++across) {
            float* to = logits + (across * 8 + row) * stride + tile * 16 + id;
            to[0] = sums[tile][across][0];
            to[stride] = sums[tile][across][1];
            to[8] = sums[tile][across][2];
            to[stride + 8] = sums[tile][across][3];
        }
}

}  // namespace unmask::cuda
