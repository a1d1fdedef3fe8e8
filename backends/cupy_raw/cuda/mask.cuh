// Who sees what: the key range of each query row, and what a warp needs to know of the ranges of its rows.
#pragma once
#include "types.cuh"

// Sorted keys [start, end); empty ranges see nothing. `index` is the row in the user's tensor, -1 beyond the list.
template <int kRows>
struct RowRanges {
  int start[kRows];
  int end[kRows];
  int index[kRows];
};

// [first, last): every key some row sees lies in it. [full_first, full_last): every row sees all of it.
struct KeySpan {
  int first, last, full_first, full_last;

  SCFA_DEVICE bool sees(int begin, int end) const { return begin < last && end > first; }
  SCFA_DEVICE bool sees_all(int begin, int end) const { return begin >= full_first && end <= full_last; }
};

// The span of rows [row, row + count) of a tile; every lane gets it. Rows beyond the list count for nothing.
template <int kRows>
SCFA_DEVICE KeySpan warp_span(const RowRanges<kRows>& rows, int row, int count) {
  int first = kIntMax, last = 0, full_first = 0, full_last = kIntMax;
  for (int i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
    const int start = rows.start[row + i], end = rows.end[row + i];
    if (start < end) first = min(first, start), last = max(last, end);
    if (rows.index[row + i] >= 0) full_first = max(full_first, start), full_last = min(full_last, end);
  }
  last = __reduce_max_sync(kAllLanes, last);
  first = min(__reduce_min_sync(kAllLanes, first), last);  // [0, 0) where no row sees anything
  return {first, last, __reduce_max_sync(kAllLanes, full_first), __reduce_min_sync(kAllLanes, full_last)};
}

// The one predicate, used by partial tiles only.
SCFA_DEVICE bool is_visible(int key, int start, int end) { return key >= start && key < end; }

// acc_s[row][column] = -inf where the row does not see key first_key + column. `row` is this lane's first row in the tile.
template <int kMi, int kNb, int kRows>
SCFA_DEVICE void warp_mask_scores(float (&acc_s)[kMi][kNb][4], const RowRanges<kRows>& rows, int row, int first_key) {
  const int lane_key = first_key + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int start = rows.start[row + mi * 16 + half * 8] - lane_key;
      const int end = rows.end[row + mi * 16 + half * 8] - lane_key;
#pragma unroll
      for (int nb = 0; nb < kNb; ++nb)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (!is_visible(nb * 8 + i, start, end)) acc_s[mi][nb][2 * half + i] = -infinity();
    }
}
