// What bwd_fused_sm90.cu needs before it starts, per sorted query row and per tile of 64 of them.
//
// computes: row_lse = lse in base 2 (+inf where nothing is seen), row_delta[i] = -(dout[i] .
//   out[i]), to which dout[i] . v[j] is added; added = 0, or kNoSum where fewer than two key tiles
//   visit the query tile; dq = 0 where none does.
// grid/block: blocks of 256 threads take query tiles in turn; 16 bytes of a row per thread and pass.
//   Heads that go the other way (choice_sm90.cuh) have no sums and are left alone.
// shared memory: none.
// inputs/outputs: Params (params_sm90.cuh): out, dout, dq in 16 bits, lse, row_lse, row_delta
//   float32, added int32.
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

constexpr int kRows = 64;                  // of a query tile
constexpr int kNoSum = 0x7FFFFFFE;         // as in bwd_fused_sm90_sums.cuh
constexpr int kLanes = SCFA_HEAD_DIM / 8;  // of one row
constexpr int kThreads = 256;

__device__ __forceinline__ float pair_product(unsigned a, unsigned b) {
  float a0, a1, b0, b1;
  unpack_pair(a, a0, a1);
  unpack_pair(b, b0, b1);
  return a0 * b0 + a1 * b1;
}

__device__ __forceinline__ void prepare_tile(const Params& p, int share, int tile) {
  const int z = p.by_query_tiles.quotient(tile);
  const int first = (tile - z * p.query_tiles) * kRows, count = p.q_count[z];
  if (share == kSome && !goes(p, kFused, p.by_group.quotient(z))) {
    if (threadIdx.x == 0) p.added[tile] = kNoSum;
    return;
  }
  const int b = p.by_query_heads.quotient(z), h = z - b * p.heads;
  const long long list = static_cast<long long>(z) * p.seqlen_q;
  // Key tiles [low, high) visit: see bwd_fused_sm90_tiles.cuh.
  int low = 0, high = 0;
  if (first < count) {
    low = p.key_start[list + first] / kTileKeys;
    high = (p.key_end[list + min(first + kRows, count) - 1] + kTileKeys - 1) / kTileKeys;
  }
  if (threadIdx.x == 0) p.added[tile] = high - low >= 2 ? 0 : kNoSum;
  const int chunk = 16 * (threadIdx.x % kLanes);
  const char *out = p.out.of_head(b, h) + chunk, *dout = p.dout.of_head(b, h) + chunk;
  char* dq = p.dq.of_head(b, h) + chunk;
#pragma unroll
  for (int pass = 0; pass < kRows * kLanes / kThreads; ++pass) {
    const int sorted = first + pass * (kThreads / kLanes) + threadIdx.x / kLanes;
    const bool there = sorted < p.seqlen_q;
    const int at = min(sorted, p.seqlen_q - 1);
    const long long row = p.q_index[list + at];
    const bool blind = at >= count || p.key_start[list + at] >= p.key_end[list + at];
    float sum = 0.0f;
    if (there && !blind) {
      const uint4 x = *reinterpret_cast<const uint4*>(dout + row * p.dout.row);
      const uint4 y = *reinterpret_cast<const uint4*>(out + row * p.out.row);
      sum = pair_product(x.x, y.x) + pair_product(x.y, y.y) + pair_product(x.z, y.z) +
            pair_product(x.w, y.w);
    }
#pragma unroll
    for (int i = 1; i < kLanes; i *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, i);
    if (there && low >= high) {
      *reinterpret_cast<uint4*>(dq + row * p.dq.row) = make_uint4(0, 0, 0, 0);
    }
    if (there && threadIdx.x % kLanes == 0) {
      const float given = blind ? -SCFA_INFINITY
                                : *reinterpret_cast<const float*>(p.lse.of_head(b, h) +
                                                                  row * p.lse.row);
      p.row_lse[list + sorted] = given == -SCFA_INFINITY ? SCFA_INFINITY : given * kLog2E;
      p.row_delta[list + sorted] = -sum;
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    scfa_bwd_prepare_sm90(const __grid_constant__ Params p) {
  const int share = share_of(p, kFused);
  if (share == kNone) return;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    p.row_lse[-1] = SCFA_INFINITY;  // the lse of queries that are not there
  }
  const int tiles = p.by_tiles.quotient(p.tiles) * p.group_size * p.query_tiles;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) prepare_tile(p, share, tile);
}
