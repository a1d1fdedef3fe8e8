// Second half of bwd_dkdv_sm90.cu where rows have at most 128 columns: each of the multiplying
// warpgroups makes dk and dv of 64 keys of a tile.
#pragma once

// The other warpgroups: dk and dv of 64 keys of each tile.
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

    float scores[kBlockM / 2], slopes[kBlockM / 2], grad_k[kWidth / 2], grad_v[kWidth / 2];
    unsigned weights[kBlockM / 4], changes[kBlockM / 4];
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) grad_k[i] = grad_v[i] = 0.0f;
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

    const auto skip_block = [&]() { pass_over_block(shared, query, lane); };
    QueryColumns columns;
    const auto sees_keys = [&]() { return columns.wait_and_look(shared, query, key0); };
    const auto load_columns = [&](unsigned slot) {
      columns.load(shared, slot, q);
      columns.start(slopes, shared, slot, q);
    };
    // Issue S^T = K Q^T and dP^T - delta = V dO^T - delta of a slot, as two groups; load_columns(slot)
    // comes before.
    const auto issue_scores = [&](unsigned slot) {
      if constexpr (kKeysInRegisters) {
        product_of_rows<kBlockM, kDepth>(scores, keys, shared.query(slot));
        wgmma_commit();
        product_of_rows<kBlockM, kDepth, true>(slopes, values, shared.dout(slot));
      } else {
        product_of_rows<kBlockN, kBlockM, kDepth>(scores, key_tile, shared.query(slot));
        wgmma_commit();
        product_of_rows<kBlockN, kBlockM, kDepth, true>(slopes, value_tile, shared.dout(slot));
      }
      wgmma_commit();
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
          load_columns(slot);
          pin(slopes);
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
            load_columns(slot);
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
          load_columns(query.slot);
          pin(scores);
          pin(slopes);
          wgmma_fence();
          issue_scores(query.slot);
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
    scatter_columns<kColumns>(grad_k, scale_k, dk, p.dk.row, index, lane);
    scatter_columns<kColumns>(grad_v, scale_v, dv, p.dv.row, index, lane);
  }
}
