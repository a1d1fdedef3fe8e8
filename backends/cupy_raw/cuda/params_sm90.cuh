// What every sm_90a kernel is told: the argument struct packed by launch_sm90.py, field for field.
#pragma once

// A (batch, heads, rows, columns) array: address and strides in bytes; columns are contiguous.
struct Array {
    char* data;
    long long batch, head, row;

    __device__ __forceinline__ char* of_head(int b, int h) const { return data + b * batch + h * head; }
};

struct Params {
    Array q, k, v, out, dout, dq, dk, dv, lse;
    const int *q_index, *q_count, *k_index, *k_count, *key_start, *key_end;
    float *row_lse, *row_delta;  // of each sorted query row, lse in base 2 (+inf where nothing is seen): dq kernel -> dk/dv kernel
    int* counter;                // tiles handed out so far beyond the first of each block; zeroed before the launch
    float scale, scale_log2;
    int heads, heads_kv, group_size, seqlen_q, seqlen_k;
    int tiles_per_head, tiles;   // tiles of one head (query head, or kv head in the dk/dv kernel), and of all
    int monotone;
};
