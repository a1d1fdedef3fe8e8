// parts_merge: one result of several that are over disjoint sets of keys, and of a sink.
//
// computes       lse = log(sum exp(lse_p) + exp(sink)), out = sum exp(lse_p - lse) out_p in float32, in the order of the parts,
//                rounded once; where there is neither a key nor a sink lse = -inf and out = 0
// grid/block     256 threads per tile of kRounds rounds of one (batch, head), see part_rows.cuh
// inputs         out_p (batch, heads, rows, head_dim), all with the same strides; lse_p (batch, heads, rows) contiguous; sinks (heads,)
//                or none, as float32
// memory         every element is read once and written once; out may be out_0, lse none of lse_p
#include "part_rows.cuh"

constexpr int kRounds = 4;

struct MergeParams {
  const Element* outs[kMostParts];
  const float* lses[kMostParts];
  const float* sinks;
  Element* out;
  float* lse;
  RowStrides strides;
  int parts, heads, rows, chunks, tiles, unused;
};

extern "C" __global__ void __launch_bounds__(kThreads) scfa_parts_merge(const __grid_constant__ MergeParams p) {
  const ThreadRows mine(p.heads, p.rows, p.chunks, p.tiles, kRounds);
  const float sink = p.sinks ? p.sinks[mine.head] : -infinity();
  for (u32 row = mine.row; row < mine.end; row += mine.step) {
    const i64 place = mine.list * p.rows + row, offset = mine.offset(p.strides, row);

    // lse: of all parts
    float most = sink;
    for (int part = 0; part < p.parts; ++part) most = fmaxf(most, p.lses[part][place]);
    const float base = most == -infinity() ? 0.0f : most;
    float total = expf(sink - base);
    for (int part = 0; part < p.parts; ++part) total += expf(p.lses[part][place] - base);
    const float scale = total == 0.0f ? 0.0f : 1.0f / total;
    if (mine.column == 0) p.lse[place] = base + logf(total);

    // out: by each part's share
    float sums[kColumns] = {};
    for (int part = 0; part < p.parts; ++part) {
      const float share = expf(p.lses[part][place] - base) * scale;
      float values[kColumns];
      load8(p.outs[part] + offset, values);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sums[i] = fmaf(share, values[i], sums[i]);
    }
    store8(p.out + offset, sums);
  }
}
