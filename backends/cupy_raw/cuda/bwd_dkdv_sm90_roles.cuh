// Second half of bwd_dkdv_sm90.cu where rows are wider than 128: dk and dv of 64 keys do not fit into
// the registers of one warpgroup. Two share the keys: one makes P^T and dv, the other dP^T, dS^T and
// dk, so that no product is made twice. P^T goes from one to the other through shared memory, thread
// by thread, as both hold accumulators of the same shape.
#pragma once

enum Role { kOfValues = 0, kOfKeys = 1 };  // whose gradient a warpgroup makes

// Where the weight of an unseen pair goes: no weight is negative. What it is multiplied by may be NaN.
constexpr float kUnseen = -1.0f;

// This thread's weights of a block in eight places of 16 bytes.
__device__ __forceinline__ unsigned weight_place(const Shared& shared, int thread) {
  return shared.weights() + 16 * thread;
}

__device__ __forceinline__ void hand_over(const float (&weights)[kBlockM / 2], unsigned place) {
#pragma unroll
  for (int i = 0; i < kBlockM / 2; i += 4) {
    shared_store_four(place + 512 * i, weights[i], weights[i + 1], weights[i + 2], weights[i + 3]);
  }
}

// dS^T = P^T * (dP^T - delta), of the weights handed over and of negative deltas.
__device__ __forceinline__ void weigh_slopes(float (&slopes)[kBlockM / 2],
                                             const int2 (&less)[kBlockM / 8], unsigned place) {
#pragma unroll
  for (int i = 0; i < kBlockM / 2; i += 4) {
    unsigned words[4];
    shared_load_words(words, place + 512 * i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float weight = __uint_as_float(words[j]);
      const int own = j & 1 ? less[i / 4].y : less[i / 4].x;
      const float change = weight * (slopes[i + j] + __int_as_float(own));
      slopes[i + j] = weight < 0.0f ? 0.0f : change;
    }
  }
}

template <Role kRole>
__device__ __forceinline__ void multiply_tiles_as(const Params& p, Shared shared) {
  static_assert(kBlockN == 64, "accumulators of one shape in both warpgroups");
  const int thread = threadIdx.x % 128, warp = uniform(thread / 32), lane = thread % 32;
  const int q = lane % 4;
  const unsigned owned = kRole == kOfValues ? shared.key() : shared.value();
  const unsigned place = weight_place(shared, thread);
  Ring<1> key, weights;
  Ring<kStages> query;
  while (true) {
    barrier_wait(shared.key_full(), key.parity);
    const int tile = uniform(shared_load(shared.tile()));
    if (tile >= p.tiles) break;
    const int z = p.by_tiles.quotient(tile), n = tile - z * p.tiles_per_head;
    const int key0 = n * kBlockN, own = key0 + 16 * warp + lane / 4;  // this thread's: own, own + 8

    float product[kBlockM / 2], gradient[kWidth / 2];
    unsigned packed[kBlockM / 4];
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) gradient[i] = 0.0f;

    const auto skip_block = [&]() { pass_over_block(shared, query, lane); };
    QueryColumns columns;
    const auto sees_keys = [&]() { return columns.wait_and_look(shared, query, key0); };
    // What belongs to the queries of a block, loaded before its product is issued.
    const auto load_columns = [&](unsigned slot) {
      if constexpr (kRole == kOfValues) {
        columns.load(shared, slot, q);
      } else {
        columns.load_delta(shared, slot, q);
      }
    };
    // S^T = K Q^T, or dP^T = V dO^T.
    const auto issue_product = [&](unsigned slot) {
      product_of_rows<kBlockN, kBlockM, kDepth>(
          product, owned, kRole == kOfValues ? shared.query(slot) : shared.dout(slot));
      wgmma_commit();
    };
    // P^T, handed over, or dS^T, of what was.
    const auto weigh = [&](unsigned slot) {
      if constexpr (kRole == kOfValues) {
        const bool all = columns.weights(product, shared, slot, q, key0, own, p.scale_log2, kUnseen);
        barrier_wait(shared.weights_empty(), weights.parity ^ 1);
        hand_over(product, place);
        barrier_release(shared.weights_full(), lane);
        if (!all) {
#pragma unroll
          for (int i = 0; i < kBlockM / 2; ++i) product[i] = product[i] < 0.0f ? 0.0f : product[i];
        }
      } else {
        barrier_wait(shared.weights_full(), weights.parity);
        weigh_slopes(product, columns.column, place);
        barrier_release(shared.weights_empty(), lane);
      }
      weights.advance();
      pack_fragment(packed, product);
    };
    // dV += P^T dO, or dK += dS^T Q.
    const auto accumulate = [&](unsigned slot) {
      accumulate_weighted_rows<kBlockM>(
          gradient, packed, kRole == kOfValues ? shared.dout(slot) : shared.query(slot));
      wgmma_commit();
    };

    for (int member = 0; member < p.group_size; ++member) {
      const int first = uniform(shared_load(shared.bound(key.parity, member, 0)));
      const int last = uniform(shared_load(shared.bound(key.parity, member, 1)));
      const int blocks = first < last ? (last - first + kBlockM - 1) / kBlockM : 0;
      int block = 0;
      // Runs of blocks that see these keys. The last of a run is given back before any other is
      // passed over: the gathering warps may need its buffer for that.
      while (true) {
        if constexpr (!kMonotone) {
          for (; block < blocks && !sees_keys(); ++block) skip_block();
        }
        if (block >= blocks) break;
        unsigned slot = query.slot;
        barrier_wait(shared.query_full(slot), query.parity);
        async_proxy_fence();
        load_columns(slot);
        wgmma_fence();
        issue_product(slot);
        for (bool begun = false;; begun = true) {
          if (begun) {
            wgmma_wait<1>();  // of the block before
            pin(gradient);
            pin(packed);
            barrier_release(shared.query_empty(slot), lane);
            slot = query.slot;
          }
          query.advance();
          wgmma_wait<0>();
          pin(product);
          weigh(slot);
          if (++block == blocks || !sees_keys()) break;
          // The next product runs behind this one.
          barrier_wait(shared.query_full(query.slot), query.parity);
          async_proxy_fence();
          load_columns(query.slot);
          pin(gradient);
          pin(packed);
          pin(product);
          wgmma_fence();
          accumulate(slot);
          issue_product(query.slot);
        }
        pin(gradient);
        pin(packed);
        wgmma_fence();
        accumulate(slot);
        wgmma_wait<0>();
        pin(gradient);
        pin(packed);
        barrier_release(shared.query_empty(slot), lane);
        if constexpr (kMonotone) break;
      }
    }
    barrier_release(shared.key_empty(), lane);
    key.advance();

    const int* k_index = p.k_index + static_cast<long long>(z) * p.seqlen_k;
    const int index[2] = {own < p.seqlen_k ? k_index[own] : -1,
                          own + 8 < p.seqlen_k ? k_index[own + 8] : -1};
    const int b = p.by_heads.quotient(z), h_kv = z - b * p.heads_kv;
    const float scale[2] = {kRole == kOfKeys ? p.scale : 1.0f, kRole == kOfKeys ? p.scale : 1.0f};
    const Array& target = kRole == kOfKeys ? p.dk : p.dv;
    scatter_columns<kColumns>(gradient, scale, target.of_head(b, h_kv), target.row, index, lane);
  }
}

__device__ __forceinline__ void multiply_tiles(const Params& p, Shared shared, int warpgroup) {
  if (warpgroup == 0) {
    multiply_tiles_as<kOfValues>(p, shared);
  } else {
    multiply_tiles_as<kOfKeys>(p, shared);
  }
}
