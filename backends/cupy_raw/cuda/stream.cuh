// Key tiles streaming through shared memory: what fwd.cu and bwd_dq.cu have in common.
//
// Group t of the background copies brings k and v of tile t, and the key indices of tile t + kStages - 1, which group
// t + kStages - 1 gathers by. So an index is always in shared memory one wait before it is needed.
#pragma once
#include "mask.cuh"
#include "params.cuh"

// Where the block's keys come from; in shared memory, as nothing in the inner loop needs it.
struct KeySource {
  const Element *k, *v;
  const int* index;  // sorted key list of the head
  int first, last;   // sorted keys [first, last) are what some row of the block sees
};

template <int kRows, int kStages>
struct KeyStages {
  char k[kStages][tile_bytes(kRows, kHeadDim)];
  char v[kStages][tile_bytes(kRows, kHeadDimV)];
};

template <int kRows, int kThreads, int kStages>
SCFA_DEVICE void block_stream_tile(KeyStages<kRows, kStages>& tiles, int (&key_rows)[kStages][kRows], const KeySource& source,
                                   const Params& p, int t, bool indices_loaded) {
  const int key = source.first + t * kRows, last = source.last;
  const int stage = t % kStages;
  if (key < last) {
    const int* rows = indices_loaded ? key_rows[stage] : source.index + key;
    block_gather<kRows, kHeadDim, kThreads>(tiles.k[stage], source.k, p.k_strides.row, rows, last - key);
    block_gather<kRows, kHeadDimV, kThreads>(tiles.v[stage], source.v, p.v_strides.row, rows, last - key);
  }
  const int ahead = t + kStages - 1;
  const int ahead_key = source.first + ahead * kRows;
  if (ahead_key < last) {
    block_copy_values<kRows, kThreads>(key_rows[ahead % kStages], source.index + ahead_key, last - ahead_key);
  }
  copies_commit();
}

// What a thread has copied of tile t, as it is multiplied (block_round); before the barrier that completes the tile.
template <int kThreads, int kRows, int kStages>
SCFA_DEVICE void block_round_tile(KeyStages<kRows, kStages>& tiles, int t) {
  block_round<kRows, kHeadDim, kThreads>(tiles.k[t % kStages]);
  block_round<kRows, kHeadDimV, kThreads>(tiles.v[t % kStages]);
}
