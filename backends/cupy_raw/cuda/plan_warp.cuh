// What the lanes of a warp find out together, and the places of rows by what the warps of a block have counted.
#pragma once
#include "plan_params.cuh"

__device__ __forceinline__ int warp_sum(int x) {
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(kEveryLane, x, step);
  return x;
}

__device__ __forceinline__ u64 warp_or(u64 x) {
  for (int step = 16; step; step >>= 1) x |= __shfl_xor_sync(kEveryLane, x, step);
  return x;
}

__device__ __forceinline__ u64 warp_min(u64 x) {
  for (int step = 16; step; step >>= 1) {
    u64 other = __shfl_xor_sync(kEveryLane, x, step);
    x = other < x ? other : x;
  }
  return x;
}

// Turns the total of each bin into the place of its first row; called by one warp.
__device__ __forceinline__ void scan_bins(int* firsts, int bins) {
  const int lane = threadIdx.x % 32;
  int carry = 0;
  for (int start = 0; start < bins; start += 32) {
    const int count = start + lane < bins ? firsts[start + lane] : 0;
    int sum = count;
    for (int step = 1; step < 32; step <<= 1) {
      const int below = __shfl_up_sync(kEveryLane, sum, step);
      if (lane >= step) sum += below;
    }
    if (start + lane < bins) firsts[start + lane] = carry + sum - count;
    carry += __shfl_sync(kEveryLane, sum, 31);
  }
}

// Entries between the counts of two warps: an odd number of words, so that a column lies in 32 banks.
template <class Count>
__device__ __forceinline__ int pitch_of(int bins) { return bins + 4 / (int)sizeof(Count); }

// before[warp][bin] = rows of `bin` before this warp's stretch, firsts[bin] = first place of the bin; by all threads.
// `before` may be `counts` itself.
template <class Count>
__device__ inline void scan_counts(const int* counts, Count* before, int* firsts, int bins, int first_warp) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  for (int bin = warp; bin < bins; bin += n_warps) {
    const int count = lane < n_warps ? counts[lane * pitch_of<int>(bins) + bin] : 0;
    int sum = count;
    for (int step = 1; step < 32; step <<= 1) {
      const int below = __shfl_up_sync(kEveryLane, sum, step);
      if (lane >= step) sum += below;
    }
    if (lane < n_warps) before[lane * pitch_of<Count>(bins) + bin] = (Count)(sum - count);
    if (lane == 31) firsts[bin] = sum;
  }
  __syncthreads();  // firsts holds the total of each bin
  if (warp == first_warp) scan_bins(firsts, bins);
}
