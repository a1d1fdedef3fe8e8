// Gradient of the queries over sorted key ranges on Hopper (wgmma), head_dim up to 256, and the row
// statistics that the dk/dv kernel needs.
//
// computes: p[i][j] = exp(scale * q[i] . k[j] - lse[i]), delta[i] = dout[i] . out[i],
//   dq[i] = scale * sum_j p[i][j] * (dout[i] . v[j] - delta[i]) k[j],
//   j over k_index[key_start[r] : key_end[r]], i = q_index[r].
// grid/block: one persistent block per SM; a tile is kBlockM sorted query rows of one head.
//   One or two warpgroups gather rows (cp.async), each of the others owns 64 query rows; scores,
//   weights and dq stay in its registers.
// shared memory: 2 * kHeadDim * (kKept * kQueryBuffers * kBlockM + 2 * kStages * kBlockN) bytes, row
//   data, barriers (kSharedBytes).
// inputs/outputs: Params (params_sm90.cuh): q, k, v, out, dout, dq in 16 bits; lse, row_lse,
//   row_delta (-delta) float32, the last two in sorted order.
// version and source: row-owner form of FlashAttention-2 (Dao 2023, algorithm 2) on the pipeline of
//   fwd_sm90.cu. Delta is formed here from the gathered rows: no preprocessing launch, no fp32 dq
//   in memory, no atomics. What each step gained: docs/perf/hopper.md.
#include "bwd_dq_sm90_gather.cuh"

// delta = dout . out of one row, by two neighbouring lanes; both get the sum.
__device__ __forceinline__ float row_product(unsigned dout, unsigned out, int row, int half) {
  constexpr int kChunks = kDepth / 16;  // of this lane
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = half * kChunks + i;
    const unsigned offset =
        (chunk / 8) * kBlockM * kRowBytes + row * kRowBytes + (((chunk & 7) ^ (row & 7)) << 4);
    unsigned a[4], b[4];
    shared_load_words(a, dout + offset);
    shared_load_words(b, out + offset);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float a0, a1, b0, b1;
      unpack_pair(a[j], a0, a1);
      unpack_pair(b[j], b0, b1);
      sum += a0 * b0 + a1 * b1;
    }
  }
  return sum + __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
}

// The other warpgroups: statistics, then score gradients and dq of 64 query rows of each tile.
__device__ __forceinline__ void multiply_tiles(const Params& p, Shared shared, int group) {
  const int thread = threadIdx.x % 128, warp = uniform(thread / 32), lane = thread % 32;
  const int row =
      64 * group + 16 * warp + lane / 4;  // this thread's rows of the tile: row and row + 8
  Ring<kQueryBuffers> query;
  Ring<kStages> key;
  const auto skip_block = [&]() {
    barrier_wait(shared.key_full(key.slot), key.parity);
    if constexpr (kWide) barrier_release(shared.value_empty(key.slot), lane);
    barrier_release(shared.key_empty(key.slot), lane);
    key.advance();
  };

  while (true) {
    const TileData<kBlockM> data = shared.data(query.slot);
    barrier_wait(shared.query_full(query.slot), query.parity);
    const int tile = uniform(shared_load(data.tile()));
    if (tile >= p.tiles) break;
    const QueryTile at = locate_query_tile<kBlockM>(p, tile);
    const int first_key = uniform(shared_load(data.first_key()));
    const RowExtremes rows =
        row_extremes(data.starts() + 256 * group, data.ends() + 256 * group, lane);
    int block = uniform(shared_load(data.key_blocks())) - 1;
    const bool any = rows.outer_start < rows.outer_end;
    const int low_block = any ? (rows.outer_start - first_key) / kBlockN : 0;
    const int high_block = any ? (rows.outer_end - first_key + kBlockN - 1) / kBlockN : 0;
    const unsigned query_tile = shared.query(query.slot) + group * 64 * kRowBytes;
    const unsigned dout_tile = shared.dout(query.slot) + group * 64 * kRowBytes;

    if constexpr (kWide) {
      Ring<kStages> room = key;
      for (int i = 0; i < kStages; ++i, room.advance()) {
        barrier_wait(shared.key_full(room.slot), room.parity);
      }
    }
    {  // Row statistics: each warp for its own 16 rows, two lanes a row.
      const int own = 64 * group + 16 * warp + lane / 2;
      // A row that sees nothing gets +inf, so that its weights exp2(s - lse) are 0, and delta 0:
      // its dout may hold anything.
      const bool blind = shared_load(data.starts() + 4 * own) >= shared_load(data.ends() + 4 * own);
      const float given = shared_load_float(shared.lse(query.slot) + 4 * own);
      const float lse = blind || given == -SCFA_INFINITY ? SCFA_INFINITY : given * kLog2E;
      float delta = row_product(shared.dout(query.slot), shared.out(query.slot), own, lane & 1);
      if (blind) delta = 0.0f;
      if ((lane & 1) == 0) {
        shared_store_float(shared.delta(query.slot) + 4 * own, delta);
        const int sorted = at.first_row + own;
        if (sorted >= 0) {
          p.row_lse[static_cast<long long>(at.z) * p.seqlen_q + sorted] = lse;
          p.row_delta[static_cast<long long>(at.z) * p.seqlen_q + sorted] = -delta;
        }
      }
      __syncwarp();  // every lane has read what it needs of lse, delta of the warp's rows is
                     // written
      if ((lane & 1) == 0) shared_store_float(shared.lse(query.slot) + 4 * own, lse);
      __syncwarp();  // and so is lse in base 2
    }
    if constexpr (kWide) {
      for (int i = 0; i < kStages; ++i, key.advance()) {
        barrier_release(shared.value_empty(key.slot), lane);
        barrier_release(shared.key_empty(key.slot), lane);
      }
    }
    const float lse[2] = {shared_load_float(shared.lse(query.slot) + 4 * row),
                          shared_load_float(shared.lse(query.slot) + 4 * row + 32)};
    const float delta[2] = {shared_load_float(shared.delta(query.slot) + 4 * row),
                            shared_load_float(shared.delta(query.slot) + 4 * row + 32)};

    float scores[kBlockN / 2], slopes[kBlockN / 2], gradient[kWidth / 2];
    unsigned weights[kBlockN / 4];
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) gradient[i] = 0.0f;

    // Issue S = Q K^T and dP = dO V^T of the block in this slot, as two groups.
    const auto issue_scores = [&](unsigned slot) {
      unsigned q_tile = query_tile, d_tile = dout_tile;
      if constexpr (kWide) {
        // Two addresses, not the descriptors of every step: those do not fit into registers.
        asm volatile("" : "+r"(q_tile));
        asm volatile("" : "+r"(d_tile));
        q_tile = uniform(q_tile);
        d_tile = uniform(d_tile);
      }
      product_of_rows<kBlockM, kBlockN, kDepth>(scores, q_tile, shared.key(slot));
      wgmma_commit();
      product_of_rows<kBlockM, kBlockN, kDepth>(slopes, d_tile, shared.value(slot));
      wgmma_commit();
    };

    for (; block >= high_block; --block) skip_block();
    if (block >= low_block && any) {
      barrier_wait(shared.key_full(key.slot), key.parity);
      async_proxy_fence();
      wgmma_fence();
      issue_scores(key.slot);
      while (true) {
        wgmma_wait<1>();
        pin(scores);
        const int key0 = first_key + block * kBlockN;
        mask_block(scores, rows, data.starts() + 4 * row, data.ends() + 4 * row, key0,
                            lane % 4);
#pragma unroll
        for (int i = 0; i < kBlockN / 2; ++i) {
          scores[i] = exp2_fast(scores[i] * p.scale_log2 - lse[half_of(i)]);
        }
        wgmma_wait<0>();
        pin(slopes);
        if constexpr (kWide) barrier_release(shared.value_empty(key.slot), lane);
#pragma unroll
        for (int i = 0; i < kBlockN / 2; ++i) scores[i] *= slopes[i] - delta[half_of(i)];
        pack_fragment(weights, scores);
        if (block == low_block) break;

        // dQ += dS K of this block and the scores of the next are in flight together.
        const unsigned slot = key.slot;
        key.advance();
        --block;
        barrier_wait(shared.key_full(key.slot), key.parity);
        async_proxy_fence();
        pin(scores);
        pin(slopes);
        pin(gradient);
        pin(weights);
        wgmma_fence();
        accumulate_weighted_rows<kBlockN>(gradient, weights, shared.key(slot));
        wgmma_commit();
        issue_scores(key.slot);
        wgmma_wait<2>();
        pin(gradient);
        pin(weights);
        barrier_release(shared.key_empty(slot), lane);
      }
      pin(gradient);
      pin(weights);
      wgmma_fence();
      accumulate_weighted_rows<kBlockN>(gradient, weights, shared.key(key.slot));
      wgmma_commit();
      --block;
    }

    const int index[2] = {shared_load(data.indices() + 4 * row),
                          shared_load(data.indices() + 4 * row + 32)};
    barrier_release(shared.query_empty(query.slot), lane);
    query.advance();
    wgmma_wait<0>();
    pin(gradient);
    if (any) {
      barrier_release(shared.key_empty(key.slot), lane);
      key.advance();
    }
    const float scale[2] = {lse[0] == SCFA_INFINITY ? 0.0f : p.scale,
                            lse[1] == SCFA_INFINITY ? 0.0f : p.scale};
    scatter_columns<kColumns>(gradient, scale, p.dq.of_head(at.b, at.h), p.dq.row, index, lane);
    for (; block >= 0; --block) skip_block();
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    scfa_bwd_dq_sm90(const __grid_constant__ Params p) {
  if (share_of(p, kSplit) == kNone) return;
  extern __shared__ __align__(1024) char dynamic[];
  const Shared shared{shared_address(dynamic)};
  if (threadIdx.x == 0) {
    if (blockIdx.x == 0) p.row_lse[-1] = SCFA_INFINITY;  // the lse of queries that are not there
    for (int i = 0; i < kQueryBuffers; ++i) {
      barrier_init(shared.query_full(i), 2 * kAllGatherThreads);
      barrier_init(shared.query_empty(i), 4 * kWarpgroups * kReleases);
    }
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared.key_full(i), kGatherThreads);
      barrier_init(shared.key_empty(i), 4 * kWarpgroups * kReleases);
      if constexpr (kWide) barrier_init(shared.value_empty(i), 4 * kWarpgroups * kReleases);
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
