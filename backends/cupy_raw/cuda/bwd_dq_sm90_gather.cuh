// First half of bwd_dq_sm90.cu: its tile shape, its shared memory, and the gathering warpgroups.
#pragma once

#if !defined(SCFA_HEAD_DIM) || !defined(SCFA_BLOCK_N) || !defined(SCFA_WARPGROUPS) || \
    !defined(SCFA_STAGES) || !defined(SCFA_QUERY_BUFFERS) || !defined(SCFA_GATHERERS) || \
    !defined(SCFA_SHARED_BYTES)
#error "the tile shape and SCFA_SHARED_BYTES: set by launch_sm90.py"
#endif
#include "mbarrier.cuh"
#include "products_sm90.cuh"
#include "params_sm90.cuh"
#include "choice_sm90.cuh"
#include "gather_sm90.cuh"
#include "width_sm90.cuh"
#include "softmax_sm90.cuh"
#include "tiles_sm90.cuh"

constexpr int kBlockN = SCFA_BLOCK_N;
constexpr int kWarpgroups = SCFA_WARPGROUPS;
constexpr int kStages = SCFA_STAGES;  // buffers of one key and one value block each
constexpr int kQueryBuffers = SCFA_QUERY_BUFFERS;
constexpr int kBlockM = 64 * kWarpgroups;
constexpr int kTwoGatherRegisters = 56;  // those of products: 256 less that
#include "gatherers_sm90.cuh"
static_assert(kBlockN % 16 == 0, "scores of one wgmma, reduced over 16 keys at a time");
static_assert(kStages >= 2, "scores of the next block start before this one is done");

static_assert(kGatherers == 1 || kHeadDim == 64, "two take turns in one panel");

constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
constexpr int kKeyBytes = kBlockN * kHeadDim * 2;
// Wide rows leave no room for out, which only delta needs: it takes that of all key and value blocks
// before the first of them comes. And few blocks have room: values, of which a step has done with
// first, are fetched before the keys, once their own room is free.
constexpr bool kWide = kHeadDim > 128;
static_assert(!kWide || (kQueryBuffers == 1 && kQueryBytes <= 2 * kStages * kKeyBytes),
              "out of a tile fits there");
constexpr int kKept = kWide ? 2 : 3;  // of q, dout and out
constexpr int kKeyBase = kKept * kQueryBuffers * kQueryBytes;
constexpr int kDataBase = kKeyBase + 2 * kStages * kKeyBytes;
constexpr int kStatsBase =
    kDataBase +
    kQueryBuffers * TileData<kBlockM>::kBytes;  // lse in base 2, then delta, of each row
constexpr int kScratchBase = kStatsBase + kQueryBuffers * 8 * kBlockM;
constexpr int kBarrierBase = kScratchBase + 64;
constexpr int kBarriers = 2 * kQueryBuffers + (kWide ? 3 : 2) * kStages;
constexpr int kSharedBytes = kBarrierBase + 8 * kBarriers;
static_assert(kSharedBytes <= 232448, "more shared memory than a block can have");
static_assert(kSharedBytes == SCFA_SHARED_BYTES, "launch_sm90.py asks for as much as is laid out");

struct Shared {
  unsigned base;
  __device__ __forceinline__ unsigned query(unsigned i) const {
    return base + kKept * i * kQueryBytes;
  }
  __device__ __forceinline__ unsigned dout(unsigned i) const { return query(i) + kQueryBytes; }
  __device__ __forceinline__ unsigned out(unsigned i) const { return query(i) + 2 * kQueryBytes; }
  __device__ __forceinline__ unsigned key(unsigned i) const {
    return base + kKeyBase + 2 * i * kKeyBytes;
  }
  __device__ __forceinline__ unsigned value(unsigned i) const { return key(i) + kKeyBytes; }
  __device__ __forceinline__ TileData<kBlockM> data(unsigned i) const {
    return {base + kDataBase + i * TileData<kBlockM>::kBytes};
  }
  __device__ __forceinline__ unsigned lse(unsigned i) const {
    return base + kStatsBase + i * 8 * kBlockM;
  }
  __device__ __forceinline__ unsigned delta(unsigned i) const { return lse(i) + 4 * kBlockM; }
  __device__ __forceinline__ unsigned query_full(unsigned i) const {
    return base + kBarrierBase + 8 * i;
  }
  // The word of the first header that TileData leaves.
  __device__ __forceinline__ unsigned share() const { return data(0).key_blocks() + 4; }
  __device__ __forceinline__ unsigned query_empty(unsigned i) const {
    return query_full(kQueryBuffers + i);
  }
  __device__ __forceinline__ unsigned key_full(unsigned i) const {
    return query_full(2 * kQueryBuffers + i);
  }
  __device__ __forceinline__ unsigned key_empty(unsigned i) const { return key_full(kStages + i); }
  __device__ __forceinline__ unsigned value_empty(unsigned i) const {  // of wide rows
    return key_full(2 * kStages + i);
  }
};

// The first warpgroups: for each tile gather q, dout, out and lse, then key and value blocks from
// the last to the first, in turn.
__device__ __forceinline__ void gather_tiles(const Params& p, Shared shared, int gatherer) {
  const int thread = threadIdx.x % kGatherThreads, warp = uniform(thread / 32);
  const bool leads = gatherer == 0;
  const int lane_bytes = (thread % kLanesPerRow) * 16;
  Ring<kQueryBuffers> query;
  Ring<kStages> key;
  if (threadIdx.x == 0) shared_store(shared.share(), share_of(p, kSplit));
  int next = blockIdx.x, turn = 0;  // whose is the next block
  while (true) {
    const TileData<kBlockM> data = shared.data(query.slot);
    barrier_wait(shared.query_empty(query.slot), query.parity ^ 1);
    if (threadIdx.x == 0) {
      next = own_tile<true>(p, kSplit, shared.share(), next, gridDim.x);
      shared_store(data.tile(), next);
    }
    named_barrier_sync(kProducerBarrier, kAllGatherThreads);  // the tile number is written
    __syncwarp();  // thread 0 is back: or ptxas writes all that follows twice
    const int tile = uniform(shared_load(data.tile()));
    if (tile >= p.tiles) break;
    if (threadIdx.x == 0) next = atomicAdd(p.counter, 1) + gridDim.x;
    const QueryTile at = locate_query_tile<kBlockM>(p, tile);
    if (leads) {
      load_tile_rows(data, shared.base + kScratchBase, PlannedRows(p, at), at.first_row, thread);
    }
    named_barrier_sync(kProducerBarrier, kAllGatherThreads);  // row data and ranges are written
    const KeyUnion keys = join_key_ranges(shared.base + kScratchBase);
    const int blocks = (keys.end - keys.first + kBlockN - 1) / kBlockN;
    const int* k_index =
        p.k_index + static_cast<long long>(at.b * p.heads_kv + at.h_kv) * p.seqlen_k;
    asm volatile("" : "+l"(k_index));  // one register pair, not the terms of its sum
    const auto key_row = [&](int block) {
      const int first = keys.first + block * kBlockN;
      const int sorted = first + min(gather_owned_row(thread, 0), kBlockN - 1);
      return seen_by_tile<kBlockN>(data, keys, first, sorted, thread) ? k_index[sorted] : -1;
    };
    if (threadIdx.x == 0) {
      shared_store(data.first_key(), keys.first);
      shared_store(data.key_blocks(), blocks);
    }
    const int ahead = kGatherers == 1 ? 0 : gatherer ^ turn;  // blocks of another before the first
    int upcoming = blocks > ahead ? key_row(blocks - 1 - ahead) : -1;
    for (int r = threadIdx.x; r < kBlockM; r += kAllGatherThreads) {
      const int row = shared_load(data.indices() + 4 * r);
      copy_word(shared.lse(query.slot) + 4 * r,
                p.lse.of_head(at.b, at.h) + static_cast<long long>(max(row, 0)) * p.lse.row,
                row >= 0);
    }

    const auto row_of = [&](int r) {
      const int row = shared_load(data.indices() + 4 * min(r, kBlockM - 1));
      return blocks > 0 ? row : -1;  // what sees nothing is not fetched
    };
    int rows[(kBlockM + 127) / 128];
#pragma unroll
    for (int i = 0; i < (kBlockM + 127) / 128; ++i) rows[i] = row_of(gather_owned_row(thread, i));
    const char* out = p.out.of_head(at.b, at.h) + lane_bytes;
    if (kGatherers == 1 || leads) {
      gather_tile<kBlockM>(shared.query(query.slot), p.q.of_head(at.b, at.h) + lane_bytes, p.q.row,
                           rows, thread);
    }
    if (kGatherers == 1 || !leads) {
      gather_tile<kBlockM>(shared.dout(query.slot), p.dout.of_head(at.b, at.h) + lane_bytes,
                           p.dout.row, rows, thread);
    }
    if constexpr (kWide) {
      Ring<kStages> room = key;
      for (int i = 0; i < kStages; ++i, room.advance()) {
        barrier_wait(shared.value_empty(room.slot), room.parity ^ 1);
        barrier_wait(shared.key_empty(room.slot), room.parity ^ 1);
      }
      gather_tile<kBlockM>(shared.out(query.slot), out, p.out.row, rows, thread);
      for (int i = 0; i < kStages; ++i, key.advance()) {
        barrier_arrive_after_copies(shared.key_full(key.slot));
      }
    } else if constexpr (kGatherers == 1) {
      gather_tile<kBlockM>(shared.out(query.slot), out, p.out.row, rows, thread);
    } else {
      constexpr int kShare = kBlockM / kGatherers;
      const int share[1] = {row_of(kShare * gatherer + gather_owned_row(thread, 0))};
      gather_tile<kShare>(shared.out(query.slot) + gatherer * kShare * kRowBytes, out, p.out.row,
                          share, thread);
    }
    barrier_arrive_after_copies(shared.query_full(query.slot));
    barrier_arrive(shared.query_full(query.slot));  // releases the row data this thread wrote

    const auto prefetch_next = [&]() {  // once its number has come
      if (leads && warp == 0) prefetch_tile_rows<kBlockM>(p, next, thread);
    };
    const char* k = p.k.of_head(at.b, at.h_kv) + lane_bytes;
    const char* v = p.v.of_head(at.b, at.h_kv) + lane_bytes;
    for (int block = blocks - 1; block >= 0; --block) {
      if (kGatherers == 1 || turn == gatherer) {
        const int current[1] = {upcoming};
        if (block >= kGatherers) upcoming = key_row(block - kGatherers);
        if constexpr (kWide) {
          barrier_wait(shared.value_empty(key.slot), key.parity ^ 1);
          gather_tile<kBlockN>(shared.value(key.slot), v, p.v.row, current, thread);
        }
        barrier_wait(shared.key_empty(key.slot), key.parity ^ 1);
        gather_tile<kBlockN>(shared.key(key.slot), k, p.k.row, current, thread);
        if constexpr (!kWide) {
          gather_tile<kBlockN>(shared.value(key.slot), v, p.v.row, current, thread);
        }
        barrier_arrive_after_copies(shared.key_full(key.slot));
      }
      key.advance();
      if constexpr (kGatherers > 1) turn ^= 1;
      if (block == blocks - 1) prefetch_next();
    }
    if (blocks == 0) prefetch_next();
    query.advance();
  }
  barrier_arrive_after_copies(shared.query_full(
      query.slot));  // no more tiles: let the others read the tile number and leave
  barrier_arrive(shared.query_full(query.slot));
}
