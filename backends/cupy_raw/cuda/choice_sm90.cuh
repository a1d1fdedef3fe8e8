// Two ways to the same gradients, and which key head goes which: the words that bwd_choose_sm90.cu
// writes and the backward kernels read. Include after params_sm90.cuh.
#pragma once

enum Way { kSplit = 0, kFused = 1 };           // bwd_dq and bwd_dkdv, or bwd_fused
enum Share { kNone = 0, kAll = 1, kSome = 2 };  // of the heads that go one way

// Words: the shares of both ways, tile counters of the three kernels, the word after the last of
// these (bwd_fused_sm90_tiles.cuh), two unused, then the way of each key head. Where ranges may lie
// in any order, two more for each query head, 1 or 0 (bwd_envelope_sm90.cu): do ends, do starts of
// its kept queries never step back?
constexpr int kChoiceCounters = 2, kChoiceCounted = 4;
constexpr int kChoiceHeads = 8;

__device__ __forceinline__ int* order_of_heads(const Params& p, int key_heads) {
  return p.choice + kChoiceHeads + key_heads;
}

#ifdef SCFA_CHOICE
constexpr bool kHasChoice = SCFA_CHOICE;  // whether this head_dim has a choice of two ways
#else
constexpr bool kHasChoice = true;
#endif

// What share of the heads goes this way; all where there is no choice.
__device__ __forceinline__ int share_of(const Params& p, Way way) {
  if constexpr (kHasChoice) {
    if (p.choice != nullptr) return p.choice[way];
  }
  return kAll;
}

__device__ __forceinline__ bool goes(const Params& p, Way way, int key_head) {
  return p.choice[kChoiceHeads + key_head] == way;
}

// The key head of a tile: tiles are those of query heads (kQueryTiles) or of key heads.
template <bool kQueryTiles>
__device__ __forceinline__ int key_head_of(const Params& p, int tile) {
  const int z = p.by_tiles.quotient(tile);
  return kQueryTiles ? p.by_group.quotient(z) : z;
}

// One thread: this tile if its head goes this way, otherwise the next such that nobody has taken.
// The counter holds tiles handed out beyond the first `ahead`; heads of the other way are passed over
// whole. The share lies in shared memory: gathering warps have no register for it.
template <bool kQueryTiles>
__device__ __forceinline__ int own_tile(const Params& p, Way way, unsigned share, int tile,
                                        int ahead) {
  if constexpr (kHasChoice) {
    if (shared_load(share) == kSome) {
#pragma unroll 1
      while (tile < p.tiles && !goes(p, way, key_head_of<kQueryTiles>(p, tile))) {
        atomicMax(p.counter, (p.by_tiles.quotient(tile) + 1) * p.tiles_per_head - ahead);
        tile = atomicAdd(p.counter, 1) + ahead;
      }
    }
  }
  return tile;
}
