// parts_add: the sum of several arrays, in float32 and rounded once.
//
// computes       out = before + x_0 + x_1 + ..., in this order; `before` and out may be float32 between launches of many parts
// grid/block     256 threads, eight elements each
// inputs         arrays of the same elements in the same order of memory, a multiple of eight of them; `before` may be none
// memory         out may be x_0, or float32 what was before
#include "part_rows.cuh"

struct AddParams {
  const Element* parts[kMostParts];
  const float* before;
  Element* out;     // or none,
  float* wide_out;  // and this instead
  i64 chunks;       // of eight
  int n_parts, unused;
};

extern "C" __global__ void __launch_bounds__(kThreads) scfa_parts_add(const __grid_constant__ AddParams p) {
  const i64 chunk = i64(blockIdx.x) * kThreads + threadIdx.x;
  if (chunk >= p.chunks) return;
  const i64 offset = chunk * kColumns;
  float sums[kColumns] = {};
  if (p.before) load8(p.before + offset, sums);
  for (int part = 0; part < p.n_parts; ++part) {
    float values[kColumns];
    load8(p.parts[part] + offset, values);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] += values[i];
  }
  if (p.out) {
    store8(p.out + offset, sums);
  } else {
    store8(p.wide_out + offset, sums);
  }
}
