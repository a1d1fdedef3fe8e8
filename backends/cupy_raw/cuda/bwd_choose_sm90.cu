// Which way each key head's backward goes: two kernels that compute seven products (short ranges) or
// one that computes five and adds dq up in memory (long ones). The host does not know how long the
// ranges of a plan are.
//
// computes: choice (choice_sm90.cuh): a key head goes the fused way if its 64-row query tiles visit
//   more than SCFA_LONG_KEYS keys on average, each weighted by the keys it visits: so an average
//   pair's tile counts, not an average tile. A window's tiles are all alike; of tiles of buckets,
//   whose long ones take the time, the plain average says as little as of a window half as long.
//   By 128 tiles of each query head; by none where SCFA_LONG_KEYS is 0. Where ranges may lie in any
//   order, none goes the fused way but those whose query heads all have them in order. A head's way
//   depends on nothing but its own ranges, so its gradients do not depend on what else is in the
//   batch.
// grid/block: a warp for four key heads, eight lanes each: one multiprocessor would take longer for
//   the loads of many heads than they take to come. The last warp to end counts.
// shared memory: none.
// inputs/outputs: Params (params_sm90.cuh) with the tiles of key heads: q_count, key_start, key_end,
//   counter, two words that are 0; choice is written, tile counters in it become 0; its last words
//   are read where ranges may lie in any order.
// version and source: new here.
#ifndef SCFA_LONG_KEYS
#error "SCFA_LONG_KEYS: set by launch_sm90.py"
#endif
#include "params_sm90.cuh"
#include "order_sm90.cuh"
#include "choice_sm90.cuh"

constexpr int kThreads = 32;
constexpr int kRows = 64;  // of a query tile
// A head takes as long as two loads, one after the other, however many there are at once.
constexpr int kLanes = 8;   // of a warp look at one head
constexpr int kLooks = 16;  // tiles of a list that each of them looks at
constexpr int kMostKeys = 1 << 20;  // more count as so many: weights must not overflow

// Which tile of a list the i-th look is at. Looks at even distances would meet each bucket at the same
// places, where a bucket takes a multiple of that distance, and take heads that are alike for
// different; steps of 0.618, the golden ratio's, find all places alike.
__device__ __forceinline__ int tile_of_look(int tiles, int i) {
  constexpr int kParts = 1024, kGolden = 633;
  const long long place = static_cast<long long>(i) * kParts + i * kGolden % kParts;
  return static_cast<int>(tiles * place / (kLanes * kLooks * kParts));
}

// Keys that tiles visit, and their squares: an average pair's tile visits squares / keys.
struct Visits {
  long long keys, squares;
};

// What this lane's looks at one list add.
__device__ __forceinline__ void add_visits(Visits& visits, const Params& p, int list, int lane) {
  const int count = p.q_count[list], tiles = (count + kRows - 1) / kRows;
  if (count == 0) return;
  const int* starts = p.key_start + static_cast<long long>(list) * p.seqlen_q;
  const int* ends = p.key_end + static_cast<long long>(list) * p.seqlen_q;
  int visited[kLooks];
#pragma unroll
  for (int i = 0; i < kLooks; ++i) {
    const int first = kRows * tile_of_look(tiles, kLooks * lane + i);
    visited[i] = ends[min(first + kRows, count) - 1] - starts[first];
  }
#pragma unroll
  for (int i = 0; i < kLooks; ++i) {
    const long long keys = min(max(visited[i], 0), kMostKeys);
    visits.keys += keys;
    visits.squares += keys * keys;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    scfa_bwd_choose_sm90(const __grid_constant__ Params p) {
  const int lane = threadIdx.x % kLanes, heads = p.by_tiles.quotient(p.tiles);
  const int z = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;  // of all key heads
  Visits visits{};
  bool in_order = true;
  for (int member = 0; member < p.group_size && z < heads; ++member) {
    const int list = z * p.group_size + member;
    if constexpr (!kMonotone) {
      const int* order = order_of_heads(p, heads) + 2 * list;
      in_order &= (order[0] & order[1]) != 0;
    }
    if (SCFA_LONG_KEYS > 0) add_visits(visits, p, list, lane);
  }
#pragma unroll
  for (int i = 1; i < kLanes; i *= 2) {
    visits.keys += __shfl_xor_sync(0xFFFFFFFFu, visits.keys, i);
    visits.squares += __shfl_xor_sync(0xFFFFFFFFu, visits.squares, i);
  }
  const bool speaks = lane == 0 && z < heads;
  const bool fused =
      in_order && (SCFA_LONG_KEYS == 0 || visits.squares > SCFA_LONG_KEYS * visits.keys);
  if (speaks) p.choice[kChoiceHeads + z] = fused ? kFused : kSplit;
  const int fused_here = __popc(__ballot_sync(0xFFFFFFFFu, speaks && fused));
  if (blockIdx.x == 0 && threadIdx.x < kChoiceCounted) p.choice[kChoiceCounters + threadIdx.x] = 0;
  if (threadIdx.x > 0) return;
  atomicAdd(p.counter, fused_here);
  __threadfence();  // a block that sees this one's arrival sees its heads counted
  if (atomicAdd(p.counter + 1, 1) + 1 < static_cast<int>(gridDim.x)) return;
  __threadfence();
  const int all_fused = atomicAdd(p.counter, 0);
  p.choice[kFused] = all_fused == 0 ? kNone : all_fused == heads ? kAll : kSome;
  p.choice[kSplit] = all_fused == heads ? kNone : all_fused == 0 ? kAll : kSome;
}
