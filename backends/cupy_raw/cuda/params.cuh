// What the host tells a kernel: one struct for all of them, mirrored field by field in params.py.
#pragma once
#include "types.cuh"

struct Strides {  // in elements; the last axis is contiguous
  i64 batch, head, row;
};

struct Params {
  const Element* q;      // (batch, heads, seqlen_q, head_dim)
  const Element* k;      // (batch, heads_kv, seqlen_k, head_dim)
  const Element* v;      // (batch, heads_kv, seqlen_k, head_dim_v)
  Element* out;          // (batch, heads, seqlen_q, head_dim_v)
  float* lse;            // (batch, heads, seqlen_q), natural log
  const Element* dout;   // like out
  Element* dq;           // like q
  Element* dk;           // like k
  Element* dv;           // like v
  float* row_lse;        // (batch, heads, seqlen_q) contiguous, sorted rows, in the units of scores.cuh; +inf where nothing is visible
  float* delta;          // (batch, heads, seqlen_q) contiguous, sorted rows; rowsum(dout * out)
  const int* q_index;    // (batch, heads, seqlen_q) original row of each sorted query
  const int* k_index;    // (batch, heads_kv, seqlen_k)
  const int* k_count;    // (batch, heads_kv)
  const int* key_start;  // (batch, heads, seqlen_q) first visible entry of the sorted key list
  const int* key_end;    // (batch, heads, seqlen_q) one past the last
  Strides q_strides, k_strides, v_strides, out_strides, lse_strides, dout_strides, dq_strides, dk_strides, dv_strides;
  int batch, heads, heads_kv, group_size, seqlen_q, seqlen_k;
  float softmax_scale;       // as given: any sign, zero too
  float softmax_scale_log2;  // softmax_scale * log2(e)
  float exponent_scale;      // |softmax_scale_log2|, at least 1e-30 so that -inf * exponent_scale stays -inf
  int negative_scale;        // 1: kernels negate the operand they own and use exponent_scale
};

template <class T>
SCFA_DEVICE T* head_base(T* tensor, const Strides& strides, int batch, int head) {
  return tensor + batch * strides.batch + head * strides.head;
}
