// First part of bwd_fused128_sm90.cu: its tile shape, its shared memory, and the gathering warps.
#pragma once

#include "bwd_fused_sm90_sizes.cuh"

constexpr int kPanels = kHeadDim / kPanelColumns;
constexpr int kRing = SCFA_STAGES;  // buffers of a q or a dout block
constexpr int kThreads = 128 * (kWarpgroups + 1);
constexpr int kRowRegisters = 40, kConsumerRegisters = 232;
static_assert(kRowRegisters + kWarpgroups * kConsumerRegisters <= launched_registers(kThreads),
              "registers are shared out, not made");
constexpr int kDataSlots = 3;  // buffers of what else belongs to a block of queries
static_assert(kHeadDim == 128 && kBlockM == 64 && kWarpgroups == 2,
              "dq of a step is two products of 64 x 64, dk and dv of 64 keys fill the registers");
static_assert(kChanges == 2, "dS of a step is stored before dq of the step before is there");
static_assert(4 <= kRing && kRing <= 6,
              "scores of the next block start before this one is done; its data outlive it");

constexpr int kChangeBase = 2 * kKeyBytes;
constexpr int kSumBase = kChangeBase + kChanges * kChangeBytes;
constexpr int kQueryBase = kSumBase + kSumBytes;
constexpr int kDataBase = kQueryBase + kRing * kQueryBytes;
constexpr int kBoundsBase = kDataBase + kDataSlots * kDataBytes;
constexpr int kJobBase = kBoundsBase + bounds_bytes(kBounds);
constexpr int kJobBytes = 16;
constexpr int kTileBase = kJobBase + kJobBytes * kCarriers;
constexpr int kBarrierBase = kTileBase + 16;
constexpr int kBarriers = 2 + 2 * kChanges + 4 * kCarriers + 1 + 2 * kRing;
constexpr int kSharedBytes = kBarrierBase + 8 * kBarriers + 1024;  // 1024: room to align the base
static_assert(kSharedBytes <= 232448, "more shared memory than a block can have");
static_assert(kSharedBytes == SCFA_SHARED_BYTES, "launch_sm90.py asks for as much as is laid out");

struct Shared : QueryData<kBlockM, kDataBase, kBounds, kBoundsBase> {
  __device__ __forceinline__ unsigned key() const { return base; }
  __device__ __forceinline__ unsigned value() const { return base + kKeyBytes; }
  __device__ __forceinline__ unsigned changes(unsigned i) const {
    return base + kChangeBase + i * kChangeBytes;
  }
  __device__ __forceinline__ unsigned sum() const { return base + kSumBase; }
  __device__ __forceinline__ unsigned rows(unsigned i) const {  // q and dout of a block in turn
    return base + kQueryBase + i * kQueryBytes;
  }
  __device__ __forceinline__ unsigned job(unsigned i) const {
    return base + kJobBase + kJobBytes * i;
  }
  __device__ __forceinline__ unsigned tile(unsigned buffer) const {
    return base + kTileBase + 4 * buffer;
  }
  __device__ __forceinline__ unsigned share() const { return base + kTileBase + 8; }
  // Read nowhere, as kInTurn is false.
  __device__ __forceinline__ unsigned in_turn() const { return base + kTileBase + 12; }
  __device__ __forceinline__ unsigned barrier(unsigned i) const {
    return base + kBarrierBase + 8 * i;
  }
  __device__ __forceinline__ unsigned key_full() const { return barrier(0); }
  __device__ __forceinline__ unsigned key_empty() const { return barrier(1); }
  __device__ __forceinline__ unsigned changes_full(unsigned i) const { return barrier(2 + i); }
  __device__ __forceinline__ unsigned changes_empty(unsigned i) const {
    return changes_full(kChanges + i);
  }
  __device__ __forceinline__ unsigned job_full(unsigned i) const {
    return changes_full(2 * kChanges + i);
  }
  __device__ __forceinline__ unsigned job_empty(unsigned i) const {
    return job_full(kCarriers + i);
  }
  __device__ __forceinline__ unsigned sum_full(unsigned i) const {
    return job_full(2 * kCarriers + i);
  }
  __device__ __forceinline__ unsigned sum_empty(unsigned i) const {
    return job_full(3 * kCarriers + i);
  }
  __device__ __forceinline__ unsigned sum_loaded() const { return job_full(4 * kCarriers); }
  __device__ __forceinline__ unsigned rows_full(unsigned i) const {
    return job_full(4 * kCarriers + 1 + i);
  }
  __device__ __forceinline__ unsigned rows_empty(unsigned i) const {
    return rows_full(kRing + i);
  }
};

#include "bwd_fused_sm90_keys.cuh"
#include "runs_sm90.cuh"

// Warps 0 and 1: for each tile gather keys and values, then every block of queries that may see one
// of them.
__device__ __forceinline__ void gather_tiles(const Params& p, Shared shared) {
  const int thread = threadIdx.x;
  const int lane_bytes = (thread % kLanesPerRow) * 16;
  unsigned buffer = 0;  // of tile number and bounds: the parity of the tile
  Ring<kRing> ring;
  Ring<kDataSlots> data;
  if (thread == 0) shared_store(shared.share(), share_of(p, kFused));
  for (;; buffer ^= 1) {
    // The multiplying warpgroups are at the last blocks of the tile before.
    const int tile = take_tile(p, shared, buffer, thread);
    if (tile >= p.tiles) break;
    const KeyTile at = locate_key_tile(p, tile);
    const int key0 = at.number * kBlockN, key1 = min(key0 + kBlockN, p.seqlen_k);
    int rows[kBlockN / kRowThreads];
    load_key_tile(p, shared, buffer, tile, at, thread, rows);
    barrier_wait(shared.key_empty(), buffer ^ 1);
    gather_rows<kBlockN, kPanels, kRowThreads>(
        shared.key(), p.k.of_head(at.b, at.h_kv) + lane_bytes, p.k.row, rows, thread);
    gather_rows<kBlockN, kPanels, kRowThreads>(
        shared.value(), p.v.of_head(at.b, at.h_kv) + lane_bytes, p.v.row, rows, thread);
    barrier_arrive_after_copies(shared.key_full());
    barrier_publish(shared.key_full(), thread);  // tile number and bounds

    for (int member = 0; member < p.group_size; ++member) {
      const int h = at.h_kv * p.group_size + member, z = at.b * p.heads + h;
      const int count = uniform(p.q_count[z]);
      const long long list = static_cast<long long>(z) * p.seqlen_q;
      const int *starts = p.key_start + list, *ends = p.key_end + list, *indices = p.q_index + list;
      const int low = uniform(shared_load(shared.bound(buffer, member, 0)));
      const bool runs = kRuns && low & 1;
      const int end_query = uniform(shared_load(shared.bound(buffer, member, 1)));
      const char* q = p.q.of_head(at.b, h) + lane_bytes;
      const char* dout = p.dout.of_head(at.b, h) + lane_bytes;
      // Range and original row of the query this thread owns in a block, loaded one block ahead and
      // looked at only then.
      struct Query {
        int start, end, row;
      };
      const auto fetch = [&](const char* source, int row_bytes, const TensorMap& map, int own) {
        const unsigned full = shared.rows_full(ring.slot);
        if (kRuns && runs) {
          fetch_own_rows<kBlockM, kPanels, kHeadDim>(shared.rows(ring.slot), map, h, at.b, source,
                                                     row_bytes, own, full, thread);
        } else {
          const int rows[1] = {own};
          gather_rows<kBlockM, kPanels, kRowThreads>(shared.rows(ring.slot), source, row_bytes, rows,
                                                     thread);
        }
        barrier_arrive_after_copies(full);
      };
      const auto load_query = [&](int first) {
        const int sorted = first + (runs ? thread : gather_owned_row<kRowThreads>(thread, 0));
        const int row = min(sorted, count - 1);
        return Query{sorted < count ? starts[row] : kSeesNothing, ends[row], indices[row]};
      };
      int first = low & ~(kBlockM - 1);
      if (first >= end_query) continue;
      Query upcoming = load_query(first);
      for (; first < end_query; first += kBlockM) {
        const Query own = upcoming;
        upcoming = load_query(first + kBlockM);
        const bool sees = own.start < own.end && own.end > key0 && own.start < key1;
        // A query that sees no key of the tile becomes zeros.
        const int current = sees ? own.row : -1;
        barrier_wait(shared.rows_empty(ring.slot), ring.parity ^ 1);
        // Rows past the last kept one repeat its range, with lse +inf (before row_lse's first
        // element) and delta 0: their weights are 0. Whoever let go of a buffer three blocks on
        // has done with the data of this slot.
        const int sorted = min(first + thread, count - 1);
        const bool kept = first + thread < count;
        copy_word(shared.lse(data.slot) + 4 * thread,
                  kept ? p.row_lse + list + sorted : p.row_lse - 1, true);
        copy_word(shared.delta(data.slot) + 4 * thread, p.row_delta + list + sorted, kept);
        copy_word(shared.starts(data.slot) + 4 * thread, starts + sorted, true);
        copy_word(shared.ends(data.slot) + 4 * thread, ends + sorted, true);
        data.advance();
        fetch(q, p.q.row, p.maps[0], current);
        ring.advance();
        barrier_wait(shared.rows_empty(ring.slot), ring.parity ^ 1);
        fetch(dout, p.dout.row, p.maps[1], current);
        ring.advance();
      }
    }
  }
  // No more tiles: let the others read the tile number and leave.
  barrier_wait(shared.key_empty(), buffer ^ 1);
  barrier_arrive_after_copies(shared.key_full());
  barrier_publish(shared.key_full(), thread);
}
