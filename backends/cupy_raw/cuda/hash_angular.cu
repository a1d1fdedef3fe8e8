// hash_angular: the bucket of every row under random directions, without the products ever reaching memory.
//
// computes       bucket = argmax [y, -y],  y = x @ R - c @ R  (R float32; no center c: y = x @ R); of equals the lowest index.
//                A head has one center, or one for every kCenterRows rows of each sequence
// grid/block     one block of 128 threads per tile_rows rows of one (batch, head) and one round; rounds of a tile lie side
//                by side, so that all but the first find its rows in L2. A warp takes kMi * 16 rows at a time.
// shared memory  the directions as mma operands, 48 * kHeadDim * kBlocks bytes, and c @ R of each center, 32 * kBlocks bytes
// inputs         x (batch, heads, seqlen, head_dim) with any strides but the last; R (rounds, own_heads, head_dim, directions)
//                and c (center_heads, head_dim) or (batch, center_heads, centers, head_dim) contiguous; bucket (rounds, batch,
//                heads, seqlen) contiguous
// version        tensor cores on exact parts (hash_rows.cuh)
#include "hash_rows.cuh"

constexpr int kResident = SCFA_X_ELEMENT == 2 && kBlocks <= 2 ? 6 : 4;  // blocks of a multiprocessor: as many as spill nothing

struct HashParams {
  const char* x;
  const float* directions;
  const float* center;  // null: none
  int* bucket;
  i64 x_batch, x_head, x_row;  // strides in bytes
  int batch, heads, own_heads, center_heads, seqlen, head_dim, n_directions, rounds, tile_rows, tiles;
  int centers;  // of each list; 0: a head has one for all batches
};

struct Shared {
  Operands operands;

  // c @ R lies behind, for each center of the tile.
  SCFA_DEVICE float (*moved())[8 * kBlocks] { return reinterpret_cast<float (*)[8 * kBlocks]>(this + 1); }
};

extern "C" __global__ void __launch_bounds__(kThreads, kResident) scfa_hash_angular(const __grid_constant__ HashParams p) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  const int round = int(blockIdx.x % p.rounds);
  const int tile = int(blockIdx.x / p.rounds % p.tiles);
  const int list = int(blockIdx.x / p.rounds / p.tiles);
  const int batch = list / p.heads, head = list % p.heads;

  const i64 own_head = (i64)round * p.own_heads + head / (p.heads / p.own_heads);
  const int tile_start = tile * p.tile_rows, tile_end = tile_start + smaller(p.seqlen - tile_start, p.tile_rows);
  const int center_head = head / (p.heads / p.center_heads);
  const float* center = p.center;
  int centers = 1;  // of the tile
  if (p.centers > 0) {
    const i64 center_list = (i64)batch * p.center_heads + center_head;
    center += (center_list * p.centers + tile_start / kCenterRows) * p.head_dim;
    centers = (tile_end - tile_start + kCenterRows - 1) / kCenterRows;
  } else if (center) {
    center += (i64)center_head * p.head_dim;
  }
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const char* x = p.x + batch * p.x_batch + head * p.x_head;
  Words words;
  constexpr int kStep = kWarps * kMi * 16;
  int first = tile_start + warp * kMi * 16;
  load_chunks(words, x, p.x_row, first, tile_end, 0, p.head_dim, lane);
  block_load_directions(shared.operands, p.directions + own_head * p.head_dim * p.n_directions, p.head_dim, p.n_directions);
  __syncthreads();  // operands are complete
  if (warp == 0) multiply_centers(shared.moved(), shared.operands, center, centers, p.head_dim, p.head_dim, lane);
  __syncthreads();  // moved is complete

  int* bucket = p.bucket + ((i64)round * p.batch * p.heads + list) * p.seqlen;
  for (; first < tile_end; first += kStep) {
    float acc[kMi][kBlocks][4] = {};
#pragma unroll kLoadsAtOnce
    for (int chunk = 0; chunk < kChunks; chunk += kAhead) {
      Words present;
      load_ahead(present, words, x, p.x_row, first, first + kStep, tile_end, chunk, p.head_dim, lane);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) multiply_chunk<SCFA_X_ELEMENT, kMi>(acc, present[i], shared.operands, chunk + i, lane);
    }

#pragma unroll
    for (int mi = 0; mi < kMi; ++mi) {
      const auto& moved = shared.moved()[p.centers > 0 ? (first - tile_start + mi * 16) / kCenterRows : 0];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int found = bucket_of(acc[mi], half, moved, nullptr, p.n_directions, lane);
        const int row = first + mi * 16 + half * 8 + lane / 4;
        if (lane % 4 == half && row < tile_end) bucket[row] = found;
      }
    }
  }
}
