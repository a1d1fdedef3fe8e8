// Long lists shared by several blocks, one per part of `part_rows` rows, in three launches: plan_parts_survey looks at
// the ids, plan_parts_count counts bins, plan_parts_place orders. Each launch reads what the one before left in
// SharedWork: no block waits for another.
#pragma once
#include "plan_joint.cuh"

// What is known of a part's rows, or of several parts'.
struct PartSurvey {
  u64 any_one, all_one, low, high;  // over kept queries and keys; no rows: 0, ~0, ~0, 0
  int dropped_queries, dropped_keys;
};

// Which rows this block takes.
struct Part {
  int list, number, parts, first_row, rows, batch, head;

  __device__ __forceinline__ explicit Part(const SortParams& p) {
    parts = ceil_div(p.queries.length, p.part_rows);
    list = blockIdx.x / parts;
    number = blockIdx.x % parts;
    first_row = number * p.part_rows;
    rows = p.queries.length - first_row < p.part_rows ? p.queries.length - first_row : p.part_rows;
    batch = list / p.queries.heads;
    head = list % p.queries.heads;
  }
};

// The workspace: every part's survey, then every part's counts, of queries and of keys, of a list's 2^bits bins.
struct SharedWork {
  PartSurvey* surveys;  // of this list
  int* counts;

  __device__ __forceinline__ SharedWork(const SortParams& p, const Part& part) {
    PartSurvey* all = (PartSurvey*)p.keys.scratch;
    surveys = all + (i64)part.list * part.parts;
    counts = (int*)(all + p.n_query_lists * part.parts) + ((i64)part.list * part.parts << (p.max_bits + 1));
  }
};

// Both sides of the part, whose rows count from 0; complete for all threads when it returns.
__device__ inline void fix_part(const SortParams& p, const Part& part, ListRows& queries, ListRows& keys) {
  const bool is_query = threadIdx.x < 32;
  const int t = threadIdx.x % 32;
  if (threadIdx.x < 64 && t <= kMaxColumns) {
    ListRows& list = is_query ? queries : keys;
    fix_side(is_query ? p.queries : p.keys, part.batch, is_query ? part.head : part.head / p.group_size, list, t);
    ColumnRow& column = t < kMaxColumns ? list.keeps[t] : list.groups[0];
    column.base += part.first_row * column.row_stride;
    if (t == kMaxColumns) list.length = part.rows;
  }
  __syncthreads();  // lists are complete
}

__device__ __forceinline__ void start_survey(PartSurvey& survey) {
  if (threadIdx.x == 0) survey = {0, ~0ull, ~0ull, 0, 0, 0};
  __syncthreads();  // it starts from these values
}

// Merges every thread's survey; called by all threads, complete for all when it returns.
__device__ inline void merge_surveys(const PartSurvey& mine, PartSurvey& survey) {
  const u64 any_one = warp_or(mine.any_one), any_zero = warp_or(~mine.all_one);
  const u64 low = warp_min(mine.low), high = ~warp_min(~mine.high);
  const int dropped_queries = warp_sum(mine.dropped_queries), dropped_keys = warp_sum(mine.dropped_keys);
  if (threadIdx.x % 32 == 0) {
    atomicOr(&survey.any_one, any_one);
    atomicAnd(&survey.all_one, ~any_zero);
    atomicMin(&survey.low, low);
    atomicMax(&survey.high, high);
    atomicAdd(&survey.dropped_queries, dropped_queries);
    atomicAdd(&survey.dropped_keys, dropped_keys);
  }
  __syncthreads();  // survey is complete
}

// The survey of a list and the digit that tells its queries and keys apart; the same in every block of the list.
struct PartDigit {
  PartSurvey survey;
  DigitCursor cursor;
  Digit digit;
  int bits;

  // Whether one digit is enough; called by all threads, complete for all when it returns.
  __device__ inline bool find(const SortParams& p, const Part& part, const PartSurvey* surveys) {
    start_survey(survey);
    PartSurvey mine = {0, ~0ull, ~0ull, 0, 0, 0};
    for (int i = threadIdx.x; i < part.parts; i += blockDim.x) {
      const PartSurvey other = surveys[i];
      mine.any_one |= other.any_one;
      mine.all_one &= other.all_one;
      mine.low = other.low < mine.low ? other.low : mine.low;
      mine.high = other.high > mine.high ? other.high : mine.high;
      mine.dropped_queries += other.dropped_queries;
      mine.dropped_keys += other.dropped_keys;
    }
    merge_surveys(mine, survey);
    if (threadIdx.x == 0) {
      // Ids from -1 to 15 differ in every bit, but their distances from -1 in five.
      const u64 differing = survey.any_one & ~survey.all_one;
      u64 distances = differing ? survey.high - survey.low : 0;
      for (int step = 1; step < 64; step *= 2) distances |= distances >> step;
      const bool by_distance = count_bits(distances) < count_bits(differing);
      cursor.n_columns = p.queries.n_groups;
      cursor.has_dropped = survey.dropped_queries + survey.dropped_keys > 0;
      cursor.varying[0] = by_distance ? distances : differing;
      cursor.low[0] = by_distance ? survey.low : 0;
      bits = cursor.total_bits();
      if (bits <= p.max_bits) cursor.next(bits, digit);
    }
    __syncthreads();  // bits and digit are known
    return bits <= p.max_bits;
  }
};
