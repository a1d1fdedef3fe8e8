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
//   a time, in order: bitwise deterministic. Beyond 128 columns two own the same keys: both make
//   the scores, each half the columns of dk and dv.
// shared memory: 4 * kHeadDim * (kBlockN + kStages * kBlockM) bytes, row data, barriers
//   (kSharedBytes).
// inputs/outputs: Params (params_sm90.cuh): q, k, v, dout, dk, dv in 16 bits; row_lse, row_delta as
//   bwd_dq_sm90.cu wrote them.
// version and source: column-owner form of FlashAttention-2 (Dao 2023, algorithm 2). New here: P^T
//   and dS^T never leave registers, because dq has a kernel of its own; so no warpgroup waits for
//   another. What each step gained: docs/perf/hopper.md.
#include "bwd_dkdv_sm90_gather.cuh"
#include "weigh_columns_sm90.cuh"

// The other warpgroups: dk and dv of 64 keys of each tile.
__device__ __forceinline__ void multiply_tiles(const Params& p, Shared shared, int warpgroup) {
  // Which 64 keys, and which columns of their dk and dv: all make the scores, and a part each.
  const int group = kParts == 1 ? warpgroup : 0, part = kParts == 1 ? 0 : warpgroup;
  const unsigned part_columns = part * (kPanels / kParts) * kBlockM * kRowBytes;
  const int thread = threadIdx.x % 128, warp = uniform(thread / 32), lane = thread % 32;
  const int q = lane % 4;
  Ring<1> key;
  Ring<kStages> query;
  while (true) {
    barrier_wait(shared.key_full(), key.parity);
    const int tile = uniform(shared_load(shared.tile()));
    if (tile >= p.tiles) break;
    const int z = p.by_tiles.quotient(tile), n = tile - z * p.tiles_per_head;
    const int key0 = n * kBlockN + 64 * group;    // first key of this warpgroup
    const int own = key0 + 16 * warp + lane / 4;  // this thread's keys: own and own + 8
    const unsigned key_tile = shared.key() + group * 64 * kRowBytes;
    const unsigned value_tile = shared.value() + group * 64 * kRowBytes;

    // Where this thread's rows go: loaded early where registers allow, so that nothing waits for
    // it.
    const int* k_index = p.k_index + static_cast<long long>(z) * p.seqlen_k;
    int index[2];
    const auto load_index = [&]() {
      index[0] = own < p.seqlen_k ? k_index[own] : -1;
      index[1] = own + 8 < p.seqlen_k ? k_index[own + 8] : -1;
    };
    if constexpr (kOverlap) load_index();

    float scores[kBlockM / 2], slopes[kBlockM / 2], grad_k[kPartWidth / 2], grad_v[kPartWidth / 2];
    unsigned weights[kBlockM / 4], changes[kBlockM / 4];
#pragma unroll
    for (int i = 0; i < kPartWidth / 2; ++i) grad_k[i] = grad_v[i] = 0.0f;
    unsigned keys[kDepth / 4], values[kDepth / 4];
    if constexpr (kKeysInRegisters) {
      load_fragments<kBlockN, kDepth>(keys, key_tile, warp, lane);
      load_fragments<kBlockN, kDepth>(values, value_tile, warp, lane);
      pin(keys);
      pin(values);
      barrier_release(shared.key_empty(), lane);
    } else {
      async_proxy_fence();
    }

    const auto skip_block = [&]() {
      barrier_wait(shared.query_full(query.slot), query.parity);
      barrier_release(shared.query_empty(query.slot), lane);
      query.advance();
    };
    QueryColumns columns;
    // Wait for the next slot; does the block there see any of these keys? In any order it may not.
    const auto sees_keys = [&]() {
      if constexpr (kMonotone) return true;
      barrier_wait(shared.query_full(query.slot), query.parity);
      return columns.look(shared, query.slot, key0);
    };
    // Issue S^T = K Q^T and dP^T = V dO^T of a slot, as two groups.
    const auto issue_scores = [&](unsigned slot) {
      if constexpr (kKeysInRegisters) {
        product_of_rows<kBlockM, kDepth>(scores, keys, shared.query(slot));
        wgmma_commit();
        product_of_rows<kBlockM, kDepth>(slopes, values, shared.dout(slot));
      } else {
        product_of_rows<kBlockN, kBlockM, kDepth>(scores, key_tile, shared.query(slot));
        wgmma_commit();
        product_of_rows<kBlockN, kBlockM, kDepth>(slopes, value_tile, shared.dout(slot));
      }
      wgmma_commit();
    };

    const auto weigh = [&](unsigned slot) {
      columns.weigh<false>(scores, slopes, shared, slot, q, key0, own, p.scale_log2);
      pack_fragment(weights, scores);
      pack_fragment(changes, slopes);
    };
    // dV += P^T dO, dK += dS^T Q of a slot, as one group.
    const auto accumulate = [&](unsigned slot) {
      accumulate_weighted_rows<kBlockM>(grad_v, weights, shared.dout(slot) + part_columns);
      accumulate_weighted_rows<kBlockM>(grad_k, changes, shared.query(slot) + part_columns);
      wgmma_commit();
    };
    const auto pin_operands = [&]() {
      pin(grad_v);
      pin(grad_k);
      pin(weights);
      pin(changes);
    };

    for (int member = 0; member < p.group_size; ++member) {
      const auto bound = [&](int i) {
        return uniform(shared_load(shared.bound(key.parity, member, i)));
      };
      const int first = bound(0), last = bound(kBounds - 1), own_first = bound(2 * group),
                own_last = bound(2 * group + 1);
      // Blocks [low, high) of `blocks` hold queries that see a key of this warpgroup.
      const int blocks = first < last ? (last - first + kBlockM - 1) / kBlockM : 0;
      const bool any = own_first < own_last;
      const int low = any ? (own_first - first) / kBlockM : 0;
      const int high = any ? (own_last - first + kBlockM - 1) / kBlockM : 0;

      for (int block = 0; block < low; ++block) skip_block();
      if constexpr (kOverlap) {
        int block = low;
        // Runs of blocks that see these keys. The last of a run is given back before any other is
        // passed over: the gathering warps may need its buffer for that.
        while (true) {
          if constexpr (!kMonotone) {
            for (; block < high && !sees_keys(); ++block) skip_block();
          }
          if (block >= high) break;
          const int run = block;
          unsigned slot = query.slot, before = 0;
          barrier_wait(shared.query_full(slot), query.parity);
          async_proxy_fence();
          columns.load(shared, slot, q);
          wgmma_fence();
          issue_scores(slot);
          while (true) {
            query.advance();
            wgmma_wait<1>();  // dV and dK of the block before, and S of this one
            pin_operands();
            pin(scores);
            if (block > run) barrier_release(shared.query_empty(before), lane);
            weigh(slot);
            before = slot;
            if (++block == high || !sees_keys()) break;
            // The next scores run behind these products.
            slot = query.slot;
            barrier_wait(shared.query_full(slot), query.parity);
            async_proxy_fence();
            columns.load(shared, slot, q);
            pin_operands();
            pin(scores);
            pin(slopes);
            wgmma_fence();
            accumulate(before);
            issue_scores(slot);
          }
          pin_operands();
          wgmma_fence();
          accumulate(before);
          wgmma_wait<0>();
          pin_operands();
          barrier_release(shared.query_empty(before), lane);
          if constexpr (kMonotone) break;
        }
      } else {
        for (int block = low; block < high; ++block) {
          if constexpr (!kMonotone) {
            if (!sees_keys()) {
              skip_block();
              continue;
            }
          }
          barrier_wait(shared.query_full(query.slot), query.parity);
          async_proxy_fence();
          pin(scores);
          pin(slopes);
          wgmma_fence();
          issue_scores(query.slot);
          columns.load(shared, query.slot, q);
          wgmma_wait<1>();
          pin(scores);
          weigh(query.slot);
          pin_operands();
          wgmma_fence();
          accumulate(query.slot);
          wgmma_wait<0>();
          pin_operands();
          barrier_release(shared.query_empty(query.slot), lane);
          query.advance();
        }
      }
      for (int block = high; block < blocks; ++block) skip_block();
    }
    if constexpr (!kKeysInRegisters) barrier_release(shared.key_empty(), lane);
    key.advance();

    if constexpr (!kOverlap) load_index();
    const int b = p.by_heads.quotient(z), h_kv = z - b * p.heads_kv;
    const float scale_k[2] = {p.scale, p.scale}, scale_v[2] = {1.0f, 1.0f};
    char *dk = p.dk.of_head(b, h_kv), *dv = p.dv.of_head(b, h_kv);
    if constexpr (kParts == 1) {
      scatter_columns<kColumns>(grad_k, scale_k, dk, p.dk.row, index, lane);
      scatter_columns<kColumns>(grad_v, scale_v, dv, p.dv.row, index, lane);
    } else if (part == 0) {
      scatter_columns<kPartWidth>(grad_k, scale_k, dk, p.dk.row, index, lane);
      scatter_columns<kPartWidth>(grad_v, scale_v, dv, p.dv.row, index, lane);
    } else {
      constexpr int kRest = kParts == 1 ? kColumns : kColumns - kPartWidth;
      scatter_columns<kRest>(grad_k, scale_k, dk + 2 * kPartWidth, p.dk.row, index, lane);
      scatter_columns<kRest>(grad_v, scale_v, dv + 2 * kPartWidth, p.dv.row, index, lane);
    }
  }
}

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
