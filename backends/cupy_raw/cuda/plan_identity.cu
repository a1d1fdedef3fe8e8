// plan_identity: the plan of a pattern without groups and keeps, where rows stay in order.
//
// computes       index[r] = r, count = length, key_start[r] = lo(r), key_end[r] = hi(r)
// grid/block     one block of 256 threads per 1024 rows of one query list, then of one key list
// shared memory  none dynamic
// inputs         start and end columns (batch, heads, rows) with any strides
// version        a plain fill, as fast as the memory takes it
#include "plan_params.cuh"

constexpr int kThreads = 256;
constexpr int kTile = 1024;

extern "C" __global__ void __launch_bounds__(kThreads) scfa_plan_identity(const __grid_constant__ RangeParams p) {
  __shared__ ColumnRow starts[kMaxColumns], ends[kMaxColumns];
  const i64 query_blocks = (i64)p.batch * p.heads * p.tiles_q;
  const bool is_query = blockIdx.x < query_blocks;
  const i64 block = is_query ? blockIdx.x : blockIdx.x - query_blocks;
  const int tiles = is_query ? p.tiles_q : p.tiles_k;
  const int length = is_query ? p.seqlen_q : p.seqlen_k;
  const i64 list = block / tiles;
  const int tile = (int)(block % tiles) * kTile;
  const int tile_end = length - tile > kTile ? tile + kTile : length;
  if (tile == 0 && threadIdx.x == 0) (is_query ? p.q_count : p.k_count)[list] = length;

  if (!is_query) {
    for (int r = tile + threadIdx.x; r < tile_end; r += kThreads) p.k_index[list * length + r] = r;
    return;  // the whole block
  }
  if (threadIdx.x < kMaxColumns) {
    const int batch = (int)(list / p.heads), head = (int)(list % p.heads);
    starts[threadIdx.x] = column_row(p.starts[threadIdx.x], batch, head, 0);
    ends[threadIdx.x] = column_row(p.ends[threadIdx.x], batch, head, 0);
  }
  __syncthreads();  // starts and ends are complete
  for (int r = tile + threadIdx.x; r < tile_end; r += kThreads) {
    const Interval seen = query_interval(r, p.seqlen_k, p.lo_offset, p.hi_offset, starts, ends, p.n_bounds);
    p.q_index[list * length + r] = r;
    p.key_start[list * length + r] = seen.low;
    p.key_end[list * length + r] = seen.high;
  }
}
