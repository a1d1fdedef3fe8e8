// Key tiles of the fused backward, and which query tiles each of them visits. Include after Shared, kBlockN,
// kBounds, kRowThreads and kSeesNothing.
#pragma once

// Key tiles of a head are handed out from the last to the first: each query tile gets its sums in
// that order, without waiting for a tile that is handed out later.
struct KeyTile {
  int z, number, b, h_kv;
};

__device__ __forceinline__ KeyTile locate_key_tile(const Params& p, int tile) {
  const int z = p.by_tiles.quotient(tile), b = p.by_heads.quotient(z);
  return {z, (z + 1) * p.tiles_per_head - 1 - tile, b, z - b * p.heads_kv};
}

// What a key tile and a query head have to do with each other, two bounds by each of two warps:
// rows [bound 0, bound 1) may see a key of the tile, and the 64-row query tiles they lie in are
// visited. So key tile j visits query tile i exactly if i's last kept row ends beyond key kBlockN *
// j and its first starts before key kBlockN * (j + 1): the visitors of i are a range of key tiles,
// which bwd_fused_sm90.cu and bwd_prepare_sm90.cu know from these two numbers. Bound 2 is the first
// row to start beyond the tile's first key, bound 3 the first to end beyond its last: if 3 comes
// before 2 it sees all keys of the tile. Where a tile beyond the keys that are kept, which
// nobody sees, is given `count` 0, nothing is searched.
__device__ __forceinline__ void find_bounds(const Params& p, Shared shared, unsigned buffer,
                                            int member, long long list, int count, int key0,
                                            int warp, int lane) {
  static_assert(kBounds == 4 && kRowThreads == 64, "two bounds by each of two warps");
  const int last = min(key0 + kBlockN, p.seqlen_k) - 1;
  Search first{(warp == 1 ? p.key_start : p.key_end) + list, warp == 1 ? key0 + kBlockN - 1 : key0,
               0, count};
  Search second{(warp == 0 ? p.key_start : p.key_end) + list, warp == 0 ? key0 : last, 0, count};
  search_both(first, second, lane);
  if (lane == 0) {
    const bool none = warp == 0 && first.high == count;
    shared_store(shared.bound(buffer, member, warp), none ? kSeesNothing : first.high);
    shared_store(shared.bound(buffer, member, warp + 2), second.high);
  }
}

// Is this key in the range of any row of [low, high]? `high` is the first row to end beyond the
// tile (count if there is none).
__device__ __forceinline__ bool seen_by_rows(const int* starts, const int* ends, int low, int high,
                                             int count, int key) {
#pragma unroll 1
  while (low < high) {
    const int middle = (low + high) >> 1;
    if (ends[middle] > key) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low < count && starts[low] <= key;
}
