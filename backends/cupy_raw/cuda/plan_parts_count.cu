// plan_parts_count: the second of three launches that plan long lists, see plan_parts.cuh.
//
// computes       counts[list][part][side][bin] = the part's queries and keys of each bin, where one digit tells the list's
//                groups apart; other lists are left to plan_sort and plan_ranges
// grid/block     one block per part of a query list; 64, 128, 256 or 512 threads
// shared memory  2 * warps * (bins + 1) * 4 bytes
// inputs         as plan_causal, and the surveys of plan_parts_survey
// version        every warp counts for itself, so that few bins do not mean that all wait for the same ones
#include "plan_parts.cuh"

extern "C" __global__ void __launch_bounds__(512, 2) scfa_plan_parts_count(const __grid_constant__ SortParams p) {
  extern __shared__ __align__(16) char shared[];
  __shared__ ListRows queries, keys;
  __shared__ PartDigit common;
  const int warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  const Part part(p);
  const SharedWork work(p, part);
  fix_part(p, part, queries, keys);
  if (!common.find(p, part, work.surveys)) return;  // the whole block

  // count: how many rows of each digit are in this warp's stretch
  const int bins = 1 << common.bits, pitch = pitch_of<int>(bins);
  int* query_counts = (int*)shared;
  int* key_counts = query_counts + n_warps * pitch;
  for (int i = threadIdx.x; i < 2 * n_warps * pitch; i += blockDim.x) query_counts[i] = 0;
  __syncthreads();  // counts are zero
  int *my_queries = query_counts + warp * pitch, *my_keys = key_counts + warp * pitch;
  count_both(queries, keys, common.cursor, common.digit, Stretch(part.rows), my_queries, my_keys);
  __syncthreads();  // every warp's counts are there

  // out: their sums
  int* counts = work.counts + (i64)part.number * 2 * bins;
  for (int i = threadIdx.x; i < 2 * bins; i += blockDim.x) {
    const int* column = (i < bins ? query_counts : key_counts) + (i & (bins - 1));
    int sum = 0;
    for (int w = 0; w < n_warps; ++w) sum += column[w * pitch];
    counts[i] = sum;
  }
}
