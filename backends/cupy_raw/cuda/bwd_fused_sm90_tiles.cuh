// Key tiles of the fused backward: how they are numbered, and what is known of each before it is
// handed out. Include after params_sm90.cuh and query_data_sm90.cuh.
#pragma once

constexpr int kTileKeys = 128;

// Key tiles of a head are numbered, and handed out, from the last to the first: each query tile gets
// its sums in that order, without waiting for a tile that is handed out later.
struct KeyTile {
  int z, number, b, h_kv;
};

__device__ __forceinline__ KeyTile locate_key_tile(const Params& p, int tile) {
  const int z = p.by_tiles.quotient(tile), b = p.by_heads.quotient(z);
  return {z, (z + 1) * p.tiles_per_head - 1 - tile, b, z - b * p.heads_kv};
}

// A tile's record in Params::key_tiles: a bit for each of its keys that some query sees, then four
// bounds for each query head.
// - Rows [first, beyond) may see one of its keys, and the 64-row query tiles they lie in are visited
//   (first is kSeesNothing if there are none). So key tile j visits query tile i exactly if i's last
//   kept row ends beyond key kTileKeys * j and its first starts before key kTileKeys * (j + 1): the
//   visitors of i are a range of key tiles, known to bwd_fused_sm90.cu and bwd_prepare_sm90.cu from
//   these two numbers. First, which is looked at by query tiles only, is odd where rows first and
//   beyond - 1 are as far apart as those of a run (runs_sm90.cuh).
// - Of these rows, those from the third bound on may see a key of its upper half, those before the
//   fourth one of its lower half.
constexpr int kSeenWords = kTileKeys / 32;
constexpr int kTileBounds = 4;

__device__ __forceinline__ int* key_tile_record(const Params& p, int tile) {
  return p.key_tiles + static_cast<long long>(tile) * (kSeenWords + kTileBounds * p.group_size);
}
