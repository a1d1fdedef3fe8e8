// Gradients of queries, keys and values over sorted key ranges on Hopper (wgmma) in one pass: five
// products where bwd_dq_sm90.cu and bwd_dkdv_sm90.cu together compute seven.
//
// computes: with p[i][j], delta[i] as in bwd_dq_sm90.cu: dS[i][j] = p[i][j] * (dout[i] . v[j] -
//   delta[i]), dv[j] = sum_i p[i][j] dout[i], dk[j] = scale * sum_i dS[i][j] q[i], dq[i] = scale *
//   sum_j dS[i][j] k[j]. Ranges must be nondecreasing along the sorted queries (plan.monotone).
// grid/block: one persistent block per SM; a tile is kBlockN sorted keys of one kv head. Warpgroups
//   1 and 2 own 64 keys each: scores and slopes of 64 queries a step, dv and dk. Warpgroup 3 makes
//   dq of the step from the dS they leave in shared memory. Warps 0 and 1 gather rows (cp.async).
//   In tiles of 64 sorted rows dq is summed in memory, in fp32, by bulk copies that add, which warps
//   2 and 3 start and wait for; the key tiles add from the last to the first, each waiting for the
//   one before it (Params::added): bitwise deterministic. The last adds in registers, to a sum that
//   was asked for during the step before, and writes the rows.
// shared memory: two key and value tiles, kChanges of dS, two dq tiles, kStages query blocks
//   (kSharedBytes).
// inputs/outputs: Params (params_sm90.cuh): q, k, v, dout, dq, dk, dv in 16 bits; row_lse,
//   row_delta, added as bwd_prepare_sm90.cu wrote them; dq_sum holds p.slots heads.
// version and source: column-owner form of FlashAttention-2 (Dao 2023, algorithm 2) with dq added
//   in order. No block waits for a tile handed out later than its own, so all make progress. What
//   each step gained: docs/perf/hopper.md.
#include "bwd_fused_sm90_gather.cuh"
#include "weigh_columns_sm90.cuh"
#include "bwd_fused_sm90_dq.cuh"

// Warpgroups 1 and 2: dk and dv of 64 keys of each tile.
__device__ __forceinline__ void multiply_tiles(const Params& p, Shared shared, int group) {
  const int thread = threadIdx.x % 128, warp = uniform(thread / 32), lane = thread % 32;
  const int q = lane % 4;
  Ring<kKeyBuffers> key;
  Ring<kStages> query;
  Ring<kChanges> change;
  unsigned buffer = 0;  // of tile number and bounds, by the parity of the tile
  // Tell the warpgroup that makes dq about a step, once its buffer is free; `keys` are its tile's.
  const auto announce = [&](int query_tile, int number, int lowest, int beyond, int keys) {
    if (group == 0 && warp == 0) {  // all lanes write the same
      const unsigned job = shared.job(change.slot);
      shared_store_four(job, query_tile, number, lowest, beyond);
      shared_store(job + 16, keys);
      shared_store(job + 20, 0);
    }
  };
  // ... and about the query tile of the step after it, in `slot`: the end of its key tiles.
  const auto announce_next = [&](unsigned slot) {
    if (group == 0 && warp == 0) {
      __syncwarp();  // all lanes have written what is in its place
      const int end = shared_load(shared.ends(slot) + 4 * (kBlockM - 1));
      shared_store(shared.job(change.slot) + 20, (end + kBlockN - 1) / kBlockN);
    }
  };
  // The same where this warpgroup would not look at those queries yet.
  const auto announce_coming = [&]() {
    if (group == 0 && warp == 0) barrier_wait(shared.query_full(query.slot), query.parity);
    announce_next(query.slot);
  };
  const auto announce_end = [&](int kind) {
    barrier_wait(shared.changes_empty(change.slot), change.parity ^ 1);
    announce(kind, 0, 0, 0, key.slot);
    barrier_release(shared.changes_full(change.slot), lane);
    change.advance();
  };
  for (;; buffer ^= 1) {
    barrier_wait(shared.key_full(key.slot), key.parity);
    const int tile = uniform(shared_load(shared.tile(buffer)));
    if (tile >= p.tiles) break;
    const KeyTile at = locate_key_tile(p, tile);
    const int key0 = at.number * kBlockN + 64 * group;  // first key of this warpgroup
    const int own = key0 + 16 * warp + lane / 4;        // this thread's keys: own and own + 8
    const unsigned key_tile = shared.key(key.slot) + group * 64 * kRowBytes;
    const unsigned value_tile = shared.value(key.slot) + group * 64 * kRowBytes;

    float scores[kBlockM / 2], slopes[kBlockM / 2], grad_k[kHeadDim / 2], grad_v[kHeadDim / 2];
    unsigned weights[kBlockM / 4], changes[kBlockM / 4];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) grad_k[i] = grad_v[i] = 0.0f;
    async_proxy_fence();
    // As much of both as registers take beside the rest: 16 columns.
    unsigned keys[4], values[4];
    load_fragments<kBlockN, 16>(keys, key_tile, warp, lane);
    load_fragments<kBlockN, 16>(values, value_tile, warp, lane);

    // Issue S^T = K Q^T and dP^T - delta = V dO^T - delta of a slot, as two groups;
    // load_columns(slot) comes before.
    const auto issue_scores = [&](unsigned slot) {
      product_of_held_rows<kBlockN, kBlockM, kHeadDim, false>(scores, keys, key_tile,
                                                              shared.query(slot));
      wgmma_commit();
      product_of_held_rows<kBlockN, kBlockM, kHeadDim, true>(slopes, values, value_tile,
                                                             shared.dout(slot));
      wgmma_commit();
    };
    QueryColumns columns;
    int first_start, last_end;  // the outermost ranges of the step
    const auto load_ends = [&](unsigned slot) {
      first_start = shared_load(shared.starts(slot));
      last_end = shared_load(shared.ends(slot) + 4 * (kBlockM - 1));
    };
    const auto load_columns = [&](unsigned slot) {
      columns.load(shared, slot, q);
      columns.start(slopes, shared, slot, q);
    };
    const auto weigh = [&](unsigned slot) {
      columns.weigh(scores, slopes, shared, slot, q, key0, own, p.scale_log2);
      pack_fragment(weights, scores);
      pack_fragment(changes, slopes);
    };
    // dV += P^T dO, dK += dS^T Q of a slot, as one group.
    const auto accumulate = [&](unsigned slot) {
      accumulate_weighted_rows<kBlockM>(grad_v, weights, shared.dout(slot));
      accumulate_weighted_rows<kBlockM>(grad_k, changes, shared.query(slot));
      wgmma_commit();
    };
    // dS^T to shared memory, and then to the warpgroup that makes dq. One fence for what this warp
    // wrote and for the queries that it is about to multiply.
    const auto store_changes = [&](int query_tile, bool ends) {
      barrier_wait(shared.changes_empty(change.slot), change.parity ^ 1);
      announce(query_tile, at.number, first_start / kBlockN, (last_end + kBlockN - 1) / kBlockN,
               key.slot | (ends ? kTileEnds : 0));
      store_fragments(shared.changes(change.slot) + group * 64 * kRowBytes, changes, warp, lane);
    };
    const auto send_changes = [&]() {
      async_proxy_fence();
      barrier_release(shared.changes_full(change.slot), lane);
      change.advance();
    };
    // A block whose queries see none of this warpgroup's keys: dS of zeros, for the other half's dq.
    const auto pass_over = [&](int query_tile, bool ends, bool more) {
      const unsigned slot = query.slot;
      barrier_wait(shared.query_full(slot), query.parity);
      query.advance();
      load_ends(slot);
#pragma unroll
      for (int i = 0; i < kBlockM / 4; ++i) changes[i] = 0;
      store_changes(query_tile, ends);
      if (more) announce_coming();
      send_changes();
      barrier_release(shared.query_empty(slot), lane);
    };
    const auto pin_operands = [&]() {
      pin(grad_v);
      pin(grad_k);
      pin(weights);
      pin(changes);
    };

    bool ended = false;  // has the last step of the tile said so?
    for (int member = 0; member < p.group_size; ++member) {
      const int low = uniform(shared_load(shared.bound(buffer, member, 0))) / kBlockM;
      const int high =
          (uniform(shared_load(shared.bound(buffer, member, 1))) + kBlockM - 1) / kBlockM;
      if (low >= high) continue;
      const int z = at.b * p.heads + at.h_kv * p.group_size + member;
      // Query tiles, of all heads: those that see this warpgroup's keys, among those of the tile.
      const int head_first = z * p.query_tiles;
      const int begin = head_first + low, end = head_first + high;
      const int bound = uniform(shared_load(shared.bound(buffer, member, 3 - group)));
      const int upper_first = max(begin, min(end, head_first + bound / kBlockM));
      const int lower_last = max(begin, min(end, head_first + (bound + kBlockM - 1) / kBlockM));
      const int first = group == 0 ? begin : upper_first, last = group == 0 ? lower_last : end;
      // The tile's last step, unless further heads have none.
      ended = member + 1 == p.group_size;
      const auto ends = [&](int block) { return ended && block + 1 == end; };
      for (int block = begin; block < first; ++block) pass_over(block, ends(block), block + 1 < end);
      if (first < last) {
        unsigned slot = query.slot, before = 0;
        barrier_wait(shared.query_full(slot), query.parity);
        async_proxy_fence();
        load_ends(slot);
        load_columns(slot);
        wgmma_fence();
        issue_scores(slot);
        for (int block = first;;) {
          query.advance();
          wgmma_wait<1>();  // dV and dK of the step before, and S of this one
          pin_operands();
          pin(scores);
          if (block > first) barrier_release(shared.query_empty(before), lane);
          weigh(slot);
          store_changes(block, ends(block));
          before = slot;
          if (++block == last) break;
          // The next scores run behind these products.
          slot = query.slot;
          barrier_wait(shared.query_full(slot), query.parity);
          announce_next(slot);
          send_changes();
          load_ends(slot);
          load_columns(slot);
          pin_operands();
          pin(scores);
          pin(slopes);
          wgmma_fence();
          accumulate(before);
          issue_scores(slot);
        }
        if (last < end) announce_coming();
        send_changes();
        pin_operands();
        wgmma_fence();
        accumulate(before);
        wgmma_wait<0>();
        pin_operands();
        barrier_release(shared.query_empty(before), lane);
      }
      for (int block = max(first, last); block < end; ++block) {
        pass_over(block, ends(block), block + 1 < end);
      }
    }
    if (!ended) announce_end(kTileDone);
    barrier_release(shared.key_empty(key.slot), lane);
    key.advance();

    const int* k_index = p.k_index + static_cast<long long>(at.z) * p.seqlen_k;
    const int index[2] = {own < p.seqlen_k ? k_index[own] : -1,
                          own + 8 < p.seqlen_k ? k_index[own + 8] : -1};
    const float scale_k[2] = {p.scale, p.scale}, scale_v[2] = {1.0f, 1.0f};
    scatter_rows(grad_k, scale_k, p.dk.of_head(at.b, at.h_kv), p.dk.row, index, lane);
    scatter_rows(grad_v, scale_v, p.dv.of_head(at.b, at.h_kv), p.dv.row, index, lane);
  }
  announce_end(kAllDone);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    scfa_bwd_fused_sm90(const __grid_constant__ Params p) {
  if constexpr (kHasChoice) {
    if (uniform(share_of(p, kFused)) == kNone) return;
  }
  extern __shared__ char dynamic[];
  const Shared shared{(shared_address(dynamic) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kKeyBuffers; ++i) {
      barrier_init(shared.key_full(i), kRowThreads + publications(kRowThreads));
      barrier_init(shared.key_empty(i), (4 * kWarpgroups + 4) * kReleases);
    }
    for (int i = 0; i < kChanges; ++i) {
      barrier_init(shared.changes_full(i), 4 * kWarpgroups * kReleases);
      barrier_init(shared.changes_empty(i), 4 * kReleases);
    }
    for (int i = 0; i < kCarriers; ++i) {
      barrier_init(shared.sum_full(i), 4 * kReleases);
      barrier_init(shared.sum_empty(i), kReleases);
      barrier_init(shared.sum_loaded(i), kReleases);
    }
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared.query_full(i), kRowThreads);
      barrier_init(shared.query_empty(i), 4 * kWarpgroups * kReleases);
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
  } else if (warpgroup == kWarpgroups + 1) {
    give_registers<kQueryRegisters>();
    sum_queries(p, shared);
  } else {
    take_registers<kConsumerRegisters>();
    multiply_tiles(p, shared, warpgroup - 1);
  }
}
