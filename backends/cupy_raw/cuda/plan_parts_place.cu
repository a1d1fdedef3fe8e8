// plan_parts_place: the last of three launches that plan long lists, see plan_parts.cuh.
//
// computes       what plan_causal does for a list, a part of it at a time; done[list] likewise
// grid/block     one block per part of a query list; the first head of each key head writes the key list; 64, 128,
//                256 or 512 threads
// shared memory  (2 * warps * (bins + 1) + 6 * bins) * 4 bytes, and 8 bytes a row of a part
// inputs         as plan_causal, and what plan_parts_survey and plan_parts_count left; key lists alone: those in both places,
//                and no key_start
// version        a part is ordered in shared memory as plan_causal orders a list. The rows of a bin then lie side by side in
//                the list as well, after those of the parts before: place in the list = place in the part + shift[bin].
#include "plan_parts.cuh"

extern "C" __global__ void __launch_bounds__(512, 2) scfa_plan_parts_place(const __grid_constant__ SortParams p) {
  extern __shared__ __align__(16) char shared[];
  __shared__ ListRows queries, keys;
  __shared__ PartDigit common;
  const int warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  const Part part(p);
  const SharedWork work(p, part);
  const int length = p.queries.length;
  const i64 key_list = (i64)part.batch * p.keys.heads + part.head / p.group_size;
  const bool writes_keys = part.head % p.group_size == 0;
  fix_part(p, part, queries, keys);

  // digit: whether this list is served, and how many rows it keeps
  const bool served = common.find(p, part, work.surveys);
  const int k_count = length - common.survey.dropped_keys;
  if (part.number == 0 && threadIdx.x == 0) {
    p.done[part.list] = served;
    if (served) {
      p.queries.count[part.list] = length - common.survey.dropped_queries;
      if (writes_keys) p.keys.count[key_list] = k_count;
    }
  }
  if (!served) return;  // the whole block

  // shared memory: rows of 2 * bins numbers are those of the queries, then of the keys
  const Digit& digit = common.digit;
  const int bins = 1 << common.bits, columns = 2 * bins, pitch = pitch_of<int>(bins);
  int* firsts = (int*)shared;         // first place of each bin in the part
  int* shifts = firsts + columns;     // rows of each bin in the parts before; then from places in the part to the list's
  int* totals = shifts + columns;     // rows of each bin in the list; then first place of each bin in the list
  int* query_counts = totals + columns;
  int* key_counts = query_counts + n_warps * pitch;
  u16* query_rows = (u16*)(shared + ((char*)(key_counts + n_warps * pitch) - shared + 15) / 16 * 16);
  u16* key_rows = query_rows + part.rows;
  u16* ends = key_rows + part.rows;
  unsigned char* query_bins = (unsigned char*)(ends + part.rows);
  unsigned char* key_bins = query_bins + part.rows;
  for (int i = threadIdx.x; i < 2 * columns + 2 * n_warps * pitch; i += blockDim.x) shifts[i] = 0;
  __syncthreads();  // all that is counted in is zero

  // count: the rows of all parts, by what the launch before found, and of this warp's stretch
  const int teams = ceil_div(blockDim.x, columns);  // powers of two
  for (int column = threadIdx.x & (columns - 1); column < columns; column += blockDim.x) {
    int before = 0, total = 0;
#pragma unroll 8
    for (int other = threadIdx.x >> (common.bits + 1); other < part.parts; other += teams) {
      const int count = work.counts[(i64)other * columns + column];
      total += count;
      before += other < part.number ? count : 0;
    }
    atomicAdd(&totals[column], total);
    atomicAdd(&shifts[column], before);
  }
  const Stretch stretch(part.rows);
  int* my_queries = query_counts + warp * pitch;
  int* my_keys = key_counts + warp * pitch;
  count_both(queries, keys, common.cursor, digit, stretch, my_queries, my_keys);
  __syncthreads();  // totals and every warp's counts are there

  // scan: places in the part, places in the list, and from the former to the latter
  if (warp < 2) scan_bins(totals + warp * bins, bins);
  scan_counts(query_counts, query_counts, firsts, bins, 0);
  scan_counts(key_counts, key_counts, firsts + bins, bins, n_warps - 1);
  __syncthreads();  // all firsts are complete
  for (int i = threadIdx.x; i < columns; i += blockDim.x) shifts[i] += totals[i] - firsts[i];

  // place: in shared memory; dropped queries get their range below
  place_both(
      queries, keys, common.cursor, digit, stretch, firsts, firsts + bins, my_queries, my_keys, 0, p.sees == kSeesItself,
      [&](int row, u32 of_query, u32 of_key, int query_place, int key_place, int stop) {
        query_rows[query_place] = (u16)row;
        query_bins[query_place] = (unsigned char)of_query;
        ends[query_place] = (u16)stop;
        key_rows[key_place] = (u16)row;
        key_bins[key_place] = (unsigned char)of_key;
      });
  __syncthreads();  // all rows are placed, shifts are complete

  // out: neighbours of one bin are neighbours in the list
  const i64 offset = (i64)part.list * length;
  for (int i = threadIdx.x; i < part.rows && p.key_start != nullptr; i += blockDim.x) {
    const int bin = query_bins[i];
    const bool dropped = digit.tests_keep && bin == (int)digit.dropped;
    const i64 place = offset + i + shifts[bin];
    const int group_end = bin + 1 < bins ? totals[bins + bin + 1] : length;
    p.queries.index[place] = part.first_row + query_rows[i];
    p.key_start[place] = dropped ? k_count : totals[bins + bin];
    p.key_end[place] = dropped ? k_count : p.sees == kSeesAll ? group_end : ends[i] + shifts[bins + bin];
  }
  if (!writes_keys) return;
  int* k_index = p.keys.index + key_list * length;
  for (int i = threadIdx.x; i < part.rows; i += blockDim.x) {
    k_index[i + shifts[bins + key_bins[i]]] = part.first_row + key_rows[i];
  }
}
