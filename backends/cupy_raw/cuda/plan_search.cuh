// Searches in a sorted key list, by one lane or by a whole warp.
#pragma once
#include "plan_params.cuh"

constexpr int kLastRow = 0x7fffffff;  // no row number is larger or equal

// The columns of one (batch, head) and of its key head; lives in shared memory.
struct Lists {
  ColumnRow q_groups[kMaxColumns], k_groups[kMaxColumns];
  ColumnRow starts[kMaxColumns], ends[kMaxColumns];
};

// Thread `t` of 4 * kMaxColumns fills one column.
__device__ inline void fix_lists(const RangeParams& p, int batch, int head, Lists& lists, int t) {
  const int c = t % kMaxColumns;
  if (t / kMaxColumns == 0) lists.q_groups[c] = column_row(p.q_groups[c], batch, head, 0);
  if (t / kMaxColumns == 1) lists.k_groups[c] = column_row(p.k_groups[c], batch, head / p.group_size, 0);
  if (t / kMaxColumns == 2) lists.starts[c] = column_row(p.starts[c], batch, head, 0);
  if (t / kMaxColumns == 3) lists.ends[c] = column_row(p.ends[c], batch, head, 0);
}

// Whether two query rows agree in all groups from column `first` on.
__device__ __forceinline__ bool same_group(const Lists& lists, int n_groups, int q_row, int other_row, int first = 0) {
#pragma unroll 1
  for (int c = first; c < n_groups; ++c) {
    if (lists.q_groups[c].integer(q_row) != lists.q_groups[c].integer(other_row)) return false;
  }
  return true;
}

// Whether a sorted key of the query's own group lies before row `bound`.
struct RowPrecedes {
  const int* k_index;
  int bound;

  __device__ __forceinline__ bool operator()(int position) const { return k_index[position] < bound; }
  __device__ __forceinline__ RowPrecedes of_lane(int lane) const {
    return {k_index, __shfl_sync(kEveryLane, bound, lane)};
  }
};

// Whether a sorted key lies before (group of the query, row `bound`).
struct KeyPrecedes {
  const Lists& lists;
  const int* k_index;
  i64 first_group;
  int n_groups, q_row, bound;

  __device__ __forceinline__ bool operator()(int position) const {
    const int row = k_index[position];
    if (n_groups > 0) {
      const i64 group = lists.k_groups[0].integer(row);
      if (group != first_group) return group < first_group;
    }
#pragma unroll 1
    for (int c = 1; c < n_groups; ++c) {
      const i64 group = lists.k_groups[c].integer(row), wanted = lists.q_groups[c].integer(q_row);
      if (group != wanted) return group < wanted;
    }
    return row < bound;
  }
  __device__ __forceinline__ KeyPrecedes of_lane(int lane) const {
    return {
        lists,
        k_index,
        __shfl_sync(kEveryLane, first_group, lane),
        n_groups,
        __shfl_sync(kEveryLane, q_row, lane),
        __shfl_sync(kEveryLane, bound, lane)};
  }
};

// First entry of [low, high) that does not precede one target, by all lanes together.
template <class Precedes>
__device__ __forceinline__ int warp_search(int low, int high, const Precedes& precedes) {
  const int lane = threadIdx.x % 32;
  WideSearch search = {low, high};
  while (!search.done()) {
    const int position = search.position(lane);
    const bool below = position < search.high && precedes(position);
    search.narrow(__popc(__ballot_sync(kEveryLane, below)));
  }
  return search.low;
}

// The same for a target per lane, nondecreasing over the lanes: looks among the next 64 entries first.
template <class Precedes>
__device__ __forceinline__ int warp_advance(int low, int high, const Precedes& precedes) {
  const int lane = threadIdx.x % 32;
  const Precedes last = precedes.of_lane(31);
  const i64 position = (i64)low + 2 * lane + 1;
  const bool below = position < high && last((int)position);
  const int count = __popc(__ballot_sync(kEveryLane, below));
  int limit;
  if (count < 32) {
    limit = high - low < 2 * count + 1 ? high : low + 2 * count + 1;
  } else {
    limit = warp_search(low + 64, high, last);
  }
  return lower_bound(low, limit, precedes);
}
