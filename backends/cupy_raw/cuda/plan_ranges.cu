// plan_ranges: the range of sorted keys that each sorted query sees.
//
// computes       key_start[r] = kept keys before (group of r, lo), key_end[r] = kept keys before (group of r, hi)
// grid/block     one block of 256 threads per 1024 sorted queries of one (batch, head)
// shared memory  none dynamic
// inputs         plan_sort's lists; group, start and end columns (batch, heads, rows) with any strides
// version        four warps bracket the tile by searches of 32 probes a step; each query then searches between the
//                brackets only, which are neighbours where ranges are monotone. Otherwise the brackets are the
//                tile's groups.
#include "plan_params.cuh"

constexpr int kThreads = 256;
constexpr int kTile = 1024;
constexpr u32 kEveryLane = 0xffffffffu;

// The lists of one (batch, head) with its key head; lives in shared memory.
struct Lists {
  ColumnRow q_groups[kMaxColumns], k_groups[kMaxColumns];
  ColumnRow starts[kMaxColumns], ends[kMaxColumns];
  int brackets[4];  // key_start of the first and last query of the tile, then key_end
};

// A place in the sorted key list: before all keys of the same group whose row is at least `bound`.
struct Target {
  int q_row;
  i64 first_group;
  int bound;
};

struct KeyPrecedes {
  const Lists& lists;
  const int* k_index;
  int n_groups;
  Target target;

  __device__ __forceinline__ bool operator()(int position) const {
    const int row = k_index[position];
    if (n_groups > 0) {
      i64 group = lists.k_groups[0].integer(row);
      if (group != target.first_group) return group < target.first_group;
    }
    for (int c = 1; c < n_groups; ++c) {
      i64 group = lists.k_groups[c].integer(row), wanted = lists.q_groups[c].integer(target.q_row);
      if (group != wanted) return group < wanted;
    }
    return row < target.bound;
  }
};

extern "C" __global__ void __launch_bounds__(kThreads) scfa_plan_ranges(const __grid_constant__ RangeParams p) {
  __shared__ Lists lists;
  const i64 list = blockIdx.x / p.tiles_q;
  const int batch = (int)(list / p.heads), head = (int)(list % p.heads);
  const int head_kv = head / p.group_size;
  const i64 k_list = (i64)batch * p.heads_kv + head_kv;
  const int* q_index = p.q_index + list * p.seqlen_q;
  const int* k_index = p.k_index + k_list * p.seqlen_k;
  const int q_count = p.q_count[list], k_count = p.k_count[k_list];
  const int tile = (int)(blockIdx.x % p.tiles_q) * kTile;
  const int tile_end = p.seqlen_q - tile > kTile ? tile + kTile : p.seqlen_q;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // lists: fix batch and head
  if (threadIdx.x < 4 * kMaxColumns) {
    int kind = threadIdx.x / kMaxColumns, c = threadIdx.x % kMaxColumns;
    if (kind == 0) lists.q_groups[c] = column_row(p.q_groups[c], batch, head, 0);
    if (kind == 1) lists.k_groups[c] = column_row(p.k_groups[c], batch, head_kv, 0);
    if (kind == 2) lists.starts[c] = column_row(p.starts[c], batch, head, 0);
    if (kind == 3) lists.ends[c] = column_row(p.ends[c], batch, head, 0);
  }
  __syncthreads();  // lists are complete but for brackets

  auto precedes = [&](int q_row, int bound) {
    i64 first_group = p.n_groups > 0 ? lists.q_groups[0].integer(q_row) : 0;
    return KeyPrecedes{lists, k_index, p.n_groups, Target{q_row, first_group, bound}};
  };
  auto interval = [&](int q_row) {
    return query_interval(q_row, p.seqlen_k, p.lo_offset, p.hi_offset, lists.starts, lists.ends, p.n_bounds);
  };

  // brackets: where the tile's ranges can begin and end
  if (warp < 4 && tile < q_count) {
    const int last = (tile_end < q_count ? tile_end : q_count) - 1;
    const int q_row = q_index[warp % 2 ? last : tile];
    const Interval seen = interval(q_row);
    int bound = warp < 2 ? seen.low : seen.high;
    if (!p.monotone) bound = warp % 2 ? p.seqlen_k : 0;
    const KeyPrecedes before = precedes(q_row, bound);
    WideSearch search = {0, k_count};
    while (!search.done()) {
      int position = search.position(lane);
      u32 below = __ballot_sync(kEveryLane, position < search.high && before(position));
      search.narrow(__popc(below));
    }
    if (lane == 0) lists.brackets[warp] = search.low;
  }
  __syncthreads();  // brackets are complete

  // ranges: one query after the other; dropped queries see nothing
  for (int r = tile + threadIdx.x; r < tile_end; r += kThreads) {
    int start = k_count, end = k_count;
    if (r < q_count) {
      const int q_row = q_index[r];
      const Interval seen = interval(q_row);
      start = lower_bound(lists.brackets[0], lists.brackets[1], precedes(q_row, seen.low));
      int first = start > lists.brackets[2] ? start : lists.brackets[2];
      end = seen.high == seen.low ? start : lower_bound(first, lists.brackets[3], precedes(q_row, seen.high));
    }
    p.key_start[list * p.seqlen_q + r] = start;
    p.key_end[list * p.seqlen_q + r] = end;
  }
}
