// First part of bwd_fused_sm90.cu: its tile shape, its shared memory, and the gathering warps.
#pragma once

#include "bwd_fused_sm90_sizes.cuh"

constexpr int kStages = SCFA_STAGES;  // buffers of one q and one dout block each
constexpr int kThreads = 128 * (kWarpgroups + 2);
constexpr int kRowRegisters = 48, kQueryRegisters = 64, kConsumerRegisters = 200;
static_assert(kRowRegisters + kQueryRegisters + kWarpgroups * kConsumerRegisters <=
                  launched_registers(kThreads),
              "registers are shared out, not made");
constexpr int kKeyBuffers = 2;
static_assert(kHeadDim == 64 && kBlockM == 64 && kWarpgroups == 2,
              "dq of a step is one product of 64 x 64, two warpgroups have the registers");
static_assert(kStages >= 2, "scores of the next block start before this one is done");

constexpr int kChangeBase = 2 * kKeyBuffers * kKeyBytes;
constexpr int kSumBase = kChangeBase + kChanges * kChangeBytes;
constexpr int kQueryBase = kSumBase + kCarriers * kSumBytes;  // each carrier has a dq tile
constexpr int kDataBase = kQueryBase + 2 * kStages * kQueryBytes;
constexpr int kBoundsBase = kDataBase + kStages * kDataBytes;
constexpr int kJobBase = kBoundsBase + bounds_bytes(kBounds);
constexpr int kJobBytes = 32;  // what a buffer of dS belongs to
constexpr int kLoadBase = kJobBase + kJobBytes * kChanges;
constexpr int kTileBase = kLoadBase + 8 * kCarriers;
constexpr int kBarrierBase = kTileBase + 16;
constexpr int kBarriers = 2 * (kKeyBuffers + kChanges + kCarriers + kStages) + kCarriers;
constexpr int kSharedBytes = kBarrierBase + 8 * kBarriers + 1024;  // 1024: room to align the base
static_assert(kSharedBytes <= 232448, "more shared memory than a block can have");
static_assert(kSharedBytes == SCFA_SHARED_BYTES, "launch_sm90.py asks for as much as is laid out");

struct Shared : QueryData<kBlockM, kDataBase, kBounds, kBoundsBase> {
  __device__ __forceinline__ unsigned key(unsigned i) const { return base + 2 * i * kKeyBytes; }
  __device__ __forceinline__ unsigned value(unsigned i) const { return key(i) + kKeyBytes; }
  __device__ __forceinline__ unsigned changes(unsigned i) const {
    return base + kChangeBase + i * kChangeBytes;
  }
  __device__ __forceinline__ unsigned sum(unsigned i) const {
    return base + kSumBase + i * kSumBytes;
  }
  __device__ __forceinline__ unsigned query(unsigned i) const {
    return base + kQueryBase + 2 * i * kQueryBytes;
  }
  __device__ __forceinline__ unsigned dout(unsigned i) const { return query(i) + kQueryBytes; }
  __device__ __forceinline__ unsigned job(unsigned i) const {
    return base + kJobBase + kJobBytes * i;
  }
  __device__ __forceinline__ unsigned load(unsigned i) const { return base + kLoadBase + 8 * i; }
  __device__ __forceinline__ unsigned tile(unsigned buffer) const {
    return base + kTileBase + 4 * buffer;
  }
  // Read nowhere where there is no choice of ways.
  __device__ __forceinline__ unsigned share() const { return base + kTileBase + 8; }
  __device__ __forceinline__ unsigned in_turn() const { return base + kTileBase + 12; }
  __device__ __forceinline__ unsigned barrier(unsigned i) const {
    return base + kBarrierBase + 8 * i;
  }
  __device__ __forceinline__ unsigned key_full(unsigned i) const { return barrier(i); }
  __device__ __forceinline__ unsigned key_empty(unsigned i) const {
    return barrier(kKeyBuffers + i);
  }
  __device__ __forceinline__ unsigned changes_full(unsigned i) const {
    return barrier(2 * kKeyBuffers + i);
  }
  __device__ __forceinline__ unsigned changes_empty(unsigned i) const {
    return changes_full(kChanges + i);
  }
  __device__ __forceinline__ unsigned sum_full(unsigned i) const {
    return changes_full(2 * kChanges + i);
  }
  __device__ __forceinline__ unsigned sum_empty(unsigned i) const {
    return sum_full(kCarriers + i);
  }
  __device__ __forceinline__ unsigned sum_loaded(unsigned i) const {
    return sum_full(2 * kCarriers + i);
  }
  __device__ __forceinline__ unsigned query_full(unsigned i) const {
    return sum_full(3 * kCarriers + i);
  }
  __device__ __forceinline__ unsigned query_empty(unsigned i) const {
    return query_full(kStages + i);
  }
};

#include "bwd_fused_sm90_keys.cuh"
#include "runs_sm90.cuh"

// Element of a list by its offset in bytes: one offset serves several lists.
template <class T>
__device__ __forceinline__ const T* at_byte(const T* list, unsigned offset) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(list) + offset);
}

// Address of this thread's chunk of a row. Volatile, so that addresses of rows to come are made
// before the copies of this one, in registers of their own: a copy reads its address late, and the
// next address in the same registers would wait for that.
__device__ __forceinline__ void row_address(const char*& address, const char* source, int row,
                                            int row_bytes) {
  asm volatile("mad.wide.u32 %0, %1, %2, %3;"
               : "=l"(address)
               : "r"(row), "r"(row_bytes), "l"(source));
}

// Start copying a block of queries, and of their output gradients behind it; `own` is the row whose
// index this thread keeps (gather_owned_row), -1 for zeros.
__device__ __forceinline__ void gather_queries(unsigned tile, const char* q, int q_bytes,
                                               const char* dout, int dout_bytes, int own,
                                               int thread) {
  constexpr int kRowsPerPass = kRowThreads / kLanesPerRow, kPasses = kBlockM / kRowsPerPass;
  constexpr int kAhead = 2;  // passes whose addresses are made early
  const int lane = thread % kLanesPerRow, first = thread / kLanesPerRow;
  const unsigned target = tile + first * kRowBytes + ((lane ^ (first & 7)) << 4);
  asm volatile("" : "+l"(q), "+l"(dout));  // base register pairs, not sums of strides per row
  const char *q_row[kPasses], *dout_row[kPasses];
  int row[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) row[i] = __shfl_sync(0xFFFFFFFFu, own, i, kLanesPerRow);
  const auto make_addresses = [&](int i) {
    row_address(q_row[i], q, row[i], q_bytes);
    row_address(dout_row[i], dout, row[i], dout_bytes);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) make_addresses(i);
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    if (i + kAhead < kPasses) make_addresses(i + kAhead);
    const unsigned to = target + i * kRowsPerPass * kRowBytes;
    copy_chunk<1>(to, q_row[i], row[i]);
    copy_chunk<1>(to + kQueryBytes, dout_row[i], row[i]);
  }
}

// Warps 0 and 1: for each tile gather keys and values, then every block of queries that may see one
// of them.
__device__ __forceinline__ void gather_tiles(const Params& p, Shared shared) {
  const int thread = threadIdx.x;
  const int lane_bytes = (thread % kLanesPerRow) * 16;
  Ring<kKeyBuffers> key;
  Ring<kStages> query;
  if (thread == 0) {
    shared_store(shared.in_turn(), heads_in_turn(p));
    if constexpr (kHasChoice) shared_store(shared.share(), share_of(p, kFused));
  }
  unsigned buffer = 0;  // of tile number and bounds, by the parity of the tile
  for (;; buffer ^= 1) {
    barrier_wait(shared.key_empty(key.slot), key.parity ^ 1);
    barrier_wait(shared.query_empty(query.slot), query.parity ^ 1);
    const int tile = take_tile(p, shared, buffer, thread);
    if (tile >= p.tiles) break;
    const KeyTile at = locate_key_tile(p, tile);
    const int key0 = at.number * kBlockN, key1 = min(key0 + kBlockN, p.seqlen_k);

    int count = p.q_count[at.b * p.heads + at.h_kv * p.group_size];  // on its way with the record
    int rows[kBlockN / kRowThreads];
    load_key_tile(p, shared, buffer, tile, at, thread, rows);
    gather_rows<kBlockN, 1, kRowThreads>(shared.key(key.slot),
                                         p.k.of_head(at.b, at.h_kv) + lane_bytes, p.k.row, rows,
                                         thread);
    gather_rows<kBlockN, 1, kRowThreads>(shared.value(key.slot),
                                         p.v.of_head(at.b, at.h_kv) + lane_bytes, p.v.row, rows,
                                         thread);
    barrier_arrive_after_copies(shared.key_full(key.slot));
    barrier_publish(shared.key_full(key.slot), thread);  // tile number and bounds

    for (int member = 0; member < p.group_size; ++member) {
      const int h = at.h_kv * p.group_size + member, z = at.b * p.heads + h;
      if (member > 0) count = p.q_count[z];
      const long long list = static_cast<long long>(z) * p.seqlen_q;
      const int *starts = p.key_start + list, *ends = p.key_end + list, *indices = p.q_index + list;
      const int low = uniform(shared_load(shared.bound(buffer, member, 0)));
      const bool runs = kRuns && low & 1;
      const int end_query = uniform(shared_load(shared.bound(buffer, member, 1)));
      const char* q = p.q.of_head(at.b, h) + lane_bytes;
      const char* dout = p.dout.of_head(at.b, h) + lane_bytes;
      const float *lse = p.row_lse + list, *delta = p.row_delta + list;
      // Range and original row of the query this thread owns in a block, and where they are listed;
      // loaded one block ahead and looked at only then. Rows past the last kept one repeat its range.
      struct Query {
        int start, end, row;
        unsigned offset;
      };
      const int column = runs ? thread : gather_owned_row<kRowThreads>(thread, 0);
      const auto load_query = [&](int first) {
        const unsigned offset = 4u * static_cast<unsigned>(min(first + column, count - 1));
        return Query{*at_byte(starts, offset), *at_byte(ends, offset), *at_byte(indices, offset),
                     offset};
      };
      int first = low & ~(kBlockM - 1);
      if (first >= end_query) continue;
      Query upcoming = load_query(first);
      for (; first < end_query; first += kBlockM) {
        const Query own = upcoming;
        upcoming = load_query(first + kBlockM);
        const bool there = first + column < count;
        const bool sees = there && own.start < own.end && own.end > key0 && own.start < key1;
        // A query that sees no key of the tile becomes zeros.
        const int row = sees ? own.row : -1;
        barrier_wait(shared.query_empty(query.slot), query.parity ^ 1);
        if (kRuns && runs) {
          const unsigned tile = shared.query(query.slot), full = shared.query_full(query.slot);
          fetch_own_rows<kBlockM, 1, kHeadDim>(tile, p.maps[0], h, at.b, q, p.q.row, row, full, thread);
          fetch_own_rows<kBlockM, 1, kHeadDim>(tile + kQueryBytes, p.maps[1], h, at.b, dout,
                                               p.dout.row, row, full, thread);
        } else {
          gather_queries(shared.query(query.slot), q, p.q.row, dout, p.dout.row, row, thread);
        }
        // Lse of rows past the last kept one is +inf (before row_lse's first element) and delta 0:
        // their weights are 0.
        const unsigned target = shared.lse(query.slot) + 4 * column;
        copy_word(target, there ? at_byte(lse, own.offset) : p.row_lse - 1, true);
        copy_word(target + 4 * kBlockM, at_byte(delta, own.offset), there);
        copy_word(target + 8 * kBlockM, at_byte(starts, own.offset), true);
        copy_word(target + 12 * kBlockM, at_byte(ends, own.offset), true);
        barrier_arrive_after_copies(shared.query_full(query.slot));
        query.advance();
      }
    }
    key.advance();
  }
  // No more tiles: let the others read the tile number and leave.
  barrier_arrive_after_copies(shared.key_full(key.slot));
  barrier_publish(shared.key_full(key.slot), thread);
}
