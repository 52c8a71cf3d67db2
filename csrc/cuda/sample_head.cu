// sample_head on a GPU, for so few rows that reading the weights is what takes the time. One launch, no host decision.
//
// A CTA multiplies a run of noise blocks and races each as soon as its logits are known: the block's log-sum-exp goes
// into a table, its score into an atomic maximum per row, and where it takes the lead the tokens of the block race at
// once. A row has about log(blocks) leads, so this costs nothing and no logits leave the CTA. The CTA that completes a
// span of blocks merges their log-sum-exps; the one that completes the last span merges the spans and writes the
// outputs. Neither the grid nor the order of the CTAs changes a bit of them.
#include "sample_head.h"

#include "product.cuh"
#include "race.cuh"

namespace unmask::cuda {
namespace {

struct Arguments {
    HeadCall call;
    Workspace work;
    int stages;
};

// Shared memory in front of the ring.
template <class S>
struct alignas(128) Front {
    Row rows[S::kRows];
    Tile<S> tile;
    int last;
};

template <class S>
UNMASK_DEVICE void read_rows(const HeadCall& call, Row* rows) {
    for (int row = thread_index(); row < S::kRows; row += kThreads) {
        Row& to = rows[row];
        to = {-1, 0, 0, 0, 1.0f, false};
        if (row >= call.rows) continue;
        const int64_t* key = call.keys + 3 * row;
        to.start = (call.gather ? call.gather[row] : row) * call.hidden_stride;
        to.position = static_cast<uint32_t>(key[1]);
        to.sequence = static_cast<uint32_t>(key[0]);
        to.draw = static_cast<uint32_t>(key[2]);
        const float temperature = call.temperatures ? call.temperatures[row] : call.temperature;
        to.random = temperature != 0.0f;
        to.scale = to.random ? 1.0f / temperature : 1.0f;
    }
}

// What is added to the logit of the id that this thread looks after; -inf after the last id.
template <class S>
UNMASK_DEVICE float own_offset(const HeadCall& call, int block) {
    const int id = block * kNoiseBlock + thread_index();
    if (thread_index() >= S::kIds || id >= call.vocab) return -kInfinity;
    return call.offset ? call.offset[id] : 0.0f;
}

// All that happens to a block after its product. `i` counts the blocks multiplied together.
template <class S>
UNMASK_DEVICE void race_block(const Arguments& arguments, Front<S>& front, const typename S::Sums& sums, float offset,
                              int first_block, int i) {
    const HeadCall& call = arguments.call;
    State* state = static_cast<State*>(call.state);
    const int block = first_block + i, warps_part = thread_index() / 32 / S::kWarpsPerPart;
    for (int part = 0; part * S::kPart < call.rows && part < S::kParts; ++part) {
        sync_threads();  // nobody looks at the tile any more
        if (thread_index() / kNoiseBlock == i) front.tile.offset[thread_index() % kNoiseBlock] = offset;
        if (part == warps_part) {
            if (i == 0)
                store_logits<S>(sums[0], front.tile.logits, Tile<S>::kStride);
            else
                store_logits<S>(sums[S::kBlocks - 1], front.tile.logits, Tile<S>::kStride);
        }
        sync_threads();
        score_block<S>(call, arguments.work, state, front.rows, front.tile, block, i, part);
        sync_threads();
        draw_tokens<S>(call, arguments.work, front.rows, front.tile, block, part);
    }
}

// Adds to a counter; true in the CTA that makes it `total`, which then sees what the others published before and leaves
// zero behind. `last` is in shared memory.
UNMASK_DEVICE bool completes(uint32_t* counter, int count, int total, int* last) {
    fence();
    sync_threads();
    if (thread_index() == 0) {
        *last = atomic_add(counter, count) + count == static_cast<uint32_t>(total);
        if (*last) *counter = 0;
    }
    sync_threads();
    fence();
    return *last;
}

// Merges what the blocks [first, end) of this CTA complete. `copy` is `size` bytes of shared memory.
UNMASK_DEVICE void finish(const HeadCall& call, const Workspace& work, int first, int end, uint32_t copy, int size,
                          int* last) {
    State* state = static_cast<State*>(call.state);
    for (int span = first / kSpan; span * kSpan < end; ++span) {
        const int start = span * kSpan, past = smaller(start + kSpan, work.blocks.count);
        const int count = smaller(past, end) - (start > first ? start : first);
        if (!completes(state->scored + span, count, past - start, last)) continue;
        merge_rows(work.blocks, call.rows, start, past - start, copy, size,
                   [&](int row, const Summary& summary) { enter(work.spans, row, span, summary); });
        if (!completes(&state->merged, 1, work.spans.count, last)) continue;
        merge_rows(work.spans, call.rows, 0, work.spans.count, copy, size,
                   [&](int row, const Summary& summary) { write_row(call, work, state, row, summary); });
    }
}

template <class S>
UNMASK_KERNEL(kThreads) race(UNMASK_PARAMETER Arguments arguments) {
    const HeadCall& call = arguments.call;
    const int64_t blocks = arguments.work.blocks.count;
    const int first = static_cast<int>(cta_index() * blocks / num_ctas());
    const int end = static_cast<int>((cta_index() + 1) * blocks / num_ctas());
    Front<S>& front = *reinterpret_cast<Front<S>*>(shared_memory());
    constexpr uint32_t kRing = sizeof(Front<S>);
    const int stages = arguments.stages;
    read_rows<S>(call, front.rows);
    sync_threads();

    Loader<S> loader{first, end, 0, 0};
    for (int i = 0; i < stages - 1; ++i) loader.advance(call, front.rows, kRing, stages);
    int slot = 0;
    for (int block = first; block < end; block += S::kBlocks) {
        const bool all = end - block >= S::kBlocks;
        const float offset = own_offset<S>(call, block);
        draw_noise<S>(call, front.rows, front.tile, block);
        typename S::Sums sums = {};
        for (int column = 0; column < call.dim; column += kDepth) {
            wait_for_stage(stages - 2);
            sync_threads();  // the stage is complete, and nobody reads the one before it any more
            loader.advance(call, front.rows, kRing, stages);
            if (all)
                multiply<S, S::kBlocks>(sums, kRing + slot * S::kStageBytes);
            else
                multiply<S, 1>(sums, kRing + slot * S::kStageBytes);
            slot = slot + 1 == stages ? 0 : slot + 1;
        }
        for (int i = 0; i < S::kBlocks && block + i < end; ++i)
            race_block<S>(arguments, front, sums, offset, block, i);
    }

    finish(call, arguments.work, first, end, kRing, stages * S::kStageBytes, &front.last);
}

template <class S>
int stages_within(int shared_bytes) {
    const int stages = (shared_bytes - static_cast<int>(sizeof(Front<S>))) / S::kStageBytes;
    return smaller(stages, kMaxStages);
}

template <class S>
void run(const HeadCall& call, const Workspace& work, const Limits& limits, int ctas, void* stream) {
    const int stages = stages_within<S>(limits.shared_bytes);
    if (stages < 2) throw std::runtime_error("sample_head: the device has too little shared memory for these rows");
    const int shared_bytes = static_cast<int>(sizeof(Front<S>)) + stages * S::kStageBytes;
    ctas = smaller(ctas > 0 ? ctas : limits.multiprocessors, work.blocks.count);
    launch(race<S>, ctas, kThreads, shared_bytes, stream, Arguments{call, work, stages});
}

template <class Operand>
void run_rows(const HeadCall& call, const Workspace& work, const Limits& limits, int ctas, void* stream) {
    if (call.rows <= 8) return run<Shape<Operand, 8>>(call, work, limits, ctas, stream);
    if (call.rows <= 32) return run<Shape<Operand, 32>>(call, work, limits, ctas, stream);
    if (call.rows <= 64) return run<Shape<Operand, 64>>(call, work, limits, ctas, stream);
    if (call.rows <= 128) return run<Shape<Operand, 128>>(call, work, limits, ctas, stream);
    return run<Shape<Operand, 256>>(call, work, limits, ctas, stream);
}

// Deals out the workspace of a call; the tables have the alignment of a copy because their lines have kLanes numbers.
struct Dealer {
    char* base;
    int64_t rows;
    size_t bytes = 0;

    template <class T>
    void take(T*& table, int stride) {
        table = reinterpret_cast<T*>(base + bytes);
        bytes += sizeof(T) * rows * stride;
    }

    void take(Table& table, int count, const HeadCall& call) {
        table.count = count;
        table.stride = (count + kLanes - 1) / kLanes * kLanes;
        take(table.lse, table.stride);
        if (call.entropy) take(table.entropy, table.stride);
        if (!call.ranked()) return;
        take(table.max, table.stride);
        take(table.second, table.stride);
        take(table.argmax, table.stride);
    }
};

size_t deal(const HeadCall& call, Workspace& work) {
    const int blocks = (call.vocab + kNoiseBlock - 1) / kNoiseBlock;
    Dealer dealer{static_cast<char*>(call.workspace), call.rows};
    dealer.take(work.blocks, blocks, call);
    dealer.take(work.spans, (blocks + kSpan - 1) / kSpan, call);
    dealer.take(work.winner, work.blocks.stride);
    return dealer.bytes;
}

}  // namespace

size_t workspace_bytes(const HeadCall& call) {
    Workspace work{};
    return deal(call, work);
}

int max_rows(int device) {
    const int shared_bytes = device_limits(device).shared_bytes;
    if (stages_within<Shape<Bf16, 256>>(shared_bytes) >= 2) return 256;
    if (stages_within<Shape<Bf16, 64>>(shared_bytes) >= 2) return 64;
    return stages_within<Shape<Bf16, 32>>(shared_bytes) >= 2 ? 32 : 0;
}

void sample_head(const HeadCall& call, int device, void* stream, int ctas) {
    static_assert(sizeof(State) <= kStateBytes, "the state must fit");
    const OnDevice on_device(device);
    Workspace work{};
    deal(call, work);
    const Limits limits = device_limits(device);
    if (call.type == Type::bf16)
        run_rows<Bf16>(call, work, limits, ctas, stream);
    else
        run_rows<Fp16>(call, work, limits, ctas, stream);
}

}  // namespace unmask::cuda
