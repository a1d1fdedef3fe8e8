// Which way each key head's backward goes: two kernels that compute seven products (short ranges) or
// one that computes five and adds dq up in memory (long ones). The host does not know how long the
// ranges of a plan are.
//
// computes: choice (choice_sm90.cuh): a key head goes the fused way if its 64-row query tiles visit
//   more than SCFA_LONG_KEYS keys on average, by 32 tiles of each of its query heads. A head's way
//   depends on nothing but its own ranges, so its gradients do not depend on what else is in the
//   batch.
// grid/block: one block of 1024 threads, a warp for each key head in turn.
// shared memory: one counter.
// inputs/outputs: Params (params_sm90.cuh) with the tiles of key heads: q_count, key_start, key_end;
//   choice is written, tile counters in it become 0.
// version and source: new here.
#ifndef SCFA_LONG_KEYS
#error "SCFA_LONG_KEYS: set by launch_sm90.py"
#endif
#include "params_sm90.cuh"
#include "choice_sm90.cuh"

constexpr int kThreads = 1024;
constexpr int kRows = 64;  // of a query tile

extern "C" __global__ void __launch_bounds__(kThreads)
    scfa_bwd_choose_sm90(const __grid_constant__ Params p) {
  __shared__ int fused;
  if (threadIdx.x == 0) fused = 0;
  __syncthreads();  // the counter is 0
  const int lane = threadIdx.x % 32, heads = p.by_tiles.quotient(p.tiles);
  for (int z = threadIdx.x / 32; z < heads; z += kThreads / 32) {
    const int first_head = z * p.group_size;  // of all query heads: batch by batch, group by group
    long long excess = 0;
    for (int member = 0; member < p.group_size; ++member) {
      const int count = p.q_count[first_head + member];
      const int tiles = (count + kRows - 1) / kRows;
      const int first = kRows * static_cast<int>(static_cast<long long>(tiles) * lane / 32);
      if (first < count) {
        const long long list = static_cast<long long>(first_head + member) * p.seqlen_q;
        const int last = min(first + kRows, count) - 1;
        excess += max(p.key_end[list + last] - p.key_start[list + first], 0) - SCFA_LONG_KEYS;
      }
    }
#pragma unroll
    for (int i = 1; i < 32; i *= 2) excess += __shfl_xor_sync(0xFFFFFFFFu, excess, i);
    if (lane == 0) {
      const int way = excess > 0 ? kFused : kSplit;
      p.choice[kChoiceHeads + z] = way;
      atomicAdd(&fused, way);
    }
  }
  __syncthreads();  // all heads are counted
  if (threadIdx.x == 0) {
    p.choice[kFused] = fused == 0 ? kNone : fused == heads ? kAll : kSome;
    p.choice[kSplit] = fused == heads ? kNone : fused == 0 ? kAll : kSome;
  }
  if (threadIdx.x < 3) p.choice[kChoiceCounters + threadIdx.x] = 0;
}
