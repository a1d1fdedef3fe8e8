// scfa_fwd_fp32: the forward of fwd.cu for float32 inputs, every product and sum in float32.
//
// Computes   out[i] = sum_j p[i][j] v[j] / sum_j p[i][j],  p[i][j] = exp(scale * q[i] . k[j]),  lse[i] = ln sum_j p[i][j]
//            over j = k_index[key_start[r] : key_end[r]] for i = q_index[r]. Rows that see nothing: out 0, lse -inf.
// Grid       one block of 256 threads per kBlockM sorted query rows of one (batch, head); see simt.cuh for who owns what.
// Shared     q tile + one tile for k, then v + scores + row ranges; see Shared.
// Inputs     q k v (batch, heads, seqlen, head_dim) float32 at any strides; plan arrays int32.
// Outputs    out like q, every row; lse float32, natural log.
// Exactness  as fwd.cu.
// Source     Dao et al., FlashAttention (online softmax over tiles); plain, correct first.
#include "mask.cuh"
#include "schedule.cuh"
#include "simt.cuh"

constexpr int kBlockM = SCFA_BLOCK_M;
constexpr int kBlockN = SCFA_BLOCK_N;
constexpr int kR = kBlockM / kSide;
constexpr int kC = kBlockN / kSide;

struct Shared {
  float q[kBlockM * pitch(kHeadDim)];
  float kv[kBlockN * pitch(larger(kHeadDim, kHeadDimV))];
  float p[kBlockM * (kBlockN + 1)];
  RowRanges<kBlockM> rows;
  char tainted[kBlockM];
};
static_assert(sizeof(Shared) <= SCFA_SHARED_BYTES, "launch.py asks for less shared memory than Shared needs");

extern "C" __global__ void __launch_bounds__(kThreads, 1) scfa_fwd_fp32(const __grid_constant__ Params p) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  const Tile tile = query_tile<kBlockM>(p);
  const int head_kv = tile.head / p.group_size;
  const i64 list = (i64(tile.batch) * p.heads + tile.head) * p.seqlen_q + tile.first_row;
  const int rows = min(kBlockM, p.seqlen_q - tile.first_row);
  const float* q = head_base(p.q, p.q_strides, tile.batch, tile.head);
  const float* k = head_base(p.k, p.k_strides, tile.batch, head_kv);
  const float* v = head_base(p.v, p.v_strides, tile.batch, head_kv);
  const int* k_index = p.k_index + (i64(tile.batch) * p.heads_kv + head_kv) * p.seqlen_k;

  // load q and the ranges of its rows
  block_load_rows<kBlockM, kHeadDim>(shared.q, q, p.q_strides.row, p.q_index + list, rows);
  for (int row = threadIdx.x; row < kBlockM; row += kThreads) {
    shared.rows.start[row] = row < rows ? p.key_start[list + row] : 0;
    shared.rows.end[row] = row < rows ? p.key_end[list + row] : 0;
    shared.rows.index[row] = row < rows ? p.q_index[list + row] : -1;
  }
  __syncthreads();  // q and row ranges are complete
  const KeySpan keys = warp_span(shared.rows, 0, kBlockM);

  RowTile<kHeadDimV, kR> acc_o;
  acc_o.init();
  float reference[kR], sum[kR], sum_lost[kR];
#pragma unroll
  for (int r = 0; r < kR; ++r) reference[r] = -infinity(), sum[r] = sum_lost[r] = 0.0f;
#pragma unroll 1
  for (int key = keys.first; key < keys.last; key += kBlockN) {
    block_load_rows<kBlockN, kHeadDim>(shared.kv, k, p.k_strides.row, k_index + key, keys.last - key);
    __syncthreads();  // k is complete

    // acc_s = q @ k^T * scale, -inf where row i does not see key j
    float acc_s[kR][kC];
    thread_dots<kHeadDim>(acc_s, shared.q, shared.kv);
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int row = thread_y() * kR + r;
      float m = -infinity();
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const bool visible = is_visible(key + thread_x() + kSide * c, shared.rows.start[row], shared.rows.end[row]);
        acc_s[r][c] = visible ? score_of(acc_s[r][c], p) : -infinity();
        m = fmaxf(m, acc_s[r][c]);
      }

      // p = exp(acc_s - reference)
      const float moved = fmaxf(reference[r], row_max(m));
      const float factor = moved == reference[r] ? 1.0f : weight_of(reference[r] - moved);
      reference[r] = moved;
      acc_o.scale_row(r, factor);
      sum[r] *= factor;
      sum_lost[r] *= factor;
      float tile_sum = 0.0f;
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const float probability = weight_of(acc_s[r][c] - (moved == -infinity() ? 0.0f : moved));
        tile_sum += probability;
        shared.p[row * (kBlockN + 1) + thread_x() + kSide * c] = probability;
      }
      add_with_loss(sum[r], sum_lost[r], tile_sum);
    }
    __syncthreads();  // p is complete, and k has been read

    // acc_o += p @ v
    block_load_rows<kBlockN, kHeadDimV>(shared.kv, v, p.v_strides.row, k_index + key, keys.last - key);
    __syncthreads();  // v is complete
    acc_o.template add_product<kBlockN>(shared.p, shared.kv);
    __syncthreads();  // p and v have been read
  }

  // out = acc_o / sum; lse
  float* out = head_base(p.out, p.out_strides, tile.batch, tile.head);
  float* lse = head_base(p.lse, p.lse_strides, tile.batch, tile.head);
  bool any_tainted = false;
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const int row = thread_y() * kR + r;
    const int q_row = shared.rows.index[row];
    const float total = row_sum(sum[r]);
    const bool empty = reference[r] == -infinity() && total == 0.0f;
    const bool bad = row_any(acc_o.tainted(r)) && q_row >= 0;
    any_tainted |= bad;
    if (thread_x() == 0) shared.tainted[row] = bad;
    if (q_row < 0) continue;
    acc_o.store_row(r, out + q_row * p.out_strides.row, empty ? 0.0f : 1.0f / total);
    if (thread_x() == 0) {
      const float of_row = reference[r] == -infinity() ? total : lse_of(reference[r], total);
      lse[q_row * p.lse_strides.row] = empty ? -infinity() : of_row;
    }
  }

  // rows with NaN or Inf once more, from visible pairs alone
  if (__syncthreads_or(any_tainted)) {
    for (int row = 0; row < kBlockM; ++row) {
      if (!shared.tainted[row]) continue;
      const i64 q_row = shared.rows.index[row];
      block_exact_out<kThreads>(q + q_row * p.q_strides.row, k, v, k_index, shared.rows.start[row], shared.rows.end[row], p,
                                shared.kv, out + q_row * p.out_strides.row, lse + q_row * p.lse_strides.row);
    }
  }
}
