// Forward attention over sorted key ranges on Hopper (wgmma), head_dim 64 or 128, 16-bit inputs.
//
// computes:      out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j], lse[i] = log sum_j exp(scale * q[i] . k[j]), j over
//                k_index[key_start[r] : key_end[r]] where i = q_index[r].
// grid/block:    one persistent block per SM; a tile is kBlockM sorted query rows of one head. Warpgroup 0 gathers rows (cp.async),
//                each of the others owns 64 query rows. Tiles come from an atomic counter, one head after another, last rows first.
// shared memory: 2 * (kQueryBuffers * kBlockM + 2 * kStages * kBlockN) * kHeadDim bytes, row data, barriers (kSharedBytes).
// inputs/outputs: Params (params_sm90.cuh): q, k, v, out (batch, heads, rows, head_dim) in 16 bits, rows 16-byte aligned; lse float32.
// version and source: warp specialisation, two-group overlap and register split after FlashAttention-3 (Shah et al. 2024, section 3;
//                hopper/mainloop_fwd_sm90_tma_gmma_ws.hpp, paged loads); new here: gather of both operands by sorted index, ranges, skipping per warpgroup.
#if !defined(SCFA_HEAD_DIM) || !defined(SCFA_BLOCK_N) || !defined(SCFA_WARPGROUPS) || !defined(SCFA_STAGES) || \
    !defined(SCFA_QUERY_BUFFERS)
#error "SCFA_HEAD_DIM, SCFA_BLOCK_N, SCFA_WARPGROUPS, SCFA_STAGES, SCFA_QUERY_BUFFERS: set by launch_sm90.py"
#endif
#include "mbarrier.cuh"
#include "wgmma.cuh"
#include "params_sm90.cuh"
#include "gather_sm90.cuh"
#include "softmax_sm90.cuh"
#include "tiles_sm90.cuh"

constexpr int kHeadDim = SCFA_HEAD_DIM;
constexpr int kBlockN = SCFA_BLOCK_N;
constexpr int kWarpgroups = SCFA_WARPGROUPS;  // multiplying ones
constexpr int kStages = SCFA_STAGES;          // key/value buffers
constexpr int kQueryBuffers = SCFA_QUERY_BUFFERS;
constexpr int kBlockM = 64 * kWarpgroups;
constexpr int kPanels = kHeadDim / kPanelColumns;
constexpr int kThreads = 128 * (kWarpgroups + 1);
constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 40;
constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 232;
constexpr int kTurnBarrier = 2;  // named barriers kTurnBarrier + warpgroup
static_assert(kHeadDim == 64 || kHeadDim == 128, "one or two panels of columns");
static_assert(kBlockN == 64 || kBlockN == 128, "scores of one wgmma");
static_assert(kStages >= 2, "keys run one block ahead of values");

constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
constexpr int kKeyBytes = kBlockN * kHeadDim * 2;
constexpr int kQueryBase = 0;
constexpr int kKeyBase = kQueryBase + kQueryBuffers * kQueryBytes;
constexpr int kValueBase = kKeyBase + kStages * kKeyBytes;
constexpr int kDataBase = kValueBase + kStages * kKeyBytes;
constexpr int kScratchBase = kDataBase + kQueryBuffers * TileData<kBlockM>::kBytes;
constexpr int kBarrierBase = kScratchBase + 64;
constexpr int kSharedBytes = kBarrierBase + 8 * (2 * kQueryBuffers + 4 * kStages) + 1024;  // 1024: room to align the base
static_assert(kSharedBytes <= 232448, "more shared memory than a block can have");

struct Shared {
    unsigned base;
    __device__ __forceinline__ unsigned query(unsigned i) const { return base + kQueryBase + i * kQueryBytes; }
    __device__ __forceinline__ unsigned key(unsigned i) const { return base + kKeyBase + i * kKeyBytes; }
    __device__ __forceinline__ unsigned value(unsigned i) const { return base + kValueBase + i * kKeyBytes; }
    __device__ __forceinline__ TileData<kBlockM> data(unsigned i) const {
        return {base + kDataBase + i * TileData<kBlockM>::kBytes};
    }
    __device__ __forceinline__ unsigned barrier(int i) const { return base + kBarrierBase + 8 * i; }
    __device__ __forceinline__ unsigned query_full(unsigned i) const { return barrier(i); }
    __device__ __forceinline__ unsigned query_empty(unsigned i) const { return barrier(kQueryBuffers + i); }
    __device__ __forceinline__ unsigned key_full(unsigned i) const { return barrier(2 * kQueryBuffers + i); }
    __device__ __forceinline__ unsigned key_empty(unsigned i) const { return key_full(kStages + i); }
    __device__ __forceinline__ unsigned value_full(unsigned i) const { return key_full(2 * kStages + i); }
    __device__ __forceinline__ unsigned value_empty(unsigned i) const { return key_full(3 * kStages + i); }
};

// Warpgroup 0: for each tile gather the queries, then key and value blocks from the last to the first, values one block behind.
__device__ __forceinline__ void gather_tiles(const Params& p, Shared shared) {
    const int thread = threadIdx.x, warp = uniform(thread / 32);
    const int lane_bytes = (thread % kLanesPerRow) * 16;
    Ring<kQueryBuffers> query;
    Ring<kStages> key, value;
    int next = blockIdx.x;
    while (true) {
        const TileData<kBlockM> data = shared.data(query.slot);
        barrier_wait(shared.query_empty(query.slot), query.parity ^ 1);
        if (thread == 0) shared_store(data.tile(), next);
        named_barrier_sync(kProducerBarrier, kGatherThreads);  // the tile number is written
        const int tile = uniform(shared_load(data.tile()));
        if (tile >= p.tiles) break;
        if (thread == 0) next = atomicAdd(p.counter, 1) + gridDim.x;
        const QueryTile at = locate_query_tile<kBlockM>(p, tile);
        const KeyUnion keys = load_tile_rows(p, data, shared.base + kScratchBase, at, thread);
        const int blocks = (keys.end - keys.first + kBlockN - 1) / kBlockN;
        if (thread == 0) {
            shared_store(data.first_key(), keys.first);
            shared_store(data.key_blocks(), blocks);
        }
        const int* k_index = p.k_index + static_cast<long long>(at.b * p.heads_kv + at.h_kv) * p.seqlen_k;
        const auto key_row = [&](int block) {
            const int sorted = keys.first + block * kBlockN + min(gather_owned_row(thread, 0), kBlockN - 1);
            const bool doubtful = sorted >= keys.gap_first && sorted < keys.gap_end;
            const bool seen = sorted < keys.end && (!doubtful || seen_by_tile(data, sorted, p.monotone));
            return seen ? k_index[sorted] : -1;
        };
        int upcoming = blocks > 0 ? key_row(blocks - 1) : -1;

        int rows[(kBlockM + 127) / 128];
#pragma unroll
        for (int i = 0; i < (kBlockM + 127) / 128; ++i) {
            rows[i] = shared_load(data.indices() + 4 * min(gather_owned_row(thread, i), kBlockM - 1));
        }
        gather_rows<kBlockM, kPanels>(
            shared.query(query.slot), p.q.of_head(at.b, at.h) + lane_bytes, p.q.row, rows, thread);
        barrier_arrive_after_copies(shared.query_full(query.slot));
        if (thread == 0) barrier_arrive(shared.query_full(query.slot));  // releases the row data written above

        const char* k = p.k.of_head(at.b, at.h_kv) + lane_bytes;
        const char* v = p.v.of_head(at.b, at.h_kv) + lane_bytes;
        int previous[1];
        for (int block = blocks - 1; block >= 0; --block) {
            const int current[1] = {upcoming};
            if (block > 0) upcoming = key_row(block - 1);
            barrier_wait(shared.key_empty(key.slot), key.parity ^ 1);
            gather_rows<kBlockN, kPanels>(shared.key(key.slot), k, p.k.row, current, thread);
            barrier_arrive_after_copies(shared.key_full(key.slot));
            key.advance();
            if (block == blocks - 1) {
                if (warp == 0) prefetch_tile_rows<kBlockM>(p, next, thread);
            } else {
                barrier_wait(shared.value_empty(value.slot), value.parity ^ 1);
                gather_rows<kBlockN, kPanels>(shared.value(value.slot), v, p.v.row, previous, thread);
                barrier_arrive_after_copies(shared.value_full(value.slot));
                value.advance();
            }
            previous[0] = current[0];
        }
        if (blocks > 0) {
            barrier_wait(shared.value_empty(value.slot), value.parity ^ 1);
            gather_rows<kBlockN, kPanels>(shared.value(value.slot), v, p.v.row, previous, thread);
            barrier_arrive_after_copies(shared.value_full(value.slot));
            value.advance();
        }
        query.advance();
    }
    barrier_arrive_after_copies(shared.query_full(query.slot));  // no more tiles: let the others read the tile number and leave
    if (thread == 0) barrier_arrive(shared.query_full(query.slot));
}

// Warpgroups 1..: scores, softmax and output of 64 query rows of each tile.
__device__ __forceinline__ void multiply_tiles(const Params& p, Shared shared, int group) {
    const int thread = threadIdx.x % 128, warp = uniform(thread / 32), lane = thread % 32;
    const int row = 64 * group + 16 * warp + lane / 4;  // this thread's rows of the tile: row and row + 8
    Ring<kQueryBuffers> query;
    Ring<kStages> key, value;
    const auto skip_block = [&]() {
        barrier_wait(shared.key_full(key.slot), key.parity);
        barrier_release(shared.key_empty(key.slot), lane);
        barrier_wait(shared.value_full(value.slot), value.parity);
        barrier_release(shared.value_empty(value.slot), lane);
        key.advance();
        value.advance();
    };

    // The warpgroups issue their products in turn, once per key block, so that one's softmax runs beside another's products.
    const auto take_turn = [&]() {
        named_barrier_sync(kTurnBarrier + group, 256);
    };
    const auto pass_turn = [&]() {
        named_barrier_arrive(kTurnBarrier + (group + 1 == kWarpgroups ? 0 : group + 1), 256);
    };
    if (group == kWarpgroups - 1) pass_turn();  // the first turn is warpgroup 0's

    while (true) {
        const TileData<kBlockM> data = shared.data(query.slot);
        barrier_wait(shared.query_full(query.slot), query.parity);
        const int tile = uniform(shared_load(data.tile()));
        if (tile >= p.tiles) break;
        const int first_key = uniform(shared_load(data.first_key()));
        const RowExtremes rows = row_extremes(data.starts() + 256 * group, data.ends() + 256 * group, lane);
        int block = uniform(shared_load(data.key_blocks())) - 1;
        // Blocks [low_block, high_block) hold keys that a row of this warpgroup sees.
        const bool any = rows.outer_start < rows.outer_end;
        const int low_block = any ? (rows.outer_start - first_key) / kBlockN : 0;
        const int high_block = any ? (rows.outer_end - first_key + kBlockN - 1) / kBlockN : 0;
        const unsigned query_tile = shared.query(query.slot) + group * 64 * kRowBytes;

        float scores[kBlockN / 2], output[kHeadDim / 2];
        unsigned weights[kBlockN / 4];
        OnlineSoftmax softmax;
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) output[i] = 0.0f;

        const unsigned own_start = data.starts() + 4 * row, own_end = data.ends() + 4 * row;
        float decay[2];
        const auto weigh = [&](int block) {
            mask_block<kBlockN>(scores, rows, own_start, own_end, first_key + block * kBlockN, lane % 4);
            softmax.update(scores, decay, p.scale_log2);
        };

        for (; block >= high_block; --block) {
            take_turn();
            pass_turn();
            skip_block();
        }

        if (block >= low_block && any) {
            // S = Q K^T of the last block, nothing to overlap with yet.
            barrier_wait(shared.key_full(key.slot), key.parity);
            async_proxy_fence();
            take_turn();
            wgmma_fence();
            product_of_rows<kBlockM, kBlockN, kHeadDim>(scores, query_tile, shared.key(key.slot));
            wgmma_commit();
            pass_turn();
            wgmma_wait<0>();
            pin(scores);
            barrier_release(shared.key_empty(key.slot), lane);
            key.advance();
            weigh(block);
            pack_fragment(weights, scores);

            // S of this block is computed while O += P V of the one before runs behind its softmax.
            for (--block; block >= low_block; --block) {
                barrier_wait(shared.key_full(key.slot), key.parity);
                async_proxy_fence();
                take_turn();
                pin(scores);
                pin(output);
                pin(weights);
                wgmma_fence();
                product_of_rows<kBlockM, kBlockN, kHeadDim>(scores, query_tile, shared.key(key.slot));
                wgmma_commit();
                barrier_wait(shared.value_full(value.slot), value.parity);
                async_proxy_fence();
                accumulate_weighted_rows<kBlockN>(output, weights, shared.value(value.slot));
                wgmma_commit();
                pass_turn();
                wgmma_wait<1>();
                pin(scores);
                barrier_release(shared.key_empty(key.slot), lane);
                key.advance();

                weigh(block);

                wgmma_wait<0>();
                pin(output);
                pin(weights);
                barrier_release(shared.value_empty(value.slot), lane);
                value.advance();
                scale_rows(output, decay);
                pack_fragment(weights, scores);
            }

            barrier_wait(shared.value_full(value.slot), value.parity);
            async_proxy_fence();
            pin(output);
            pin(weights);
            wgmma_fence();
            accumulate_weighted_rows<kBlockN>(output, weights, shared.value(value.slot));
            wgmma_commit();
        }

        const int index[2] = {shared_load(data.indices() + 4 * row), shared_load(data.indices() + 4 * row + 32)};
        barrier_release(shared.query_empty(query.slot), lane);
        query.advance();
        float inverse[2], lse[2];
        softmax.finalize(inverse, lse, p.scale);
        wgmma_wait<0>();
        pin(output);
        if (any) {
            barrier_release(shared.value_empty(value.slot), lane);
            value.advance();
        }

        const QueryTile at = locate_query_tile<kBlockM>(p, tile);
        scatter_rows(output, inverse, p.out.of_head(at.b, at.h), p.out.row, index, lane);
        if (lane % 4 == 0) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                char* address = p.lse.of_head(at.b, at.h) + static_cast<long long>(index[half]) * p.lse.row;
                if (index[half] >= 0) *reinterpret_cast<float*>(address) = lse[half];
            }
        }
        for (; block >= 0; --block) {
            take_turn();
            pass_turn();
            skip_block();
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) scfa_fwd_sm90(const __grid_constant__ Params p) {
    extern __shared__ char dynamic[];
    const Shared shared{(shared_address(dynamic) + 1023) & ~1023u};
    if (threadIdx.x == 0) {
        for (int i = 0; i < kQueryBuffers; ++i) {
            barrier_init(shared.query_full(i), kGatherThreads + 1);
            barrier_init(shared.query_empty(i), 4 * kWarpgroups);
        }
        for (int i = 0; i < kStages; ++i) {
            barrier_init(shared.key_full(i), kGatherThreads);
            barrier_init(shared.value_full(i), kGatherThreads);
            barrier_init(shared.key_empty(i), 4 * kWarpgroups);
            barrier_init(shared.value_empty(i), 4 * kWarpgroups);
        }
        barrier_init_done();
    }
    __syncthreads();  // barriers are initialised
    const int warpgroup = uniform(threadIdx.x / 128);
    if (warpgroup == 0) {
        give_registers<kProducerRegisters>();
        gather_tiles(p, shared);
    } else {
        take_registers<kConsumerRegisters>();
        multiply_tiles(p, shared, warpgroup - 1);
    }
}
