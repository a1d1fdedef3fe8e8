// scfa_fwd_few_merge: one result of what fwd_few found in each chunk of the keys.
//
// computes       lse = log(sum exp(lse_s)), out = sum exp(lse_s - lse) out_s, in the order of the chunks; out = 0 and lse = -inf where
//                no chunk has a key of the row
// grid/block     one block of 128 threads per sorted query row; a thread takes four columns of every so many chunks
// inputs         what fwd_few left; q_index of the plan
// version        out_s is read of chunks alone that the row sees keys of
#include "copy.cuh"
#include "few.cuh"

constexpr int kThreads = 128;
constexpr int kMostSplits = 32;
constexpr int kQuads = kHeadDimV / 4;
constexpr int kTeams = kThreads / kQuads;  // each takes every kTeams-th chunk

extern "C" __global__ void __launch_bounds__(kThreads) scfa_fwd_few_merge(const __grid_constant__ FewParams few) {
  __shared__ float shares[kMostSplits];
  __shared__ float4 sums[kTeams][kQuads];
  const Params& p = few.call;
  const i64 entry = blockIdx.x, rows_of_all = i64(p.batch) * p.heads * p.seqlen_q;
  const int list = int(entry / p.seqlen_q), batch = list / p.heads, head = list % p.heads;
  const int q_row = p.q_index[entry];

  // shares: of each chunk; `splits` is kMostSplits at most
  if (threadIdx.x < kWarpSize) {
    const int lane = threadIdx.x;
    const float lse = lane < few.splits ? few.part_lse[lane * rows_of_all + entry] : -infinity();
    float most = lse;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
    const float base = most == -infinity() ? 0.0f : most;
    const float weight = exp2_fast((lse - base) * kLog2E);
    float total = weight;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) total += __shfl_xor_sync(kAllLanes, total, step);
    shares[lane] = weight == 0.0f ? 0.0f : weight / total;
    if (lane == 0) head_base(p.lse, p.lse_strides, batch, head)[q_row * p.lse_strides.row] = total == 0.0f ? -infinity() : base + logf(total);
  }
  __syncthreads();  // shares are known

  // out: each team's chunks, then the teams'
  const int quad = threadIdx.x % kQuads, team = threadIdx.x / kQuads;
  if (team < kTeams) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int split = team; split < few.splits; split += kTeams) {
      const float share = shares[split];
      if (share == 0.0f) continue;  // it may have no out
      const float4 part = *reinterpret_cast<const float4*>(few.part_out + (split * rows_of_all + entry) * kHeadDimV + 4 * quad);
      sum.x = fmaf(share, part.x, sum.x), sum.y = fmaf(share, part.y, sum.y);
      sum.z = fmaf(share, part.z, sum.z), sum.w = fmaf(share, part.w, sum.w);
    }
    sums[team][quad] = sum;
  }
  __syncthreads();  // every team's sum is there
  for (int column = threadIdx.x; column < kHeadDimV; column += kThreads) {
    float value = 0.0f;
#pragma unroll
    for (int t = 0; t < kTeams; ++t) value += reinterpret_cast<const float*>(sums[t])[column];
    head_base(p.out, p.out_strides, batch, head)[q_row * p.out_strides.row + column] = from_float<Element>(value);
  }
}
