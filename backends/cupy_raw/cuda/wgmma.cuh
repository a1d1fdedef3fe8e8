// The only inline PTX for sm_90a matrix products: wgmma m64nNk16 with fp32 accumulators, its
// descriptors and fences. B, and A where it is shared, are tiles of 128-byte rows (64 16-bit
// columns, one "panel") in the 128-byte swizzle: 16-byte chunk j of row r lies at chunk j ^ (r &
// 7). Wider tiles are panels one after another. Bases are 1024-byte aligned.
#pragma once

#ifndef SCFA_BFLOAT16
#error "SCFA_BFLOAT16: set by launch_sm90.py (1 bfloat16, 0 float16)"
#endif
#if SCFA_BFLOAT16
#define SCFA_WGMMA_TYPES "f32.bf16.bf16"
#else
#define SCFA_WGMMA_TYPES "f32.f16.f16"
#endif

constexpr int kPanelColumns = 64;
constexpr int kRowBytes = 128;     // one row of a panel
constexpr int kGroupBytes = 1024;  // eight rows: one period of the swizzle
constexpr int kStepColumns = 16;   // reduction depth of one instruction

#define SCFA_ACC16 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define SCFA_ACC24                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23}"
#define SCFA_ACC32                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define SCFA_ACC40                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39}"
#define SCFA_ACC48                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}"
#define SCFA_ACC64                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define SCFA_ACC96                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}"
#define SCFA_ACC128                                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                      \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"
#define SCFA_OUT8(d, i)                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define SCFA_OUT16(d) SCFA_OUT8(d, 0), SCFA_OUT8(d, 8)
#define SCFA_OUT24(d) SCFA_OUT16(d), SCFA_OUT8(d, 16)
#define SCFA_OUT32(d) SCFA_OUT8(d, 0), SCFA_OUT8(d, 8), SCFA_OUT8(d, 16), SCFA_OUT8(d, 24)
#define SCFA_OUT64(d) \
  SCFA_OUT32(d), SCFA_OUT8(d, 32), SCFA_OUT8(d, 40), SCFA_OUT8(d, 48), SCFA_OUT8(d, 56)
#define SCFA_OUT40(d) SCFA_OUT32(d), SCFA_OUT8(d, 32)
#define SCFA_OUT48(d) SCFA_OUT40(d), SCFA_OUT8(d, 40)
#define SCFA_OUT96(d) \
  SCFA_OUT64(d), SCFA_OUT8(d, 64), SCFA_OUT8(d, 72), SCFA_OUT8(d, 80), SCFA_OUT8(d, 88)
#define SCFA_OUT128(d) \
  SCFA_OUT96(d), SCFA_OUT8(d, 96), SCFA_OUT8(d, 104), SCFA_OUT8(d, 112), SCFA_OUT8(d, 120)

// How B is read: its columns are the reduction (K-major), or its rows are (MN-major).
enum class ReduceOver { kColumns, kRows };

// Descriptor of a swizzled tile: start, stride between eight-row groups, 128-byte swizzle;
// `panel_bytes` is the distance to the next 64 columns, used only where the rows are reduced over
// and more than 64 columns are produced.
__device__ __forceinline__ unsigned long long tile_descriptor(unsigned address,
                                                              unsigned panel_bytes = 16) {
  const unsigned low = ((address & 0x3FFFFu) >> 4) | ((panel_bytes >> 4) << 16);
  const unsigned high = (kGroupBytes >> 4) | (1u << 30);
  return (static_cast<unsigned long long>(high) << 32) | low;
}

// Byte offset of reduction step `step` in a tile of kRows rows.
template <int kRows, ReduceOver kReduce>
__device__ __forceinline__ constexpr unsigned step_offset(int step) {
  return kReduce == ReduceOver::kRows
             ? step * kStepColumns * kRowBytes
             : (step / 4) * kRows * kRowBytes + (step % 4) * kStepColumns * 2;
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Pin registers at this point of the program, so that no use of them moves across a fence or wait.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin(unsigned (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// d (+)= A B, A and B in shared memory, both K-major.
template <int kCount>
__device__ __forceinline__ void wgmma_shared(float (&d)[kCount], unsigned long long a,
                                             unsigned long long b, int accumulate) {
  if constexpr (kCount == 32) {
    asm volatile(
        "{\n.reg .pred acc;\nsetp.ne.b32 acc, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16." SCFA_WGMMA_TYPES " " SCFA_ACC32
        ", %32, %33, acc, 1, 1, 0, 0;\n}"
        : SCFA_OUT32(d)
        : "l"(a), "l"(b), "r"(accumulate));
  } else if constexpr (kCount == 24) {
    asm volatile(
        "{\n.reg .pred acc;\nsetp.ne.b32 acc, %26, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n48k16." SCFA_WGMMA_TYPES " " SCFA_ACC24
        ", %24, %25, acc, 1, 1, 0, 0;\n}"
        : SCFA_OUT24(d)
        : "l"(a), "l"(b), "r"(accumulate));
  } else if constexpr (kCount == 40) {
    asm volatile(
        "{\n.reg .pred acc;\nsetp.ne.b32 acc, %42, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16." SCFA_WGMMA_TYPES " " SCFA_ACC40
        ", %40, %41, acc, 1, 1, 0, 0;\n}"
        : SCFA_OUT40(d)
        : "l"(a), "l"(b), "r"(accumulate));
  } else if constexpr (kCount == 48) {
    asm volatile(
        "{\n.reg .pred acc;\nsetp.ne.b32 acc, %50, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16." SCFA_WGMMA_TYPES " " SCFA_ACC48
        ", %48, %49, acc, 1, 1, 0, 0;\n}"
        : SCFA_OUT48(d)
        : "l"(a), "l"(b), "r"(accumulate));
  } else {
    static_assert(kCount == 64, "48, 64, 80, 96 or 128 columns");
    asm volatile(
        "{\n.reg .pred acc;\nsetp.ne.b32 acc, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16." SCFA_WGMMA_TYPES " " SCFA_ACC64
        ", %64, %65, acc, 1, 1, 0, 0;\n}"
        : SCFA_OUT64(d)
        : "l"(a), "l"(b), "r"(accumulate));
  }
}

// d = A B, or d += A B, where the reduction is along both tiles' columns, or both tiles' rows (then
// 64 columns of A and of B are multiplied). Unlike above, a product that starts a sum
// says so to the compiler: what d held before need not be kept in registers until then.
#define SCFA_NEW8(d, i)                                                                       \
  "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3]), "=f"(d[i + 4]), "=f"(d[i + 5]), \
      "=f"(d[i + 6]), "=f"(d[i + 7])
#define SCFA_NEW16(d) SCFA_NEW8(d, 0), SCFA_NEW8(d, 8)
#define SCFA_NEW32(d) SCFA_NEW16(d), SCFA_NEW8(d, 16), SCFA_NEW8(d, 24)
#define SCFA_ISSUE_SHARED(shape, list, operands, a_at, b_at, sum_at, transposed_at)            \
  asm volatile("{\n.reg .pred acc;\nsetp.ne.b32 acc, " sum_at                                 \
               ", 0;\nwgmma.mma_async.sync.aligned." shape "." SCFA_WGMMA_TYPES " " list ", " a_at \
               ", " b_at ", acc, 1, 1, " transposed_at ", " transposed_at ";\n}"              \
               : operands                                                                      \
               : "l"(a), "l"(b), "n"(static_cast<int>(kSum)), "n"(kTransposed))
template <ReduceOver kReduce, bool kSum, int kCount>
__device__ __forceinline__ void wgmma_issue(float (&d)[kCount], unsigned long long a,
                                            unsigned long long b) {
  static_assert(kCount == 32, "64 columns");
  constexpr int kTransposed = kReduce == ReduceOver::kRows;
  if constexpr (kSum) {
    SCFA_ISSUE_SHARED("m64n64k16", SCFA_ACC32, SCFA_OUT32(d), "%32", "%33", "%34", "%35");
  } else {
    SCFA_ISSUE_SHARED("m64n64k16", SCFA_ACC32, SCFA_NEW32(d), "%32", "%33", "%34", "%35");
  }
}

// d (+)= A B, A in registers (one 64 x 16 fragment), B in shared memory.
template <ReduceOver kReduce, int kCount>
__device__ __forceinline__ void wgmma_registers(float (&d)[kCount], unsigned a0, unsigned a1,
                                                unsigned a2, unsigned a3, unsigned long long b,
                                                int accumulate) {
  constexpr int kTransposeB = kReduce == ReduceOver::kRows;
  if constexpr (kCount == 32) {
    asm volatile(
        "{\n.reg .pred acc;\nsetp.ne.b32 acc, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16." SCFA_WGMMA_TYPES " " SCFA_ACC32
        ", {%32, %33, %34, %35}, %36, acc, 1, 1, %38;\n}"
        : SCFA_OUT32(d)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate), "n"(kTransposeB));
  } else if constexpr (kCount == 16) {
    asm volatile(
        "{\n.reg .pred acc;\nsetp.ne.b32 acc, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16." SCFA_WGMMA_TYPES " " SCFA_ACC16
        ", {%16, %17, %18, %19}, %20, acc, 1, 1, %22;\n}"
        : SCFA_OUT16(d)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate), "n"(kTransposeB));
  } else if constexpr (kCount == 48) {
    asm volatile(
        "{\n.reg .pred acc;\nsetp.ne.b32 acc, %53, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16." SCFA_WGMMA_TYPES " " SCFA_ACC48
        ", {%48, %49, %50, %51}, %52, acc, 1, 1, %54;\n}"
        : SCFA_OUT48(d)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate), "n"(kTransposeB));
  } else if constexpr (kCount == 96) {
    asm volatile(
        "{\n.reg .pred acc;\nsetp.ne.b32 acc, %101, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k16." SCFA_WGMMA_TYPES " " SCFA_ACC96
        ", {%96, %97, %98, %99}, %100, acc, 1, 1, %102;\n}"
        : SCFA_OUT96(d)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate), "n"(kTransposeB));
  } else if constexpr (kCount == 128) {
    asm volatile(
        "{\n.reg .pred acc;\nsetp.ne.b32 acc, %133, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16." SCFA_WGMMA_TYPES " " SCFA_ACC128
        ", {%128, %129, %130, %131}, %132, acc, 1, 1, %134;\n}"
        : SCFA_OUT128(d)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate), "n"(kTransposeB));
  } else {
    static_assert(kCount == 64, "32, 64, 96, 128, 192 or 256 columns");
    asm volatile(
        "{\n.reg .pred acc;\nsetp.ne.b32 acc, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16." SCFA_WGMMA_TYPES " " SCFA_ACC64
        ", {%64, %65, %66, %67}, %68, acc, 1, 1, %70;\n}"
        : SCFA_OUT64(d)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate), "n"(kTransposeB));
  }
}
