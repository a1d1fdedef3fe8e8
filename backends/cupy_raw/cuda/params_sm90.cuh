// What every sm_90a kernel is told: the argument struct packed by launch_sm90.py, field for field.
#pragma once

// A (batch, heads, rows, columns) array: address and strides in bytes; columns are contiguous.
struct Array {
  char* data;
  long long batch, head;
  int row, unused;

  __device__ __forceinline__ char* of_head(int b, int h) const {
    return data + b * batch + h * head;
  }
};

// Division of 0 .. 2^31 - 1 by a number the host knows: one wide product and a shift.
struct Divisor {
  unsigned multiplier, shift;

  __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>(
        (static_cast<unsigned long long>(static_cast<unsigned>(n)) * multiplier) >> shift);
  }
};

// A tensor map, as the driver encodes it: what the bulk tensor engine knows of a (batch, heads, rows,
// columns) array.
struct alignas(64) TensorMap {
  char opaque[128];
};

struct Params {
  Array q, k, v, out, dout, dq, dk, dv, lse;
  const int *q_index, *q_count, *k_index, *k_count, *key_start, *key_end;
  float *row_lse, *row_delta;  // of each sorted query row, lse in base 2, +inf where nothing is
                               // seen and before the first; -delta: dq kernel -> dk/dv kernel,
                               // preparing -> fused kernel
  int* counter;  // tiles handed out so far beyond the first of each block; zeroed before the launch,
                 // with a word after it (bwd_fused_sm90_tiles.cuh)
  float scale, scale_log2;
  int heads, heads_kv, group_size, seqlen_q, seqlen_k;
  int tiles_per_head,
      tiles;  // tiles of one head (query head, or kv head in the dk/dv kernel), and of all
  int in_turn;  // forward: tiles of the last 2^in_turn heads are handed out in turn; fused backward
                // at head_dim 64: of so many they may be; else 0
  Divisor by_tiles, by_heads,
      by_group;  // by tiles_per_head, by heads (heads_kv in the dk/dv kernel), by group_size
  // Fused backward only: fp32 sums of dq in sorted order (p.slots heads, 64 rows a tile), and how
  // many key tiles have added to each query tile of every head.
  float* dq_sum;
  int* added;
  int slots, query_tiles;  // heads whose sums have room; 64-row tiles of one query head
  Divisor by_query_tiles, by_query_heads, by_slots;
  int* choice;  // backward: which heads go which way (choice_sm90.cuh); null: all go this one
  // dk/dv over ranges in any order only: what it searches for queries, a word a query row each
  // (bwd_envelope_sm90.cu).
  int *envelope_start, *envelope_end;
  int* key_tiles;  // fused backward only: what bwd_prepare_sm90.cu found out about each key tile
                   // (bwd_fused_sm90_tiles.cuh)
  TensorMap maps[2];  // forward: of k, v; fused backward: of q, dout; read where SCFA_RUNS is set
};
