// ptx.cuh for the CPU: takes its place when the kernels run on the fibers of cuda_on_host.hpp.
//
// Background copies happen as late as their waits allow, so a wait that is missing or too weak shows as stale data.
#pragma once
#define __align__(n) alignas(n)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

template <class To, class From>
SCFA_INLINE To bits_of(From x) {
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}
SCFA_INLINE float __fmul_rn(float x, float y) { return x * y; }  // -ffp-contract=off
inline float __int_as_float(int x) { return bits_of<float>(x); }
SCFA_INLINE float __uint_as_float(unsigned x) { return bits_of<float>(x); }
inline unsigned __float_as_uint(float x) { return bits_of<unsigned>(x); }

inline bool __all_sync(unsigned lanes, bool vote) { return __ballot_sync(lanes, vote) == lanes; }
inline int __reduce_min_sync(unsigned, int value) { return host::reduce_warp(value, false); }
inline int __reduce_max_sync(unsigned, int value) { return host::reduce_warp(value, true); }

inline bool __syncthreads_or(bool vote) { return host::any_of_block(vote); }
inline bool __syncthreads_and(bool vote) { return !host::any_of_block(!vote); }

#include "types.cuh"

inline u16 float_to_16(float x) {
  if (!kIsBf16) {
    const _Float16 h = (_Float16)x;
    return bits_of<u16>(h);
  }
  const u32 bits = bits_of<u32>(x);
  if (x != x) return 0x7fff;
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
SCFA_INLINE float float_of_16(u16 x) { return host::number_of_16(x, kIsBf16); }

SCFA_INLINE void unpack_pair(u32 word, float& low, float& high) { low = float_of_16(u16(word)), high = float_of_16(u16(word >> 16)); }
inline u32 pack_pair(float low, float high) { return u32(float_to_16(low)) | u32(float_to_16(high)) << 16; }
// To the nearest of 10 mantissa bits, ties away from 0; NaN and Inf stay what they are.
inline float round_tf32(float x) {
  const u32 bits = bits_of<u32>(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return __uint_as_float((x != x ? 0x7fc00000u : bits + (finite ? 0x1000u : 0u)) & 0xffffe000u);
}
inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }
inline u32 shared_address(const void* pointer) { return u32((const char*)pointer - dynamic_shared); }
inline char* dynamic_shared_memory() { return dynamic_shared; }
inline void order_shared_accesses() {}
inline int thread_here() { return threadIdx.x; }
inline int block_here() { return blockIdx.x; }

// Blocks run one after the other: what one waits for has been written, or never will be.
inline int wait_for_flag(const int* flag) {
  if (*flag == 0) std::fprintf(stderr, "block %u waits for one that has not run\n", blockIdx.x), std::abort();
  return *flag;
}
inline void release_flag(int* flag, int value) { *flag = value; }
inline float load_of_others(const float* address) { return *address; }

inline void copy16_async(u32 target, const void* source, bool wanted) { host::queue_copy(target, source, 16, wanted); }
inline void copy16_async(u32 target, const void* source) { host::queue_copy(target, source, 16, true); }
inline void copy4_async(u32 target, const void* source, bool wanted) { host::queue_copy(target, source, 4, wanted); }
inline void copies_commit() { host::close_copies(); }
template <int kPending>
void copies_wait() {
  host::end_copies(kPending);
}

inline void load_matrices(u32 (&r)[4], u32 address) { host::load_matrices(r, address, false); }
inline void load_matrices_transposed(u32 (&r)[4], u32 address) { host::load_matrices(r, address, true); }

inline u32 load_word(u32 address) { return *(const u32*)(dynamic_shared + address); }

inline void multiply_add(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  constexpr host::Kind kOf16 = kIsBf16 ? host::Kind::bfloat16 : host::Kind::float16;
  constexpr host::Kind kKind = kElementBytes == 4 ? host::Kind::tf32 : kOf16;
  host::multiply_add(acc, {a[0], a[1], a[2], a[3], b0, b1}, kKind);
}
