// Rows of a list that also follow one another in memory (a run), fetched by the bulk tensor engine: one
// instruction for 32 rows. Where a tile's rows may be runs, each warp fetches 32 of a block, in this way if
// they are one, by index otherwise; that, it finds out from the indices themselves.
#pragma once

#include "order_sm90.cuh"

#ifndef SCFA_RUNS
#define SCFA_RUNS 0  // 1: the host gave tensor maps
#endif
// compute-sanitizer does not see what the engine writes (kSanitize in mbarrier.cuh).
constexpr bool kRuns = SCFA_RUNS && kMonotone && !kSanitize;
constexpr int kRunRows = 32;  // of a box of the tensor maps, which are 64 columns wide

// Row of a block whose index this thread keeps: where rows may be runs, each warp has its own.
template <bool kMayRun, int kThreads>
__device__ __forceinline__ int fetch_owned_row(int thread) {
  return kMayRun ? thread : gather_owned_row<kThreads>(thread, 0);
}

// Are the rows of a warp's lanes a run that begins at `first`, the first lane's? Row -1, which is none,
// may come before row 0: the engine writes zeros for what lies outside an array.
__device__ __forceinline__ bool is_run(int row, int first, int lane) {
  return __all_sync(0xFFFFFFFFu, row == first + lane);
}

// The first lane starts the copy of 32 rows from `first` on, one box a panel of a tile of kRows rows; the
// barrier waits for their bytes, beside the arrivals it was initialised with. Predicates, not branches: where
// one lane goes alone, ptxas writes all that follows twice.
template <int kRows, int kPanels>
__device__ __forceinline__ void copy_run(unsigned target, const TensorMap& map, int first, int h, int b,
                                         unsigned barrier, int lane) {
  asm volatile(
      "{\n.reg .pred first;\nsetp.eq.s32 first, %2, 0;\n"
      "@first mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;\n}" ::"r"(barrier),
      "n"(kPanels * kRunRows * kRowBytes), "r"(lane)
      : "memory");
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    asm volatile(
        "{\n.reg .pred first;\nsetp.eq.s32 first, %7, 0;\n"
        "@first cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];\n}" ::"r"(target + panel * kRows * kRowBytes),
        "l"(&map), "r"(panel * kPanelColumns), "r"(first), "r"(h), "r"(b), "r"(barrier), "r"(lane)
        : "memory");
  }
}

// Copy this warp's 32 rows by index, -1 for zeros; lane l knows that of row l. Rows are what gather_rows
// makes of them; this form takes few registers, as it seldom runs.
template <int kRows, int kPanels, int kColumns>
__device__ __forceinline__ void gather_own_rows(unsigned target, const char* source, int row_bytes,
                                                int index, int lane) {
  constexpr int kRowsPerPass = 32 / kLanesPerRow, kPasses = kRunRows / kRowsPerPass, kBatch = 4;
  constexpr int kEnd = (kColumns - 1) / kPanelColumns;
  constexpr int kChunks = kColumns / 8 - kEnd * kLanesPerRow;
  constexpr bool kPartial = kChunks < kLanesPerRow;
  const int chunk = lane % kLanesPerRow, first = lane / kLanesPerRow;
  const int beyond = (kChunks - 1 - chunk) >> 31;
  const unsigned even = target + first * kRowBytes + ((chunk ^ first) << 4);
  asm volatile("" : "+l"(source));  // as in gather_rows
#pragma unroll 1
  for (int pass0 = 0; pass0 < kPasses; pass0 += kBatch) {
    int row[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      row[i] = __shfl_sync(0xFFFFFFFFu, index, (pass0 + i) * kRowsPerPass + first);
      if (kPanels == 1 && kPartial) row[i] |= beyond;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const char* address =
          source + static_cast<unsigned long long>(static_cast<unsigned>(row[i])) *
                       static_cast<unsigned>(row_bytes);
      // Rows of odd passes are 4 to 7 of 8: the swizzle differs by a bit.
      const unsigned at = (i & 1 ? even ^ 64 : even) + (pass0 + i) * kRowsPerPass * kRowBytes;
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const int wanted = panel > kEnd                ? -1
                           : kPartial && panel == kEnd ? row[i] | beyond
                                                       : row[i];
        copy_chunk<kPanels>(at + panel * kRows * kRowBytes, address + panel * kRowBytes, wanted);
      }
    }
  }
}

// Fetch this warp's 32 rows of a block, `index` of which each lane has one, -1 for zeros; an arrival of each
// thread is left to the caller.
template <int kRows, int kPanels, int kColumns>
__device__ __forceinline__ void fetch_own_rows(unsigned block, const TensorMap& map, int h, int b,
                                               const char* source, int row_bytes, int index,
                                               unsigned barrier, int thread) {
  const int lane = thread % 32, first = __shfl_sync(0xFFFFFFFFu, index, 0);
  const unsigned target = block + thread / 32 * kRunRows * kRowBytes;
  if (is_run(index, first, lane)) {
    copy_run<kRows, kPanels>(target, map, first, h, b, barrier, lane);
  } else {
    gather_own_rows<kRows, kPanels, kColumns>(target, source, row_bytes, index, lane);
  }
}
