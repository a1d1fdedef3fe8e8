// scfa_bwd_dq: gradient of the queries, and the two numbers per query row that scfa_bwd_dkdv needs, by tensor cores.
//
// Computes   delta[i] = sum_d dout[i][d] out[i][d],  p[i][j] = exp(scale * q[i] . k[j] - lse[i]),
//            ds[i][j] = p[i][j] (dout[i] . v[j] - delta[i]),  dq[i] = scale * sum_j ds[i][j] k[j]
//            over j = k_index[key_start[r] : key_end[r]] for i = q_index[r].
// Grid       as scfa_fwd: kBlockM sorted query rows of one (batch, head) a block, kWarpRows a warp. A warp takes the kBlockN
//            keys of a tile kSubN at a time, which bounds its registers and sharpens skipping.
// Shared     q and dout tiles (q is reused for dq) + kStages * (k tile + v tile) + row data + key indices; see Shared.
// Inputs     q k v dout out (batch, heads, seqlen, head_dim | head_dim_v) float16 | bfloat16 | float32, whose products are TF32; lse
//            float32; plan arrays.
// Outputs    dq like q, every row; delta and lse * log2(e) (+inf for rows that see nothing) float32 in sorted order.
// Exactness  as scfa_fwd: exact.cuh recomputes every row of dq that is not finite.
// Source     Dao, FlashAttention-2, split in two kernels so that nothing is accumulated across blocks; see
//            docs/decisions/0004-two-kernel-backward.md.
#include "exact.cuh"
#include "schedule.cuh"
#include "stream.cuh"

constexpr int kBlockM = SCFA_BLOCK_M;
constexpr int kBlockN = SCFA_BLOCK_N;
constexpr int kSubN = SCFA_SUB_N;
constexpr int kStages = SCFA_STAGES;
constexpr int kWarps = SCFA_NUM_WARPS;
constexpr bool kOwnInRegisters = SCFA_OWN_IN_REGISTERS != 0;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpRows = kBlockM / kWarps;
constexpr int kMi = kWarpRows / 16;
constexpr int kSteps = padded(kHeadDim) / kStepColumns;
constexpr int kStepsV = padded(kHeadDimV) / kStepColumns;
constexpr int kOutBlocks = padded(kHeadDim) / 8;
constexpr int kHeldQ = kOwnInRegisters ? kSteps : 1;
constexpr int kHeldDout = kOwnInRegisters ? kStepsV : 1;
static_assert(kWarpRows % 16 == 0, "a warp owns whole blocks of 16 rows");
static_assert(kSubN % 16 == 0 && kBlockN % kSubN == 0, "keys are multiplied 16 at a time");
static_assert(kStages >= 2, "the next tile loads while this one computes");

struct Shared {
  char q[tile_bytes(kBlockM, kHeadDim)];
  char dout[tile_bytes(kBlockM, kHeadDimV)];
  KeyStages<kBlockN, kStages> keys;
  RowRanges<kBlockM> rows;
  KeySource source;
  KeySpan spans[kWarps];  // read anew for each tile: four registers less
  float lse_log2[kBlockM];
  float delta[kBlockM];
  int key_rows[kStages][kBlockN];
  char tainted[kBlockM];
};
static_assert(sizeof(Shared) <= SCFA_SHARED_BYTES, "launch.py asks for less shared memory than Shared needs");

struct Own {  // what a warp keeps of its rows
  u32 q[kMi][kHeldQ][4];
  u32 dout[kMi][kHeldDout][4];
};

// Eight lanes a row: delta and lse * log2(e), kept here in shared memory and stored for the kernel of the keys.
SCFA_DEVICE void block_row_statistics(Shared& shared, const Params& p, const Tile& tile, i64 list) {
  constexpr int kLanes = 8;
  const Element* out = head_base(p.out, p.out_strides, tile.batch, tile.head);
  const Element* dout = head_base(p.dout, p.dout_strides, tile.batch, tile.head);
  const float* lse = head_base(p.lse, p.lse_strides, tile.batch, tile.head);
  const int lane = threadIdx.x % kLanes;
#pragma unroll 2
  for (int row = threadIdx.x / kLanes; row < kBlockM; row += kThreads / kLanes) {
    const int q_row = shared.rows.index[row];
    float delta = 0.0f;
    if (q_row >= 0) {
#pragma unroll
      for (int d = lane * 8; d < kHeadDimV; d += kLanes * 8) {
        float x[8], y[8];
        load8(out + q_row * p.out_strides.row + d, x);
        load8(dout + q_row * p.dout_strides.row + d, y);
#pragma unroll
        for (int i = 0; i < 8; ++i) delta = fmaf(x[i], as_multiplied(y[i]), delta);
      }
    }
#pragma unroll
    for (int other = 1; other < kLanes; other *= 2) delta += __shfl_xor_sync(kAllLanes, delta, other);
    if (lane == 0) {
      const bool sees = shared.rows.start[row] < shared.rows.end[row];
      const float natural = sees ? lse[q_row * p.lse_strides.row] : -infinity();
      shared.delta[row] = sees ? delta : 0.0f;
      shared.lse_log2[row] = natural == -infinity() ? infinity() : natural * kLog2E;
      if (q_row >= 0) {
        p.delta[list + row] = shared.delta[row];
        p.row_lse[list + row] = shared.lse_log2[row];
      }
    }
  }
}

template <bool kMasked>
SCFA_DEVICE void visit_keys(const Shared& shared, int stage, int sub, int first_key, const Own& own,
                            float (&acc_dq)[kMi][kOutBlocks][4], float scale) {
  const int lane = threadIdx.x % kWarpSize;
  const int row = thread_here() / kWarpSize * kWarpRows;

  // acc_s = q @ k^T, acc_dp = dout @ v^T
  float acc_s[kMi][kSubN / 8][4] = {}, acc_dp[kMi][kSubN / 8][4] = {};
  const auto k = right_operand<kBlockN>(shared.keys.k[stage], sub * kSubN);
  const auto v = right_operand<kBlockN>(shared.keys.v[stage], sub * kSubN);
  if constexpr (kOwnInRegisters) {
    warp_product_nt(acc_s, own.q, k);
    warp_product_nt(acc_dp, own.dout, v);
  } else {
    warp_product_nt<kSteps>(acc_s, left_operand<kBlockM>(shared.q, row), k);
    warp_product_nt<kStepsV>(acc_dp, left_operand<kBlockM>(shared.dout, row), v);
  }

  // ds = p * (dp - delta), 0 where row i does not see key j
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int lane_key = first_key + 2 * (lane % 4);
      const float lse_log2 = shared.lse_log2[row + mi * 16 + half * 8 + lane / 4];
      const float delta = shared.delta[row + mi * 16 + half * 8 + lane / 4];
      const int start = kMasked ? shared.rows.start[row + mi * 16 + half * 8 + lane / 4] - lane_key : 0;
      const int end = kMasked ? shared.rows.end[row + mi * 16 + half * 8 + lane / 4] - lane_key : 0;
#pragma unroll
      for (int nb = 0; nb < kSubN / 8; ++nb)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& s = acc_s[mi][nb][2 * half + i];
          const float probability = exp2_fast(fmaf(s, scale, -lse_log2));
          s = probability * (acc_dp[mi][nb][2 * half + i] - delta);
          if (kMasked && !is_visible(nb * 8 + i, start, end)) s = 0.0f;
        }
    }

  // acc_dq += ds @ k
  u32 ds[kMi][kSubN / kStepColumns][4];
  warp_pack(ds, acc_s);
  warp_product_nn(acc_dq, ds, rows_operand<kBlockN>(shared.keys.k[stage], sub * kSubN));
}

// Stores dq; everything it needs to know of its place is found again.
SCFA_DEVICE void block_finish(const Params& p, Shared& shared, const float (&acc_dq)[kMi][kOutBlocks][4]) {
  const Tile tile = query_tile<kBlockM>(p);
  const int lane = thread_here() % kWarpSize;
  const int warp_row = thread_here() / kWarpSize * kWarpRows;
  const Element* q = head_base(p.q, p.q_strides, tile.batch, tile.head);
  const Element* dout = head_base(p.dout, p.dout_strides, tile.batch, tile.head);

  // dq = scale * acc_dq through this warp's rows of the q tile
  float factor[kMi][2], taint[kMi][2] = {};
  warp_row_taint(taint, acc_dq);
  bool any_tainted = false;
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + mi * 16 + half * 8 + lane / 4;
      const bool bad =
          ((__ballot_sync(kAllLanes, taint[mi][half] != 0.0f) >> (lane & 28)) & 15) != 0 && shared.rows.index[row] >= 0;
      factor[mi][half] = p.softmax_scale;
      any_tainted |= bad;
      if (lane % 4 == 0) shared.tainted[row] = bad;
    }
  __syncwarp();  // this warp has read its q for the last time
  warp_store_rows(shared.q + warp_row * kRowBytes, kBlockM, acc_dq, factor);
  __syncwarp();  // dq of this warp is in shared memory
  Element* dq = head_base(p.dq, p.dq_strides, tile.batch, tile.head);
  warp_scatter<kWarpRows, kBlockM, kHeadDim>(shared.q, warp_row, dq, p.dq_strides.row, shared.rows.index);

  // rows with NaN or Inf once more, from visible pairs alone
  if (__syncthreads_or(any_tainted)) {
    for (int row = 0; row < kBlockM; ++row) {
      if (!shared.tainted[row]) continue;
      const int q_row = shared.rows.index[row];
      block_exact_dq<kThreads>(q + q_row * p.q_strides.row, dout + q_row * p.dout_strides.row, shared.lse_log2[row],
                               shared.delta[row], shared.source.k, shared.source.v,
                                shared.source.index, shared.rows.start[row], shared.rows.end[row], p,
                               reinterpret_cast<float*>(shared.keys.k[0]), dq + q_row * p.dq_strides.row);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, SCFA_MIN_BLOCKS) scfa_bwd_dq(const __grid_constant__ Params p) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  const Tile tile = query_tile<kBlockM>(p);
  const int head_kv = tile.head / p.group_size;
  const int warp_row = threadIdx.x / kWarpSize * kWarpRows;
  const i64 list = (i64(tile.batch) * p.heads + tile.head) * p.seqlen_q + tile.first_row;
  const int rows = min(kBlockM, p.seqlen_q - tile.first_row);
  const Element* q = head_base(p.q, p.q_strides, tile.batch, tile.head);
  const Element* dout = head_base(p.dout, p.dout_strides, tile.batch, tile.head);
  const Element* k = head_base(p.k, p.k_strides, tile.batch, head_kv);
  const Element* v = head_base(p.v, p.v_strides, tile.batch, head_kv);
  const int* k_index = p.k_index + (i64(tile.batch) * p.heads_kv + head_kv) * p.seqlen_k;

  // load q, dout and the ranges of their rows; keys [first, last) are what some row sees
  block_gather<kBlockM, kHeadDim, kThreads>(shared.q, q, p.q_strides.row, p.q_index + list, rows);
  block_gather<kBlockM, kHeadDimV, kThreads>(shared.dout, dout, p.dout_strides.row, p.q_index + list, rows);
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

  block_row_statistics(shared, p, tile, list);
  copies_wait<kStages - 1>();
  block_round<kBlockM, kHeadDim, kThreads>(shared.q);
  block_round<kBlockM, kHeadDimV, kThreads>(shared.dout);
  __syncthreads();  // q, dout and row statistics are complete
  if (p.negative_scale) warp_negate_rows<kWarpRows, kBlockM, kHeadDim>(shared.q, warp_row);
  Own own;
  if constexpr (kOwnInRegisters) {
    warp_load_left(own.q, left_operand<kBlockM>(shared.q, warp_row));
    warp_load_left(own.dout, left_operand<kBlockM>(shared.dout, warp_row));
  }
  float acc_dq[kMi][kOutBlocks][4] = {};
#pragma unroll 1
  for (int t = 0; shared.source.first + t * kBlockN < shared.source.last; ++t) {
    copies_wait<kStages - 2>();
    block_round_tile<kThreads>(shared.keys, t);
    __syncthreads();  // tile t is complete, and everyone has left the stage that is filled next
    const int stage = t % kStages;
    block_stream_tile<kBlockN, kThreads>(shared.keys, shared.key_rows, shared.source, p, t + kStages - 1, true);

#pragma unroll 1
    for (int sub = 0; sub < kBlockN / kSubN; ++sub) {
      const KeySpan warp_keys = shared.spans[thread_here() / kWarpSize];
      const int key = shared.source.first + t * kBlockN + sub * kSubN;
      if (!warp_keys.sees(key, key + kSubN)) continue;
      if (warp_keys.sees_all(key, key + kSubN)) {
        visit_keys<false>(shared, stage, sub, key, own, acc_dq, p.exponent_scale);
      } else {
        visit_keys<true>(shared, stage, sub, key, own, acc_dq, p.exponent_scale);
      }
    }
  }

  block_finish(p, shared, acc_dq);
}
