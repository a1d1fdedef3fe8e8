// Gradients of queries, keys and values over sorted key ranges on Hopper (wgmma) in one pass, for
// head_dim 128: what bwd_fused_sm90.cu is for 64, where registers allow dq no warpgroup of its own.
//
// computes: with p[i][j], delta[i] as in bwd_dq_sm90.cu: dS[i][j] = p[i][j] * (dout[i] . v[j] -
//   delta[i]), dv[j] = sum_i p[i][j] dout[i], dk[j] = scale * sum_i dS[i][j] q[i], dq[i] = scale *
//   sum_j dS[i][j] k[j]. Ranges must be nondecreasing along the sorted queries (plan.monotone).
// grid/block: one persistent block per SM; a tile is kBlockN sorted keys of one kv head. Warpgroups
//   1 and 2 own 64 keys each: scores and slopes of 64 queries a step, dv and dk; and half the columns
//   of dq each, from the dS that both leave in shared memory, one step late, so that neither waits
//   for the other. Warps 0 and 1 gather rows (cp.async). Warps 2 and 3 add dq to fp32 sums in memory,
//   64 sorted rows at a time, by bulk copies; the key tiles add from the last to the first, each
//   waiting for the one before it (Params::added): bitwise deterministic. For the one that comes last
//   they fetch the sum instead, and the multiplying warpgroups write the rows.
// shared memory: a key and a value tile, kChanges of dS, a dq tile, kRing blocks of q or dout
//   (kSharedBytes).
// inputs/outputs: Params (params_sm90.cuh): q, k, v, dout, dq, dk, dv in 16 bits; row_lse,
//   row_delta, added as bwd_prepare_sm90.cu wrote them; dq_sum holds p.slots heads.
// version and source: column-owner form of FlashAttention-2 (Dao 2023, algorithm 2) with dq added
//   in order; that the warpgroups which own keys share dq is an idea of FlashAttention-3 (Shah et al.
//   2024). No block waits for a tile handed out later than its own, so all make progress.
#include "bwd_fused128_sm90_gather.cuh"
#include "bwd_fused128_sm90_weigh.cuh"
#include "bwd_fused128_sm90_carry.cuh"

// This warpgroup's half of a dq tile to shared memory; each thread's 32 numbers in eight places of 16
// bytes.
__device__ __forceinline__ void stage_sum(const float (&grad)[32], Shared shared, const Turn& turn,
                                          int group, int thread) {
  wait_for_room_here(shared, turn.carrier, turn.parity);
  const unsigned target = shared.sum() + group * (kSumBytes / kWarpgroups) + 16 * thread;
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    shared_store_four(target + 512 * i, grad[i], grad[i + 1], grad[i + 2], grad[i + 3]);
  }
}

// The sum of the others, which a carrier brings.
__device__ __forceinline__ void add_fetched(float (&grad)[32], Shared shared, const Turn& turn,
                                            int group, int thread, int lane) {
  barrier_wait(shared.sum_loaded(), turn.fetch);
  const unsigned source = shared.sum() + group * (kSumBytes / kWarpgroups) + 16 * thread;
#pragma unroll
  for (int i = 0; i < 32; i += 2) {
    const int2 other = shared_load_pair(source + 512 * (i / 4 * 4) + 4 * (i % 4));
    grad[i] += __int_as_float(other.x);
    grad[i + 1] += __int_as_float(other.y);
  }
  // The next bulk copy into this room comes after these reads: without the fence it overtook them, in
  // one call of fifty, whether or not the card was busy.
  shared_writes_fence();
  barrier_release(shared.sum_empty(turn.carrier), lane);
}

// Warpgroups 1 and 2: dk and dv of 64 keys of each tile, half the columns of dq.
__device__ __forceinline__ void multiply_tiles(const Params& p, Shared shared, int group) {
  const int thread = threadIdx.x % 128, warp = uniform(thread / 32), lane = thread % 32;
  const unsigned key_tile = shared.key() + group * 64 * kRowBytes;
  const unsigned value_tile = shared.value() + group * 64 * kRowBytes;
  const unsigned key_panel = shared.key() + group * kBlockN * kRowBytes;
  unsigned buffer = 0;  // of tile number and bounds: the parity of the tile
  int fetch = 0;  // parity of the next sum that is fetched
  Ring<kRing> ring;
  Ring<kDataSlots> data;
  Ring<kChanges> change;
  Ring<kCarriers> carrier;
  for (;; buffer ^= 1) {
    barrier_wait(shared.key_full(), buffer);
    const int tile = uniform(shared_load(shared.tile(buffer)));
    if (tile >= p.tiles) break;
    const KeyTile at = locate_key_tile(p, tile);
    const int key0 = at.number * kBlockN + 64 * group;  // first key of this warpgroup
    int own = key0 + 16 * warp + lane / 4;              // this thread's keys: own and own + 8
    asm volatile("" : "+r"(own));  // or own - key0 is kept in memory as well

    float scores[kBlockM / 2], slopes[kBlockM / 2], grad_q[kHeadDim / 4];
    float grad_k[kHeadDim / 2], grad_v[kHeadDim / 2];
    unsigned weights[kBlockM / 4], changes[kBlockM / 4];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) grad_k[i] = grad_v[i] = 0.0f;

    for (int member = 0; member < p.group_size; ++member) {
      const int low = uniform(shared_load(shared.bound(buffer, member, 0))) / kBlockM;
      const int high = (uniform(shared_load(shared.bound(buffer, member, 1))) + kBlockM - 1) / kBlockM;
      if (low >= high) continue;
      const int z = at.b * p.heads + at.h_kv * p.group_size + member;
      const int first = z * p.query_tiles + low;  // query tile, of all heads
      const int last = z * p.query_tiles + high;

      unsigned query_slot, dout_slot;  // of this step
      const auto wait_for_rows = [&]() {
        query_slot = ring.slot;
        barrier_wait(shared.rows_full(ring.slot), ring.parity);
        ring.advance();
        dout_slot = ring.slot;
        barrier_wait(shared.rows_full(ring.slot), ring.parity);
        ring.advance();
      };
      // S^T = K Q^T and dP^T = V dO^T, as two groups; Weighing::load comes before.
      const auto issue_scores = [&]() {
        wgmma_fence();
        new_product_of_rows<kBlockN, kBlockM, kHeadDim>(scores, key_tile, shared.rows(query_slot));
        wgmma_commit();
        new_product_of_rows<kBlockN, kBlockM, kHeadDim>(slopes, value_tile, shared.rows(dout_slot));
        wgmma_commit();
      };
      // dQ = dS K: half the columns, all keys of the tile.
      const auto issue_grad_q = [&](unsigned slot) {
        product_of_columns<kBlockN>(grad_q, shared.changes(slot), key_panel);
        wgmma_commit();
      };
      QueryRows query_rows;
      // dq of a step has come: what takes it further, up to the fence that must follow.
      const auto finish_grad_q = [&](const Turn& turn, unsigned slot) {
        pin(grad_q);
        barrier_release(shared.changes_empty(slot), lane);
        if (turn.kind == kAdd) {
          stage_sum(grad_q, shared, turn, group, thread);
        } else {
          if (turn.kind == kFetch) add_fetched(grad_q, shared, turn, group, thread, lane);
          query_rows.write(p, grad_q, z, group * kRowBytes, lane);
        }
      };

      Weighing weighing;
      weighing.key0 = key0;
      weighing.own = own;
      weighing.q = lane % 4;
      Turn turn{kAlone, 0, 0, 0, 0};
      unsigned change_before = 0;
      wait_for_rows();
      async_proxy_fence();
      weighing.load(shared, data.slot);
      issue_scores();
      for (int block = first;;) {
        // Pending: S and dP of this step.
        wgmma_wait<1>();
        pin(scores);
        weighing.weigh_scores(scores, shared, data.slot, p.scale_log2);
        weighing.load_delta(shared, data.slot);
        pack_fragment(weights, scores);
        pin(weights);
        pin(grad_v);
        wgmma_fence();
        accumulate_weighted_rows<kBlockM>(grad_v, weights, shared.rows(dout_slot));
        wgmma_commit();
        wgmma_wait<1>();
        pin(slopes);
        weighing.weigh_slopes(slopes, scores, shared, data.slot);
        const int first_start = shared_load(shared.starts(data.slot));
        const int last_end = shared_load(shared.ends(data.slot) + 4 * (kBlockM - 1));
        pack_fragment(changes, slopes);
        barrier_wait(shared.changes_empty(change.slot), change.parity ^ 1);
        store_fragments(shared.changes(change.slot) + group * 64 * kRowBytes, changes, warp, lane);
        shared_writes_fence();
        barrier_release(shared.changes_full(change.slot), lane);
        const Turn next =
            take_turn(uniform(first_start), uniform(last_end), at.number, carrier, fetch);
        data.advance();

        // dq of the step before, from what both warpgroups left; of anything, and forgotten, at the
        // first step.
        const unsigned full = change.parity ^ (change.slot == 0);
        change_before = change.slot ^ 1;
        if (block > first) barrier_wait(shared.changes_full(change_before), full);
        pin(changes);
        pin(grad_k);
        wgmma_fence();
        issue_grad_q(change_before);
        accumulate_weighted_rows<kBlockM>(grad_k, changes, shared.rows(query_slot));
        wgmma_commit();
        if (next.kind != kAlone) {
          if (group == 0 && warp == 0) announce(shared, next, block, lane);
          carrier.advance();
          if (next.kind == kFetch) fetch ^= 1;
        }
        if (block > first && turn.kind != kAdd) query_rows.look_up(p, z, block - 1, own - key0);
        wgmma_wait<2>();
        pin(grad_v);
        pin(weights);
        barrier_release(shared.rows_empty(dout_slot), lane);
        wgmma_wait<1>();
        if (block > first) finish_grad_q(turn, change_before);
        const bool more = block + 1 < last;
        const unsigned query_before = query_slot;
        if (more) wait_for_rows();
        shared_writes_fence();  // of dq, and of the next rows
        if (block > first && turn.kind == kAdd) {
          barrier_release(shared.sum_full(turn.carrier), lane);
        }
        turn = next;
        change_before = change.slot;
        change.advance();
        if (++block == last) break;
        weighing.load(shared, data.slot);
        wgmma_wait<0>();  // dK: with it and scores pending at once, ptxas runs out of registers
        pin(grad_k);
        pin(changes);
        barrier_release(shared.rows_empty(query_before), lane);
        issue_scores();
      }
      // Pending: dK of the last step.
      barrier_wait(shared.changes_full(change_before), change.parity ^ (change.slot == 0));
      wgmma_fence();
      issue_grad_q(change_before);
      if (turn.kind != kAdd) query_rows.look_up(p, z, last - 1, own - key0);
      wgmma_wait<1>();
      pin(grad_k);
      pin(changes);
      barrier_release(shared.rows_empty(query_slot), lane);
      wgmma_wait<0>();
      finish_grad_q(turn, change_before);
      if (turn.kind == kAdd) {
        shared_writes_fence();
        barrier_release(shared.sum_full(turn.carrier), lane);
      }
    }
    barrier_release(shared.key_empty(), lane);

    const int* k_index = p.k_index + static_cast<long long>(at.z) * p.seqlen_k;
    const int index[2] = {own < p.seqlen_k ? k_index[own] : -1,
                          own + 8 < p.seqlen_k ? k_index[own + 8] : -1};
    const float scale_k[2] = {p.scale, p.scale}, scale_v[2] = {1.0f, 1.0f};
    scatter_rows(grad_k, scale_k, p.dk.of_head(at.b, at.h_kv), p.dk.row, index, lane);
    scatter_rows(grad_v, scale_v, p.dv.of_head(at.b, at.h_kv), p.dv.row, index, lane);
  }
  if (group == 0 && warp == 0) {
    for (int i = 0; i < kCarriers; ++i) {
      announce(shared, Turn{kEnd, 0, carrier.slot, carrier.parity, 0}, 0, lane);
      carrier.advance();
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    scfa_bwd_fused128_sm90(const __grid_constant__ Params p) {
  if (uniform(share_of(p, kFused)) == kNone) return;
  extern __shared__ char dynamic[];
  const Shared shared{(shared_address(dynamic) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    constexpr int kAll = 4 * kWarpgroups * kReleases;  // each multiplying warp arrives
    barrier_init(shared.key_full(), kRowThreads + publications(kRowThreads));
    barrier_init(shared.key_empty(), kAll);
    for (int i = 0; i < kChanges; ++i) {
      barrier_init(shared.changes_full(i), kAll);
      barrier_init(shared.changes_empty(i), kAll);
    }
    for (int i = 0; i < kCarriers; ++i) {
      barrier_init(shared.job_full(i), kReleases);
      barrier_init(shared.job_empty(i), kReleases);
      barrier_init(shared.sum_full(i), kAll);
      barrier_init(shared.sum_empty(i), kAll);
    }
    barrier_init(shared.sum_loaded(), kReleases);
    for (int i = 0; i < kRing; ++i) {
      barrier_init(shared.rows_full(i), kRowThreads);
      barrier_init(shared.rows_empty(i), kAll);
    }
    barrier_init_done();
  }
  __syncthreads();  // barriers are initialised
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    give_registers<kRowRegisters>();
    const int warp = uniform(threadIdx.x / 32);
    if (warp < kRowThreads / 32) {
      gather_tiles(p, shared);
    } else {
      carry_sums(p, shared, warp - kRowThreads / 32, threadIdx.x % 32);
    }
  } else {
    take_registers<kConsumerRegisters>();
    multiply_tiles(p, shared, warpgroup - 1);
  }
}
