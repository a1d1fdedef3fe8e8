// Gradients of queries, keys and values over sorted key ranges on Hopper (wgmma) in one pass: five
// products where bwd_dq_sm90.cu and bwd_dkdv_sm90.cu together compute seven.
//
// computes: with p[i][j], delta[i] as in bwd_dq_sm90.cu: dS[i][j] = p[i][j] * (dout[i] . v[j] -
//   delta[i]), dv[j] = sum_i p[i][j] dout[i], dk[j] = scale * sum_i dS[i][j] q[i], dq[i] = scale *
//   sum_j dS[i][j] k[j]. Ranges must be nondecreasing along the sorted queries (plan.monotone).
// grid/block: one persistent block per SM; a tile is kBlockN sorted keys of one kv head.
//   Warpgroup 0 gathers rows (cp.async), two multiply, each 64 keys and half the columns of dq, the
//   last one stores dq. In tiles of 64 sorted rows dq is summed in memory, in fp32, by bulk copies
//   that add; the key tiles add from the last to the first, each waiting for the one before it
//   (Params::added): bitwise deterministic. The last adds in registers and writes the rows.
// shared memory: two or four key and value tiles, dS and dq tiles, kStages query blocks
//   (kSharedBytes).
// inputs/outputs: Params (params_sm90.cuh): q, k, v, dout, dq, dk, dv in 16 bits; row_lse,
//   row_delta, added as bwd_prepare_sm90.cu wrote them; dq_sum holds p.slots heads.
// version and source: column-owner form of FlashAttention-2 (Dao 2023, algorithm 2) with dq added
//   in order. No block waits for a tile handed out later than its own, so all make progress. What
//   each step gained: docs/perf/hopper.md.
#include "bwd_fused_sm90_gather.cuh"
#include "bwd_fused_sm90_store.cuh"

// Warpgroups 1 and 2: dk and dv of 64 keys of each tile, and half the columns of its share of dq.
__device__ __forceinline__ void multiply_tiles(const Params& p, Shared shared, int group) {
  const int thread = threadIdx.x % 128, warp = uniform(thread / 32), lane = thread % 32;
  const int q = lane % 4;
  Ring<kKeyBuffers> key;
  Ring<kStages> query;
  Ring<kChanges> change;
  Ring<kStaging> staging;
  unsigned buffer = 0, step = 0;  // step: of all tiles, to number the jobs of the storing warps
  for (;; buffer ^= 1) {
    barrier_wait(shared.key_full(key.slot), key.parity);
    const int tile = uniform(shared_load(shared.tile(buffer)));
    if (tile >= p.tiles) break;
    const KeyTile at = locate_key_tile(p, tile);
    const int key0 = at.number * kBlockN + 64 * group;  // first key of this warpgroup
    const int own = key0 + 16 * warp + lane / 4;        // this thread's keys: own and own + 8
    const unsigned all_keys = shared.key(key.slot);
    const unsigned key_tile = all_keys + group * 64 * kRowBytes;
    const unsigned value_tile = shared.value(key.slot) + group * 64 * kRowBytes;
    // Half the columns of the keys: half a panel, or one of two.
    const unsigned key_columns =
        all_keys + group * (kPanels == 1 ? kRowBytes / 2 : kBlockN * kRowBytes);

    float scores[kBlockM / 2], slopes[kBlockM / 2], grad_k[kHeadDim / 2], grad_v[kHeadDim / 2];
    float grad_q[kHeadDim / 4];  // 64 queries, half the columns
    unsigned weights[kBlockM / 4], changes[kBlockM / 4];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) grad_k[i] = grad_v[i] = 0.0f;
    async_proxy_fence();

    // Issue S^T = K Q^T and dP^T = V dO^T of a slot, each as a group.
    const auto issue_scores = [&](unsigned slot) {
      new_product_of_rows<kBlockN, kBlockM, kHeadDim>(scores, key_tile, shared.query(slot));
      wgmma_commit();
    };
    const auto issue_slopes = [&](unsigned slot) {
      new_product_of_rows<kBlockN, kBlockM, kHeadDim>(slopes, value_tile, shared.dout(slot));
      wgmma_commit();
    };
    // P^T = exp2(S^T * scale - lse): lse and delta belong to columns here.
    const auto weigh_scores = [&](unsigned slot) {
#pragma unroll
      for (int i = 0; i < kBlockM / 2; i += 4) {
        const int2 lse = shared_load_pair(shared.lse(slot) + 8 * i + 8 * q);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float own_lse = __int_as_float(j & 1 ? lse.y : lse.x);
          scores[i + j] = exp2_fast(scores[i + j] * p.scale_log2 - own_lse);
        }
      }
    };
    // dS^T, and zero by selection, not by product, what is not seen: such a row may hold anything.
    const auto weigh_slopes = [&](unsigned slot) {
#pragma unroll
      for (int i = 0; i < kBlockM / 2; i += 4) {
        const int2 delta = shared_load_pair(shared.delta(slot) + 8 * i + 8 * q);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float own_delta = __int_as_float(j & 1 ? delta.y : delta.x);
          slopes[i + j] = scores[i + j] * (slopes[i + j] - own_delta);
        }
      }
      // Ranges are nondecreasing: the first query ends first, the last one starts last.
      const int first_end = uniform(shared_load(shared.ends(slot)));
      const int last_start = uniform(shared_load(shared.starts(slot) + 4 * (kBlockM - 1)));
      if (first_end < key0 + 64) {
#pragma unroll
        for (int i = 0; i < kBlockM / 2; i += 4) {
          const int2 end = shared_load_pair(shared.ends(slot) + 8 * i + 8 * q);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const bool seen = own + 8 * half_of(j) < (j & 1 ? end.y : end.x);
            scores[i + j] = seen ? scores[i + j] : 0.0f;
            slopes[i + j] = seen ? slopes[i + j] : 0.0f;
          }
        }
      }
      if (last_start > key0) {
#pragma unroll
        for (int i = 0; i < kBlockM / 2; i += 4) {
          const int2 start = shared_load_pair(shared.starts(slot) + 8 * i + 8 * q);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const bool seen = own + 8 * half_of(j) >= (j & 1 ? start.y : start.x);
            scores[i + j] = seen ? scores[i + j] : 0.0f;
            slopes[i + j] = seen ? slopes[i + j] : 0.0f;
          }
        }
      }
      pack_fragment(weights, scores);
      pack_fragment(changes, slopes);
    };
    // Tell the storing warps which query tile this step is about, and who visits it (find_bounds).
    const auto announce = [&](unsigned slot, int query_tile) {
      if (group == 0 && thread == 0) {
        const unsigned job = shared.job(step % kJobs);
        shared_store(job, query_tile);
        shared_store(job + 4, at.number);
        shared_store(job + 8, shared_load(shared.starts(slot)) / kBlockN);
        shared_store(job + 12,
                     (shared_load(shared.ends(slot) + 4 * (kBlockM - 1)) + kBlockN - 1) / kBlockN);
      }
      ++step;
    };
    // Give dS^T to the other warpgroup. Its product with the changes two steps ago is complete: it
    // says so by giving those of the last step, which this one has waited for.
    const auto share_changes = [&]() {
      store_fragments(shared.changes(change.slot) + group * 64 * kRowBytes, changes, warp, lane);
      shared_writes_fence();
      barrier_release(shared.changes_full(change.slot), lane);
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
    // dQ = dS K, once both warpgroups' changes are there.
    const auto issue_queries = [&]() {
      barrier_wait(shared.changes_full(change.slot), change.parity);
      wgmma_fence();
      new_product_of_columns<kBlockN>(grad_q, shared.changes(change.slot), key_columns);
      wgmma_commit();
      change.advance();
    };
    const auto stage_queries = [&]() {
      barrier_wait(shared.sum_empty(staging.slot), staging.parity ^ 1);
      const unsigned target =
          shared.sum(staging.slot) + 16 * ((kHeadDim / 16) * 128 * group + thread);
#pragma unroll
      for (int i = 0; i < kHeadDim / 4; i += 4) {
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(target + 512 * i),
                     "f"(grad_q[i]), "f"(grad_q[i + 1]), "f"(grad_q[i + 2]), "f"(grad_q[i + 3])
                     : "memory");
      }
      shared_writes_fence();
      barrier_release(shared.sum_full(staging.slot), lane);
      staging.advance();
    };

    for (int member = 0; member < p.group_size; ++member) {
      const int low = uniform(shared_load(shared.bound(buffer, member, 0))) / kBlockM;
      const int high =
          (uniform(shared_load(shared.bound(buffer, member, 1))) + kBlockM - 1) / kBlockM;
      if (low >= high) continue;
      const int z = at.b * p.heads + at.h_kv * p.group_size + member;
      const int last = z * p.query_tiles + high;
      int block = z * p.query_tiles + low;  // query tile, of all heads

      if constexpr (kOverlap) {
      barrier_wait(shared.query_full(query.slot), query.parity);
      async_proxy_fence();
      wgmma_fence();
      issue_scores(query.slot);
      issue_slopes(query.slot);
        wgmma_commit();  // in the place of dQ of the step before
        bool staged = true;
        unsigned before = 0;
        while (true) {
          const unsigned slot = query.slot;
          wgmma_wait<2>();  // dV and dK of the step before, and S of this one
          pin_operands();
          pin(scores);
          if (!staged) barrier_release(shared.query_empty(before), lane);
          announce(slot, block);
          weigh_scores(slot);
          wgmma_wait<1>();
          pin(slopes);
          weigh_slopes(slot);
          wgmma_wait<0>();
          pin(grad_q);
          share_changes();
          query.advance();
          if (++block == last) {
            pin_operands();
            wgmma_fence();
            accumulate(slot);
            if (!staged) stage_queries();
            issue_queries();
            wgmma_wait<1>();
            pin_operands();
            barrier_release(shared.query_empty(slot), lane);
            wgmma_wait<0>();
            pin(grad_q);
            stage_queries();
            break;
          }
          barrier_wait(shared.query_full(query.slot), query.parity);
          async_proxy_fence();
          pin_operands();
          wgmma_fence();
          accumulate(slot);
          issue_scores(query.slot);
          issue_slopes(query.slot);
          if (!staged) stage_queries();
          staged = false;
          issue_queries();
          before = slot;
        }
      } else {
        for (; block < last; ++block) {
          const unsigned slot = query.slot;
          barrier_wait(shared.query_full(slot), query.parity);
          async_proxy_fence();
          wgmma_fence();
          issue_scores(slot);
          issue_slopes(slot);
          announce(slot, block);
          wgmma_wait<1>();
          pin(scores);
          weigh_scores(slot);
          wgmma_wait<0>();
          pin(slopes);
          weigh_slopes(slot);
          share_changes();
          query.advance();
          pin_operands();
          wgmma_fence();
          accumulate(slot);
          issue_queries();
          wgmma_wait<1>();
          pin_operands();
          barrier_release(shared.query_empty(slot), lane);
          wgmma_wait<0>();
          pin(grad_q);
          stage_queries();
        }
      }
    }
    barrier_release(shared.key_empty(key.slot), lane);
    key.advance();

    const int* k_index = p.k_index + static_cast<long long>(at.z) * p.seqlen_k;
    const int index[2] = {own < p.seqlen_k ? k_index[own] : -1,
                          own + 8 < p.seqlen_k ? k_index[own + 8] : -1};
    const float scale_k[2] = {p.scale, p.scale}, scale_v[2] = {1.0f, 1.0f};
    scatter_rows(grad_k, scale_k, p.dk.of_head(at.b, at.h_kv), p.dk.row, index, lane);
    scatter_rows(grad_v, scale_v, p.dv.of_head(at.b, at.h_kv), p.dv.row, index, lane);
  }
  // Send the warps of every buffer home.
  for (int i = 0; i < kStaging; ++i) {
    barrier_wait(shared.sum_empty(staging.slot), staging.parity ^ 1);
    if (group == 0 && thread == 0) shared_store(shared.job(step % kJobs), -1);
    ++step;
    barrier_release(shared.sum_full(staging.slot), lane);
    staging.advance();
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    scfa_bwd_fused_sm90(const __grid_constant__ Params p) {
  extern __shared__ char dynamic[];
  const Shared shared{(shared_address(dynamic) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kKeyBuffers; ++i) {
      barrier_init(shared.key_full(i), kGatherThreads + 1);
      barrier_init(shared.key_empty(i), 4 * kWarpgroups);
    }
    for (int i = 0; i < kChanges; ++i) barrier_init(shared.changes_full(i), 4 * kWarpgroups);
    for (int i = 0; i < kStaging; ++i) {
      barrier_init(shared.sum_full(i), 4 * kWarpgroups);
      barrier_init(shared.sum_empty(i), 4 / kStaging);
    }
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
  } else if (warpgroup == kWarpgroups + 1) {
    give_registers<kStoreRegisters>();
    store_tiles(p, shared);
  } else {
    take_registers<kConsumerRegisters>();
    multiply_tiles(p, shared, warpgroup - 1);
  }
}
