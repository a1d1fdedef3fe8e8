// How full each bucket is before every block of rows, and the factors that this gives. Include after Shared of hash_past.cu, whose
// sums of rows are passed from tile to tile in the same way.
#pragma once

// Numbers of rows by the load that ptx.cuh has: 32 bits, whatever they mean.
SCFA_DEVICE int load_rows_of_others(const int* address) {
  return int(__float_as_uint(load_of_others(reinterpret_cast<const float*>(address))));
}

// Rows of each bucket in the tile's blocks to factors of their products, in shared memory.
SCFA_DEVICE void find_factors(Shared& shared, const PastParams& p, int list, int tile, int centers, int round, int warp, int lane) {
  const int buckets = 2 * p.n_directions;
  const bool last = tile + 1 == p.tiles;
  const int group = tile / kGroup, before = tile % kGroup;
  const i64 slot = ((i64)round * p.batch * p.heads + list) * (p.tiles + p.groups), group_slot = slot + p.tiles + group;
  const auto own_total = [&](int bucket) {
    int total = 0;
#pragma unroll 1
    for (int center = 0; center < centers; ++center) total += shared.fills[center][bucket];
    return total;
  };
  if (!last) {
    for (int bucket = threadIdx.x; bucket < buckets; bucket += kThreads) p.fills[(slot + tile) * buckets + bucket] = own_total(bucket);
    __syncthreads();  // the tile's rows are written
    if (threadIdx.x == 0) release_flag(p.fill_flags + slot + tile, 1);
  }
  if (warp == 0) {
    if (lane < before) wait_for_flag(p.fill_flags + slot + tile - before + lane);
    if (lane == kGroup && group > 0) wait_for_flag(p.fill_flags + group_slot);
  }
  __syncthreads();  // the rows before are written
  int* earlier = shared.fills[kTileCenters];
  const int* theirs = p.fills + (slot + tile - before) * buckets;
  for (int item = threadIdx.x; item < before * buckets; item += kThreads) atomicAdd(earlier + item % buckets, load_rows_of_others(theirs + item));
  if (group > 0) {
    for (int bucket = threadIdx.x; bucket < buckets; bucket += kThreads) {
      atomicAdd(earlier + bucket, load_rows_of_others(p.fills + group_slot * buckets + bucket));
    }
  }
  __syncthreads();  // earlier is complete
  for (int bucket = threadIdx.x; bucket < buckets; bucket += kThreads) {
    int total = earlier[bucket];
    if (before == kGroup - 1 && !last) p.fills[(group_slot + 1) * buckets + bucket] = total + own_total(bucket);
#pragma unroll 1
    for (int center = 0; center < centers; ++center) {
      const int own = shared.fills[center][bucket], rows = tile * kTileRows + center * kCenterRows;
      const float fill = float(buckets) * float(total + kStartFill) / (float(rows) + float(buckets * kStartFill));
      shared.fills[center][bucket] = int(__float_as_uint(exp2f(p.power * log2f(fill))));
      total += own;
    }
  }
  __syncthreads();  // factors are complete, and the group's rows are written
  if (before == kGroup - 1 && !last && threadIdx.x == 0) release_flag(p.fill_flags + group_slot + 1, 1);
}
