// Queries and keys of one (batch, head) ordered together, by digits common to both: when row i is placed, the running
// count of the keys in its group is the end of its range, where it does not see all of them. Shared by plan_causal and the plan_parts kernels.
#pragma once
#include "plan_rows.cuh"
#include "plan_warp.cuh"

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

// Rows [begin, end): those of this warp among `length` that the warps of the block share.
struct Stretch {
  int begin, end;

  __device__ __forceinline__ explicit Stretch(int length) {
    const int rows = rows_per_warp(length, blockDim.x / 32), first = threadIdx.x / 32 * rows;
    begin = first < length ? first : length;
    end = begin + rows < length ? begin + rows : length;
  }
};

// Whether queries and keys of a list are the same rows in the same groups, none of them dropped: as with documents, and
// with one hash for both.
__device__ __forceinline__ bool are_same(const ListRows& queries, const ListRows& keys) {
  const ColumnRow &a = queries.groups[0], &b = keys.groups[0];
  return queries.n_groups == 1 && queries.n_keeps == 0 && keys.n_keeps == 0 && a.base == b.base && a.row_stride == b.row_stride &&
         a.wide == b.wide;
}

// Walks a stretch in order, kUnroll rounds of 32 rows at a time: visit(rows, digits of queries, of keys, rows left).
template <bool kSame, class Visit>
__device__ __forceinline__ void walk_both(
    const ListRows& queries, const ListRows& keys, const DigitCursor& cursor, const Digit& digit, Stretch stretch,
    Visit visit) {
  const int lane = threadIdx.x % 32, end = stretch.end;
  for (int round = stretch.begin; round < end; round += 32 * kUnroll) {
    int rows[kUnroll];
    u32 of_query[kUnroll], of_key[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) rows[u] = round + 32 * u + lane < end ? round + 32 * u + lane : 0;
    digits_of<false>(queries, cursor, digit, rows, of_query);
    if constexpr (!kSame) digits_of<false>(keys, cursor, digit, rows, of_key);
    visit(rows, of_query, kSame ? of_query : of_key, end - round);
  }
}

// Adds the rows of a stretch to this warp's counts; with kSame (`are_same`) to those of queries alone.
template <bool kSame = false>
__device__ __forceinline__ void count_both(
    const ListRows& queries, const ListRows& keys, const DigitCursor& cursor, const Digit& digit, Stretch stretch,
    int* my_queries, int* my_keys) {
  const int lane = threadIdx.x % 32;
  walk_both<kSame>(queries, keys, cursor, digit, stretch, [&](const int(&)[kUnroll], const u32(&of_query)[kUnroll], const u32(&of_key)[kUnroll], int left) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (32 * u + lane < left) {
        atomicAdd(&my_queries[of_query[u]], 1);
        if constexpr (!kSame) atomicAdd(&my_keys[of_key[u]], 1);
      }
    }
  });
}

// Calls put(row, digit of query, of key, place of query, of key, end of the query's range) for the rows of a stretch: rows
// of one digit keep their order, over warps, rounds and lanes. `my_queries` and `my_keys` are the rows of each digit
// before; `k_count` is the end for dropped queries. With kSame (`are_same`) numbers of keys are those of queries, and a
// query's range ends at its own place.
template <bool kSame = false, class Count, class Put>
__device__ __forceinline__ void place_both(
    const ListRows& queries, const ListRows& keys, const DigitCursor& cursor, const Digit& digit, Stretch stretch,
    const int* query_firsts, const int* key_firsts, Count* my_queries, Count* my_keys, int k_count, int sees_itself,
    Put put) {
  const int lane = threadIdx.x % 32;
  walk_both<kSame>(queries, keys, cursor, digit, stretch, [&](const int(&rows)[kUnroll], const u32(&of_query)[kUnroll], const u32(&of_key)[kUnroll], int left) {
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
        const u32 queries_one = __ballot_sync(kEveryLane, query_one);
        same_queries &= query_one ? queries_one : ~queries_one;
        if constexpr (kSame) continue;
        const u32 keys_one = __ballot_sync(kEveryLane, key_one);
        same_keys &= key_one ? keys_one : ~keys_one;
        group_keys &= query_one ? keys_one : ~keys_one;
      }
      const u32 below = (1u << lane) - 1, seen = below | (u32)sees_itself << lane;
      int query_place = 0, key_place = 0, stop = 0;
      if (present) {
        query_place = query_firsts[of_query[u]] + my_queries[of_query[u]] + __popc(same_queries & below);
        if constexpr (kSame) {
          key_place = query_place;
          stop = query_place + sees_itself;
        } else {
          key_place = key_firsts[of_key[u]] + my_keys[of_key[u]] + __popc(same_keys & below);
          stop = key_firsts[of_query[u]] + my_keys[of_query[u]] + __popc(group_keys & seen);
        }
        if (digit.tests_keep && of_query[u] == digit.dropped) stop = k_count;
      }
      __syncwarp();  // all lanes have read the counts that the leaders change
      if (present) {
        put(rows[u], of_query[u], of_key[u], query_place, key_place, stop);
        if (lane == __ffs(same_queries) - 1) my_queries[of_query[u]] += (Count)__popc(same_queries);
        if (!kSame && lane == __ffs(same_keys) - 1) my_keys[of_key[u]] += (Count)__popc(same_keys);
      }
      __syncwarp();  // the next round reads the new counts
    }
  });
}
