// plan_sort: the sorted query and key lists of a plan.
//
// computes       index[list] = the rows of a list ordered by (dropped, groups..., starts..., ends..., row); count[list] =
//                rows kept
// grid/block     one block per list, query lists first; any multiple of 32 threads up to 512
// shared memory  warps * (256 + 1) * 4 + 256 * 4 + capacity * 2 bytes
// inputs         group and bound columns int32 or int64, keep columns of bytes, (batch, heads, rows) with any strides
// version        LSD counting sort of at most 8 bits a pass, over only those key bits that differ within the list, so
//                that 16 buckets are one pass of 4 bits, and no pass at all where the rows are in order. Orders alternate between shared memory (lists up to
//                `capacity`) or the output (longer ones), and scratch; the last pass ends in the former.
#include "sort.cuh"

extern "C" __global__ void __launch_bounds__(512, 2) scfa_plan_sort(const __grid_constant__ SortParams p) {
  extern __shared__ __align__(16) char shared[];
  __shared__ ListRows list;
  __shared__ Survey survey;
  __shared__ DigitCursor cursor;
  __shared__ Digit digit;
  __shared__ Order source, target, home, away;
  __shared__ int bits_left;
  const bool is_query = blockIdx.x < p.n_query_lists;
  const ListSet& set = is_query ? p.queries : p.keys;
  const i64 id = is_query ? blockIdx.x : blockIdx.x - p.n_query_lists;
  const int length = set.length;
  if (p.done != nullptr) {  // key lists were written along with the first query head of theirs
    const i64 first_head = is_query ? id : id / set.heads * p.queries.heads + id % set.heads * p.group_size;
    if (p.done[first_head]) return;
  }

  // list: fix batch and head
  if (threadIdx.x < 2 * kMaxColumns) {
    int column = threadIdx.x % kMaxColumns;
    int batch = (int)(id / set.heads), head = (int)(id % set.heads);
    if (threadIdx.x < kMaxColumns) {
      list.groups[column] = column_row(set.groups[column], batch, head, 0);
    } else {
      list.keeps[column] = column_row(set.keeps[column], batch, head, 1);
    }
  }
  if (threadIdx.x == 0) {
    list.n_groups = set.n_groups;
    list.n_keeps = set.n_keeps;
    list.length = length;
    list.n_bounds = set.n_bounds;
    list.seqlen_k = set.seqlen_k;
  }
  __syncthreads();  // list is complete

  // digits: which bits of the keys order this list
  survey_order(list, survey);
  survey_rows(list, survey);
  survey_distances(list, survey);
  if (threadIdx.x == 0) {
    start_cursor(list, survey, cursor);
    set.count[id] = length - survey.dropped;
  }
  __syncthreads();  // cursor is complete
  const int total_bits = cursor.total_bits();
  const int passes = ceil_div(total_bits, kMaxDigitBits);

  // passes: least significant digit first
  int* counts = (int*)shared;
  int* firsts = counts + blockDim.x / 32 * (kMaxBins + 1);
  if (threadIdx.x == 0) {
    const bool fits = length <= p.capacity;
    home = {fits ? (u16*)(firsts + kMaxBins) : nullptr, fits ? nullptr : set.index + id * length};
    away = {nullptr, set.scratch + id * length};
    target = {nullptr, nullptr};  // row i at place i
    bits_left = total_bits;
  }
  for (int pass = 0; pass < passes; ++pass) {
    __syncthreads();  // all are done with the cursor and the pass before
    if (threadIdx.x == 0) {
      const int bits = ceil_div(bits_left, passes - pass);
      bits_left -= bits;
      cursor.next(bits, digit);
      source = target;
      target = (passes - pass) % 2 ? home : away;
    }
    __syncthreads();  // digit, source and target are complete
    sort_pass(list, cursor, digit, source, target, counts, firsts);
  }
  __syncthreads();  // target is complete, also where there was no pass

  // index: in row order where nothing tells the rows apart
  if (passes == 0 || length <= p.capacity) {
    int* index = set.index + id * length;
    for (int i = threadIdx.x; i < length; i += blockDim.x) index[i] = target.get(i);
  }
}
