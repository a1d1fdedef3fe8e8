// Envelopes of key ranges that lie in any order: nondecreasing arrays, so that the dk/dv kernel finds
// the queries that may see a key tile by searching, as where the ranges themselves are nondecreasing.
//
// computes: envelope_end[r] = max of key_end over the rows r' <= r that see anything,
//   envelope_start[r] = min of key_start over the rows r' >= r that do; kNoEnd and kNoStart where
//   there are none. Queries before the first whose envelope_end lies beyond key j do not see j, nor
//   do those from the first on whose envelope_start does. Of nondecreasing ranges without empty ones
//   the envelopes are the ranges. Where both ways of the backward are launched, also whether ends,
//   and whether starts, of the kept rows never step back, those that see nothing included: all that
//   the kernels of the fused way ask of them.
// grid/block: two blocks of 1024 threads for each list of queries: one goes up and makes
//   envelope_end, one goes down and makes envelope_start as the running maximum of -1 - key_start.
//   A thread takes 4 rows of each 4096; those of the next step load meanwhile.
// shared memory: the maxima of the warps, twice.
// inputs/outputs: Params (params_sm90.cuh) with a tile for each list: q_count, key_start, key_end;
//   envelope_start, envelope_end and, unless choice is null, order_of_heads (choice_sm90.cuh) are
//   written.
// version and source: new here.
#include "params_sm90.cuh"
#include "order_sm90.cuh"
#include "choice_sm90.cuh"

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kItems = 4;  // rows of a thread in one step

extern "C" __global__ void __launch_bounds__(kThreads)
    scfa_bwd_envelope_sm90(const __grid_constant__ Params p) {
  __shared__ int maxima[2 * kWarps];  // of the warps, in this step and in the one before
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const bool down = blockIdx.x & 1;
  const long long list = static_cast<long long>(blockIdx.x / 2) * p.seqlen_q;
  const int *starts = p.key_start + list, *ends = p.key_end + list;
  int* envelope = (down ? p.envelope_start : p.envelope_end) + list;
  const int least = down ? -1 - kNoStart : kNoEnd;
  const int count = p.q_count[blockIdx.x / 2];

  // A step's rows of this thread, counted from the end that this block starts at.
  const auto row_of = [&](long long at) {
    return static_cast<int>(down ? p.seqlen_q - 1 - at : at);
  };
  int next[kItems];
  bool in_order = true;
  const int* bounds = down ? starts : ends;
  const auto load = [&](long long first) {
    const long long own = first + thread * kItems;
    int before = -1 - kNoStart;  // what the row before this one has; nothing is less
    if (own > 0 && own <= p.seqlen_q) {
      before = bounds[row_of(own - 1)];
      if (down) before = -1 - before;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const long long at = own + i;
      next[i] = least;
      if (at < p.seqlen_q) {
        const int row = row_of(at), start = starts[row], end = ends[row];
        const int given = down ? -1 - start : end;
        if (start < end) next[i] = given;
        in_order &= before <= given || row + down >= count;  // the later of the two rows is dropped
        before = given;
      }
    }
  };
  load(0);
  int before = least;  // maximum of all earlier steps
  int step = 0;
  for (long long first = 0; first < p.seqlen_q; first += kThreads * kItems, step ^= 1) {
    int running[kItems];
    running[0] = next[0];
#pragma unroll
    for (int i = 1; i < kItems; ++i) running[i] = max(running[i - 1], next[i]);
    load(first + kThreads * kItems);
    int upto = running[kItems - 1];  // maximum of this warp's rows up to this thread's
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      upto = max(upto, __shfl_up_sync(0xFFFFFFFFu, upto, distance));
    }
    if (lane == 31) maxima[step * kWarps + warp] = upto;
    __syncthreads();  // the warps' maxima are written; those of the step before last are read
    const int of_lane = maxima[step * kWarps + lane];
    int earlier = max(before, __reduce_max_sync(0xFFFFFFFFu, lane < warp ? of_lane : least));
    before = max(before, __reduce_max_sync(0xFFFFFFFFu, of_lane));
    const int neighbour = __shfl_up_sync(0xFFFFFFFFu, upto, 1);
    earlier = max(earlier, lane > 0 ? neighbour : least);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const long long at = first + thread * kItems + i;
      const int value = max(earlier, running[i]);
      if (at < p.seqlen_q) envelope[row_of(at)] = down ? -1 - value : value;
    }
  }
  if (p.choice == nullptr) return;
  in_order = __syncthreads_and(in_order);
  if (thread == 0) order_of_heads(p, p.by_group.quotient(p.tiles))[blockIdx.x] = in_order;
}
