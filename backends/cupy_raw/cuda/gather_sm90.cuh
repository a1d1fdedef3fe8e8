// Gather rows by index from global memory into swizzled shared tiles (wgmma.cuh), and scatter
// accumulators back by index. One warpgroup gathers: eight lanes move the eight 16-byte chunks of a
// 128-byte row, sixteen rows a pass.
#pragma once

constexpr int kGatherThreads = 128;
constexpr int kLanesPerRow = 8;

// Row of a tile whose index this thread keeps in register `slot`: the lanes of a row group share
// the work.
template <int kThreads = kGatherThreads>
__device__ __forceinline__ int gather_owned_row(int thread, int slot) {
  return thread / kLanesPerRow + kThreads / kLanesPerRow * (thread % kLanesPerRow) +
         kThreads * slot;
}

// Start copying 16 bytes, or writing 16 zero bytes where `row` is negative, and bring the rest of
// the row (kPanels lines) into L2.
template <int kPanels>
__device__ __forceinline__ void copy_chunk(unsigned target, const char* source, int row) {
  if constexpr (kPanels == 1) {
    asm volatile(
        "{\n.reg .pred valid;\n.reg .b32 bytes;\nsetp.ge.s32 valid, %2, 0;\nselp.b32 bytes, 16, 0, "
        "valid;\n"
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, bytes;\n}" ::"r"(target),
        "l"(source), "r"(row));
  } else {
    asm volatile(
        "{\n.reg .pred valid;\n.reg .b32 bytes;\nsetp.ge.s32 valid, %2, 0;\nselp.b32 bytes, 16, 0, "
        "valid;\n"
        "cp.async.cg.shared.global.L2::256B [%0], [%1], 16, bytes;\n}" ::"r"(target),
        "l"(source), "r"(row));
  }
}

// Copy kRows rows of kColumns columns to a tile of kPanels panels; index -1 fills the row with
// zeros (and reads nothing), and zeros fill the columns that rows do not have. `source` is the
// head's first row plus this thread's chunk (16 bytes times its lane).
template <int kRows, int kPanels, int kThreads = kGatherThreads,
          int kColumns = kPanels * kPanelColumns>
__device__ __forceinline__ void gather_rows(unsigned tile, const char* source, int row_bytes,
                                            const int (&index)[(kRows + kThreads - 1) / kThreads],
                                            int thread) {
  constexpr int kRowsPerPass = kThreads / kLanesPerRow, kPasses = kRows / kRowsPerPass;
  static_assert(kRows % kRowsPerPass == 0, "whole passes");
  constexpr int kBatch = 4;  // index shuffles in flight together: their latency is what a pass
                             // would otherwise wait for
  const int lane = thread % kLanesPerRow, first = thread / kLanesPerRow;
  const unsigned target = tile + first * kRowBytes + ((lane ^ (first & 7)) << 4);
  // -1 in lanes whose chunk of the panel that rows end in they do not have.
  constexpr int kEnd = (kColumns - 1) / kPanelColumns;
  constexpr int kChunks = kColumns / 8 - kEnd * kLanesPerRow;
  constexpr bool kPartial = kChunks < kLanesPerRow;
  const int beyond = (kChunks - 1 - lane) >> 31;
  asm volatile("" : "+l"(source));  // one base register pair, not one sum of strides per row
#pragma unroll
  for (int pass0 = 0; pass0 < kPasses; pass0 += kBatch) {
    int row[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (pass0 + i >= kPasses) continue;
      row[i] = __shfl_sync(0xFFFFFFFFu, index[(pass0 + i) / kLanesPerRow],
                           (pass0 + i) % kLanesPerRow, kLanesPerRow);
      if (kPanels == 1 && kPartial) row[i] |= beyond;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (pass0 + i >= kPasses) continue;
      const char* address =
          source + static_cast<unsigned long long>(static_cast<unsigned>(row[i])) *
                       static_cast<unsigned>(row_bytes);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        // What a row does not have is beyond it: zeros, as where there is no row.
        const int wanted = panel > kEnd                ? -1
                           : kPartial && panel == kEnd ? row[i] | beyond
                                                       : row[i];
        copy_chunk<kPanels>(target + (panel * kRows + (pass0 + i) * kRowsPerPass) * kRowBytes,
                            address + panel * kRowBytes, wanted);
      }
    }
  }
}

// Copy four bytes, or write zero if `valid` is false.
__device__ __forceinline__ void copy_word(unsigned target, const void* source, bool valid) {
  if constexpr (kSanitize) {
    shared_store(target, valid ? *static_cast<const int*>(source) : 0);
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(source),
                 "r"(valid ? 4 : 0));
  }
}

// Give lane t of each quad the values that the four lanes hold in their register t: a 4 x 4
// transpose.
__device__ __forceinline__ void transpose_quad(unsigned (&r)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
  unsigned send = odd ? r[0] : r[1], other = __shfl_xor_sync(0xFFFFFFFFu, send, 1);
  if (odd)
    r[0] = other;
  else
    r[1] = other;
  send = odd ? r[2] : r[3];
  other = __shfl_xor_sync(0xFFFFFFFFu, send, 1);
  if (odd)
    r[2] = other;
  else
    r[3] = other;
  send = upper ? r[0] : r[2];
  other = __shfl_xor_sync(0xFFFFFFFFu, send, 2);
  if (upper)
    r[0] = other;
  else
    r[2] = other;
  send = upper ? r[1] : r[3];
  other = __shfl_xor_sync(0xFFFFFFFFu, send, 2);
  if (upper)
    r[1] = other;
  else
    r[3] = other;
}

// Write the first kColumns of one warp's 16 rows of 2 * kCount columns, scaled, in 16 bits, to the
// rows given by this lane's two indices (rows g and g + 8; -1 writes nothing). Scale 0 writes exact
// zeros whatever the accumulator holds.
template <int kColumns, int kCount>
__device__ __forceinline__ void scatter_columns(const float (&values)[kCount],
                                                const float (&scale)[2], char* head, int row_bytes,
                                                const int (&index)[2], int lane) {
  static_assert(kColumns % 8 == 0 && kColumns <= 2 * kCount, "whole chunks of what there is");
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    char* row = head + static_cast<long long>(index[half]) * row_bytes + (lane & 3) * 16;
#pragma unroll
    for (int block = 0; block < (kColumns + 31) / 32; ++block) {
      const int chunks = kColumns / 8 - 4 * block;  // of 16 bytes, one a lane, that rows have here
      unsigned pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 16 * block + 4 * i + 2 * half;
        pairs[i] = pack_pair(values[at] * scale[half], values[at + 1] * scale[half]);
        if (scale[half] == 0.0f) pairs[i] = 0;
      }
      transpose_quad(pairs, lane);
      if (index[half] >= 0 && (chunks >= 4 || (lane & 3) < chunks)) {
        *reinterpret_cast<uint4*>(row + block * 64) =
            make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
    }
  }
}

// All columns.
template <int kCount>
__device__ __forceinline__ void scatter_rows(const float (&values)[kCount], const float (&scale)[2],
                                             char* head, int row_bytes, const int (&index)[2],
                                             int lane) {
  scatter_columns<2 * kCount>(values, scale, head, row_bytes, index, lane);
}
