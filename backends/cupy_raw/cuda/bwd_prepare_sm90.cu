// What the fused kernels need before they start: per sorted query row, per tile of 64 of them, and
// per key tile (key_tiles_sm90.cuh).
//
// computes: row_lse = lse in base 2 (+inf where nothing is seen), row_delta[i] = -(dout[i] .
//   out[i]), to which dout[i] . v[j] is added; added = 0, or kNoSum where fewer than two key tiles
//   visit the query tile; dq = 0 where none does; key_tiles, a record for each tile of 128 keys; at
//   head_dim 64 whether tiles are handed out in turn (bwd_fused_sm90_tiles.cuh).
// grid/block: two or more blocks of 256 threads. A fifth of them, the first, make records, a warp for
//   a tile: chains of loads that cost little beside the rows, which keep memory busy. The others take
//   query tiles in turn, 16 bytes of a row per thread and pass. Heads that go the other way
//   (choice_sm90.cuh) have no sums and are left alone.
// shared memory: none.
// inputs/outputs: Params (params_sm90.cuh) with the tiles of key heads: out, dout, dq in 16 bits,
//   lse, row_lse, row_delta float32, added and key_tiles int32.
// version and source: the preprocessing of FlashAttention-2 (Dao 2023, algorithm 2, line 4), in
//   sorted order.
#ifndef SCFA_HEAD_DIM
#error "SCFA_HEAD_DIM: set by launch_sm90.py"
#endif
#include "mbarrier.cuh"
#include "products_sm90.cuh"
#include "params_sm90.cuh"
#include "choice_sm90.cuh"
#include "softmax_sm90.cuh"
#include "query_data_sm90.cuh"
#include "bwd_fused_sm90_tiles.cuh"
#include "key_tiles_sm90.cuh"

constexpr int kRows = 64;                  // of a query tile
constexpr int kNoSum = 0x7FFFFFFE;         // as in bwd_fused_sm90_sums.cuh
constexpr int kLanes = SCFA_HEAD_DIM / 8;  // of one row
constexpr int kThreads = 256;
constexpr int kRecorderShare = 5;          // one block in so many makes records
constexpr bool kInTurn = SCFA_HEAD_DIM == 64;  // as in bwd_fused_sm90_sizes.cuh

__device__ __forceinline__ float pair_product(unsigned a, unsigned b) {
  float a0, a1, b0, b1;
  unpack_pair(a, a0, a1);
  unpack_pair(b, b0, b1);
  return a0 * b0 + a1 * b1;
}

constexpr int kPasses = kRows * kLanes / kThreads;  // rows of a thread
constexpr int kBlocks = kPasses > 2 ? 3 : 5;        // of a multiprocessor, as launch_sm90.py launches

// What a thread looks up of a tile before it can load rows: of each of its own the place of the row
// in the arrays, and its range.
struct Places {
  int count;  // kept rows of the list
  int row[kPasses], start[kPasses], end[kPasses];
};

__device__ __forceinline__ int sorted_row(const Params& p, int tile, int z, int pass) {
  const int first = (tile - z * p.query_tiles) * kRows;
  return first + pass * (kThreads / kLanes) + threadIdx.x / kLanes;
}

__device__ __forceinline__ Places look_up(const Params& p, int tile) {
  const int z = p.by_query_tiles.quotient(tile);
  const long long list = static_cast<long long>(z) * p.seqlen_q;
  Places places;
  places.count = p.q_count[z];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int at = min(sorted_row(p, tile, z, pass), p.seqlen_q - 1);
    places.row[pass] = p.q_index[list + at];
    // All at once, though ranges of dropped rows may never have been written, which initcheck need
    // not see.
    const bool looks = !kSanitize || at < places.count;
    places.start[pass] = looks ? p.key_start[list + at] : 0;
    places.end[pass] = looks ? p.key_end[list + at] : 0;
  }
  return places;
}

// How many key tiles visit a tile: see bwd_fused_sm90_tiles.cuh.
__device__ __forceinline__ int visits_of(const Params& p, int tile, int count) {
  const int z = p.by_query_tiles.quotient(tile), first = (tile - z * p.query_tiles) * kRows;
  if (first >= count) return 0;
  const long long list = static_cast<long long>(z) * p.seqlen_q;
  const int low = p.key_start[list + first] / kTileKeys;
  return (p.key_end[list + min(first + kRows, count) - 1] + kTileKeys - 1) / kTileKeys - low;
}

// The rows of a tile. `meanwhile` comes once its loads are on their way.
template <class Function>
__device__ __forceinline__ void prepare_tile(const Params& p, int tile, const Places& places,
                                             int visits, const Function& meanwhile) {
  const int z = p.by_query_tiles.quotient(tile);
  const int b = p.by_query_heads.quotient(z), h = z - b * p.heads;
  const long long list = static_cast<long long>(z) * p.seqlen_q;
  const int chunk = 16 * (threadIdx.x % kLanes);
  const char *out = p.out.of_head(b, h) + chunk, *dout = p.dout.of_head(b, h) + chunk;
  const char* lse = p.lse.of_head(b, h);
  uint4 x[kPasses], y[kPasses];
  float given[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const bool sees = sorted_row(p, tile, z, pass) < places.count &&
                      places.start[pass] < places.end[pass];
    const long long row = places.row[pass];
    x[pass] = y[pass] = make_uint4(0, 0, 0, 0);
    given[pass] = -SCFA_INFINITY;
    if (sees) {
      x[pass] = *reinterpret_cast<const uint4*>(dout + row * p.dout.row);
      y[pass] = *reinterpret_cast<const uint4*>(out + row * p.out.row);
      given[pass] = *reinterpret_cast<const float*>(lse + row * p.lse.row);
    }
  }
  meanwhile();
  if (threadIdx.x == 0) p.added[tile] = visits >= 2 ? 0 : kNoSum;
  char* dq = p.dq.of_head(b, h) + chunk;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int sorted = sorted_row(p, tile, z, pass);
    float sum = pair_product(x[pass].x, y[pass].x) + pair_product(x[pass].y, y[pass].y) +
                pair_product(x[pass].z, y[pass].z) + pair_product(x[pass].w, y[pass].w);
#pragma unroll
    for (int i = 1; i < kLanes; i *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, i);
    if (sorted >= p.seqlen_q) continue;
    if (visits <= 0) {
      const long long row = places.row[pass];
      *reinterpret_cast<uint4*>(dq + row * p.dq.row) = make_uint4(0, 0, 0, 0);
    }
    if (threadIdx.x % kLanes == 0) {
      p.row_lse[list + sorted] =
          given[pass] == -SCFA_INFINITY ? SCFA_INFINITY : given[pass] * kLog2E;
      p.row_delta[list + sorted] = -sum;
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    scfa_bwd_prepare_sm90(const __grid_constant__ Params p) {
  const int share = share_of(p, kFused);
  if (share == kNone) return;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    p.row_lse[-1] = SCFA_INFINITY;  // the lse of queries that are not there
  }
  constexpr int kWarps = kThreads / 32;
  const int blocks = gridDim.x, block = blockIdx.x;
  const int recorders = (blocks - 1) / kRecorderShare + 1;
  if (block < recorders) {
    record_key_tiles(p, share, kWarps * block + threadIdx.x / 32, kWarps * recorders);
    return;
  }
  const int tiles = p.by_tiles.quotient(p.tiles) * p.group_size * p.query_tiles;
  int tile = block - recorders;
  if (tile >= tiles) return;
  Places places = look_up(p, tile);
  int visits = visits_of(p, tile, places.count);
  int for_turns = 0;
  while (tile < tiles) {
    // The next tile's places are looked up behind the loads of this one's rows, one chain of loads
    // instead of two.
    const int next = tile + blocks - recorders, upcoming = min(next, tiles - 1);
    Places next_places = places;
    const int key_head = p.by_group.quotient(p.by_query_tiles.quotient(tile));
    if (share == kSome && !goes(p, kFused, key_head)) {
      if (threadIdx.x == 0) p.added[tile] = kNoSum;
      next_places = look_up(p, upcoming);
    } else {
      prepare_tile(p, tile, places, visits, [&]() { next_places = look_up(p, upcoming); });
    }
    for_turns += visits_for_turns(visits);
    places = next_places;
    visits = visits_of(p, upcoming, places.count);
    tile = next;
  }
  if (kInTurn && threadIdx.x == 0) atomicAdd(p.counter + 1, for_turns);
}
