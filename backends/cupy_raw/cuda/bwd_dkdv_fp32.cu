// scfa_bwd_dkdv_fp32: bwd_dkdv.cu for float32 inputs, every product and sum in float32.
//
// Computes   dv[j] = sum_i p[i][j] dout[i],  dk[j] = scale * sum_i ds[i][j] q[i],  with p and ds as in scfa_bwd_dq_fp32,
//            over the queries i of all heads of the group whose range holds j.
// Grid       one block of 256 threads per kBlockN sorted keys of one (batch, kv head); see simt.cuh for who owns what. Sums run
//            over heads and queries in order, so results are the same bit for bit.
// Shared     k, v, q, dout tiles + p + ds + row data; see Shared.
// Inputs     q k v dout float32; row_lse and delta from scfa_bwd_dq_fp32; plan arrays.
// Outputs    dk like k, dv like v: every row, 0 for keys nobody sees.
// Exactness  as fwd.cu.
// Source     as bwd_dkdv.cu; plain, correct first.
#include "mask.cuh"
#include "schedule.cuh"
#include "simt.cuh"

constexpr int kBlockM = SCFA_BLOCK_M;
constexpr int kBlockN = SCFA_BLOCK_N;
constexpr bool kMonotone = SCFA_MONOTONE != 0;
constexpr int kR = kBlockN / kSide;
constexpr int kC = kBlockM / kSide;

struct Shared {
  float k[kBlockN * pitch(kHeadDim)];
  float v[kBlockN * pitch(kHeadDimV)];
  float q[kBlockM * pitch(kHeadDim)];
  float dout[kBlockM * pitch(kHeadDimV)];
  float p[kBlockN * (kBlockM + 1)];
  float ds[kBlockN * (kBlockM + 1)];
  float scratch[2 * kThreads];
  int start[kBlockM], end[kBlockM];
  float lse[kBlockM], delta[kBlockM];
  char tainted[kBlockN];
};
static_assert(sizeof(Shared) <= SCFA_SHARED_BYTES, "launch.py asks for less shared memory than Shared needs");

// Sorted rows of query head `head` that can see one of keys [begin, end); every warp finds the same.
SCFA_DEVICE QueryRange query_range(const Params& p, i64 list, int begin, int end) {
  if (begin >= end) return {0, 0};
  if (kMonotone) return warp_query_range_monotone(p.key_start + list, p.key_end + list, p.seqlen_q, begin, end);
  return warp_query_range_scan(p.key_start + list, p.key_end + list, p.seqlen_q, begin, end);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) scfa_bwd_dkdv_fp32(const __grid_constant__ Params p) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  const Tile tile = key_tile<kBlockN>(p);
  const i64 key_list = (i64(tile.batch) * p.heads_kv + tile.head) * p.seqlen_k + tile.first_row;
  const int* k_index = p.k_index + key_list;
  const int keys = max(0, min(kBlockN, p.k_count[tile.batch * p.heads_kv + tile.head] - tile.first_row));
  const int first_head = tile.head * p.group_size;
  const float* k = head_base(p.k, p.k_strides, tile.batch, tile.head);
  const float* v = head_base(p.v, p.v_strides, tile.batch, tile.head);
  block_load_rows<kBlockN, kHeadDim>(shared.k, k, p.k_strides.row, k_index, keys);
  block_load_rows<kBlockN, kHeadDimV>(shared.v, v, p.v_strides.row, k_index, keys);

  RowTile<kHeadDim, kR> acc_dk;
  RowTile<kHeadDimV, kR> acc_dv;
  acc_dk.init();
  acc_dv.init();
  for (int head = first_head; head < first_head + p.group_size; ++head) {
    const float* q = head_base(p.q, p.q_strides, tile.batch, head);
    const float* dout = head_base(p.dout, p.dout_strides, tile.batch, head);
    const i64 list = (i64(tile.batch) * p.heads + head) * p.seqlen_q;
    const QueryRange range = query_range(p, list, tile.first_row, tile.first_row + keys);
#pragma unroll 1
    for (int row = range.first; row < range.last; row += kBlockM) {
      const int valid = range.last - row;
      block_load_rows<kBlockM, kHeadDim>(shared.q, q, p.q_strides.row, p.q_index + list + row, valid);
      block_load_rows<kBlockM, kHeadDimV>(shared.dout, dout, p.dout_strides.row, p.q_index + list + row, valid);
      for (int i = threadIdx.x; i < kBlockM; i += kThreads) {
        shared.start[i] = i < valid ? p.key_start[list + row + i] : 0;
        shared.end[i] = i < valid ? p.key_end[list + row + i] : 0;
        shared.lse[i] = i < valid ? p.row_lse[list + row + i] : infinity();
        shared.delta[i] = i < valid ? p.delta[list + row + i] : 0.0f;
      }
      __syncthreads();  // k, v, q, dout and row data are complete

      // p^T = exp(k @ q^T * scale - lse), ds^T = p^T * (v @ dout^T - delta), 0 where query i does not see key j
      float acc_s[kR][kC], acc_dp[kR][kC];
      thread_dots<kHeadDim>(acc_s, shared.k, shared.q);
      thread_dots<kHeadDimV>(acc_dp, shared.v, shared.dout);
#pragma unroll
      for (int r = 0; r < kR; ++r)
#pragma unroll
        for (int c = 0; c < kC; ++c) {
          const int key = thread_y() * kR + r, column = thread_x() + kSide * c;
          const bool visible = is_visible(tile.first_row + key, shared.start[column], shared.end[column]);
          const float probability = weight_of(score_of(acc_s[r][c], p) - shared.lse[column]);
          shared.p[key * (kBlockM + 1) + column] = visible ? probability : 0.0f;
          shared.ds[key * (kBlockM + 1) + column] = visible ? probability * (acc_dp[r][c] - shared.delta[column]) : 0.0f;
        }
      __syncthreads();  // p^T and ds^T are complete

      // acc_dv += p^T @ dout, acc_dk += ds^T @ q
      acc_dv.template add_product<kBlockM>(shared.p, shared.dout);
      acc_dk.template add_product<kBlockM>(shared.ds, shared.q);
      __syncthreads();  // q, dout, p and ds have been read
    }
  }

  // dk = scale * acc_dk, dv = acc_dv; keys nobody sees have gathered 0
  float* dk = head_base(p.dk, p.dk_strides, tile.batch, tile.head);
  float* dv = head_base(p.dv, p.dv_strides, tile.batch, tile.head);
  bool any_tainted = false;
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const int key = thread_y() * kR + r;
    const bool exists = tile.first_row + key < p.seqlen_k;
    const bool bad = row_any(acc_dk.tainted(r) || acc_dv.tainted(r)) && exists;
    any_tainted |= bad;
    if (thread_x() == 0) shared.tainted[key] = bad;
    if (!exists) continue;
    acc_dk.store_row(r, dk + k_index[key] * p.dk_strides.row, p.softmax_scale);
    acc_dv.store_row(r, dv + k_index[key] * p.dv_strides.row, 1.0f);
  }

  // rows with NaN or Inf once more, from visible pairs alone
  if (__syncthreads_or(any_tainted)) {
    for (int key = 0; key < kBlockN; ++key) {
      if (!shared.tainted[key]) continue;
      ExactKeyRow<kThreads> exact;
      exact.init();
      const i64 row = k_index[key];
      for (int head = first_head; head < first_head + p.group_size; ++head) {
        const i64 list = (i64(tile.batch) * p.heads + head) * p.seqlen_q;
        const QueryRange range = query_range(p, list, tile.first_row, tile.first_row + keys);
        exact.add_head(p, tile.batch, head, tile.first_row + key, k + row * p.k_strides.row, v + row * p.v_strides.row,
                       range.first, range.last, shared.scratch);
      }
      exact.acc_dk.scale(p.softmax_scale);
      exact.acc_dk.store(dk + row * p.dk_strides.row);
      exact.acc_dv.store(dv + row * p.dv_strides.row);
    }
  }
}
