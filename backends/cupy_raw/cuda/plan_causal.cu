// plan_causal: lists and ranges of one (batch, head) at once, where queries see the keys of their group up to their own row,
// or all of them.
//
// computes       what plan_sort and plan_ranges do, for at most one group column and as many queries as keys; done[list] =
//                whether this list was served (otherwise those two kernels do it)
// grid/block     one block per query list; the first head of each key head writes the key list; a multiple of 32 threads
// shared memory  2 * (warps * (bins + 1) + bins) * 4 bytes; where `staged`, 2 * (warps * (bins + 2) * 2 + bins * 4) bytes and
//                3 * 2 bytes a row, whose place the 32-bit counts take first
// inputs         group columns int32 or int64 (both alike), keep columns of bytes, (batch, heads, rows) with any strides; key lists
//                alone: those in both places, and no key_start
// version        one counting pass over digits common to queries and keys. When row i is placed, the running count of the
//                keys in its group is the end of its range: nothing is searched. One column for both is read
//                once. More than `max_bits` bits: not served. Beside staged orders counts are kept in 16 bits, so that two
//                blocks of 512 threads hold 128 bins at 16384 rows. Long lists, few or very long, are shared by several
//                blocks in plan_parts_*.
#include "plan_joint.cuh"

struct JointSurvey {
  u64 any_one, all_one, low;  // over kept queries and keys
  u64 any_above;              // ones of key - low
  int dropped_queries, dropped_keys;
};

// Calls visit(key) for every kept query and key; with `same` (`are_same`) for every query.
template <class Visit>
__device__ __forceinline__ void visit_both(const ListRows& queries, const ListRows& keys, bool same, Visit visit) {
  visit_rows(queries.length, [&](const int(&rows)[kUnroll], u32 present) {
    u64 of_query[kUnroll], of_key[kUnroll];
    load_keys(queries.groups[0], rows, of_query);
    if (!same) load_keys(keys.groups[0], rows, of_key);
    const u32 kept_queries = present & queries.kept(rows), kept_keys = same ? 0 : present & keys.kept(rows);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (kept_queries >> u & 1) visit(of_query[u]);
      if (kept_keys >> u & 1) visit(of_key[u]);
    }
  });
}

// Fills the survey; called by all threads, complete for all when it returns.
__device__ inline void survey_both(const ListRows& queries, const ListRows& keys, int max_bits, bool same, JointSurvey& survey) {
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
    visit_both(queries, keys, same, [&](u64 key) {
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
  visit_both(queries, keys, same, [&](u64 key) { low = key < low ? key : low; });
  low = warp_min(low);
  if (lane == 0) atomicMin(&survey.low, low);
  __syncthreads();  // low is complete
  low = survey.low;
  u64 any_above = 0;
  visit_both(queries, keys, same, [&](u64 key) { any_above |= key - low; });
  any_above = warp_or(any_above);
  if (lane == 0) atomicOr(&survey.any_above, any_above);
  __syncthreads();  // any_above is complete
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
  const bool same = are_same(queries, keys);
  survey_both(queries, keys, p.max_bits, same, survey);
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
  // counts: made in 32 bits where the orders will be staged, and kept in 16 beside them
  const int bins = 1 << total_bits;
  int* query_firsts = (int*)shared;
  int* key_firsts = same ? query_firsts : query_firsts + bins;
  char* kept_counts = (char*)(query_firsts + 2 * bins);
  const int kept_bytes = p.staged ? 2 * n_warps * pitch_of<u16>(bins) * (int)sizeof(u16) : 0;
  // 16-byte steps: the places of each array are copied four at a time
  char* stage = shared + (kept_counts + kept_bytes - shared + 15) / 16 * 16;
  int* query_counts = (int*)stage;
  int* key_counts = same ? query_counts : query_counts + n_warps * pitch_of<int>(bins);
  for (int i = threadIdx.x; i < 2 * n_warps * pitch_of<int>(bins); i += blockDim.x) query_counts[i] = 0;
  __syncthreads();  // digit is complete, counts are zero

  // count: how many rows of each digit are in this warp's stretch
  const Stretch stretch(length);
  int* my_queries = query_counts + warp * pitch_of<int>(bins);
  int* my_keys = key_counts + warp * pitch_of<int>(bins);
  if (same) {
    count_both<true>(queries, keys, cursor, digit, stretch, my_queries, my_keys);
  } else {
    count_both(queries, keys, cursor, digit, stretch, my_queries, my_keys);
  }
  __syncthreads();  // every warp's counts are there

  // place: staged in shared memory, or at once in the lists
  const int k_count = length - survey.dropped_keys;
  const i64 offset = list * length;
  const i64 key_offset = key_list * length;
  const bool sees_all = p.sees == kSeesAll;  // then ends are those of groups, below
  const int sees_itself = p.sees == kSeesItself;
  const auto place = [&](auto* queries_before, auto* keys_before, auto put) {
    if (same) {
      place_both<true>(
          queries, keys, cursor, digit, stretch, query_firsts, key_firsts, queries_before, keys_before, k_count, sees_itself, put);
    } else {
      place_both(
          queries, keys, cursor, digit, stretch, query_firsts, key_firsts, queries_before, keys_before, k_count, sees_itself, put);
    }
  };
  if (p.staged) {
    const int pitch = pitch_of<u16>(bins);
    u16* queries_before = (u16*)kept_counts;
    u16* keys_before = queries_before + n_warps * pitch;
    scan_counts(query_counts, queries_before, query_firsts, bins, 0);
    if (!same) scan_counts(key_counts, keys_before, key_firsts, bins, n_warps - 1);
    __syncthreads();  // counts and firsts are complete, and the 32-bit counts no longer needed
    u16* query_rows = (u16*)stage;
    u16* key_rows = query_rows + (length + 7) / 8 * 8;
    u16* ends = key_rows + (length + 7) / 8 * 8;
    place(
        queries_before + warp * pitch, keys_before + warp * pitch, [&](int row, u32, u32, int query_place, int key_place, int stop) {
          query_rows[query_place] = (u16)row;
          if (same) return;
          key_rows[key_place] = (u16)row;
          ends[query_place] = (u16)stop;
        });
    __syncthreads();  // all rows are placed
    if (p.key_start != nullptr) flush(query_rows, p.queries.index + offset, length);
    if (writes_keys) flush(same ? query_rows : key_rows, p.keys.index + key_offset, length);
    if (same && !sees_all) {
      for (int i = threadIdx.x; i < length; i += blockDim.x) p.key_end[offset + i] = i + sees_itself;
    } else if (!sees_all) {
      flush(ends, p.key_end + offset, length);
    }
  } else {
    scan_counts(query_counts, query_counts, query_firsts, bins, 0);
    if (!same) scan_counts(key_counts, key_counts, key_firsts, bins, n_warps - 1);
    __syncthreads();  // counts and firsts are complete
    place(my_queries, my_keys, [&](int row, u32, u32, int query_place, int key_place, int stop) {
      p.queries.index[offset + query_place] = row;
      if (writes_keys) p.keys.index[key_offset + key_place] = row;
      if (!sees_all) p.key_end[offset + query_place] = stop;
    });
  }

  // key_start: where each group's keys begin; key_end: where they end, if all are seen
  if (p.key_start == nullptr) return;
  for (int bin = warp; bin < bins; bin += n_warps) {
    const int last = bin + 1 < bins ? query_firsts[bin + 1] : length;
    const bool dropped = digit.tests_keep && bin == (int)digit.dropped;
    const int start = dropped ? k_count : key_firsts[bin];
    const int stop = dropped ? k_count : bin + 1 < bins ? key_firsts[bin + 1] : length;
    for (int i = query_firsts[bin] + lane; i < last; i += 32) {
      p.key_start[offset + i] = start;
      if (sees_all) p.key_end[offset + i] = stop;
    }
  }
}
