// Gradients of the keys and values over sorted key ranges on Hopper (wgmma), head_dim up to 256, in
// transposed form: rows are keys, columns queries.
//
// computes: with p[i][j], delta[i] as in bwd_dq_sm90.cu: dv[j] = sum_i p[i][j] dout[i],
//   dk[j] = scale * sum_i p[i][j] * (dout[i] . v[j] - delta[i]) q[i], over the queries i whose
//   range holds j, all heads of the group. Where ranges are nondecreasing along the sorted queries
//   (plan.monotone) the queries of a key tile are one range too. In any order they lie in one
//   (bwd_envelope_sm90.cu), of which blocks that do not see the tile are passed over.
// grid/block: one persistent block per SM; a tile is kBlockN sorted keys of one kv head. One or two
//   warpgroups gather rows (cp.async), each of the others owns 64 keys and walks kBlockM queries at
//   a time, in order: bitwise deterministic. Beyond 128 columns two own the same keys: one makes
//   dv, the other dk.
// shared memory: 4 * kHeadDim * (kBlockN + kStages * kBlockM) bytes, row data, weights that are
//   handed over, barriers (kSharedBytes).
// inputs/outputs: Params (params_sm90.cuh): q, k, v, dout, dk, dv in 16 bits; row_lse, row_delta as
//   bwd_dq_sm90.cu wrote them.
// version and source: column-owner form of FlashAttention-2 (Dao 2023, algorithm 2). New here: P^T
//   and dS^T never leave registers, because dq has a kernel of its own; so no warpgroup waits for
//   another. What each step gained: docs/perf/hopper.md.
#include "bwd_dkdv_sm90_gather.cuh"
#include "weigh_columns_sm90.cuh"

// Nothing is wanted of the block of queries in this slot: its buffer goes back as it came.
__device__ __forceinline__ void pass_over_block(Shared shared, Ring<kStages>& query, int lane) {
  barrier_wait(shared.query_full(query.slot), query.parity);
  barrier_release(shared.query_empty(query.slot), lane);
  query.advance();
}

#if SCFA_PARTS == 1
#include "bwd_dkdv_sm90_both.cuh"
#else
#include "bwd_dkdv_sm90_roles.cuh"
#endif

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    scfa_bwd_dkdv_sm90(const __grid_constant__ Params p) {
  if (share_of(p, kSplit) == kNone) return;
  extern __shared__ char dynamic[];
  const Shared shared{(shared_address(dynamic) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    barrier_init(shared.key_full(), kGatherThreads + publications(kAllGatherThreads));
    barrier_init(shared.key_empty(), 4 * kWarpgroups * kReleases);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared.query_full(i), kGatherThreads);
      barrier_init(shared.query_empty(i), 4 * kWarpgroups * kReleases);
    }
    if constexpr (kParts > 1) {
      barrier_init(shared.weights_full(), 4 * kReleases);
      barrier_init(shared.weights_empty(), 4 * kReleases);
    }
    barrier_init_done();
  }
  __syncthreads();  // barriers are initialised
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup < kGatherers) {
    give_registers<kProducerRegisters>();
    gather_tiles(p, shared, warpgroup);
  } else {
    take_registers<kConsumerRegisters>();
    multiply_tiles(p, shared, warpgroup - kGatherers);
  }
}
