// What bwd_fused_sm90.cu and bwd_fused128_sm90.cu are told, and the sizes they have in common.
#pragma once

#if !defined(SCFA_HEAD_DIM) || !defined(SCFA_BLOCK_N) || !defined(SCFA_WARPGROUPS) || \
    !defined(SCFA_STAGES) || !defined(SCFA_QUERY_BUFFERS) || !defined(SCFA_SHARED_BYTES)
#error "the tile shape and SCFA_SHARED_BYTES: set by launch_sm90.py"
#endif
#include "mbarrier.cuh"
#include "products_sm90.cuh"
#include "params_sm90.cuh"
#include "choice_sm90.cuh"
#include "gather_sm90.cuh"
#include "query_data_sm90.cuh"
#include "softmax_sm90.cuh"

constexpr int kHeadDim = SCFA_HEAD_DIM;
constexpr int kWarpgroups = SCFA_WARPGROUPS;  // that own 64 keys each
constexpr int kBlockN = 64 * kWarpgroups;     // keys of a tile
constexpr int kBlockM = SCFA_BLOCK_N;         // queries of a step
constexpr int kChanges = SCFA_QUERY_BUFFERS;  // buffers of dS
constexpr int kRowThreads = 64;  // two warps gather; the other two of their warpgroup carry sums
constexpr int kCarriers = 2;
// Are tiles of several heads handed out in turn where ranges are short? At 128 it gains nothing.
constexpr bool kInTurn = kHeadDim == 64;
constexpr int kProducerBarrier = 1;  // named barrier of those that gather

constexpr int kKeyBytes = kBlockN * kHeadDim * 2;
constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
constexpr int kChangeBytes = kBlockN * kBlockM * 2;
constexpr int kSumFloats = kBlockM * kHeadDim;  // of one dq tile
constexpr int kSumBytes = 4 * kSumFloats;
constexpr int kDataBytes = query_data_bytes(kBlockM);
constexpr int kBounds = 4;  // of one query head (bwd_fused_sm90_tiles.cuh)
