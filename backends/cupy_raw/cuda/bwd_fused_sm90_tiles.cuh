// Key tiles of the fused backward: how they are numbered, and what is known of each before it is
// handed out. Include after params_sm90.cuh, choice_sm90.cuh and query_data_sm90.cuh.
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

// Tiles of 2^in_turn heads may be handed out in turn: key tiles of one head that follow at once wait
// for each other to add dq. Not where ranges are long, as those of many heads do not stay in L2:
// bwd_prepare_sm90.cu counts the key tiles that query tiles visit, against it three times those of
// query tiles that visit more than so many, in the word after Params::counter. Nor where some heads go
// the other way, as those are passed over one after the other. Sums are the same bits in any such
// order.
constexpr int kTurnTiles = 19;
constexpr int kMostTilesCounted = 32;  // of a query tile: the count must not overflow

__device__ __forceinline__ int visits_for_turns(int visits) {
  return visits <= kTurnTiles ? max(visits, 0) : -3 * min(visits, kMostTilesCounted);
}

__device__ __forceinline__ int heads_in_turn(const Params& p) {
  return share_of(p, kFused) == kAll && p.counter[1] > 0 ? p.in_turn : 0;
}

// Which tile is handed out as the n-th: the first of each of 2^in_turn heads, then the second of each,
// and so on; heads that are left over, one after the other.
__device__ __forceinline__ int tile_in_turn(const Params& p, int n, int in_turn) {
  const int group = p.by_tiles.quotient(n) >> in_turn;
  if ((group + 1) << in_turn > p.by_tiles.quotient(p.tiles)) return n;
  const int first_head = group << in_turn, i = n - first_head * p.tiles_per_head;
  const int head = first_head + (i & ((1 << in_turn) - 1));
  return head * p.tiles_per_head + (i >> in_turn);
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
