// scfa_bwd_dkdv: gradients of keys and values, by tensor cores.
//
// Computes   dv[j] = sum_i p[i][j] dout[i],  dk[j] = scale * sum_i ds[i][j] q[i],  with p and ds as in scfa_bwd_dq,
//            over the queries i of all heads of the group whose range holds j. Scores are formed transposed (keys are rows),
//            so p^T and ds^T are left operands straight from the accumulators.
// Grid       x: one block per kBlockN sorted keys of one (batch, kv head); y: 1, or with kSplit dv and dk in turn. Warp w owns
//            kWarpRows keys; query tiles of kBlockM rows stream by, taken kSubM at a time, head after head: the order of every
//            sum is fixed, so results are the same bit for bit.
// Shared     k and v tiles (reused for dk and dv) + kStages * (q tile + dout tile + row data) + query indices; see Shared.
// Inputs     q k v dout float16 | bfloat16 | float32 (products TF32); float32 row_lse, delta of scfa_bwd_dq, sorted; plan arrays.
// Outputs    dk like k, dv like v: every row, 0 for keys nobody sees.
// Exactness  as scfa_fwd: exact.cuh recomputes every row of dk and dv that is not finite.
// Source     Dao, FlashAttention-2, the key-owner half of its backward; transposed scores as in FlashAttention-3.
#include "exact.cuh"
#include "mask.cuh"
#include "stream_queries.cuh"

constexpr int kBlockM = SCFA_BLOCK_M;
constexpr int kBlockN = SCFA_BLOCK_N;
constexpr int kSubM = SCFA_SUB_M;
constexpr int kStages = SCFA_STAGES;
constexpr int kWarps = SCFA_NUM_WARPS;
constexpr bool kOwnInRegisters = SCFA_OWN_IN_REGISTERS != 0;
constexpr bool kSplit = SCFA_SPLIT != 0;
constexpr bool kMonotone = SCFA_MONOTONE != 0;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpRows = kBlockN / kWarps;
constexpr int kMi = kWarpRows / 16;
constexpr int kSteps = padded(kHeadDim) / kStepColumns;
constexpr int kStepsV = padded(kHeadDimV) / kStepColumns;
constexpr int kOutBlocks = padded(kHeadDim) / 8;
constexpr int kOutBlocksV = padded(kHeadDimV) / 8;
static_assert(kWarpRows % 16 == 0, "a warp owns whole blocks of 16 keys");
static_assert(kSubM % 16 == 0 && kSubM <= kWarpSize && kBlockM % kSubM == 0, "one lane looks at one query of a step");
static_assert(kStages >= 2, "the next tile loads while this one computes");

struct alignas(16) Shared {
  char k[tile_bytes(kBlockN, kHeadDim)];
  char v[tile_bytes(kBlockN, kHeadDimV)];
  char q[kStages][tile_bytes(kBlockM, kHeadDim)];
  char dout[kStages][tile_bytes(kBlockM, kHeadDimV)];
  QueryRows<kBlockM> rows[kStages];
  int query_rows[kStages][kBlockM];
  Cursor<kBlockM> at[2 * kStages];  // where the query tiles t, t + 1, ... lie, tile t in slot t % (2 * kStages)
  int key_index[kBlockN];
  char tainted[kBlockN];
  int first_key;  // sorted key of the first row

  // group_size of them follow
  SCFA_DEVICE Member* members() { return reinterpret_cast<Member*>(this + 1); }
  SCFA_DEVICE const Member* members() const { return reinterpret_cast<const Member*>(this + 1); }
};
static_assert(sizeof(Shared) + sizeof(Member) <= SCFA_SHARED_BYTES, "launch.py asks for less shared memory than Shared needs");

SCFA_DEVICE void block_load_indices(Shared& shared, const Params& p, const Cursor<kBlockM>& at, int stage) {
  if (at.member >= p.group_size) return;
  const Member& member = shared.members()[at.member];
  block_copy_values<kBlockM, kThreads>(shared.query_rows[stage], p.q_index + member.list + at.row, member.range.last - at.row);
}

// Rows of q and dout by the plan's list or, in the loop, by what block_load_indices brought before.
SCFA_DEVICE void block_load_tile(Shared& shared, const Params& p, const Cursor<kBlockM>& at, int stage, bool indices_loaded) {
  if (at.member >= p.group_size) return;
  const Member& member = shared.members()[at.member];
  const int valid = member.range.last - at.row;
  const i64 list = member.list + at.row;
  const int* rows = indices_loaded ? shared.query_rows[stage] : p.q_index + list;
  block_gather<kBlockM, kHeadDim, kThreads>(shared.q[stage], member.q, p.q_strides.row, rows, valid);
  block_gather<kBlockM, kHeadDimV, kThreads>(shared.dout[stage], member.dout, p.dout_strides.row, rows, valid);
  block_copy_rows<kThreads>(shared.rows[stage], p, list, valid);
}


template <bool kMasked, bool kDoDk, bool kDoDv>
SCFA_DEVICE void visit_queries(const Shared& shared, int stage, int sub, const u32 (&own_k)[kMi][kOwnInRegisters ? kSteps : 1][4],
                               float (&acc_dk)[kMi][kDoDk ? kOutBlocks : 1][4], float (&acc_dv)[kMi][kDoDv ? kOutBlocksV : 1][4], float scale) {
  const int lane = threadIdx.x % kWarpSize;
  const int own_row = thread_here() / kWarpSize * kWarpRows;
  const QueryRows<kBlockM>& rows = shared.rows[stage];
  const int column = sub * kSubM + 2 * (lane % 4);

  // acc_s = k @ q^T, acc_dp = v @ dout^T
  float acc_s[kMi][kSubM / 8][4] = {};
  float acc_dp[kMi][kSubM / 8][4] = {};
  const auto q = right_operand<kBlockM>(shared.q[stage], sub * kSubM);
  if constexpr (kOwnInRegisters) {
    warp_product_nt(acc_s, own_k, q);
  } else {
    warp_product_nt<kSteps>(acc_s, left_operand<kBlockN>(shared.k, own_row), q);
  }
  if constexpr (kDoDk) {
    warp_product_nt<kStepsV>(acc_dp, left_operand<kBlockN>(shared.v, own_row),
                             right_operand<kBlockM>(shared.dout[stage], sub * kSubM));
  }

  // p^T = 2^(acc_s * scale - lse_log2), ds^T = p^T * (acc_dp - delta); 0 where query i does not see key j
#pragma unroll
  for (int nb = 0; nb < kSubM / 8; ++nb) {
    const float2 lse_log2 = *reinterpret_cast<const float2*>(&rows.lse_log2[column + nb * 8]);
    const float2 delta = *reinterpret_cast<const float2*>(&rows.delta[column + nb * 8]);
    int2 start, end;
    if constexpr (kMasked) {
      start = *reinterpret_cast<const int2*>(&rows.start[column + nb * 8]);
      end = *reinterpret_cast<const int2*>(&rows.end[column + nb * 8]);
    }
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float probability = exp2_fast(fmaf(acc_s[mi][nb][i], scale, -(i % 2 ? lse_log2.y : lse_log2.x)));
        float ds = probability * (acc_dp[mi][nb][i] - (i % 2 ? delta.y : delta.x));
        if constexpr (kMasked) {
          const int key = shared.first_key + own_row + mi * 16 + (i / 2) * 8 + lane / 4;
          if (!is_visible(key, i % 2 ? start.y : start.x, i % 2 ? end.y : end.x)) probability = ds = 0.0f;
        }
        acc_s[mi][nb][i] = probability, acc_dp[mi][nb][i] = ds;
      }
  }

  // acc_dv += p^T @ dout, acc_dk += ds^T @ q
  if constexpr (kDoDv) {
    u32 probability[kMi][kSubM / kStepColumns][4];
    warp_pack(probability, acc_s);
    warp_product_nn(acc_dv, probability, rows_operand<kBlockM>(shared.dout[stage], sub * kSubM));
  }
  if constexpr (kDoDk) {
    u32 ds[kMi][kSubM / kStepColumns][4];
    warp_pack(ds, acc_dp);
    warp_product_nn(acc_dk, ds, rows_operand<kBlockM>(shared.q[stage], sub * kSubM));
  }
}

// Stores dk and dv; everything it needs to know of its place is found again.
template <bool kDoDk, bool kDoDv>
SCFA_DEVICE void block_finish(const Params& p, Shared& shared, const float (&acc_dk)[kMi][kDoDk ? kOutBlocks : 1][4],
                              const float (&acc_dv)[kMi][kDoDv ? kOutBlocksV : 1][4]) {
  const Tile tile = key_tile<kBlockN>(p);
  const int lane = thread_here() % kWarpSize;
  const int warp_row = thread_here() / kWarpSize * kWarpRows;
  const int first_head = tile.head * p.group_size;
  const Element* k = head_base(p.k, p.k_strides, tile.batch, tile.head);
  const Element* v = head_base(p.v, p.v_strides, tile.batch, tile.head);

  // dk = scale * acc_dk and dv = acc_dv through this warp's rows of the k and v tiles; 0 for keys that were dropped
  float factor_dk[kMi][2], factor_dv[kMi][2], taint[kMi][2] = {};
  if constexpr (kDoDk) warp_row_taint(taint, acc_dk);
  if constexpr (kDoDv) warp_row_taint(taint, acc_dv);
  bool any_tainted = false;
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + mi * 16 + half * 8 + lane / 4;
      const bool bad = ((__ballot_sync(kAllLanes, taint[mi][half] != 0.0f) >> (lane & 28)) & 15) != 0 && shared.key_index[row] >= 0;
      factor_dk[mi][half] = p.softmax_scale;
      factor_dv[mi][half] = 1.0f;
      any_tainted |= bad;
      if (lane % 4 == 0) shared.tainted[row] = bad;
    }
  __syncwarp();  // this warp has read its k and v for the last time
  Element* dk = head_base(p.dk, p.dk_strides, tile.batch, tile.head);
  Element* dv = head_base(p.dv, p.dv_strides, tile.batch, tile.head);
  if constexpr (kDoDk) warp_store_rows(shared.k + warp_row * kRowBytes, kBlockN, acc_dk, factor_dk);
  if constexpr (kDoDv) warp_store_rows(shared.v + warp_row * kRowBytes, kBlockN, acc_dv, factor_dv);
  __syncwarp();  // dk and dv of this warp are in shared memory
  if constexpr (kDoDk) warp_scatter<kWarpRows, kBlockN, kHeadDim>(shared.k, warp_row, dk, p.dk_strides.row, shared.key_index);
  if constexpr (kDoDv) warp_scatter<kWarpRows, kBlockN, kHeadDimV>(shared.v, warp_row, dv, p.dv_strides.row, shared.key_index);

  // rows with NaN or Inf once more, from visible pairs alone
  if (__syncthreads_or(any_tainted)) {
    for (int row = 0; row < kBlockN; ++row) {
      if (!shared.tainted[row]) continue;
      ExactKeyRow<kThreads> exact;
      exact.init();
      const i64 k_row = shared.key_index[row];
      for (int member = 0; member < p.group_size; ++member) {
        exact.add_head(p, tile.batch, first_head + member, tile.first_row + row, k + k_row * p.k_strides.row, v + k_row * p.v_strides.row,
                       shared.members()[member].range.first, shared.members()[member].range.last, reinterpret_cast<float*>(shared.q));
      }
      exact.acc_dk.scale(p.softmax_scale);
      if constexpr (kDoDk) exact.acc_dk.store(dk + k_row * p.dk_strides.row);
      if constexpr (kDoDv) exact.acc_dv.store(dv + k_row * p.dv_strides.row);
    }
  }
}

template <bool kDoDk, bool kDoDv>
SCFA_DEVICE void block_gradients(const Params& p, Shared& shared) {
  const Tile tile = key_tile<kBlockN>(p);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int warp_row = warp * kWarpRows;
  const i64 list = (i64(tile.batch) * p.heads_kv + tile.head) * p.seqlen_k;
  const int count = p.k_count[tile.batch * p.heads_kv + tile.head];
  const int keys = max(0, min(kBlockN, count - tile.first_row));  // kept keys of this tile; queries see no others
  const int last_key = tile.first_row + keys;
  const int first_head = tile.head * p.group_size;
  const Element* k = head_base(p.k, p.k_strides, tile.batch, tile.head);
  const Element* v = head_base(p.v, p.v_strides, tile.batch, tile.head);

  // load k and v; meanwhile find the query rows of each head that can see one of the keys
  block_gather<kBlockN, kHeadDim, kThreads>(shared.k, k, p.k_strides.row, p.k_index + list + tile.first_row, keys);
  block_gather<kBlockN, kHeadDimV, kThreads>(shared.v, v, p.v_strides.row, p.k_index + list + tile.first_row, keys);
  copies_commit();
  for (int row = threadIdx.x; row < kBlockN; row += kThreads) {
    shared.key_index[row] = tile.first_row + row < p.seqlen_k ? p.k_index[list + tile.first_row + row] : -1;
  }
  for (int member = warp; member < p.group_size; member += kWarps) {
    const int head = first_head + member;
    const i64 queries = (i64(tile.batch) * p.heads + head) * p.seqlen_q;
    QueryRange range = {0, 0};
    if (keys > 0) {
      range = kMonotone ? warp_query_range_monotone(p.key_start + queries, p.key_end + queries, p.seqlen_q, tile.first_row, last_key)
                        : warp_query_range_scan(p.key_start + queries, p.key_end + queries, p.seqlen_q, tile.first_row, last_key);
    }
    if (lane == 0) {
      shared.first_key = tile.first_row;
      shared.members()[member] = {head_base(p.q, p.q_strides, tile.batch, head), head_base(p.dout, p.dout_strides, tile.batch, head),
                                queries, range};
    }
  }
  __syncthreads();  // the members are complete

  // the first kStages - 1 query tiles, with the query indices that the loop will need
  constexpr int kSlots = 2 * kStages;
  if (threadIdx.x == 0) {
    Cursor<kBlockM> at;
    at.start(shared.members(), p.group_size);
    for (int t = 0; t < kSlots - 1; ++t) {
      shared.at[t] = at;
      at.advance(shared.members(), p.group_size);
    }
  }
  __syncthreads();  // the first tiles are known
#pragma unroll
  for (int t = 0; t < kStages - 1; ++t) {
    block_load_tile(shared, p, shared.at[t], t, false);
    block_load_indices(shared, p, shared.at[t + kStages - 1], (t + kStages - 1) % kStages);
    copies_commit();
  }

  copies_wait<kStages - 1>();
  block_round<kBlockN, kHeadDim, kThreads>(shared.k);
  block_round<kBlockN, kHeadDimV, kThreads>(shared.v);
  __syncthreads();  // k and v are complete
  if (p.negative_scale) warp_negate_rows<kWarpRows, kBlockN, kHeadDim>(shared.k, warp_row);
  u32 own_k[kMi][kOwnInRegisters ? kSteps : 1][4];
  if constexpr (kOwnInRegisters) warp_load_left(own_k, left_operand<kBlockN>(shared.k, warp_row));

  float acc_dk[kMi][kDoDk ? kOutBlocks : 1][4] = {};
  float acc_dv[kMi][kDoDv ? kOutBlocksV : 1][4] = {};
#pragma unroll 1
  for (int t = 0; shared.at[t % kSlots].member < p.group_size; ++t) {
    copies_wait<kStages - 2>();
    block_round<kBlockM, kHeadDim, kThreads>(shared.q[t % kStages]);
    block_round<kBlockM, kHeadDimV, kThreads>(shared.dout[t % kStages]);
    __syncthreads();  // tile t is complete, and everyone has left the stage and the slot that are filled next

    const int stage = t % kStages;
    const int next = t + kStages - 1, ahead = next + kStages - 1;
    block_load_tile(shared, p, shared.at[next % kSlots], next % kStages, true);
    block_load_indices(shared, p, shared.at[ahead % kSlots], ahead % kStages);
    copies_commit();
    if (threadIdx.x == 0) {
      Cursor<kBlockM> at = shared.at[ahead % kSlots];
      at.advance(shared.members(), p.group_size);
      shared.at[(ahead + 1) % kSlots] = at;
    }

#pragma unroll 1
    for (int sub = 0; sub < kBlockM / kSubM; ++sub) {
      const int row = sub * kSubM + lane % kSubM;
      const int start = shared.rows[stage].start[row], end = shared.rows[stage].end[row];
      // rows beyond the range were zeroed: they see nothing, and make the step a masked one, as dropped keys do
      const int first_key = shared.first_key + thread_here() / kWarpSize * kWarpRows;
      const int past_key = first_key + kWarpRows;
      if (!__any_sync(kAllLanes, start < end && start < past_key && end > first_key)) continue;
      if (__all_sync(kAllLanes, start <= first_key && end >= past_key)) {
        visit_queries<false, kDoDk, kDoDv>(shared, stage, sub, own_k, acc_dk, acc_dv, p.exponent_scale);
      } else {
        visit_queries<true, kDoDk, kDoDv>(shared, stage, sub, own_k, acc_dk, acc_dv, p.exponent_scale);
      }
    }
  }

  block_finish<kDoDk, kDoDv>(p, shared, acc_dk, acc_dv);
}

extern "C" __global__ void __launch_bounds__(kThreads, SCFA_MIN_BLOCKS) scfa_bwd_dkdv(const __grid_constant__ Params p) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  if constexpr (kSplit) {
    if (blockIdx.y == 0) {
      block_gradients<false, true>(p, shared);
    } else {
      block_gradients<true, false>(p, shared);
    }
  } else {
    block_gradients<true, true>(p, shared);
  }
}
