// sinks_gradient: what the rows of a tile add to the gradient of their head's sink.
//
// computes       partial[list, tile] = -sum over rows of exp(sink - lse) * (dout . out), in float32; a sink of -inf has none
// grid/block     256 threads per tile of kRounds rounds of one (batch, head), see part_rows.cuh; sums are made in one fixed order
// shared memory  a float for each warp
// inputs         dout, out (batch, heads, rows, head_dim), lse (batch, heads, rows) and sinks (heads,) contiguous float32
// memory         every element is read once
#include "part_rows.cuh"

constexpr int kRounds = 16;
constexpr int kWarps = kThreads / kWarpSize;

struct SinkParams {
  const Element *dout, *out;
  const float *lse, *sinks;
  float* partial;
  RowStrides dout_strides, out_strides;
  int heads, rows, chunks, tiles;
};

extern "C" __global__ void __launch_bounds__(kThreads) scfa_sinks_gradient(const __grid_constant__ SinkParams p) {
  __shared__ float of_warps[kWarps];
  const ThreadRows mine(p.heads, p.rows, p.chunks, p.tiles, kRounds);
  const float sink = p.sinks[mine.head];
  float sum = 0.0f;
  for (u32 row = mine.row; row < mine.end; row += mine.step) {
    const float weight = sink == -infinity() ? 0.0f : expf(sink - p.lse[mine.list * p.rows + row]);
    float dout[kColumns], out[kColumns], dot = 0.0f;
    load8(p.dout + mine.offset(p.dout_strides, row), dout);
    load8(p.out + mine.offset(p.out_strides, row), out);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) dot = fmaf(dout[i], out[i], dot);
    sum = fmaf(-weight, dot, sum);
  }
#pragma unroll
  for (int other = kWarpSize / 2; other > 0; other /= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = sum;
  __syncthreads();  // every warp's sum is there
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) sum += of_warps[warp];
    p.partial[blockIdx.x] = sum;
  }
}
