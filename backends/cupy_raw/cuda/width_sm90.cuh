// How wide rows are, for the kernels that serve more head_dims than they have tile widths. Shared
// tiles are whole panels (SCFA_HEAD_DIM columns); the columns that rows do not have are zeros there
// and are never stored. Products reduce over kDepth and make kWidth columns, no more than needed.
#pragma once

#ifndef SCFA_COLUMNS
#define SCFA_COLUMNS SCFA_HEAD_DIM
#endif

constexpr int kHeadDim = SCFA_HEAD_DIM;  // of a shared tile
constexpr int kColumns = SCFA_COLUMNS;   // of the arrays: head_dim
constexpr int kPanels = kHeadDim / 64;

__device__ constexpr int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

constexpr int kDepth = round_up(kColumns, 16);
constexpr int kWidth = round_up(kColumns, kColumns <= 128 ? 32 : 64);
static_assert(kHeadDim % 64 == 0 && kColumns % 8 == 0, "whole panels, whole 16-byte chunks");
static_assert(0 < kColumns && kColumns <= kHeadDim, "the tile holds the row");

// gather_rows of rows this wide.
template <int kRows>
__device__ __forceinline__ void gather_tile(
    unsigned tile, const char* source, int row_bytes,
    const int (&index)[(kRows + kGatherThreads - 1) / kGatherThreads], int thread) {
  gather_rows<kRows, kPanels, kGatherThreads, kColumns>(tile, source, row_bytes, index, thread);
}
