// scfa_fwd: attention of sorted query rows over their ranges of the sorted key list, by tensor cores.
//
// Computes   out[i] = sum_j p[i][j] v[j] / sum_j p[i][j],  p[i][j] = exp(scale * q[i] . k[j]),  lse[i] = ln sum_j p[i][j]
//            over j = k_index[key_start[r] : key_end[r]] for i = q_index[r]. Rows that see nothing: out 0, lse -inf.
// Grid       one block per kBlockM sorted query rows of one (batch, head), heads one after another; warp w owns kWarpRows of
//            them. A block walks the union of its rows' ranges kBlockN keys at a time; a warp skips tiles its rows do
//            not see, and takes those seen in part kSubN keys at a time, masked.
// Shared     q tile (reused for out) + kStages * (k tile + v tile) + row ranges + kStages * kBlockN key indices; see Shared.
// Inputs     q k v (batch, heads, seqlen, head_dim) float16 | bfloat16 | float32, whose products are TF32, at any strides; plan
//            arrays int32.
// Outputs    out like q, every row; lse float32, natural log, in the user's order.
// Exactness  rows outside the block's union are never read; NaN or Inf of invisible rows inside it cannot leak: exact.cuh.
// Source     Dao et al., FlashAttention-2 (tiling, warps own rows); Pagliardini et al. 2023 (key ranges). This version:
//            gather fused, 32 rows a warp, lazy rescaling (softmax.cuh).
#include "exact.cuh"
#include "schedule.cuh"
#include "softmax.cuh"
#include "stream.cuh"

constexpr int kBlockM = SCFA_BLOCK_M;
constexpr int kBlockN = SCFA_BLOCK_N;
constexpr int kSubN = SCFA_SUB_N;
constexpr int kStages = SCFA_STAGES;
constexpr int kWarps = SCFA_NUM_WARPS;
constexpr bool kQInRegisters = SCFA_OWN_IN_REGISTERS != 0;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpRows = kBlockM / kWarps;
constexpr int kMi = kWarpRows / 16;
constexpr int kSteps = padded(kHeadDim) / kStepColumns;
constexpr int kOutBlocks = padded(kHeadDimV) / 8;
static_assert(kWarpRows % 16 == 0, "a warp owns whole blocks of 16 rows");
static_assert(kSubN % 16 == 0 && kBlockN % kSubN == 0, "keys are multiplied 16 at a time");
static_assert(kStages >= 2, "the next tile loads while this one computes");

struct Shared {
  char q[tile_bytes(kBlockM, larger(kHeadDim, kHeadDimV))];
  KeyStages<kBlockN, kStages> keys;
  RowRanges<kBlockM> rows;
  KeySource source;
  KeySpan spans[kWarps];  // read anew for each tile: four registers less
  int key_rows[kStages][kBlockN];
  char tainted[kBlockM];
};
static_assert(sizeof(Shared) <= SCFA_SHARED_BYTES, "launch.py asks for less shared memory than Shared needs");

// Keys sub .. sub + kKeys of tile t.
template <bool kMasked, int kKeys>
SCFA_DEVICE void visit_keys(const Shared& shared, int t, int sub, const u32 (&q)[kMi][kQInRegisters ? kSteps : 1][4],
                            SoftmaxState<kMi>& softmax, float (&acc_o)[kMi][kOutBlocks][4], float scale) {
  const int thread = thread_here();
  const int row = thread / kWarpSize * kWarpRows;
  const int stage = t % kStages;
  float acc_s[kMi][kKeys / 8][4];

  for (bool settled = softmax.settled;; settled = false) {
    // acc_s = q @ k^T
#pragma unroll
    for (int i = 0; i < kMi * kKeys / 2; ++i) acc_s[i / (kKeys / 2)][i / 4 % (kKeys / 8)][i % 4] = 0.0f;
    const auto k = right_operand<kBlockN>(shared.keys.k[stage], sub);
    if constexpr (kQInRegisters) {
      warp_product_nt(acc_s, q, k);
    } else {
      warp_product_nt<kSteps>(acc_s, left_operand<kBlockM>(shared.q, row), k);
    }

    // acc_s = -inf where row i does not see key j
    if constexpr (kMasked) {
      const int first_key = shared.source.first + t * kBlockN + sub;
      warp_mask_scores(acc_s, shared.rows, row + thread % kWarpSize / 4, first_key);
    }

    // p = 2^(acc_s * scale - reference)
    if (settled && softmax.try_update(acc_s, scale)) break;
    if (!settled) {
      softmax.update(acc_s, acc_o, scale);
      break;
    }
  }

  // acc_o += p @ v. Were p rounded to TF32, so would be delta, which backward makes of out and where rows of few keys have
  // nothing else to be wrong by.
  warp_product_nn_unrounded(acc_o, acc_s, rows_operand<kBlockN>(shared.keys.v[stage], sub));
}

// Stores out and lse; everything it needs to know of its place is found again.
SCFA_DEVICE void block_finish(const Params& p, Shared& shared, SoftmaxState<kMi>& softmax, float (&acc_o)[kMi][kOutBlocks][4]) {
  const Tile tile = query_tile<kBlockM>(p);
  const int lane = thread_here() % kWarpSize;
  const int warp_row = thread_here() / kWarpSize * kWarpRows;
  const Element* q = head_base(p.q, p.q_strides, tile.batch, tile.head);

  // out = acc_o / row_sum through this warp's rows of the q tile; lse
  float inverse[kMi][2], lse[kMi][2], taint[kMi][2] = {};
  softmax.finalize(inverse, lse);
  warp_row_taint(taint, acc_o);
  __syncwarp();  // this warp has read its q for the last time
  warp_store_rows(shared.q + warp_row * kRowBytes, kBlockM, acc_o, inverse);
  float* lse_base = head_base(p.lse, p.lse_strides, tile.batch, tile.head);
  bool any_tainted = false;
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + mi * 16 + half * 8 + lane / 4;
      const int q_row = shared.rows.index[row];
      const bool bad = ((__ballot_sync(kAllLanes, taint[mi][half] != 0.0f) >> (lane & 28)) & 15) != 0 && q_row >= 0;
      any_tainted |= bad;
      if (lane % 4 == 0) {
        shared.tainted[row] = bad;
        if (q_row >= 0) lse_base[q_row * p.lse_strides.row] = lse[mi][half];
      }
    }
  __syncwarp();  // out of this warp is in shared memory
  Element* out = head_base(p.out, p.out_strides, tile.batch, tile.head);
  warp_scatter<kWarpRows, kBlockM, kHeadDimV>(shared.q, warp_row, out, p.out_strides.row, shared.rows.index);

  // rows with NaN or Inf once more, from visible pairs alone
  if (__syncthreads_or(any_tainted)) {
    for (int row = 0; row < kBlockM; ++row) {
      if (!shared.tainted[row]) continue;
      const int q_row = shared.rows.index[row];
      block_exact_out<kThreads>(q + q_row * p.q_strides.row, shared.source.k, shared.source.v,
                                shared.source.index, shared.rows.start[row], shared.rows.end[row], p,
                                reinterpret_cast<float*>(shared.keys.k[0]), out + q_row * p.out_strides.row,
                                lse_base + q_row * p.lse_strides.row);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, SCFA_MIN_BLOCKS) scfa_fwd(const __grid_constant__ Params p) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  const Tile tile = query_tile<kBlockM>(p);
  const int head_kv = tile.head / p.group_size;
  const int warp_row = threadIdx.x / kWarpSize * kWarpRows;
  const i64 list = (i64(tile.batch) * p.heads + tile.head) * p.seqlen_q + tile.first_row;
  const int rows = min(kBlockM, p.seqlen_q - tile.first_row);
  const Element* q = head_base(p.q, p.q_strides, tile.batch, tile.head);
  const Element* k = head_base(p.k, p.k_strides, tile.batch, head_kv);
  const Element* v = head_base(p.v, p.v_strides, tile.batch, head_kv);
  const int* k_index = p.k_index + (i64(tile.batch) * p.heads_kv + head_kv) * p.seqlen_k;

  // load q and the ranges of its rows; keys [first, last) are what some row sees
  block_gather<kBlockM, kHeadDim, kThreads>(shared.q, q, p.q_strides.row, p.q_index + list, rows);
  copies_commit();
  for (int row = threadIdx.x; row < kBlockM; row += kThreads) {
    shared.rows.start[row] = row < rows ? p.key_start[list + row] : 0;
    shared.rows.end[row] = row < rows ? p.key_end[list + row] : 0;
    shared.rows.index[row] = row < rows ? p.q_index[list + row] : -1;
  }
  __syncthreads();  // row ranges are complete
  const KeySpan block_keys = warp_span(shared.rows, 0, kBlockM);
  shared.spans[threadIdx.x / kWarpSize] = warp_span(shared.rows, warp_row, kWarpRows);
  if (threadIdx.x == 0) shared.source = {k, v, k_index, block_keys.first, block_keys.last};
  __syncthreads();  // the source of keys is known

  // the first kStages - 1 key tiles
#pragma unroll
  for (int t = 0; t < kStages - 1; ++t) block_stream_tile<kBlockN, kThreads>(shared.keys, shared.key_rows, shared.source, p, t, false);

  copies_wait<kStages - 1>();
  block_round<kBlockM, kHeadDim, kThreads>(shared.q);
  __syncthreads();  // q is complete
  if (p.negative_scale) warp_negate_rows<kWarpRows, kBlockM, kHeadDim>(shared.q, warp_row);
  u32 q_operand[kMi][kQInRegisters ? kSteps : 1][4];
  if constexpr (kQInRegisters) warp_load_left(q_operand, left_operand<kBlockM>(shared.q, warp_row));

  SoftmaxState<kMi> softmax;
  softmax.init();
  float acc_o[kMi][kOutBlocks][4] = {};
#pragma unroll 1
  for (int t = 0; shared.source.first + t * kBlockN < shared.source.last; ++t) {
    copies_wait<kStages - 2>();
    block_round_tile<kThreads>(shared.keys, t);
    __syncthreads();  // tile t is complete, and everyone has left the stage that is filled next
    block_stream_tile<kBlockN, kThreads>(shared.keys, shared.key_rows, shared.source, p, t + kStages - 1, true);

    const int key = shared.source.first + t * kBlockN;
    const KeySpan warp_keys = shared.spans[thread_here() / kWarpSize];
    if (!warp_keys.sees(key, key + kBlockN)) continue;
    if (warp_keys.sees_all(key, key + kBlockN)) {
      visit_keys<false, kBlockN>(shared, t, 0, q_operand, softmax, acc_o, p.exponent_scale);
      continue;
    }
#pragma unroll 1
    for (int sub = 0; sub < kBlockN; sub += kSubN) {
      if (!shared.spans[thread_here() / kWarpSize].sees(key + sub, key + sub + kSubN)) continue;
      visit_keys<true, kSubN>(shared, t, sub, q_operand, softmax, acc_o, p.exponent_scale);
    }
  }

  block_finish(p, shared, softmax, acc_o);
}
