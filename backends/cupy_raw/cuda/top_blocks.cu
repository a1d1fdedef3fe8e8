// scfa_top_blocks: for every query the blocks of keys of the highest scores, among those that end before its own begins.
//
// computes       ids[t][list][row] = the block of the t-th highest score, of equal ones the first; where there is none the number of a
//                block that lies ahead, or of none at all. Scores of -inf are never chosen; NaN counts as the highest.
// grid/block     256 threads, a row each, per tile of 256 rows of one (batch, head)
// inputs         scores (batch, heads, blocks, rows) contiguous: neighbouring rows are read side by side
// memory         every score that may be chosen is read once
#include "copy.cuh"

constexpr int kThreads = 256;
constexpr int kTop = SCFA_TOP;  // blocks that are kept in mind
constexpr int kTogether = 8;    // scores that memory is asked for at once

struct TopParams {
  const Element* scores;
  int* ids;             // (top, batch, heads, rows)
  i64 lists;            // batch * heads
  int blocks, rows, block_rows, first_row, last_block, top, tiles, ahead;
};

SCFA_DEVICE bool is_higher(float x, float y) { return x > y || (x != x && y == y); }

extern "C" __global__ void __launch_bounds__(kThreads) scfa_top_blocks(const __grid_constant__ TopParams p) {
  const i64 list = blockIdx.x / p.tiles;
  const i64 row = i64(blockIdx.x % p.tiles) * kThreads + threadIdx.x;
  if (row >= p.rows) return;
  const int own = int((p.first_row + row) / p.block_rows);
  const int none = p.last_block + (p.ahead == 0 || own == p.last_block);
  const int end = min(own, p.blocks);
  const Element* scores = p.scores + list * p.blocks * p.rows + row;

  float best[kTop];
  int ids[kTop];
#pragma unroll
  for (int t = 0; t < kTop; ++t) best[t] = -infinity(), ids[t] = none;
  for (int first = 0; first < end; first += kTogether) {
    float found[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) found[i] = first + i < end ? to_float(scores[i64(first + i) * p.rows]) : -infinity();
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      float score = found[i];
      int id = first + i;
      bool moves = false;  // what is displaced displaces the next one
#pragma unroll
      for (int t = 0; t < kTop; ++t) {
        moves |= is_higher(score, best[t]);
        const float other = best[t];
        const int its = ids[t];
        best[t] = moves ? score : other, ids[t] = moves ? id : its;
        score = moves ? other : score, id = moves ? its : id;
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTop; ++t)
    if (t < p.top) p.ids[(t * p.lists + list) * p.rows + row] = ids[t];
}
