// Gradients of the keys and values over sorted key ranges on Hopper (wgmma), in transposed form:
// rows are keys, columns queries.
//
// computes: with p[i][j], delta[i] as in bwd_dq_sm90.cu: dv[j] = sum_i p[i][j] dout[i],
//   dk[j] = scale * sum_i p[i][j] * (dout[i] . v[j] - delta[i]) q[i], over the queries i whose
//   range holds j, all heads of the group. Ranges must be nondecreasing along the sorted queries
//   (plan.monotone): then the queries of a key tile are one range too.
// grid/block: one persistent block per SM; a tile is kBlockN sorted keys of one kv head. Warpgroup
// 0
//   gathers rows (cp.async), each of the others owns 64 keys and walks kBlockM queries at a time,
//   in order: bitwise deterministic.
// shared memory: 4 * kHeadDim * (kBlockN + kStages * kBlockM) bytes, row data, barriers
//   (kSharedBytes).
// inputs/outputs: Params (params_sm90.cuh): q, k, v, dout, dk, dv in 16 bits; row_lse, row_delta as
//   bwd_dq_sm90.cu wrote them.
// version and source: column-owner form of FlashAttention-2 (Dao 2023, algorithm 2). New here: P^T
//   and dS^T never leave registers, because dq has a kernel of its own; so no warpgroup waits for
//   another. What each step gained: docs/perf/hopper.md.
#include "bwd_dkdv_sm90_gather.cuh"

// Warpgroups 1..: dk and dv of 64 keys of each tile.
__device__ __forceinline__ void multiply_tiles(const Params& p, Shared shared, int group) {
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

    float scores[kBlockM / 2], slopes[kBlockM / 2], grad_k[kHeadDim / 2], grad_v[kHeadDim / 2];
    unsigned weights[kBlockM / 4], changes[kBlockM / 4];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) grad_k[i] = grad_v[i] = 0.0f;
    unsigned keys[kHeadDim / 4], values[kHeadDim / 4];
    if constexpr (kKeysInRegisters) {
      load_fragments<kBlockN, kHeadDim>(keys, key_tile, warp, lane);
      load_fragments<kBlockN, kHeadDim>(values, value_tile, warp, lane);
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
    // Issue S^T = K Q^T and dP^T = V dO^T of a slot, as two groups.
    const auto issue_scores = [&](unsigned slot) {
      if constexpr (kKeysInRegisters) {
        product_of_rows<kBlockM, kHeadDim>(scores, keys, shared.query(slot));
        wgmma_commit();
        product_of_rows<kBlockM, kHeadDim>(slopes, values, shared.dout(slot));
      } else {
        product_of_rows<kBlockN, kBlockM, kHeadDim>(scores, key_tile, shared.query(slot));
        wgmma_commit();
        product_of_rows<kBlockN, kBlockM, kHeadDim>(slopes, value_tile, shared.dout(slot));
      }
      wgmma_commit();
    };

    // P^T and dS^T of the slot whose scores were issued last, as A operands; waits for the scores
    // itself.
    const auto weigh = [&](unsigned slot) {
      // Ranges are nondecreasing: the first query ends first, the last one starts last.
      const int first_end = uniform(shared_load(shared.ends(slot)));
      const int last_start = uniform(shared_load(shared.starts(slot) + 4 * (kBlockM - 1)));
      // P^T = exp2(S^T * scale - lse): lse and delta belong to columns here.
      int2 column[kBlockM / 8];
#pragma unroll
      for (int block = 0; block < kBlockM / 8; ++block) {
        column[block] = shared_load_pair(shared.lse(slot) + 32 * block + 8 * q);
      }
      wgmma_wait<1>();
      pin(scores);
#pragma unroll
      for (int i = 0; i < kBlockM / 2; ++i) {
        const int lse = i & 1 ? column[i / 4].y : column[i / 4].x;
        scores[i] = exp2_fast(scores[i] * p.scale_log2 - __int_as_float(lse));
      }
#pragma unroll
      for (int block = 0; block < kBlockM / 8; ++block) {
        column[block] = shared_load_pair(shared.delta(slot) + 32 * block + 8 * q);
      }
      wgmma_wait<0>();
      pin(slopes);
#pragma unroll
      for (int i = 0; i < kBlockM / 2; ++i) {
        const int delta = i & 1 ? column[i / 4].y : column[i / 4].x;
        slopes[i] = scores[i] * (slopes[i] - __int_as_float(delta));
      }
      // Zero by selection, not by product: an unseen row may hold anything.
      if (first_end < key0 + 64) {
#pragma unroll
        for (int i = 0; i < kBlockM / 2; ++i) {
          if (i % 4 == 0) column[i / 4] = shared_load_pair(shared.ends(slot) + 8 * i + 8 * q);
          const bool seen = own + 8 * half_of(i) < (i & 1 ? column[i / 4].y : column[i / 4].x);
          scores[i] = seen ? scores[i] : 0.0f;
          slopes[i] = seen ? slopes[i] : 0.0f;
        }
      }
      if (last_start > key0) {
#pragma unroll
        for (int i = 0; i < kBlockM / 2; ++i) {
          if (i % 4 == 0) column[i / 4] = shared_load_pair(shared.starts(slot) + 8 * i + 8 * q);
          const bool seen = own + 8 * half_of(i) >= (i & 1 ? column[i / 4].y : column[i / 4].x);
          scores[i] = seen ? scores[i] : 0.0f;
          slopes[i] = seen ? slopes[i] : 0.0f;
        }
      }
      pack_fragment(weights, scores);
      pack_fragment(changes, slopes);
    };
    // dV += P^T dO, dK += dS^T Q of a slot, as one group.
    const auto accumulate = [&](unsigned slot) {
      accumulate_weighted_rows<kBlockM>(grad_v, weights, shared.dout(slot));
      accumulate_weighted_rows<kBlockM>(grad_k, changes, shared.query(slot));
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
        if (low < high) {
          barrier_wait(shared.query_full(query.slot), query.parity);
          async_proxy_fence();
          wgmma_fence();
          issue_scores(query.slot);
          int block = low;
          while (true) {
            const unsigned slot = query.slot;
            weigh(slot);
            query.advance();
            if (++block == high) {
              pin_operands();
              wgmma_fence();
              accumulate(slot);
              wgmma_wait<0>();
              pin_operands();
              barrier_release(shared.query_empty(slot), lane);
              break;
            }
            // The next scores run behind these products.
            barrier_wait(shared.query_full(query.slot), query.parity);
            async_proxy_fence();
            pin_operands();
            pin(scores);
            pin(slopes);
            wgmma_fence();
            accumulate(slot);
            issue_scores(query.slot);
            wgmma_wait<2>();
            pin_operands();
            barrier_release(shared.query_empty(slot), lane);
          }
        }
      } else {
        for (int block = low; block < high; ++block) {
          barrier_wait(shared.query_full(query.slot), query.parity);
          async_proxy_fence();
          pin(scores);
          pin(slopes);
          wgmma_fence();
          issue_scores(query.slot);
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
    scatter_rows(grad_k, scale_k, p.dk.of_head(b, h_kv), p.dk.row, index, lane);
    scatter_rows(grad_v, scale_v, p.dv.of_head(b, h_kv), p.dv.row, index, lane);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    scfa_bwd_dkdv_sm90(const __grid_constant__ Params p) {
  extern __shared__ char dynamic[];
  const Shared shared{(shared_address(dynamic) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    barrier_init(shared.key_full(), kGatherThreads + 1);
    barrier_init(shared.key_empty(), 4 * kWarpgroups);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared.query_full(i), kGatherThreads);
      barrier_init(shared.query_empty(i), 4 * kWarpgroups);
    }
    barrier_init_done();
  }
  __syncthreads();  // barriers are initialised
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    give_registers<kProducerRegisters>();
    gather_tiles(p, shared);
  } else {
    take_registers<kConsumerRegisters>();
    multiply_tiles(p, shared, warpgroup - 1);
  }
}
