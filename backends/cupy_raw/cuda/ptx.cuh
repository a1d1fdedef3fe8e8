// Every instruction that C++ has no word for: the only inline PTX of the portable kernels. Tests put a host version of
// this file in its place and run the kernels on the CPU.
#pragma once
#include "types.cuh"

// Two neighbouring 16-bit elements of one 32-bit word, low half first.
SCFA_DEVICE void unpack_pair(u32 word, float& low, float& high) {
  if constexpr (kIsBf16) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
  } else {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(word));
  }
}

SCFA_DEVICE u32 pack_pair(float low, float high) {
  u32 word;
  if constexpr (kIsBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

// The nearest of 10 mantissa bits, ties away from 0: what a tensor core multiplies of a float32.
SCFA_DEVICE float round_tf32(float x) {
  u32 rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return __uint_as_float(rounded);
}

SCFA_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

SCFA_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

SCFA_DEVICE u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

// The block's dynamic shared memory.
SCFA_DEVICE char* dynamic_shared_memory() {
  extern __shared__ __align__(128) char shared_bytes[];
  return shared_bytes;
}

// 16 bytes to a shared address in the background; zeros where the row is not wanted, and then nothing is read. No memory clobber: what they
// write is looked at only after copies_wait and a barrier, which have one.
SCFA_DEVICE void copy16_async(u32 target, const void* source, bool wanted) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(wanted ? 16 : 0));
}

SCFA_DEVICE void copy16_async(u32 target, const void* source) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(target), "l"(source));
}

SCFA_DEVICE void copy4_async(u32 target, const void* source, bool wanted) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(source), "r"(wanted ? 4 : 0));
}

SCFA_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
SCFA_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Keeps ordinary shared stores of this thread before the ldmatrix that follow them in program order.
SCFA_DEVICE void order_shared_accesses() { asm volatile("" ::: "memory"); }

// What other blocks of the grid wrote before they released a flag, once it is no longer 0. Who waits must have started after
// those it waits for.
SCFA_DEVICE int wait_for_flag(const int* flag) {
  int value;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  } while (value == 0);
  return value;
}

SCFA_DEVICE void release_flag(int* flag, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// Not from L1, which knows nothing of other blocks.
SCFA_DEVICE float load_of_others(const float* address) {
  float value;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
  return value;
}

// threadIdx.x, read anew: what is computed from it inside a loop stays there, instead of holding registers all the way.
SCFA_DEVICE int thread_here() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// blockIdx.x, read anew: an epilogue that asks again where it is keeps nothing alive through the main loop.
SCFA_DEVICE int block_here() {
  int block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

// Four 8 x 8 matrices of 16-bit elements, one row a lane by address, as mma operands: lane l gets row l / 4, columns
// 2 * (l % 4) and one on of each; transposed, column l / 4 and rows 2 * (l % 4) and one on. Of float32, a row of a matrix is
// 4 elements, and lane l gets column l % 4.
SCFA_DEVICE void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

SCFA_DEVICE void load_matrices_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// One float32 of shared memory: ldmatrix transposes 16-bit elements only.
SCFA_DEVICE u32 load_word(u32 address) {
  u32 word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}

// acc (16 x 8) += a (16 x kStepColumns) @ b (kStepColumns x 8); of float32 the 13 low bits are ignored
SCFA_DEVICE void multiply_add(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (kElementBytes == 4) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else if constexpr (kIsBf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}
