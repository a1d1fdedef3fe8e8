// plan_ranges: the range of sorted keys that each sorted query sees.
//
// computes       key_start[r] = kept keys before (group of r, lo), key_end[r] = kept keys before (group of r, hi)
// grid/block     8 warps a block; each warp walks 512 sorted queries of one (batch, head), 32 at a time
// shared memory  none dynamic
// inputs         plan_sort's lists; group, start and end columns (batch, heads, rows) with any strides
// version        sorted queries whose first and last share a group all do: then their keys are one stretch, found once
//                per group and warp, and only row numbers are compared. Loads run two rounds ahead. Where ranges are
//                monotone a round searches from where the last one ended, mostly among 64 neighbours.
#include "plan_search.cuh"

constexpr int kThreads = 256;
constexpr int kStretch = 512;                    // sorted queries of one warp
constexpr int kTile = kStretch * kThreads / 32;  // of one block

// Where this warp is in the sorted lists.
struct Walk {
  int group_row;            // a query row of the group whose keys these are; -1: none
  int first_key, last_key;  // [first_key, last_key); without a group, later groups begin at first_key or after
  int start, end;           // range of the last query seen
};

extern "C" __global__ void __launch_bounds__(kThreads, 4) scfa_plan_ranges(const __grid_constant__ RangeParams p) {
  __shared__ Lists lists;
  const i64 list = blockIdx.x / p.tiles_q;
  if (p.done != nullptr && p.done[list]) return;
  const int batch = (int)(list / p.heads), head = (int)(list % p.heads);
  const i64 k_list = (i64)batch * p.heads_kv + head / p.group_size;
  if (threadIdx.x < 4 * kMaxColumns) fix_lists(p, batch, head, lists, threadIdx.x);
  __syncthreads();  // lists are complete

  const int lane = threadIdx.x % 32;
  const int* q_index = p.q_index + list * p.seqlen_q;
  const int* k_index = p.k_index + k_list * p.seqlen_k;
  const int q_count = p.q_count[list], k_count = p.k_count[k_list];
  const i64 begin = (i64)(blockIdx.x % p.tiles_q) * kTile + threadIdx.x / 32 * kStretch;
  const int end = (int)(begin + kStretch < p.seqlen_q ? begin + kStretch : p.seqlen_q);
  Walk walk = {-1, 0, 0, 0, 0};

  // While a round searches, the first group of the next (in the outer lanes) and the rows of the one after are under
  // way. Lanes beyond the last kept query repeat it.
  const int last_query = (q_count < end ? q_count : end) - 1;
  const bool any_query = begin <= last_query;
  auto row_of = [&](i64 round) { return q_index[round + lane < last_query ? round + lane : last_query]; };
  auto group_of = [&](int q_row) -> i64 {
    return p.n_groups > 0 && (lane == 0 || lane == 31) ? lists.q_groups[0].integer(q_row) : 0;
  };
  int next_row = any_query ? row_of(begin) : 0, later_row = any_query ? row_of(begin + 32) : 0;
  i64 next_group = any_query ? group_of(next_row) : 0;

  for (i64 round = begin; round < end; round += 32) {
    const int active = (int)(q_count - round < 32 ? q_count - round : 32);  // lanes with a kept query; may be negative
    int start = k_count, stop = k_count;
    if (active > 0) {
      // interval: from row numbers alone
      const int q_row = next_row;
      const i64 first_group = __shfl_sync(kEveryLane, next_group, 0), last_group = __shfl_sync(kEveryLane, next_group, 31);
      next_row = later_row;
      next_group = group_of(next_row);
      later_row = row_of(round + 64);
      const Interval seen = query_interval(q_row, p.seqlen_k, p.lo_offset, p.hi_offset, lists.starts, lists.ends, p.n_bounds);

      // group: one for all lanes, or several
      const int first_row = __shfl_sync(kEveryLane, q_row, 0), last_row = __shfl_sync(kEveryLane, q_row, 31);
      if (first_group == last_group && same_group(lists, p.n_groups, first_row, last_row, 1)) {
        if (walk.group_row < 0 || !same_group(lists, p.n_groups, walk.group_row, last_row)) {
          const int before = walk.group_row < 0 ? walk.first_key : walk.last_key;
          walk.first_key = warp_advance(before, k_count, KeyPrecedes{lists, k_index, last_group, p.n_groups, last_row, 0});
          walk.last_key =
              warp_advance(walk.first_key, k_count, KeyPrecedes{lists, k_index, last_group, p.n_groups, last_row, kLastRow});
          walk.group_row = last_row;
          walk.start = walk.end = walk.first_key;
        }
        const RowPrecedes before_low = {k_index, seen.low}, before_high = {k_index, seen.high};
        if (p.monotone) {
          start = __any_sync(kEveryLane, seen.low > 0) ? warp_advance(walk.start, walk.last_key, before_low) : walk.first_key;
          stop = warp_advance(walk.end, walk.last_key, before_high);
        } else {
          start = lower_bound(walk.first_key, walk.last_key, before_low);
          stop = lower_bound(walk.first_key, walk.last_key, before_high);
        }
      } else {
        const i64 group = lists.q_groups[0].integer(q_row);  // several groups: there is a first column
        const KeyPrecedes before_low = {lists, k_index, group, p.n_groups, q_row, seen.low};
        const KeyPrecedes before_high = {lists, k_index, group, p.n_groups, q_row, seen.high};
        if (p.monotone) {
          start = warp_advance(walk.start, k_count, before_low);
          stop = warp_advance(walk.end, k_count, before_high);
        } else {
          start = lower_bound(walk.first_key, k_count, before_low);
          stop = lower_bound(walk.first_key, k_count, before_high);
        }
        walk.group_row = -1;
        walk.first_key = __shfl_sync(kEveryLane, stop, 0);  // later groups begin no earlier
      }
      walk.start = __shfl_sync(kEveryLane, start, 31);
      walk.end = __shfl_sync(kEveryLane, stop, 31);
      if (lane >= active) start = stop = k_count;
    }
    if (round + lane < end) {
      p.key_start[list * p.seqlen_q + round + lane] = start;
      p.key_end[list * p.seqlen_q + round + lane] = stop;
    }
  }
}
