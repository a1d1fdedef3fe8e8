// hash_past: the bucket of every row about a mean of the rows before it, in one pass over the rows.
//
// computes       mean of block j (kCenterRows rows) = (sum of the rows of blocks before j + kStartRows * start) / (their number +
//                kStartRows); a block with a sum that is not below kMostSum counts for nothing. Then bucket = argmax [y, -y],
//                y = x @ R - mean @ R; of equals the lowest index. With SCFA_EVEN [y, -y] is divided, in each block, by a power of
//                fill = n (rows before it whose bucket this was, without that division, + kStartFill) / (all rows + n kStartFill)
// grid/block     one block of 128 or 256 threads per kTileRows rows of one (batch, head), which takes all rounds one after the other;
//                blocks get their tiles in the order in which they start, so that whoever waits for an earlier tile waits for a
//                block that runs. A warp takes whole blocks of kCenterRows rows.
// memory         each tile writes the sum of its rows and says how many blocks count; a tile adds the sums of the up to kGroup - 1
//                tiles before it in its group to that of the groups before, always in this order; the rows of buckets likewise
// shared memory  sizeof(Shared): directions as mma operands, the tile's products (each lane those that it made), sums, means, fills
// inputs         x (batch, heads, seqlen, head_dim) with any strides but the last; R (rounds, own_heads, head_dim, directions),
//                start (start_heads, head_dim), bucket (rounds, batch, heads, seqlen), mean (batch, heads, centers, head_dim)
//                contiguous; sums (lists, tiles + groups, kHeadDim), flags 1 + (lists, tiles + groups), with SCFA_EVEN fills (rounds,
//                lists, tiles + groups, n) and fill_flags (rounds, lists, tiles + groups), all 0 at first
// version        tensor cores on exact parts (hash_rows.cuh)
#include "hash_rows.cuh"

#ifndef SCFA_EVEN
#error "SCFA_EVEN (whether full buckets are given less): set by hashing.py"
#endif
constexpr int kTileRows = kBlocks == 1 ? 1024 : kBlocks == 2 ? 512 : 256;
constexpr int kTileCenters = kTileRows / kCenterRows;
constexpr int kGroup = 16;  // tiles
constexpr float kStartRows = 16.0f;
constexpr float kMostSum = 1e30f;
constexpr bool kEven = SCFA_EVEN;
constexpr int kStartFill = 2;
// Threads of a multiprocessor, in blocks: as many as spill nothing. Wider elements take registers as more directions do.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kMostResident = 768;
#else
constexpr int kMostResident = 512;
#endif
constexpr int kHeld = kBlocks + (SCFA_X_ELEMENT != 2);
constexpr int kResident = (kHeld > 2 ? 384 : kHeld == 2 ? 512 : kMostResident) / kThreads;
static_assert(kTileCenters <= 16, "one product makes those of all means of a tile");

struct PastParams {
  const char* x;
  const float* directions;
  const float* start;
  int* bucket;
  float* mean;
  float* sums;
  int* flags;
  int* fills;
  int* fill_flags;
  i64 x_batch, x_head, x_row;  // strides in bytes
  int batch, heads, own_heads, start_heads, seqlen, head_dim, n_directions, rounds, tiles, groups;
  float power;  // of the fill, negative
};

struct Shared {
  Operands operands;
  float4 products[kTileRows / 16][kBlocks][kWarpSize];
  float means[kTileCenters][kHeadDim];  // sums of the blocks until they are known
  float moved[kTileCenters][8 * kBlocks];
  int counts[kTileCenters];  // whether a block counts
  int fills[kEven ? kTileCenters + 1 : 1][16 * kBlocks];  // rows of a block in each bucket, then factors' bits; rows of tiles before
  int ticket, blocks_before;
};

// A half as a float; what is not finite as infinity.
SCFA_DEVICE float float_of_any_half(u32 bits) { return (bits & 0x7c00u) == 0x7c00u ? infinity() : float_of_half(bits); }

// Sum over the rows of a chunk that a warp holds: each lane gets that of one column.
SCFA_DEVICE float sum_of_rows(const u32 (&words)[kMi][2][EightOfX::kWords], int lane) {
  constexpr int kWords = EightOfX::kWords;
  float sums[8] = {};
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if constexpr (SCFA_X_ELEMENT == kFloat) {
          sums[i] += __uint_as_float(words[mi][half][i % kWords]);
        } else {
          const u32 word = words[mi][half][i / 2];
          if constexpr (SCFA_X_ELEMENT == 2) {
            sums[i] += __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
          } else {
            sums[i] += float_of_any_half(i % 2 ? word >> 16 : word & 0xffffu);
          }
        }
      }
#pragma unroll
  for (int kept = 4; kept > 0; kept /= 2) {  // lanes with other rows of the same columns keep one half each
    const bool upper = lane & 4 * kept;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const float theirs = __shfl_xor_sync(kAllLanes, upper ? sums[i] : sums[i + kept], 4 * kept);
      sums[i] = (upper ? sums[i + kept] : sums[i]) + theirs;
    }
  }
  return sums[0];
}

// Of the chunk's columns, the one whose sum a lane gets.
SCFA_DEVICE int column_of_sum(int lane) { return lane % 4 * 8 + lane / 4; }

// The rows that a warp takes after these: of the same block of kCenterRows rows, or of its next one.
SCFA_DEVICE int next_rows(int row) {
  row += kMi * 16;
  return row % kCenterRows ? row : row + (kWarps - 1) * kCenterRows;
}

// Products of the tile's rows, each lane's own to shared memory; in the first round sums of each block of rows as well. `words` holds
// the warp's first rows.
template <bool kSums>
SCFA_DEVICE void multiply_tile(Shared& shared, const PastParams& p, Words& words, const char* x, int rows, int warp, int lane) {
#pragma unroll 1
  for (int row = warp * kCenterRows; row < rows; row = next_rows(row)) {
    float acc[kMi][kBlocks][4] = {};
#pragma unroll kLoadsAtOnce
    for (int chunk = 0; chunk < kChunks; chunk += kAhead) {
      Words present;
      load_ahead(present, words, x, p.x_row, row, next_rows(row), rows, chunk, p.head_dim, lane);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if constexpr (kSums) {
          float& sum = shared.means[row / kCenterRows][(chunk + i) * kChunk + column_of_sum(lane)];
          const float part = sum_of_rows(present[i], lane);
          sum = row % kCenterRows ? sum + part : part;
        }
        multiply_chunk<SCFA_X_ELEMENT, kMi>(acc, present[i], shared.operands, chunk + i, lane);
      }
    }
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const float(&y)[4] = acc[mi][block];
        shared.products[row / 16 + mi][block][lane] = make_float4(y[0], y[1], y[2], y[3]);
      }
  }
}

// Sums of blocks to means of the rows before them, in shared memory and in p.mean.
SCFA_DEVICE void find_means(Shared& shared, const PastParams& p, int list, int tile, int centers, int warp, int lane) {
  for (int center = warp; center < centers; center += kWarps) {
    bool counts = true;
    for (int column = lane; column < kHeadDim; column += kWarpSize) counts &= fabsf(shared.means[center][column]) < kMostSum;
    counts = __all_sync(kAllLanes, counts);  // no NaN is
    if (lane == 0) shared.counts[center] = counts;
  }
  __syncthreads();  // counts is complete
  int own_blocks = 0;
#pragma unroll 1
  for (int center = 0; center < centers; ++center) own_blocks += shared.counts[center];
  const bool last = tile + 1 == p.tiles;
  const int group = tile / kGroup, before = tile % kGroup;  // tiles before this one in its group
  const i64 slot = (i64)list * (p.tiles + p.groups), group_slot = slot + p.tiles + group;
  int* flags = p.flags + 1;
  const auto own_total = [&](int column) {
    float total = 0.0f;
#pragma unroll 1
    for (int center = 0; center < centers; ++center) total += shared.counts[center] ? shared.means[center][column] : 0.0f;
    return total;
  };
  if (!last) {
    for (int column = threadIdx.x; column < kHeadDim; column += kThreads) p.sums[(slot + tile) * kHeadDim + column] = own_total(column);
    __syncthreads();  // the tile's sum is written
    if (threadIdx.x == 0) release_flag(flags + slot + tile, 1 + own_blocks);
  }
  if (warp == 0) {
    int blocks = 0;
    if (lane < before) blocks = wait_for_flag(flags + slot + tile - before + lane) - 1;
    if (lane == kGroup && group > 0) blocks = wait_for_flag(flags + group_slot) - 1;
    for (int other = 1; other < kWarpSize; other *= 2) blocks += __shfl_xor_sync(kAllLanes, blocks, other);
    if (lane == 0) shared.blocks_before = blocks;
  }
  __syncthreads();  // the sums before are written, and their blocks counted
  const float* start = p.start + (i64)(list % p.heads / (p.heads / p.start_heads)) * p.head_dim;
  float* mean = p.mean + ((i64)list * ceil_div(p.seqlen, kCenterRows) + tile * kTileCenters) * p.head_dim;
  for (int column = threadIdx.x; column < kHeadDim; column += kThreads) {
    float theirs[kGroup - 1];
    float total = group > 0 ? load_of_others(p.sums + group_slot * kHeadDim + column) : 0.0f;
#pragma unroll
    for (int i = 0; i < kGroup - 1; ++i)
      theirs[i] = i < before ? load_of_others(p.sums + (slot + tile - before + i) * kHeadDim + column) : 0.0f;
#pragma unroll
    for (int i = 0; i < kGroup - 1; ++i) total += theirs[i];
    if (before == kGroup - 1 && !last) p.sums[(group_slot + 1) * kHeadDim + column] = total + own_total(column);
    const bool exists = column < p.head_dim;
    const float first = exists ? kStartRows * start[column] : 0.0f;
    int blocks = shared.blocks_before;
#pragma unroll 1
    for (int center = 0; center < centers; ++center) {
      const float sum = shared.means[center][column];
      const float found = (total + first) / (float(blocks) * kCenterRows + kStartRows);
      shared.means[center][column] = found;
      if (exists) mean[center * p.head_dim + column] = found;
      if (shared.counts[center]) total += sum, ++blocks;
    }
  }
  __syncthreads();  // means are complete, and the group's sum is written
  if (before == kGroup - 1 && !last && threadIdx.x == 0) release_flag(flags + group_slot + 1, 1 + shared.blocks_before + own_blocks);
}

#include "hash_past_fills.cuh"

// The bucket of each of a warp's rows, by factors of [y, -y] if `kWeighs`, to take(its row of the tile, its bucket).
template <bool kWeighs, typename Take>
SCFA_DEVICE void take_buckets(Shared& shared, const PastParams& p, int rows, int warp, int lane, Take take) {
#pragma unroll 1
  for (int row = warp * kCenterRows; row < rows; row = next_rows(row)) {
    const int center = row / kCenterRows;
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi) {
      float products[kBlocks][4];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const float4 y = shared.products[row / 16 + mi][block][lane];
        products[block][0] = y.x, products[block][1] = y.y, products[block][2] = y.z, products[block][3] = y.w;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int found = bucket_of<kWeighs>(products, half, shared.moved[center], shared.fills[kWeighs ? center : 0], p.n_directions, lane);
        const int at = row + mi * 16 + half * 8 + lane / 4;
        if (lane % 4 == half && at < rows) take(at, found);
      }
    }
  }
}

// One round of a tile; the first finds the means.
template <bool kFirst>
SCFA_DEVICE void hash_round(Shared& shared, const PastParams& p, int list, int tile, int round) {
  const int batch = list / p.heads, head = list % p.heads;
  const int tile_start = tile * kTileRows, rows = smaller(p.seqlen - tile_start, kTileRows);
  const int centers = ceil_div(rows, kCenterRows);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const char* x = p.x + batch * p.x_batch + head * p.x_head + tile_start * p.x_row;
  const i64 own_head = (i64)round * p.own_heads + head / (p.heads / p.own_heads);
  Words words;
  load_chunks(words, x, p.x_row, warp * kCenterRows, rows, 0, p.head_dim, lane);
  block_load_directions(shared.operands, p.directions + own_head * p.head_dim * p.n_directions, p.head_dim, p.n_directions);
  __syncthreads();  // operands are complete
  multiply_tile<kFirst>(shared, p, words, x, rows, warp, lane);
  if constexpr (kFirst) {
    __syncthreads();  // sums are complete
    find_means(shared, p, list, tile, centers, warp, lane);
  }
  if (warp == 0) multiply_centers(shared.moved, shared.operands, &shared.means[0][0], centers, kHeadDim, kHeadDim, lane);
  if constexpr (kEven) {
    for (int i = threadIdx.x; i < (kTileCenters + 1) * 16 * kBlocks; i += kThreads) (&shared.fills[0][0])[i] = 0;
  }
  __syncthreads();  // moved is complete, and operands are free
  int* bucket = p.bucket + ((i64)round * p.batch * p.heads + list) * p.seqlen + tile_start;
  if constexpr (kEven) {
    take_buckets<false>(shared, p, rows, warp, lane, [&](int row, int found) { atomicAdd(&shared.fills[row / kCenterRows][found], 1); });
    __syncthreads();  // fills are complete
    find_factors(shared, p, list, tile, centers, round, warp, lane);
  }
  take_buckets<kEven>(shared, p, rows, warp, lane, [&](int row, int found) { bucket[row] = found; });
}

extern "C" __global__ void __launch_bounds__(kThreads, kResident) scfa_hash_past(const __grid_constant__ PastParams p) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  if (threadIdx.x == 0) shared.ticket = atomicAdd(p.flags, 1);
  __syncthreads();  // the tile is known
  const int list = shared.ticket / p.tiles, tile = shared.ticket % p.tiles;
  hash_round<true>(shared, p, list, tile, 0);
#pragma unroll 1
  for (int round = 1; round < p.rounds; ++round) hash_round<false>(shared, p, list, tile, round);
}
