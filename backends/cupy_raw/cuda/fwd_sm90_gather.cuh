// First half of fwd_sm90.cu: its tile shape, its shared memory, and the gathering warpgroup.
#pragma once

#if !defined(SCFA_HEAD_DIM) || !defined(SCFA_BLOCK_N) || !defined(SCFA_WARPGROUPS) || \
    !defined(SCFA_STAGES) || !defined(SCFA_QUERY_BUFFERS) || !defined(SCFA_SHARED_BYTES)
#error "the tile shape and SCFA_SHARED_BYTES: set by launch_sm90.py"
#endif
#include "mbarrier.cuh"
#include "products_sm90.cuh"
#include "params_sm90.cuh"
#include "gather_sm90.cuh"
#include "width_sm90.cuh"
#include "runs_sm90.cuh"
#include "softmax_sm90.cuh"
#include "tiles_sm90.cuh"

constexpr int kBlockN = SCFA_BLOCK_N;
constexpr int kWarpgroups = SCFA_WARPGROUPS;  // multiplying ones
constexpr int kStages = SCFA_STAGES;          // key/value buffers
constexpr int kQueryBuffers = SCFA_QUERY_BUFFERS;
constexpr int kBlockM = 64 * kWarpgroups;
constexpr int kThreads = 128 * (kWarpgroups + 1);
constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 40;
constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 232;
static_assert(kProducerRegisters + kWarpgroups * kConsumerRegisters <= launched_registers(kThreads),
              "registers are shared out, not made");
// Power bounds tiles of 128 columns: fewer bytes read of shared memory run at a higher clock
// (docs/perf/hopper.md). At 64 there are no registers for the queries, beyond 128 as few.
constexpr bool kFrugal = kHeadDim == 128;
// Are the scores of half a block made alone where a warpgroup sees no key of the rest?
constexpr int kFewKeys = kBlockN == 128 ? 64 : kBlockN;
constexpr bool kHalves = kFewKeys < kBlockN;
constexpr int kTurnBarrier = 2;  // named barriers kTurnBarrier + warpgroup
static_assert(kBlockN % 16 == 0, "scores of one wgmma, reduced over 16 keys at a time");
static_assert(kStages >= 2, "keys run one block ahead of values");

constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
constexpr int kKeyBytes = kBlockN * kHeadDim * 2;
constexpr int kQueryBase = 0;
constexpr int kKeyBase = kQueryBase + kQueryBuffers * kQueryBytes;
constexpr int kValueBase = kKeyBase + kStages * kKeyBytes;
constexpr int kDataBase = kValueBase + kStages * kKeyBytes;
constexpr int kScratchBase = kDataBase + kQueryBuffers * TileData<kBlockM>::kBytes;
// The rows of the next tile are on their way while this one is gathered. With one query buffer, as
// beyond head_dim 128, there is no room for them, nor for the tile: its queries wait for this one's.
constexpr bool kStaged = kQueryBuffers > 1;
// Two halves, of tiles in turn: a warp may write the next tile's while another reads this one's, as
// staged rows need no barrier between the two.
constexpr int kStagedBase = kScratchBase + 2 * 64;
constexpr int kBarrierBase = kStagedBase + (kStaged ? TileData<kBlockM>::kBytes : 0);
constexpr int kBarriers = 2 * kQueryBuffers + 4 * kStages + (kStaged ? 1 : 0);
constexpr int kSharedBytes = kBarrierBase + 8 * kBarriers + 1024;  // 1024: room to align the base
static_assert(kSharedBytes <= 232448, "more shared memory than a block can have");
static_assert(kSharedBytes == SCFA_SHARED_BYTES, "launch_sm90.py asks for as much as is laid out");

struct Shared {
  unsigned base;
  __device__ __forceinline__ unsigned query(unsigned i) const {
    return base + kQueryBase + i * kQueryBytes;
  }
  __device__ __forceinline__ unsigned key(unsigned i) const {
    return base + kKeyBase + i * kKeyBytes;
  }
  __device__ __forceinline__ unsigned value(unsigned i) const {
    return base + kValueBase + i * kKeyBytes;
  }
  __device__ __forceinline__ TileData<kBlockM> data(unsigned i) const {
    return {base + kDataBase + i * TileData<kBlockM>::kBytes};
  }
  __device__ __forceinline__ StagedRows<kBlockM> staged() const { return {base + kStagedBase}; }
  __device__ __forceinline__ unsigned barrier(int i) const { return base + kBarrierBase + 8 * i; }
  __device__ __forceinline__ unsigned query_full(unsigned i) const { return barrier(i); }
  __device__ __forceinline__ unsigned query_empty(unsigned i) const {
    return barrier(kQueryBuffers + i);
  }
  __device__ __forceinline__ unsigned key_full(unsigned i) const {
    return barrier(2 * kQueryBuffers + i);
  }
  __device__ __forceinline__ unsigned key_empty(unsigned i) const { return key_full(kStages + i); }
  __device__ __forceinline__ unsigned value_full(unsigned i) const {
    return key_full(2 * kStages + i);
  }
  __device__ __forceinline__ unsigned value_empty(unsigned i) const {
    return key_full(3 * kStages + i);
  }
  __device__ __forceinline__ unsigned staged_full() const { return barrier(kBarriers - 1); }
};

// Warpgroup 0: for each tile gather the queries, then key and value blocks from the last to the
// first, values one block behind.
template <bool kMayRun>
__device__ __forceinline__ void gather_tiles(const Params& p, Shared shared) {
  const int thread = threadIdx.x, warp = uniform(thread / 32);
  const int lane_bytes = (thread % kLanesPerRow) * 16;
  Ring<kQueryBuffers> query;
  Ring<kStages> key, value;
  int next = blockIdx.x;
  const auto stage_next = [&]() {
    if (warp == 0) stage_tile_rows(p, shared.staged(), shared.staged_full(), next, thread);
  };
  if constexpr (kStaged) stage_next();
  for (unsigned parity = 0;; parity ^= 1) {
    const TileData<kBlockM> data = shared.data(query.slot);
    barrier_wait(shared.query_empty(query.slot), query.parity ^ 1);
    if constexpr (kStaged) {
      barrier_wait(shared.staged_full(), parity);
      if (thread == 0) shared_store(data.tile(), shared_load(shared.staged().tile()));
    } else {
      if (thread == 0) shared_store(data.tile(), next);
      named_barrier_sync(kProducerBarrier, kGatherThreads);  // the tile number is written
    }
    const int tile = uniform(shared_load(kStaged ? shared.staged().tile() : data.tile()));
    if (tile >= p.tiles) break;
    if (thread == 0) next = atomicAdd(p.counter, 1) + gridDim.x;
    const QueryTile at = locate_query_tile<kBlockM>(p, tile);
    const unsigned scratch = shared.base + kScratchBase + 64 * parity;
    if constexpr (kStaged) {
      load_tile_rows(data, scratch, shared.staged(), at.first_row, thread);
    } else {
      load_tile_rows(data, scratch, PlannedRows(p, at), at.first_row, thread);
    }
    named_barrier_sync(kProducerBarrier, kGatherThreads);  // row data and ranges are written
    const KeyUnion keys = join_key_ranges(scratch);
    const int blocks = (keys.end - keys.first + kBlockN - 1) / kBlockN;
    if (thread == 0) {
      shared_store(data.first_key(), keys.first);
      shared_store(data.key_blocks(), blocks);
    }
    const int* k_index =
        p.k_index + static_cast<long long>(at.b * p.heads_kv + at.h_kv) * p.seqlen_k;
    const auto key_row = [&](int block) {
      const int first = keys.first + block * kBlockN;
      const int sorted = first + min(fetch_owned_row<kMayRun, kGatherThreads>(thread), kBlockN - 1);
      return seen_by_tile<kBlockN>(data, keys, first, sorted, thread) ? k_index[sorted] : -1;
    };
    int upcoming = blocks > 0 ? key_row(blocks - 1) : -1;

    int rows[(kBlockM + 127) / 128];
#pragma unroll
    for (int i = 0; i < (kBlockM + 127) / 128; ++i) {
      const int row =
          shared_load(data.indices() + 4 * min(gather_owned_row(thread, i), kBlockM - 1));
      rows[i] = blocks > 0 ? row : -1;  // what sees nothing is not fetched
    }
    gather_tile<kBlockM>(shared.query(query.slot), p.q.of_head(at.b, at.h) + lane_bytes,
                                  p.q.row, rows, thread);
    barrier_arrive_after_copies(shared.query_full(query.slot));
    if (thread == 0)
      barrier_arrive(shared.query_full(query.slot));  // releases the row data written above

    const auto prefetch_next = [&]() {  // once its number has come
      if constexpr (kStaged) {
        stage_next();
      } else if (warp == 0) {
        prefetch_tile_rows<kBlockM>(p, next, thread);
      }
    };
    if (blocks == 0) prefetch_next();
    const char* k = p.k.of_head(at.b, at.h_kv) + lane_bytes;
    const char* v = p.v.of_head(at.b, at.h_kv) + lane_bytes;
    const auto fetch = [&](unsigned tile, const char* source, int row_bytes, const TensorMap& map,
                           const int (&rows)[1], unsigned full) {
      if constexpr (kMayRun) {
        fetch_own_rows<kBlockN, kPanels, kColumns>(tile, map, at.h_kv, at.b, source, row_bytes,
                                                   rows[0], full, thread);
      } else {
        gather_tile<kBlockN>(tile, source, row_bytes, rows, thread);
      }
      barrier_arrive_after_copies(full);
    };
    int previous[1];
    for (int block = blocks - 1; block >= 0; --block) {
      const int current[1] = {upcoming};
      if (block > 0) upcoming = key_row(block - 1);
      barrier_wait(shared.key_empty(key.slot), key.parity ^ 1);
      fetch(shared.key(key.slot), k, p.k.row, p.maps[0], current, shared.key_full(key.slot));
      key.advance();
      if (block == blocks - 1) {
        prefetch_next();
      } else {
        barrier_wait(shared.value_empty(value.slot), value.parity ^ 1);
        fetch(shared.value(value.slot), v, p.v.row, p.maps[1], previous, shared.value_full(value.slot));
        value.advance();
      }
      previous[0] = current[0];
    }
    if (blocks > 0) {
      barrier_wait(shared.value_empty(value.slot), value.parity ^ 1);
      fetch(shared.value(value.slot), v, p.v.row, p.maps[1], previous, shared.value_full(value.slot));
      value.advance();
    }
    query.advance();
  }
  barrier_arrive_after_copies(shared.query_full(
      query.slot));  // no more tiles: let the others read the tile number and leave
  if (thread == 0) barrier_arrive(shared.query_full(query.slot));
}

// Are keys of this block's first tile likely to be runs? A guess, from the middle of their list.
__device__ __forceinline__ bool keys_may_run(const Params& p) {
  if (!kRuns || p.seqlen_k < kRunRows) return false;
  const QueryTile at = locate_query_tile<kBlockM>(p, blockIdx.x);
  const long long list = static_cast<long long>(at.b * p.heads_kv + at.h_kv) * p.seqlen_k;
  const int lane = threadIdx.x % 32;
  const int row = p.k_index[list + (p.seqlen_k - kRunRows) / 2 + lane];
  return is_run(row, __shfl_sync(0xFFFFFFFFu, row, 0), lane);
}
