// plan_parts_survey: the first of three launches that plan long lists, see plan_parts.cuh.
//
// computes       surveys[list][part] = which bits differ among the part's kept queries and keys, the lowest and the
//                highest id, how many of each side are dropped
// grid/block     one block per part of a query list; 64, 128, 256 or 512 threads
// shared memory  none dynamic
// inputs         as plan_causal
// version        one look at every row: the distances from the lowest id are bounded by the highest, not found one by one
#include "plan_parts.cuh"

extern "C" __global__ void __launch_bounds__(512, 2) scfa_plan_parts_survey(const __grid_constant__ SortParams p) {
  __shared__ ListRows queries, keys;
  __shared__ PartSurvey survey;
  const Part part(p);
  fix_part(p, part, queries, keys);
  start_survey(survey);

  PartSurvey mine = {0, ~0ull, ~0ull, 0, 0, 0};
  visit_rows(part.rows, [&](const int(&rows)[kUnroll], u32 present) {
    const u32 kept_queries = present & queries.kept(rows), kept_keys = present & keys.kept(rows);
    mine.dropped_queries += __popc(present & ~kept_queries);
    mine.dropped_keys += __popc(present & ~kept_keys);
    if (queries.n_groups == 0) return;  // the same for all threads
    u64 of_query[kUnroll], of_key[kUnroll];
    load_keys(queries.groups[0], rows, of_query);
    load_keys(keys.groups[0], rows, of_key);
    auto visit = [&](u64 id) {
      mine.any_one |= id;
      mine.all_one &= id;
      mine.low = id < mine.low ? id : mine.low;
      mine.high = id > mine.high ? id : mine.high;
    };
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (kept_queries >> u & 1) visit(of_query[u]);
      if (kept_keys >> u & 1) visit(of_key[u]);
    }
  });
  merge_surveys(mine, survey);
  if (threadIdx.x == 0) SharedWork(p, part).surveys[part.number] = survey;
}
