// The one vocabulary of every kernel: integer names, the element type, the conversions between it and float, and the
// constants that describe the problem. A kernel adds its own tile constants.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define SCFA_DEVICE __device__ __forceinline__

#ifndef SCFA_HEAD_DIM
#error "SCFA_HEAD_DIM: set by variants.py"
#endif
#ifndef SCFA_HEAD_DIM_V
#error "SCFA_HEAD_DIM_V: set by variants.py"
#endif
#ifndef SCFA_ELEMENT
#error "SCFA_ELEMENT (0 float32, 1 float16, 2 bfloat16, 3 float32 multiplied as TF32): set by variants.py"
#endif
#ifndef SCFA_ALIGNED
#error "SCFA_ALIGNED (1: rows start at multiples of 16 bytes, less than 4 GiB apart): set by variants.py"
#endif

constexpr int kHeadDim = SCFA_HEAD_DIM;
constexpr int kHeadDimV = SCFA_HEAD_DIM_V;
constexpr bool kIsBf16 = SCFA_ELEMENT == 2;
constexpr bool kIsTf32 = SCFA_ELEMENT == 3;
constexpr bool kAligned = SCFA_ALIGNED != 0;
static_assert(kHeadDim % 8 == 0 && kHeadDim >= 8 && kHeadDim <= 256, "head_dim is a multiple of 8, at most 256");
static_assert(kHeadDimV % 8 == 0 && kHeadDimV >= 8 && kHeadDimV <= 256, "head_dim_v is a multiple of 8, at most 256");

#if SCFA_ELEMENT == 0 || SCFA_ELEMENT == 3
using Element = float;
#else
using Element = u16;  // the bits of a half or a bfloat16
#endif

constexpr int kElementBytes = sizeof(Element);
constexpr int kChunkColumns = 16 / kElementBytes;  // one copy moves 16 bytes of a row
constexpr int kStepColumns = 32 / kElementBytes;   // one tensor-core product takes 32 bytes of a row

constexpr int kWarpSize = 32;
constexpr u32 kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kIntMax = 0x7fffffff;

SCFA_DEVICE float infinity() { return __int_as_float(0x7f800000); }

SCFA_DEVICE constexpr int ceil_div(int value, int unit) { return (value + unit - 1) / unit; }

SCFA_DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }

SCFA_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
