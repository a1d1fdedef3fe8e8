// Gradients of the keys and values over sorted key ranges on Hopper (wgmma), in transposed form: rows are keys, columns queries.
//
// computes:      with p[i][j], delta[i] as in bwd_dq_sm90.cu: dv[j] = sum_i p[i][j] dout[i],
//                dk[j] = scale * sum_i p[i][j] * (dout[i] . v[j] - delta[i]) q[i], over the queries i whose range holds j, all heads of the group.
// grid/block:    one persistent block per SM; a tile is kBlockN sorted keys of one kv head. Warpgroup 0 gathers rows (cp.async),
//                each of the others owns 64 keys and walks kBlockM queries at a time, in order: bitwise deterministic.
// shared memory: 4 * kHeadDim * (kBlockN + kStages * kBlockM) bytes, row data, barriers (kSharedBytes).
// inputs/outputs: Params (params_sm90.cuh): q, k, v, dout, dk, dv in 16 bits; row_lse, row_delta as bwd_dq_sm90.cu wrote them.
// version and source: column-owner form of FlashAttention-2 (Dao 2023, algorithm 2). New here: P^T and dS^T never leave registers, because
//                dq has a kernel of its own; so no warpgroup waits for another.
#if !defined(SCFA_HEAD_DIM) || !defined(SCFA_BLOCK_N) || !defined(SCFA_WARPGROUPS) || !defined(SCFA_STAGES)
#error "SCFA_HEAD_DIM, SCFA_BLOCK_N, SCFA_WARPGROUPS, SCFA_STAGES: set by launch_sm90.py"
#endif
#include "mbarrier.cuh"
#include "wgmma.cuh"
#include "params_sm90.cuh"
#include "gather_sm90.cuh"
#include "softmax_sm90.cuh"

constexpr int kHeadDim = SCFA_HEAD_DIM;
constexpr int kWarpgroups = SCFA_WARPGROUPS;
constexpr int kStages = SCFA_STAGES;  // buffers of one q and one dout block each
constexpr int kBlockN = 64 * kWarpgroups;  // keys of a tile
constexpr int kBlockM = SCFA_BLOCK_N;       // queries of a step
constexpr int kPanels = kHeadDim / kPanelColumns;
constexpr int kThreads = 128 * (kWarpgroups + 1);
constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 40;
constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 232;
#ifndef SCFA_OVERLAP
#define SCFA_OVERLAP (SCFA_HEAD_DIM == 64 && SCFA_BLOCK_N == 64 && SCFA_WARPGROUPS == 2)
#endif
// Two uses of registers that are free only at head_dim 64, 64 queries a step and two warpgroups: keys and values as A operands, and
// scores of the next queries running behind the products of these.
constexpr bool kOverlap = SCFA_OVERLAP;
constexpr bool kKeysInRegisters = kOverlap;
static_assert(kHeadDim == 64 || kHeadDim == 128, "one or two panels of columns");
static_assert(kStages >= 2, "scores of the next block start before this one is done");

constexpr int kKeyBytes = kBlockN * kHeadDim * 2;
constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
constexpr int kQueryBase = 2 * kKeyBytes;
constexpr int kDataBase = kQueryBase + 2 * kStages * kQueryBytes;
constexpr int kDataBytes = 16 * kBlockM + 16;  // lse, delta, key_start, key_end of the block's queries, then the end-of-tile flag
constexpr int kScratchBase = kDataBase + kStages * kDataBytes;
constexpr int kTileBase = kScratchBase + 16;
constexpr int kBarrierBase = kTileBase + 16;
constexpr int kSharedBytes = kBarrierBase + 8 * (2 + 2 * kStages) + 1024;  // 1024: room to align the base
static_assert(kSharedBytes <= 232448, "more shared memory than a block can have");

constexpr int kSeesNothing = 0x7FFFFFFF;  // a range start beyond every key
constexpr int kProducerBarrier = 1;  // named barrier of the gathering warpgroup

struct Shared {
    unsigned base;
    __device__ __forceinline__ unsigned key() const { return base; }
    __device__ __forceinline__ unsigned value() const { return base + kKeyBytes; }
    __device__ __forceinline__ unsigned query(unsigned i) const { return base + kQueryBase + 2 * i * kQueryBytes; }
    __device__ __forceinline__ unsigned dout(unsigned i) const { return query(i) + kQueryBytes; }
    __device__ __forceinline__ unsigned lse(unsigned i) const { return base + kDataBase + i * kDataBytes; }
    __device__ __forceinline__ unsigned delta(unsigned i) const { return lse(i) + 4 * kBlockM; }
    __device__ __forceinline__ unsigned starts(unsigned i) const { return lse(i) + 8 * kBlockM; }
    __device__ __forceinline__ unsigned ends(unsigned i) const { return lse(i) + 12 * kBlockM; }
    __device__ __forceinline__ unsigned last(unsigned i) const { return lse(i) + 16 * kBlockM; }
    __device__ __forceinline__ unsigned tile() const { return base + kTileBase; }
    __device__ __forceinline__ unsigned key_full() const { return base + kBarrierBase; }
    __device__ __forceinline__ unsigned key_empty() const { return base + kBarrierBase + 8; }
    __device__ __forceinline__ unsigned query_full(unsigned i) const { return base + kBarrierBase + 16 + 8 * i; }
    __device__ __forceinline__ unsigned query_empty(unsigned i) const { return query_full(kStages + i); }
};

// First index in [0, count) of the nondecreasing `values` that is greater than `bound` (count if none); a whole warp searches.
__device__ __forceinline__ int first_greater(const int* values, int count, int bound, int lane) {
    int low = 0, high = count;  // the answer is in [low, high]
    while (low < high) {
        const int step = (high - low + 31) / 32;
        const int probe = low + step * (lane + 1) - 1;
        const bool greater = probe >= high || values[probe] > bound;
        const int hit = __ffs(__ballot_sync(0xFFFFFFFFu, greater));  // 1-based; 0: none of the 32
        if (hit == 0) return high;
        high = min(high, low + step * hit - 1);
        low = low + step * (hit - 1);
    }
    return low;
}

// Warpgroup 0: for each tile gather keys and values, then every block of queries that may see one of them.
__device__ __forceinline__ void gather_tiles(const Params& p, Shared shared) {
    const int thread = threadIdx.x, lane = thread % 32;
    const int lane_bytes = (thread % kLanesPerRow) * 16;
    Ring<1> key;
    Ring<kStages> query;
    int next = blockIdx.x;
    while (true) {
        barrier_wait(shared.key_empty(), key.parity ^ 1);
        if (thread == 0) shared_store(shared.tile(), next);
        named_barrier_sync(kProducerBarrier, kGatherThreads);  // the tile number is written
        const int tile = uniform(shared_load(shared.tile()));
        if (tile >= p.tiles) break;
        if (thread == 0) next = atomicAdd(p.counter, 1) + gridDim.x;
        const int z = p.by_tiles.quotient(tile), n = tile - z * p.tiles_per_head;
        const int b = p.by_heads.quotient(z), h_kv = z - b * p.heads_kv;
        const int key0 = n * kBlockN, key1 = min(key0 + kBlockN, p.seqlen_k);

        const int* k_index = p.k_index + static_cast<long long>(z) * p.seqlen_k;
        int rows[(kBlockN + 127) / 128];
#pragma unroll
        for (int i = 0; i < (kBlockN + 127) / 128; ++i) {
            const int sorted = key0 + gather_owned_row(thread, i);
            rows[i] = sorted < key1 ? k_index[sorted] : -1;
        }
        gather_rows<kBlockN, kPanels>(
            shared.key(), p.k.of_head(b, h_kv) + lane_bytes, p.k.row, rows, thread);
        gather_rows<kBlockN, kPanels>(
            shared.value(), p.v.of_head(b, h_kv) + lane_bytes, p.v.row, rows, thread);
        barrier_arrive_after_copies(shared.key_full());
        if (thread == 0) barrier_arrive(shared.key_full());  // releases the tile number

        for (int member = 0; member < p.group_size; ++member) {
            const int h = h_kv * p.group_size + member;
            const long long list = static_cast<long long>(b * p.heads + h) * p.seqlen_q;
            const int *starts = p.key_start + list, *ends = p.key_end + list, *indices = p.q_index + list;
            int first_query = 0, end_query = p.seqlen_q;
            if (p.monotone) {
                // Queries that see a key of the tile lie between the first that ends beyond key0 and the last that starts before key1.
                if (thread < 64) {
                    const int found = thread < 32 ? first_greater(ends, p.seqlen_q, key0, lane)
                                                  : first_greater(starts, p.seqlen_q, key1 - 1, lane);
                    if (lane == 0) shared_store(shared.base + kScratchBase + 4 * (thread / 32), found);
                }
                named_barrier_sync(kProducerBarrier, kGatherThreads);  // both bounds are written
                first_query = uniform(shared_load(shared.base + kScratchBase));
                end_query = uniform(shared_load(shared.base + kScratchBase + 4));
                named_barrier_sync(kProducerBarrier, kGatherThreads);  // and read, before the next search
            }
            const char* q = p.q.of_head(b, h) + lane_bytes;
            const char* dout = p.dout.of_head(b, h) + lane_bytes;
            // Range and original row of the query this thread owns in a block, loaded one block ahead and looked at only then.
            struct Query {
                int start, end, row;
            };
            const auto load_query = [&](int first) {
                const int sorted = first + min(gather_owned_row(thread, 0), kBlockM - 1);
                const int at = min(sorted, p.seqlen_q - 1);
                return Query{sorted < end_query ? starts[at] : kSeesNothing, ends[at], indices[at]};
            };
            Query upcoming = load_query(first_query);
            for (int first = first_query; first < end_query; first += kBlockM) {
                const Query own = upcoming;
                upcoming = load_query(first + kBlockM);
                const bool sees = own.start < own.end && own.end > key0 && own.start < key1;
                const int current[1] = {sees ? own.row : -1};  // a query that sees no key of the tile becomes zeros
                if (!p.monotone && !named_barrier_any(kProducerBarrier, kGatherThreads, sees)) continue;
                barrier_wait(shared.query_empty(query.slot), query.parity ^ 1);
                gather_rows<kBlockM, kPanels>(shared.query(query.slot), q, p.q.row, current, thread);
                gather_rows<kBlockM, kPanels>(shared.dout(query.slot), dout, p.dout.row, current, thread);
                // Rows past the end repeat the last row's data; their q and dout are zeros.
                const int column = thread % kBlockM, sorted = min(first + column, p.seqlen_q - 1);
                if (thread < kBlockM) {
                    copy_word(shared.lse(query.slot) + 4 * column, p.row_lse + list + sorted, true);
                    copy_word(shared.delta(query.slot) + 4 * column, p.row_delta + list + sorted, true);
                }
                if (thread >= kGatherThreads - kBlockM) {
                    copy_word(shared.starts(query.slot) + 4 * column, starts + sorted, true);
                    copy_word(shared.ends(query.slot) + 4 * column, ends + sorted, true);
                }
                if (thread == 0) shared_store(shared.last(query.slot), 0);
                barrier_arrive_after_copies(shared.query_full(query.slot));
                if (thread == 0) barrier_arrive(shared.query_full(query.slot));  // releases the flag
                query.advance();
            }
        }
        barrier_wait(shared.query_empty(query.slot), query.parity ^ 1);
        if (thread == 0) shared_store(shared.last(query.slot), 1);
        barrier_arrive_after_copies(shared.query_full(query.slot));
        if (thread == 0) barrier_arrive(shared.query_full(query.slot));  // releases the flag
        query.advance();
        key.advance();
    }
    barrier_arrive_after_copies(shared.key_full());  // no more tiles: let the others read the tile number and leave
    if (thread == 0) barrier_arrive(shared.key_full());
}

// Warpgroups 1..: dk and dv of 64 keys of each tile.
__device__ __forceinline__ void multiply_tiles(const Params& p, Shared shared, int group) {
    const int thread = threadIdx.x % 128, warp = __shfl_sync(0xFFFFFFFFu, thread / 32, 0), lane = thread % 32;
    const int q = lane % 4;
    Ring<1> key;
    Ring<kStages> query;
    while (true) {
        barrier_wait(shared.key_full(), key.parity);
        const int tile = uniform(shared_load(shared.tile()));
        if (tile >= p.tiles) break;
        const int z = p.by_tiles.quotient(tile), n = tile - z * p.tiles_per_head;
        const int key0 = n * kBlockN + 64 * group;     // first key of this warpgroup
        const int own = key0 + 16 * warp + lane / 4;  // this thread's keys: own and own + 8
        const unsigned key_tile = shared.key() + group * 64 * kRowBytes;
        const unsigned value_tile = shared.value() + group * 64 * kRowBytes;

        float scores[kBlockM / 2], slopes[kBlockM / 2], grad_k[kHeadDim / 2], grad_v[kHeadDim / 2];
        unsigned weights[kBlockM / 4], changes[kBlockM / 4];
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) grad_k[i] = grad_v[i] = 0.0f;
        unsigned keys[kHeadDim / 4], values[kHeadDim / 4];
        if constexpr (kKeysInRegisters) {
            load_fragments<kBlockN, kHeadDim>(keys, key_tile, warp, lane);
            load_fragments<kBlockN, kHeadDim>(values, value_tile, warp, lane);
            pin(keys);
            pin(values);
            barrier_release(shared.key_empty(), lane);
        } else {
            async_proxy_fence();
        }

        RowExtremes range;  // of the current block of queries
        // Wait for the block in the current slot; does one of its queries see one of this warpgroup's keys?
        bool last = false;
        const auto look = [&]() {
            barrier_wait(shared.query_full(query.slot), query.parity);
            last = uniform(shared_load(shared.last(query.slot))) != 0;
            if (last) return false;
            const unsigned starts = shared.starts(query.slot), ends = shared.ends(query.slot);
            if (p.monotone) {
                constexpr int kLast = 4 * (kBlockM - 1);
                range = {uniform(shared_load(starts)), uniform(shared_load(ends + kLast)),
                         uniform(shared_load(starts + kLast)), uniform(shared_load(ends))};
            } else {
                range = row_extremes<kBlockM>(starts, ends, lane);
            }
            return range.outer_end > key0 && range.outer_start < key0 + 64;
        };
        // Pass over blocks that do not concern this warpgroup; false at the end of the tile. No slot may be held meanwhile:
        // the gathering warpgroup might need just that one.
        const auto find_block = [&]() {
            while (!look()) {
                barrier_release(shared.query_empty(query.slot), lane);
                query.advance();
                if (last) return false;
            }
            return true;
        };
        // Issue S^T = K Q^T and dP^T = V dO^T of a slot, as two groups.
        const auto issue_scores = [&](unsigned slot) {
            if constexpr (kKeysInRegisters) {
                product_of_rows<kBlockM, kHeadDim>(scores, keys, shared.query(slot));
                wgmma_commit();
                product_of_rows<kBlockM, kHeadDim>(slopes, values, shared.dout(slot));
            } else {
                product_of_rows<kBlockN, kBlockM, kHeadDim>(scores, key_tile, shared.query(slot));
                wgmma_commit();
                product_of_rows<kBlockN, kBlockM, kHeadDim>(slopes, value_tile, shared.dout(slot));
            }
            wgmma_commit();
        };

        // P^T and dS^T of the slot whose scores were issued last, as A operands; waits for the scores itself.
        const auto weigh = [&](unsigned slot, const RowExtremes& seen_by) {
            // P^T = exp2(S^T * scale - lse): lse and delta belong to columns here.
            int2 column[kBlockM / 8];
#pragma unroll
            for (int block = 0; block < kBlockM / 8; ++block) {
                column[block] = shared_load_pair(shared.lse(slot) + 32 * block + 8 * q);
            }
            wgmma_wait<1>();
            pin(scores);
#pragma unroll
            for (int i = 0; i < kBlockM / 2; ++i) {
                const int lse = i & 1 ? column[i / 4].y : column[i / 4].x;
                scores[i] = exp2_fast(scores[i] * p.scale_log2 - __int_as_float(lse));
            }
#pragma unroll
            for (int block = 0; block < kBlockM / 8; ++block) {
                column[block] = shared_load_pair(shared.delta(slot) + 32 * block + 8 * q);
            }
            wgmma_wait<0>();
            pin(slopes);
#pragma unroll
            for (int i = 0; i < kBlockM / 2; ++i) {
                const int delta = i & 1 ? column[i / 4].y : column[i / 4].x;
                slopes[i] = scores[i] * (slopes[i] - __int_as_float(delta));
            }
            // Zero by selection, not by product: an unseen row may hold anything.
            if (seen_by.inner_end < key0 + 64) {
#pragma unroll
                for (int i = 0; i < kBlockM / 2; ++i) {
                    if (i % 4 == 0) column[i / 4] = shared_load_pair(shared.ends(slot) + 8 * i + 8 * q);
                    const bool seen = own + 8 * half_of(i) < (i & 1 ? column[i / 4].y : column[i / 4].x);
                    scores[i] = seen ? scores[i] : 0.0f;
                    slopes[i] = seen ? slopes[i] : 0.0f;
                }
            }
            if (seen_by.inner_start > key0) {
#pragma unroll
                for (int i = 0; i < kBlockM / 2; ++i) {
                    if (i % 4 == 0) column[i / 4] = shared_load_pair(shared.starts(slot) + 8 * i + 8 * q);
                    const bool seen = own + 8 * half_of(i) >= (i & 1 ? column[i / 4].y : column[i / 4].x);
                    scores[i] = seen ? scores[i] : 0.0f;
                    slopes[i] = seen ? slopes[i] : 0.0f;
                }
            }
            pack_fragment(weights, scores);
            pack_fragment(changes, slopes);
        };
        // dV += P^T dO, dK += dS^T Q of a slot, as one group.
        const auto accumulate = [&](unsigned slot) {
            accumulate_weighted_rows<kBlockM>(grad_v, weights, shared.dout(slot));
            accumulate_weighted_rows<kBlockM>(grad_k, changes, shared.query(slot));
            wgmma_commit();
        };
        const auto pin_operands = [&]() {
            pin(grad_v);
            pin(grad_k);
            pin(weights);
            pin(changes);
        };

        bool more = find_block();
        if constexpr (kOverlap) {
            if (more) {
                async_proxy_fence();
                wgmma_fence();
                issue_scores(query.slot);
                while (true) {
                    const unsigned slot = query.slot;
                    const RowExtremes seen_by = range;
                    query.advance();
                    const bool next_too = look();  // while the scores are being computed
                    weigh(slot, seen_by);
                    if (next_too) {
                        // The next scores run behind these products.
                        async_proxy_fence();
                        pin_operands();
                        pin(scores);
                        pin(slopes);
                        wgmma_fence();
                        accumulate(slot);
                        issue_scores(query.slot);
                        wgmma_wait<2>();
                        pin_operands();
                        barrier_release(shared.query_empty(slot), lane);
                        continue;
                    }
                    pin_operands();
                    wgmma_fence();
                    accumulate(slot);
                    wgmma_wait<0>();
                    pin_operands();
                    barrier_release(shared.query_empty(slot), lane);
                    if (!find_block()) break;
                    async_proxy_fence();
                    pin(scores);
                    pin(slopes);
                    wgmma_fence();
                    issue_scores(query.slot);
                }
            }
        } else {
            for (; more; more = find_block()) {
                async_proxy_fence();
                pin(scores);
                pin(slopes);
                wgmma_fence();
                issue_scores(query.slot);
                weigh(query.slot, range);
                pin_operands();
                wgmma_fence();
                accumulate(query.slot);
                wgmma_wait<0>();
                pin_operands();
                barrier_release(shared.query_empty(query.slot), lane);
                query.advance();
            }
        }
        if constexpr (!kKeysInRegisters) barrier_release(shared.key_empty(), lane);
        key.advance();

        const int* k_index = p.k_index + static_cast<long long>(z) * p.seqlen_k;
        const int index[2] = {own < p.seqlen_k ? k_index[own] : -1, own + 8 < p.seqlen_k ? k_index[own + 8] : -1};
        const int b = p.by_heads.quotient(z), h_kv = z - b * p.heads_kv;
        const float scale_k[2] = {p.scale, p.scale}, scale_v[2] = {1.0f, 1.0f};
        scatter_rows(grad_k, scale_k, p.dk.of_head(b, h_kv), p.dk.row, index, lane);
        scatter_rows(grad_v, scale_v, p.dv.of_head(b, h_kv), p.dv.row, index, lane);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) scfa_bwd_dkdv_sm90(const __grid_constant__ Params p) {
    extern __shared__ char dynamic[];
    const Shared shared{(shared_address(dynamic) + 1023) & ~1023u};
    if (threadIdx.x == 0) {
        barrier_init(shared.key_full(), kGatherThreads + 1);
        barrier_init(shared.key_empty(), 4 * kWarpgroups);
        for (int i = 0; i < kStages; ++i) {
            barrier_init(shared.query_full(i), kGatherThreads + 1);
            barrier_init(shared.query_empty(i), 4 * kWarpgroups);
        }
        barrier_init_done();
    }
    __syncthreads();  // barriers are initialised
    const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
    if (warpgroup == 0) {
        give_registers<kProducerRegisters>();
        gather_tiles(p, shared);
    } else {
        take_registers<kConsumerRegisters>();
        multiply_tiles(p, shared, warpgroup - 1);
    }
}
