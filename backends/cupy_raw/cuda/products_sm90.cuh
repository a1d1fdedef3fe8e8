// Products of whole tiles by the instructions of wgmma.cuh, and what goes between their operands:
// accumulators packed to 16-bit fragments, fragments loaded from and stored to swizzled tiles.
#pragma once

#include "wgmma.cuh"

// d = A B^T over all columns, added to d with kSum: A is 64 rows of a tile of kRowsA rows, B a tile of
// kRowsB rows. Issues only; commit and wait are the caller's.
template <int kRowsA, int kRowsB, int kHeadDim, bool kSum = false, int kCount>
__device__ __forceinline__ void product_of_rows(float (&d)[kCount], unsigned tile_a,
                                                unsigned tile_b) {
  const unsigned long long a = tile_descriptor(tile_a), b = tile_descriptor(tile_b);
#pragma unroll
  for (int step = 0; step < kHeadDim / kStepColumns; ++step) {
    wgmma_shared(d, a + (step_offset<kRowsA, ReduceOver::kColumns>(step) >> 4),
                 b + (step_offset<kRowsB, ReduceOver::kColumns>(step) >> 4), kSum || step != 0);
  }
}

// d = A B^T with A already in registers, as fragments (load_fragments) of 64 rows.
template <int kRowsB, int kHeadDim, bool kSum = false, int kCount>
__device__ __forceinline__ void product_of_rows(float (&d)[kCount],
                                                const unsigned (&a)[kHeadDim / 4],
                                                unsigned tile_b) {
  const unsigned long long b = tile_descriptor(tile_b);
#pragma unroll
  for (int step = 0; step < kHeadDim / kStepColumns; ++step) {
    wgmma_registers<ReduceOver::kColumns>(
        d, a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3],
        b + (step_offset<kRowsB, ReduceOver::kColumns>(step) >> 4), kSum || step != 0);
  }
}

// d += W B: W is 64 x kRowsB in registers (16-bit pairs), B a tile of kRowsB rows and 2 * kCount
// columns.
template <int kRowsB, int kCount>
__device__ __forceinline__ void accumulate_weighted_rows(float (&d)[kCount],
                                                         const unsigned (&weights)[kRowsB / 4],
                                                         unsigned tile_b) {
  const unsigned long long b = tile_descriptor(tile_b, kRowsB * kRowBytes);
#pragma unroll
  for (int step = 0; step < kRowsB / kStepColumns; ++step) {
    wgmma_registers<ReduceOver::kRows>(d, weights[4 * step], weights[4 * step + 1],
                                       weights[4 * step + 2], weights[4 * step + 3],
                                       b + (step_offset<kRowsB, ReduceOver::kRows>(step) >> 4), 1);
  }
}

// d = A B^T as in product_of_rows, for 64 rows of a tile of kRowsA rows and 64 of a tile of kRowsB.
template <int kRowsA, int kRowsB, int kHeadDim>
__device__ __forceinline__ void new_product_of_rows(float (&d)[32], unsigned tile_a,
                                                    unsigned tile_b) {
  const unsigned long long a = tile_descriptor(tile_a), b = tile_descriptor(tile_b);
  wgmma_issue<ReduceOver::kColumns, false>(d, a, b);
#pragma unroll
  for (int step = 1; step < kHeadDim / kStepColumns; ++step) {
    wgmma_issue<ReduceOver::kColumns, true>(
        d, a + (step_offset<kRowsA, ReduceOver::kColumns>(step) >> 4),
        b + (step_offset<kRowsB, ReduceOver::kColumns>(step) >> 4));
  }
}

// The same, added to d with kSum, of an A whose first columns, kHeld / 4 steps of 16, are in
// registers as well (load_fragments): they are not read from shared memory again.
template <int kRowsA, int kRowsB, int kHeadDim, bool kSum, int kHeld>
__device__ __forceinline__ void product_of_held_rows(float (&d)[32], const unsigned (&held)[kHeld],
                                                     unsigned tile_a, unsigned tile_b) {
  const unsigned long long a = tile_descriptor(tile_a), b = tile_descriptor(tile_b);
#pragma unroll
  for (int step = 0; step < kHeadDim / kStepColumns; ++step) {
    const unsigned long long right = b + (step_offset<kRowsB, ReduceOver::kColumns>(step) >> 4);
    if (4 * step < kHeld) {
      wgmma_registers<ReduceOver::kColumns>(d, held[4 * step], held[4 * step + 1],
                                            held[4 * step + 2], held[4 * step + 3], right,
                                            kSum || step != 0);
    } else {
      wgmma_issue<ReduceOver::kColumns, true>(
          d, a + (step_offset<kRowsA, ReduceOver::kColumns>(step) >> 4), right);
    }
  }
}

// d = A^T B over kRows rows: A is one panel, B starts at `tile_b` within one.
template <int kRows, int kCount>
__device__ __forceinline__ void product_of_columns(float (&d)[kCount], unsigned tile_a,
                                                   unsigned tile_b) {
  constexpr unsigned kStep = step_offset<kRows, ReduceOver::kRows>(1) >> 4;
  const unsigned long long a = tile_descriptor(tile_a), b = tile_descriptor(tile_b);
  wgmma_issue<ReduceOver::kRows, false>(d, a, b);
#pragma unroll
  for (int step = 1; step < kRows / kStepColumns; ++step) {
    wgmma_issue<ReduceOver::kRows, true>(d, a + step * kStep, b + step * kStep);
  }
}

// Two floats to a 16-bit pair, `low` in the lower half, rounded to nearest even.
__device__ __forceinline__ unsigned pack_pair(float low, float high) {
  unsigned pair;
#if SCFA_BFLOAT16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}

__device__ __forceinline__ void unpack_pair(unsigned pair, float& low, float& high) {
#if SCFA_BFLOAT16
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xFFFF0000u);
#else
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
      : "=f"(low), "=f"(high)
      : "r"(pair));
#endif
}

// Accumulator layout -> A-operand layout of the same thread: consecutive pairs (row g, row g + 8,
// then eight columns on). Zeros where there are fewer values than columns.
template <int kPairs, int kCount>
__device__ __forceinline__ void pack_fragment(unsigned (&packed)[kPairs],
                                              const float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i)
    packed[i] = 2 * i < kCount ? pack_pair(values[2 * i], values[2 * i + 1]) : 0;
}

// This warp's 16 rows (of the 64 at `tile`) of a swizzled tile of kRows rows, as A operand: four
// registers per 16 columns.
template <int kRows, int kHeadDim>
__device__ __forceinline__ void load_fragments(unsigned (&a)[kHeadDim / 4], unsigned tile, int warp,
                                               int lane) {
  const int row = 16 * warp + (lane & 15);
#pragma unroll
  for (int step = 0; step < kHeadDim / kStepColumns; ++step) {
    const int chunk = 2 * (step % 4) + (lane >> 4);
    const unsigned address =
        tile + (step / 4) * kRows * kRowBytes + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[4 * step]), "=r"(a[4 * step + 1]), "=r"(a[4 * step + 2]),
                   "=r"(a[4 * step + 3])
                 : "r"(address)
                 : "memory");
  }
}

// The other way round: this warp's 16 rows of `a` to 16 rows of a one-panel tile of 64 columns.
__device__ __forceinline__ void store_fragments(unsigned tile, const unsigned (&a)[16], int warp,
                                                int lane) {
  const int row = 16 * warp + (lane & 15);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int chunk = 2 * step + (lane >> 4);
    const unsigned address = tile + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(a[4 * step]), "r"(a[4 * step + 1]), "r"(a[4 * step + 2]),
                 "r"(a[4 * step + 3])
                 : "memory");
  }
}
