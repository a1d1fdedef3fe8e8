// scfa_bwd_dq_fp32: bwd_dq.cu for float32 inputs, every product and sum in float32.
//
// Computes   delta[i] = sum_d dout[i][d] out[i][d],  p[i][j] = exp(scale * q[i] . k[j] - lse[i]),
//            ds[i][j] = p[i][j] (dout[i] . v[j] - delta[i]),  dq[i] = scale * sum_j ds[i][j] k[j]
// Grid       one block of 256 threads per kBlockM sorted query rows of one (batch, head); see simt.cuh for who owns what.
// Shared     q, dout, k, v tiles + ds + row data; see Shared.
// Inputs     q k v dout out float32; lse float32; plan arrays.
// Outputs    dq like q, every row; delta and lse in sorted order for scfa_bwd_dkdv_fp32.
// Exactness  as fwd.cu.
// Source     as bwd_dq.cu; plain, correct first.
#include "mask.cuh"
#include "schedule.cuh"
#include "simt.cuh"

constexpr int kBlockM = SCFA_BLOCK_M;
constexpr int kBlockN = SCFA_BLOCK_N;
constexpr int kR = kBlockM / kSide;
constexpr int kC = kBlockN / kSide;

struct Shared {
  float q[kBlockM * pitch(kHeadDim)];
  float dout[kBlockM * pitch(kHeadDimV)];
  float k[kBlockN * pitch(kHeadDim)];
  float v[kBlockN * pitch(kHeadDimV)];
  float ds[kBlockM * (kBlockN + 1)];
  float scratch[kThreads];
  RowRanges<kBlockM> rows;
  float lse[kBlockM];
  float delta[kBlockM];
  char tainted[kBlockM];
};
static_assert(sizeof(Shared) <= SCFA_SHARED_BYTES, "launch.py asks for less shared memory than Shared needs");

extern "C" __global__ void __launch_bounds__(kThreads, 1) scfa_bwd_dq_fp32(const __grid_constant__ Params p) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  const Tile tile = query_tile<kBlockM>(p);
  const int head_kv = tile.head / p.group_size;
  const i64 list = (i64(tile.batch) * p.heads + tile.head) * p.seqlen_q + tile.first_row;
  const int rows = min(kBlockM, p.seqlen_q - tile.first_row);
  const float* q = head_base(p.q, p.q_strides, tile.batch, tile.head);
  const float* out = head_base(p.out, p.out_strides, tile.batch, tile.head);
  const float* dout = head_base(p.dout, p.dout_strides, tile.batch, tile.head);
  const float* k = head_base(p.k, p.k_strides, tile.batch, head_kv);
  const float* v = head_base(p.v, p.v_strides, tile.batch, head_kv);
  const float* lse = head_base(p.lse, p.lse_strides, tile.batch, tile.head);
  const int* k_index = p.k_index + (i64(tile.batch) * p.heads_kv + head_kv) * p.seqlen_k;

  // load q, dout and the ranges of their rows
  block_load_rows<kBlockM, kHeadDim>(shared.q, q, p.q_strides.row, p.q_index + list, rows);
  block_load_rows<kBlockM, kHeadDimV>(shared.dout, dout, p.dout_strides.row, p.q_index + list, rows);
  for (int row = threadIdx.x; row < kBlockM; row += kThreads) {
    shared.rows.start[row] = row < rows ? p.key_start[list + row] : 0;
    shared.rows.end[row] = row < rows ? p.key_end[list + row] : 0;
    shared.rows.index[row] = row < rows ? p.q_index[list + row] : -1;
  }
  __syncthreads();  // q, dout and row ranges are complete
  const KeySpan keys = warp_span(shared.rows, 0, kBlockM);

  // delta = rowsum(dout * out)
#pragma unroll 1
  for (int r = 0; r < kR; ++r) {
    const int row = thread_y() * kR + r;
    const i64 q_row = shared.rows.index[row];
    float part = 0.0f;
    if (q_row >= 0) {
      for (int d = thread_x(); d < kHeadDimV; d += kSide) {
        part = fmaf(shared.dout[row * pitch(kHeadDimV) + d], out[q_row * p.out_strides.row + d], part);
      }
    }
    const float delta = row_sum(part);
    if (thread_x() == 0) {
      const bool sees = shared.rows.start[row] < shared.rows.end[row];
      const float natural = sees ? lse[q_row * p.lse_strides.row] : -infinity();
      shared.delta[row] = sees ? delta : 0.0f;
      shared.lse[row] = natural == -infinity() ? infinity() : natural;
      if (q_row >= 0) p.delta[list + row] = shared.delta[row], p.row_lse[list + row] = shared.lse[row];
    }
  }

  RowTile<kHeadDim, kR> acc_dq;
  acc_dq.init();
#pragma unroll 1
  for (int key = keys.first; key < keys.last; key += kBlockN) {
    block_load_rows<kBlockN, kHeadDim>(shared.k, k, p.k_strides.row, k_index + key, keys.last - key);
    block_load_rows<kBlockN, kHeadDimV>(shared.v, v, p.v_strides.row, k_index + key, keys.last - key);
    __syncthreads();  // k, v and, the first time, row statistics are complete

    // ds = p * (dout @ v^T - delta), 0 where row i does not see key j
    float acc_s[kR][kC], acc_dp[kR][kC];
    thread_dots<kHeadDim>(acc_s, shared.q, shared.k);
    thread_dots<kHeadDimV>(acc_dp, shared.dout, shared.v);
#pragma unroll
    for (int r = 0; r < kR; ++r)
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const int row = thread_y() * kR + r, column = thread_x() + kSide * c;
        const float probability = weight_of(score_of(acc_s[r][c], p) - shared.lse[row]);
        const bool visible = is_visible(key + column, shared.rows.start[row], shared.rows.end[row]);
        shared.ds[row * (kBlockN + 1) + column] = visible ? probability * (acc_dp[r][c] - shared.delta[row]) : 0.0f;
      }
    __syncthreads();  // ds is complete

    // acc_dq += ds @ k
    acc_dq.template add_product<kBlockN>(shared.ds, shared.k);
    __syncthreads();  // k, v and ds have been read
  }

  // dq = scale * acc_dq
  float* dq = head_base(p.dq, p.dq_strides, tile.batch, tile.head);
  bool any_tainted = false;
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const int row = thread_y() * kR + r;
    const int q_row = shared.rows.index[row];
    const bool bad = row_any(acc_dq.tainted(r)) && q_row >= 0;
    any_tainted |= bad;
    if (thread_x() == 0) shared.tainted[row] = bad;
    if (q_row >= 0) acc_dq.store_row(r, dq + q_row * p.dq_strides.row, p.softmax_scale);
  }

  // rows with NaN or Inf once more, from visible pairs alone
  if (__syncthreads_or(any_tainted)) {
    for (int row = 0; row < kBlockM; ++row) {
      if (!shared.tainted[row]) continue;
      const i64 q_row = shared.rows.index[row];
      block_exact_dq<kThreads>(q + q_row * p.q_strides.row, dout + q_row * p.dout_strides.row, shared.lse[row],
                               shared.delta[row], k, v, k_index, shared.rows.start[row], shared.rows.end[row], p,
                               shared.scratch, dq + q_row * p.dq_strides.row);
    }
  }
}
