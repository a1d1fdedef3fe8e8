// plan_causal: lists and ranges of one (batch, head) at once, where queries see the keys of their group up to their own row.
//
// computes       what plan_sort and plan_ranges do, for at most one group column and as many queries as keys; done[list] =
//                whether this list was served (otherwise those two kernels do it)
// grid/block     one block per query list; the first head of each key head writes the key list; a multiple of 32 threads
// shared memory  2 * (warps * (bins + 1) + bins) * 4 bytes, and 3 * 2 bytes a row where `staged`
// inputs         group columns int32 or int64 (both alike), keep columns of bytes, (batch, heads, rows) with any strides
// version        one counting pass over digits common to queries and keys. When row i is placed, the running count of the
//                keys in its group is the end of its range: nothing is searched. More than `max_bits` bits: not served.
#include "sort.cuh"

struct JointSurvey {
  u64 any_one, all_one, low;  // over kept queries and keys
  u64 any_above;              // ones of key - low
  int dropped_queries, dropped_keys;
};

// Calls visit(key) for every kept query and key.
template <class Visit>
__device__ __forceinline__ void visit_both(const ListRows& queries, const ListRows& keys, Visit visit) {
  visit_rows(queries.length, [&](const int(&rows)[kUnroll], u32 present) {
    u64 of_query[kUnroll], of_key[kUnroll];
    load_keys(queries.groups[0], rows, of_query);
    load_keys(keys.groups[0], rows, of_key);
    const u32 kept_queries = present & queries.kept(rows), kept_keys = present & keys.kept(rows);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (kept_queries >> u & 1) visit(of_query[u]);
      if (kept_keys >> u & 1) visit(of_key[u]);
    }
  });
}

__device__ __forceinline__ int warp_sum(int x) {
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(kEveryLane, x, step);
  return x;
}

// Fills the survey; called by all threads, complete for all when it returns.
__device__ inline void survey_both(const ListRows& queries, const ListRows& keys, int max_bits, JointSurvey& survey) {
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) survey = {0, ~0ull, ~0ull, 0, 0, 0};
  __syncthreads();  // the sums below start from these values
  if (queries.n_keeps > 0 || keys.n_keeps > 0) {
    int dropped_queries = 0, dropped_keys = 0;
    visit_rows(queries.length, [&](const int(&rows)[kUnroll], u32 present) {
      dropped_queries += __popc(present & ~queries.kept(rows));
      dropped_keys += __popc(present & ~keys.kept(rows));
    });
    dropped_queries = warp_sum(dropped_queries);
    dropped_keys = warp_sum(dropped_keys);
    if (lane == 0) {
      atomicAdd(&survey.dropped_queries, dropped_queries);
      atomicAdd(&survey.dropped_keys, dropped_keys);
    }
  }
  if (queries.n_groups > 0) {
    u64 any_one = 0, any_zero = 0;
    visit_both(queries, keys, [&](u64 key) {
      any_one |= key;
      any_zero |= ~key;
    });
    any_one = warp_or(any_one);
    any_zero = warp_or(any_zero);
    if (lane == 0) {
      atomicOr(&survey.any_one, any_one);
      atomicAnd(&survey.all_one, ~any_zero);
    }
  }
  __syncthreads();  // any_one and all_one are complete
  if (count_bits(survey.any_one & ~survey.all_one) <= max_bits) return;

  // Ids from -1 to 15 differ in every bit, but their distances from -1 in five.
  u64 low = ~0ull;
  visit_both(queries, keys, [&](u64 key) { low = key < low ? key : low; });
  low = warp_min(low);
  if (lane == 0) atomicMin(&survey.low, low);
  __syncthreads();  // low is complete
  low = survey.low;
  u64 any_above = 0;
  visit_both(queries, keys, [&](u64 key) { any_above |= key - low; });
  any_above = warp_or(any_above);
  if (lane == 0) atomicOr(&survey.any_above, any_above);
  __syncthreads();  // any_above is complete
}

// The group column and the keep columns of one side, with batch and head fixed; thread t of kMaxColumns + 1.
__device__ inline void fix_side(const ListSet& set, int batch, int head, ListRows& list, int t) {
  if (t < kMaxColumns) {
    list.keeps[t] = column_row(set.keeps[t], batch, head, 1);
  } else {
    list.groups[0] = column_row(set.groups[0], batch, head, 0);
    list.n_groups = set.n_groups;
    list.n_keeps = set.n_keeps;
    list.length = set.length;
  }
}

// counts[warp][bin] = rows of `bin` before this warp's stretch, firsts[bin] = first place of the bin; by all threads.
__device__ inline void scan_counts(int* counts, int* firsts, int bins, int first_warp) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  for (int bin = warp; bin < bins; bin += n_warps) {
    const int count = lane < n_warps ? counts[lane * (bins + 1) + bin] : 0;
    int sum = count;
    for (int step = 1; step < 32; step <<= 1) {
      const int below = __shfl_up_sync(kEveryLane, sum, step);
      if (lane >= step) sum += below;
    }
    if (lane < n_warps) counts[lane * (bins + 1) + bin] = sum - count;
    if (lane == 31) firsts[bin] = sum;
  }
  __syncthreads();  // firsts holds the total of each bin
  if (warp == first_warp) {
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
}

// Copies staged places to a list in global memory.
__device__ inline void flush(const u16* staged, int* list, int length) {
  if (length % 4 == 0) {  // then every list begins on 16 bytes
    for (int i = threadIdx.x; i < length / 4; i += blockDim.x) {
      const ushort4 four = ((const ushort4*)staged)[i];
      ((int4*)list)[i] = {four.x, four.y, four.z, four.w};
    }
  } else {
    for (int i = threadIdx.x; i < length; i += blockDim.x) list[i] = staged[i];
  }
}

// Walks rows [begin, end) in order, kUnroll rounds of 32 at a time: visit(rows, digits of queries, of keys, rows left).
template <class Visit>
__device__ __forceinline__ void walk_both(
    const ListRows& queries, const ListRows& keys, const DigitCursor& cursor, const Digit& digit, int begin, int end,
    Visit visit) {
  const int lane = threadIdx.x % 32;
  for (int round = begin; round < end; round += 32 * kUnroll) {
    int rows[kUnroll];
    u32 of_query[kUnroll], of_key[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) rows[u] = round + 32 * u + lane < end ? round + 32 * u + lane : 0;
    digits_of(queries, cursor, digit, rows, of_query);
    digits_of(keys, cursor, digit, rows, of_key);
    visit(rows, of_query, of_key, end - round);
  }
}

extern "C" __global__ void __launch_bounds__(1024, 1) scfa_plan_causal(const __grid_constant__ SortParams p) {
  extern __shared__ __align__(16) char shared[];
  __shared__ ListRows queries, keys;
  __shared__ JointSurvey survey;
  __shared__ DigitCursor cursor;
  __shared__ Digit digit;
  __shared__ int total_bits;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  const i64 list = blockIdx.x;
  const int batch = (int)(list / p.queries.heads), head = (int)(list % p.queries.heads);
  const i64 key_list = (i64)batch * p.keys.heads + head / p.group_size;
  const bool writes_keys = head % p.group_size == 0;
  const int length = p.queries.length;

  // lists: fix batch and head
  if (threadIdx.x <= kMaxColumns) fix_side(p.queries, batch, head, queries, threadIdx.x);
  if (threadIdx.x >= 32 && threadIdx.x <= 32 + kMaxColumns) {
    fix_side(p.keys, batch, head / p.group_size, keys, threadIdx.x - 32);
  }
  __syncthreads();  // lists are complete

  // digit: the bits that tell queries and keys of this list apart
  survey_both(queries, keys, p.max_bits, survey);
  if (threadIdx.x == 0) {
    const u64 differing = survey.any_one & ~survey.all_one;
    const bool by_distance = count_bits(differing) > p.max_bits;
    cursor.n_columns = queries.n_groups;
    cursor.has_dropped = survey.dropped_queries + survey.dropped_keys > 0;
    cursor.varying[0] = by_distance ? survey.any_above : differing;
    cursor.low[0] = by_distance ? survey.low : 0;
    total_bits = cursor.total_bits();
    p.done[list] = total_bits <= p.max_bits;
  }
  __syncthreads();  // total_bits is known
  if (total_bits > p.max_bits) return;
  if (threadIdx.x == 0) {
    cursor.next(total_bits, digit);
    p.queries.count[list] = length - survey.dropped_queries;
    if (writes_keys) p.keys.count[key_list] = length - survey.dropped_keys;
  }
  const int bins = 1 << total_bits, pitch = bins + 1;
  int* query_counts = (int*)shared;
  int* key_counts = query_counts + n_warps * pitch;
  int* query_firsts = key_counts + n_warps * pitch;
  int* key_firsts = query_firsts + bins;
  // 16-byte steps: the places of each array are copied four at a time
  u16* query_rows = (u16*)(shared + ((char*)(key_firsts + bins) - shared + 15) / 16 * 16);
  u16* key_rows = query_rows + (length + 7) / 8 * 8;
  u16* ends = key_rows + (length + 7) / 8 * 8;
  for (int i = threadIdx.x; i < 2 * n_warps * pitch; i += blockDim.x) query_counts[i] = 0;
  __syncthreads();  // digit is complete, counts are zero

  // count: how many rows of each digit are in this warp's stretch
  const int stretch = rows_per_warp(length, n_warps);
  const int begin = warp * stretch < length ? warp * stretch : length;
  const int end = begin + stretch < length ? begin + stretch : length;
  int* my_queries = query_counts + warp * pitch;
  int* my_keys = key_counts + warp * pitch;
  walk_both(queries, keys, cursor, digit, begin, end, [&](const int(&)[kUnroll], const u32(&of_query)[kUnroll], const u32(&of_key)[kUnroll], int left) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (32 * u + lane < left) {
        atomicAdd(&my_queries[of_query[u]], 1);
        atomicAdd(&my_keys[of_key[u]], 1);
      }
    }
  });
  __syncthreads();  // every warp's counts are there
  scan_counts(query_counts, query_firsts, bins, 0);
  scan_counts(key_counts, key_firsts, bins, n_warps - 1);
  __syncthreads();  // counts and firsts are complete

  // place: rows of one digit keep their order, over warps, rounds and lanes
  const int k_count = length - survey.dropped_keys;
  const i64 offset = list * length;
  int* q_index = p.queries.index + offset;
  int* k_index = p.keys.index + key_list * length;
  walk_both(queries, keys, cursor, digit, begin, end, [&](const int(&rows)[kUnroll], const u32(&of_query)[kUnroll], const u32(&of_key)[kUnroll], int left) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (32 * u >= left) break;  // the same for all lanes
      const bool present = 32 * u + lane < left;
      const u32 active = __ballot_sync(kEveryLane, present);
      u32 same_queries = active, same_keys = active, group_keys = active;  // lanes with this query's, key's group
#pragma unroll
      for (int b = 0; b < kMaxDigitBits; ++b) {
        if (b == digit.bits) break;  // the same for all lanes
        const bool query_one = of_query[u] >> b & 1, key_one = of_key[u] >> b & 1;
        const u32 queries_one = __ballot_sync(kEveryLane, query_one), keys_one = __ballot_sync(kEveryLane, key_one);
        same_queries &= query_one ? queries_one : ~queries_one;
        same_keys &= key_one ? keys_one : ~keys_one;
        group_keys &= query_one ? keys_one : ~keys_one;
      }
      const u32 below = (1u << lane) - 1, seen = below | (u32)p.sees_itself << lane;
      int query_place = 0, key_place = 0, stop = 0;
      if (present) {
        query_place = query_firsts[of_query[u]] + my_queries[of_query[u]] + __popc(same_queries & below);
        key_place = key_firsts[of_key[u]] + my_keys[of_key[u]] + __popc(same_keys & below);
        stop = key_firsts[of_query[u]] + my_keys[of_query[u]] + __popc(group_keys & seen);
        if (digit.tests_keep && of_query[u] == digit.dropped) stop = k_count;
      }
      __syncwarp();  // all lanes have read the counts that the leaders change
      if (present) {
        if (p.staged) {
          query_rows[query_place] = (u16)rows[u];
          key_rows[key_place] = (u16)rows[u];
          ends[query_place] = (u16)stop;
        } else {
          q_index[query_place] = rows[u];
          if (writes_keys) k_index[key_place] = rows[u];
          p.key_end[offset + query_place] = stop;
        }
        if (lane == __ffs(same_queries) - 1) my_queries[of_query[u]] += __popc(same_queries);
        if (lane == __ffs(same_keys) - 1) my_keys[of_key[u]] += __popc(same_keys);
      }
      __syncwarp();  // the next round reads the new counts
    }
  });
  __syncthreads();  // all rows are placed

  // out: staged lists, and where each group's keys begin
  if (p.staged) {
    flush(query_rows, q_index, length);
    flush(ends, p.key_end + offset, length);
    if (writes_keys) flush(key_rows, k_index, length);
  }
  for (int bin = warp; bin < bins; bin += n_warps) {
    const int last = bin + 1 < bins ? query_firsts[bin + 1] : length;
    const int start = digit.tests_keep && bin == (int)digit.dropped ? k_count : key_firsts[bin];
    for (int i = query_firsts[bin] + lane; i < last; i += 32) p.key_start[offset + i] = start;
  }
}
