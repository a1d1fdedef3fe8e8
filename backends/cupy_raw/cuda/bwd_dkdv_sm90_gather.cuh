// First half of bwd_dkdv_sm90.cu: its tile shape, its shared memory, and the gathering warpgroups.
#pragma once

#if !defined(SCFA_HEAD_DIM) || !defined(SCFA_BLOCK_N) || !defined(SCFA_WARPGROUPS) || \
    !defined(SCFA_STAGES) || !defined(SCFA_GATHERERS) || !defined(SCFA_SHARED_BYTES)
#error "the tile shape and SCFA_SHARED_BYTES: set by launch_sm90.py"
#endif
#ifndef SCFA_PARTS
#define SCFA_PARTS 1
#endif
#include "mbarrier.cuh"
#include "products_sm90.cuh"
#include "params_sm90.cuh"
#include "choice_sm90.cuh"
#include "order_sm90.cuh"
#include "gather_sm90.cuh"
#include "search_sm90.cuh"
#include "query_data_sm90.cuh"
#include "width_sm90.cuh"
#include "softmax_sm90.cuh"

constexpr int kKeyGroups = SCFA_WARPGROUPS;  // of 64 keys
constexpr int kParts = SCFA_PARTS;           // warpgroups that share 64 keys: bwd_dkdv_sm90_roles.cuh
constexpr int kWarpgroups = kKeyGroups * kParts;
constexpr int kStages = SCFA_STAGES;       // buffers of one q and one dout block each
constexpr int kBlockN = 64 * kKeyGroups;   // keys of a tile
constexpr int kBlockM = SCFA_BLOCK_N;      // queries of a step
constexpr int kTwoGatherRegisters = 32;  // those of products: 256 less that
#include "gatherers_sm90.cuh"
// Two uses of registers that are free only at head_dim 64, 64 queries a step and two warpgroups:
// keys and values as A operands, and scores of the next queries running behind the products of
// these.
constexpr bool kOverlap = kHeadDim == 64 && kBlockM == 64 && kWarpgroups == 2;
constexpr bool kKeysInRegisters = kOverlap;
static_assert(kParts == 1 ? kWidth <= 128 : kParts == 2 && kKeyGroups == 1,
              "dk and dv, or one of them, fit into registers");
static_assert(kStages >= 2, "scores of the next block start before this one is done");

constexpr int kKeyBytes = kBlockN * kHeadDim * 2;
constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
constexpr int kQueryBase = 2 * kKeyBytes;
constexpr int kDataBase = kQueryBase + 2 * kStages * kQueryBytes;
constexpr int kDataBytes = query_data_bytes(kBlockM);
constexpr int kBounds = 2 * kKeyGroups;  // first and end query of each warpgroup's keys
constexpr int kWeightsBase = kDataBase + kStages * kDataBytes;
constexpr int kWeightBytes = kParts == 1 ? 0 : 4 * kBlockN * kBlockM;  // handed over in a step
constexpr int kBoundsBase = kWeightsBase + kWeightBytes;
constexpr int kTileBase = kBoundsBase + bounds_bytes(kBounds);
constexpr int kBarrierBase = kTileBase + 16;
constexpr int kBarriers = 2 + 2 * kStages + (kParts == 1 ? 0 : 2);
constexpr int kSharedBytes = kBarrierBase + 8 * kBarriers + 1024;  // 1024: room to align the base
static_assert(kSharedBytes <= 232448, "more shared memory than a block can have");
static_assert(kSharedBytes == SCFA_SHARED_BYTES, "launch_sm90.py asks for as much as is laid out");

constexpr int kProducerBarrier = 1;  // named barrier of all gathering warpgroups
constexpr int kGathererBarrier = 2;  // the first of those of each alone

struct Shared : QueryData<kBlockM, kDataBase, kBounds, kBoundsBase> {
  __device__ __forceinline__ unsigned key() const { return base; }
  __device__ __forceinline__ unsigned value() const { return base + kKeyBytes; }
  __device__ __forceinline__ unsigned query(unsigned i) const {
    return base + kQueryBase + 2 * i * kQueryBytes;
  }
  __device__ __forceinline__ unsigned dout(unsigned i) const { return query(i) + kQueryBytes; }
  __device__ __forceinline__ unsigned weights() const { return base + kWeightsBase; }
  __device__ __forceinline__ unsigned tile() const { return base + kTileBase; }
  __device__ __forceinline__ unsigned share() const { return base + kTileBase + 4; }
  __device__ __forceinline__ unsigned key_full() const { return base + kBarrierBase; }
  __device__ __forceinline__ unsigned key_empty() const { return base + kBarrierBase + 8; }
  __device__ __forceinline__ unsigned query_full(unsigned i) const {
    return base + kBarrierBase + 16 + 8 * i;
  }
  __device__ __forceinline__ unsigned query_empty(unsigned i) const {
    return query_full(kStages + i);
  }
  __device__ __forceinline__ unsigned weights_full() const { return query_full(2 * kStages); }
  __device__ __forceinline__ unsigned weights_empty() const { return query_full(2 * kStages + 1); }
};

// Bring the row numbers of a tile's keys nearer; one warp calls it with the tile number in its lane
// 0.
__device__ __forceinline__ void prefetch_tile_keys(const Params& p, int number, int lane) {
  number = __shfl_sync(0xFFFFFFFFu, number, 0);
  if (number >= p.tiles || lane > kBlockN / 32) return;
  const int z = p.by_tiles.quotient(number), n = number - z * p.tiles_per_head;
  const int row = min(n * kBlockN + 32 * lane, p.seqlen_k - 1);
  const int* line = p.k_index + static_cast<long long>(z) * p.seqlen_k + row;
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

// The first warpgroups: for each tile gather keys and values, then every block of queries that may
// see one of them, in turn.
__device__ __forceinline__ void gather_tiles(const Params& p, Shared shared, int gatherer) {
  const int thread = threadIdx.x % kGatherThreads, warp = uniform(thread / 32), lane = thread % 32;
  const bool fetches_keys = gatherer == 0, searches = gatherer == kGatherers - 1;
  const int lane_bytes = (thread % kLanesPerRow) * 16;
  Ring<1> key;
  Ring<kStages> query;
  if (threadIdx.x == 0) shared_store(shared.share(), share_of(p, kSplit));
  int next = blockIdx.x, turn = 0;  // whose is the next block
  while (true) {
    barrier_wait(shared.key_empty(), key.parity ^ 1);
    if (threadIdx.x == 0) {
      next = own_tile<false>(p, kSplit, shared.share(), next, gridDim.x);
      shared_store(shared.tile(), next);
    }
    named_barrier_sync(kProducerBarrier, kAllGatherThreads);  // the tile number is written
    __syncwarp();  // thread 0 is back: or ptxas writes all that follows twice
    const int tile = uniform(shared_load(shared.tile()));
    if (tile >= p.tiles) break;
    if (threadIdx.x == 0) next = atomicAdd(p.counter, 1) + gridDim.x;
    const int z = p.by_tiles.quotient(tile), n = tile - z * p.tiles_per_head;
    const int b = p.by_heads.quotient(z), h_kv = z - b * p.heads_kv;
    const int key0 = n * kBlockN, key1 = min(key0 + kBlockN, p.seqlen_k);

    const int kept = p.k_count[z];  // no query sees a key beyond these: nothing is fetched for it
    if (fetches_keys) {
      const int* k_index = p.k_index + static_cast<long long>(z) * p.seqlen_k;
      int rows[(kBlockN + 127) / 128];
#pragma unroll
      for (int i = 0; i < (kBlockN + 127) / 128; ++i) {
        const int sorted = key0 + gather_owned_row(thread, i), row = k_index[min(sorted, key1 - 1)];
        rows[i] = sorted < min(key1, kept) ? row : -1;
      }
      gather_tile<kBlockN>(shared.key(), p.k.of_head(b, h_kv) + lane_bytes, p.k.row, rows, thread);
      gather_tile<kBlockN>(shared.value(), p.v.of_head(b, h_kv) + lane_bytes, p.v.row, rows,
                           thread);
      barrier_arrive_after_copies(shared.key_full());
    }

    // The queries that see one of a warpgroup's keys lie between the first that ends beyond the
    // first of these keys and the first that starts beyond the last; where ranges lie in any order,
    // their envelopes end and start there. Each warp searches for one bound at a time.
    for (int member = 0; searches && member < p.group_size; ++member) {
      const long long list =
          static_cast<long long>(b * p.heads + h_kv * p.group_size + member) * p.seqlen_q;
      for (int i = warp; i < kBounds; i += kGatherThreads / 32) {
        // Queries that are dropped start at `kept`, beyond all that see a key.
        const int first = key0 + 64 * (i / 2);
        const int key_of_bound = i & 1 ? min(first + 63, kept - 1) : first;
        const int* searched = kMonotone ? i & 1 ? p.key_start : p.key_end
                              : i & 1   ? p.envelope_start
                                        : p.envelope_end;
        const int found =
            key0 < kept ? first_greater(searched + list, p.seqlen_q, key_of_bound, lane) : 0;
        if (lane == 0) shared_store(shared.bound(key.parity, member, i), found);
      }
    }
    named_barrier_sync(kProducerBarrier, kAllGatherThreads);  // the bounds are written
    barrier_publish(shared.key_full(), threadIdx.x);          // tile number and bounds
    if (fetches_keys && warp == 0) prefetch_tile_keys(p, next, lane);

    for (int member = 0; member < p.group_size; ++member) {
      const int h = h_kv * p.group_size + member;
      const long long list = static_cast<long long>(b * p.heads + h) * p.seqlen_q;
      const int *starts = p.key_start + list, *ends = p.key_end + list, *indices = p.q_index + list;
      const int first_query = uniform(shared_load(shared.bound(key.parity, member, 0)));
      const int end_query = uniform(shared_load(shared.bound(key.parity, member, kBounds - 1)));
      const char* q = p.q.of_head(b, h) + lane_bytes;
      const char* dout = p.dout.of_head(b, h) + lane_bytes;
      // Range and original row of the query this thread owns in a block, loaded one block ahead and
      // looked at only then.
      struct Query {
        int start, end, row;
      };
      const auto load_query = [&](int first) {
        const int sorted = first + min(gather_owned_row(thread, 0), kBlockM - 1);
        const int at = min(sorted, p.seqlen_q - 1);
        return Query{sorted < end_query ? starts[at] : kSeesNothing, ends[at], indices[at]};
      };
      const auto pass = [&]() {
        query.advance();
        if constexpr (kGatherers > 1) turn ^= 1;
      };
      const int ahead = kGatherers == 1 ? 0 : gatherer ^ turn;  // blocks of another before the first
      Query upcoming = load_query(first_query + ahead * kBlockM);
      for (int first = first_query; first < end_query; first += kBlockM) {
        if (kGatherers > 1 && turn != gatherer) {
          pass();
          continue;
        }
        const Query own = upcoming;
        upcoming = load_query(first + kGatherers * kBlockM);
        const bool sees = own.start < own.end && own.end > key0 && own.start < key1;
        const int current[1] = {sees ? own.row
                                     : -1};  // a query that sees no key of the tile becomes zeros
        // A block of which no query does is passed over by those who multiply: they need the ranges.
        const bool wanted =
            kMonotone || named_barrier_any(kGathererBarrier + gatherer, kGatherThreads, sees);
        barrier_wait(shared.query_empty(query.slot), query.parity ^ 1);
        if (wanted) {
          gather_tile<kBlockM>(shared.query(query.slot), q, p.q.row, current, thread);
          gather_tile<kBlockM>(shared.dout(query.slot), dout, p.dout.row, current, thread);
        }
        // Rows past the end repeat the last row's range, with lse +inf (before row_lse's first
        // element): their weights are 0.
        const int column = thread % kBlockM, sorted = min(first + column, p.seqlen_q - 1);
        if (thread < kBlockM) {
          const float* lse =
              first + column < p.seqlen_q ? p.row_lse + list + sorted : p.row_lse - 1;
          copy_word(shared.lse(query.slot) + 4 * column, lse, true);
          copy_word(shared.delta(query.slot) + 4 * column, p.row_delta + list + sorted, true);
        }
        if (thread >= kGatherThreads - kBlockM) {
          copy_word(shared.starts(query.slot) + 4 * column, starts + sorted, true);
          copy_word(shared.ends(query.slot) + 4 * column, ends + sorted, true);
        }
        barrier_arrive_after_copies(shared.query_full(query.slot));
        pass();
      }
    }
    key.advance();
  }
  // No more tiles: let the others read the tile number and leave.
  if (fetches_keys) barrier_arrive_after_copies(shared.key_full());
  barrier_publish(shared.key_full(), threadIdx.x);
}
