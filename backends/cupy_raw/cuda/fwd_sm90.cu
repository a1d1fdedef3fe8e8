// Forward attention over sorted key ranges on Hopper (wgmma), head_dim up to 256, 16-bit inputs.
//
// computes: out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j] and
//   lse[i] = log sum_j exp(scale * q[i] . k[j]), j over k_index[key_start[r] : key_end[r]] where
//   i = q_index[r].
// grid/block: one persistent block per SM; a tile is kBlockM sorted query rows of one head.
//   Warpgroup 0 gathers rows (cp.async), each of the others owns 64 query rows. Tiles come from an
//   atomic counter, one head after another (the last heads together), the last rows of a head first.
// shared memory: 2 * (kQueryBuffers * kBlockM + 2 * kStages * kBlockN) * kHeadDim bytes, row data of
//   as many tiles and, with several query buffers, of one more, barriers (kSharedBytes).
// inputs/outputs: Params (params_sm90.cuh): q, k, v, out (batch, heads, rows, head_dim) in 16 bits,
//   rows 16-byte aligned; lse float32.
// version and source: warp specialisation, two-group overlap, turns and register split after
//   FlashAttention-3 (Shah et al. 2024, section 3; hopper/mainloop_fwd_sm90_tma_gmma_ws.hpp). New
//   here: both operands gathered by sorted index, ranges, blocks skipped per warpgroup. What each
//   step gained: docs/perf/hopper.md.
#include "fwd_sm90_gather.cuh"

// Warpgroups 1..: scores, softmax and output of 64 query rows of each tile.
__device__ __forceinline__ void multiply_tiles(const Params& p, Shared shared, int group) {
  const int thread = threadIdx.x % 128, warp = uniform(thread / 32), lane = thread % 32;
  const int row =
      64 * group + 16 * warp + lane / 4;  // this thread's rows of the tile: row and row + 8
  Ring<kQueryBuffers> query;
  Ring<kStages> key, value;
  // What was copied by index may be overwritten by the tensor engine, though no product has read it.
  const auto before_release = [&]() {
    if constexpr (kRuns) async_proxy_fence();
  };
  const auto skip_block = [&]() {
    barrier_wait(shared.key_full(key.slot), key.parity);
    before_release();
    barrier_release(shared.key_empty(key.slot), lane);
    barrier_wait(shared.value_full(value.slot), value.parity);
    before_release();
    barrier_release(shared.value_empty(value.slot), lane);
    key.advance();
    value.advance();
  };

  // The warpgroups issue their products in turn, once per key block, so that one's softmax runs
  // beside another's products.
  const auto take_turn = [&]() { named_barrier_sync(kTurnBarrier + group, 256); };
  const auto pass_turn = [&]() {
    named_barrier_arrive(kTurnBarrier + (group + 1 == kWarpgroups ? 0 : group + 1), 256);
  };
  if (group == kWarpgroups - 1) pass_turn();  // the first turn is warpgroup 0's

  while (true) {
    const TileData<kBlockM> data = shared.data(query.slot);
    barrier_wait(shared.query_full(query.slot), query.parity);
    const int tile = uniform(shared_load(data.tile()));
    if (tile >= p.tiles) break;
    const int first_key = uniform(shared_load(data.first_key()));
    const RowExtremes rows =
        row_extremes(data.starts() + 256 * group, data.ends() + 256 * group, lane);
    int block = uniform(shared_load(data.key_blocks())) - 1;
    // Blocks [low_block, high_block) hold keys that a row of this warpgroup sees.
    const bool any = rows.outer_start < rows.outer_end;
    const int low_block = any ? (rows.outer_start - first_key) / kBlockN : 0;
    const int high_block = any ? (rows.outer_end - first_key + kBlockN - 1) / kBlockN : 0;
    const unsigned query_tile = shared.query(query.slot) + group * 64 * kRowBytes;

    float scores[kBlockN / 2], output[kWidth / 2];
    unsigned weights[kBlockN / 4];
    OnlineSoftmax softmax;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) output[i] = 0.0f;

    const unsigned own_start = data.starts() + 4 * row, own_end = data.ends() + 4 * row;
    float decay[2];
    bool decays = false;  // do earlier results shrink by it?
    const auto weigh = [&](auto& scores, int block) {
      mask_block(scores, rows, own_start, own_end, first_key + block * kBlockN, lane % 4);
      decays = softmax.update(scores, decay, p.scale_log2);
    };

    // Issue S = Q K^T, as one group. Q as A operand from registers, where it fits beside the rest, is
    // read from shared memory once a tile and not once a block.
    unsigned queries[kDepth / 4];
    if constexpr (kFrugal) {
      load_fragments<kBlockM, kDepth>(queries, query_tile, warp, lane);
      pin(queries);
    }
    const auto issue_scores = [&](auto& scores, unsigned slot) {
      if constexpr (kFrugal) {
        product_of_rows<kBlockN, kDepth>(scores, queries, shared.key(slot));
      } else {
        product_of_rows<kBlockM, kBlockN, kDepth>(scores, query_tile, shared.key(slot));
      }
      wgmma_commit();
    };

    for (; block >= high_block; --block) {
      take_turn();
      pass_turn();
      skip_block();
    }

    if (block >= low_block && any) {
      // S = Q K^T of the last block, nothing to overlap with yet.
      const auto begin = [&](auto& scores) {
        barrier_wait(shared.key_full(key.slot), key.parity);
        async_proxy_fence();
        take_turn();
        wgmma_fence();
        issue_scores(scores, key.slot);
        pass_turn();
        wgmma_wait<0>();
        pin(scores);
        barrier_release(shared.key_empty(key.slot), lane);
        key.advance();
        weigh(scores, block);
        pack_fragment(weights, scores);
      };
      if (kHalves && rows.outer_end - first_key <= block * kBlockN + kFewKeys) {
        float few[kFewKeys / 2];  // nobody here sees the other keys
        begin(few);
      } else {
        begin(scores);
      }

      // S of this block is computed while O += P V of the one before runs behind its softmax.
      for (--block; block >= low_block; --block) {
        barrier_wait(shared.key_full(key.slot), key.parity);
        if constexpr (kFrugal) barrier_wait(shared.value_full(value.slot), value.parity);
        async_proxy_fence();
        take_turn();
        pin(scores);
        pin(output);
        pin(weights);
        wgmma_fence();
        issue_scores(scores, key.slot);
        if constexpr (!kFrugal) {
          barrier_wait(shared.value_full(value.slot), value.parity);
          async_proxy_fence();
        }
        accumulate_weighted_rows<kBlockN>(output, weights, shared.value(value.slot));
        wgmma_commit();
        pass_turn();
        wgmma_wait<1>();
        pin(scores);
        barrier_release(shared.key_empty(key.slot), lane);
        key.advance();

        weigh(scores, block);

        wgmma_wait<0>();
        pin(output);
        pin(weights);
        barrier_release(shared.value_empty(value.slot), lane);
        value.advance();
        if (decays) scale_rows(output, decay);
        pack_fragment(weights, scores);
      }

      barrier_wait(shared.value_full(value.slot), value.parity);
      async_proxy_fence();
      pin(output);
      pin(weights);
      wgmma_fence();
      accumulate_weighted_rows<kBlockN>(output, weights, shared.value(value.slot));
      wgmma_commit();
    }

    const int index[2] = {shared_load(data.indices() + 4 * row),
                          shared_load(data.indices() + 4 * row + 32)};
    barrier_release(shared.query_empty(query.slot), lane);
    query.advance();
    float inverse[2], lse[2];
    softmax.finalize(inverse, lse, p.scale);
    wgmma_wait<0>();
    pin(output);
    if (any) {
      barrier_release(shared.value_empty(value.slot), lane);
      value.advance();
    }

    const QueryTile at = locate_query_tile<kBlockM>(p, tile);
    scatter_columns<kColumns>(output, inverse, p.out.of_head(at.b, at.h), p.out.row, index, lane);
    if (lane % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        char* address = p.lse.of_head(at.b, at.h) + static_cast<long long>(index[half]) * p.lse.row;
        if (index[half] >= 0) *reinterpret_cast<float*>(address) = lse[half];
      }
    }
    for (; block >= 0; --block) {
      take_turn();
      pass_turn();
      skip_block();
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    scfa_fwd_sm90(const __grid_constant__ Params p) {
  extern __shared__ char dynamic[];
  const Shared shared{(shared_address(dynamic) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kQueryBuffers; ++i) {
      barrier_init(shared.query_full(i), kGatherThreads + 1);
      barrier_init(shared.query_empty(i), 4 * kWarpgroups * kReleases);
    }
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared.key_full(i), kGatherThreads);
      barrier_init(shared.value_full(i), kGatherThreads);
      barrier_init(shared.key_empty(i), 4 * kWarpgroups * kReleases);
      barrier_init(shared.value_empty(i), 4 * kWarpgroups * kReleases);
    }
    if constexpr (kStaged) barrier_init(shared.staged_full(), kStagings);
    barrier_init_done();
  }
  __syncthreads();  // barriers are initialised
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    give_registers<kProducerRegisters>();
    if (keys_may_run(p)) {
      gather_tiles<kRuns>(p, shared);
    } else {
      gather_tiles<false>(p, shared);
    }
  } else {
    take_registers<kConsumerRegisters>();
    multiply_tiles(p, shared, warpgroup - 1);
  }
}
