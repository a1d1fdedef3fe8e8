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
using std::fmaxf;

template <class To, class From>
SCFA_INLINE To bits_of(From x) {
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}
inline float __int_as_float(int x) { return bits_of<float>(x); }
SCFA_INLINE float __uint_as_float(unsigned x) { return bits_of<float>(x); }
inline unsigned __float_as_uint(float x) { return bits_of<unsigned>(x); }

inline bool __all_sync(unsigned lanes, bool vote) { return __ballot_sync(lanes, vote) == lanes; }
inline int reduce_on_host(int value, bool largest) {
  for (int other = 1; other < 32; other *= 2) {
    const int theirs = __shfl_xor_sync(~0u, value, other);
    value = (theirs > value) == largest ? theirs : value;
  }
  return value;
}
inline int __reduce_min_sync(unsigned, int value) { return reduce_on_host(value, false); }
inline int __reduce_max_sync(unsigned, int value) { return reduce_on_host(value, true); }

inline bool __syncthreads_or(bool vote) {
  host::slots[host::current] = vote;
  __syncthreads();
  bool any = false;
  for (auto slot : host::slots) any |= slot != 0;
  __syncthreads();
  return any;
}
inline bool __syncthreads_and(bool vote) { return !__syncthreads_or(!vote); }

#include "types.cuh"

inline float half_to_float(u16 x) {
  _Float16 h;
  std::memcpy(&h, &x, 2);
  return (float)h;
}
inline u16 float_to_16(float x) {
  if (!kIsBf16) {
    const _Float16 h = (_Float16)x;
    return bits_of<u16>(h);
  }
  const u32 bits = bits_of<u32>(x);
  if (x != x) return 0x7fff;
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
SCFA_INLINE float float_of_16(u16 x) { return kIsBf16 ? __uint_as_float(u32(x) << 16) : half_to_float(x); }

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

struct PendingCopy {
  void* target;
  const void* source;
  int bytes;
  bool wanted;
};
using CopyQueue = host::Groups<PendingCopy>;
static std::vector<CopyQueue> copy_queues;  // one per thread; cleared by the driver before each block

inline void copy16_async(u32 target, const void* source, bool wanted) {
  if ((size_t)source % 16 || target % 16) std::fprintf(stderr, "unaligned copy\n"), std::abort();
  copy_queues[host::current].open().push_back({dynamic_shared + target, source, 16, wanted});
}
inline void copy16_async(u32 target, const void* source) { copy16_async(target, source, true); }
inline void copy4_async(u32 target, const void* source, bool wanted) {
  copy_queues[host::current].open().push_back({dynamic_shared + target, source, 4, wanted});
}
inline void copies_commit() { copy_queues[host::current].close(); }
template <int kPending>
void copies_wait() {
  copy_queues[host::current].wait(kPending, [](const PendingCopy& copy) {
    if (copy.wanted) {
      std::memcpy(copy.target, copy.source, copy.bytes);
    } else {
      std::memset(copy.target, 0, copy.bytes);
    }
  });
}

inline u16 shared_element(u32 address, int column) { return *(const u16*)(dynamic_shared + address + 2 * column); }

inline void load_matrices_on_host(u32 (&r)[4], u32 address, bool transposed) {
  const int lane = host::current % 32, first = host::current - lane;
  if (address % 16) std::fprintf(stderr, "unaligned ldmatrix\n"), std::abort();
  host::slots[host::current] = address;
  host::wait_warp();
  for (int m = 0; m < 4; ++m) {
    u16 pair[2];
    for (int i = 0; i < 2; ++i) {
      const int outer = lane / 4, inner = 2 * (lane % 4) + i;
      pair[i] = transposed ? shared_element(u32(host::slots[first + 8 * m + inner]), outer)
                           : shared_element(u32(host::slots[first + 8 * m + outer]), inner);
    }
    r[m] = u32(pair[0]) | u32(pair[1]) << 16;
  }
  host::wait_warp();
}
inline void load_matrices(u32 (&r)[4], u32 address) { load_matrices_on_host(r, address, false); }
inline void load_matrices_transposed(u32 (&r)[4], u32 address) { load_matrices_on_host(r, address, true); }

inline u32 load_word(u32 address) { return *(const u32*)(dynamic_shared + address); }

// Element k of a row of fragments, of lanes first + 4 * row .. + 3: 16 bits lie by twos, float32 by fours.
inline float fragment_element(const std::vector<u32>& registers, int first, int row, int k, int slot, int slots_on) {
  if (kElementBytes == 2) {
    const u32 pair = registers[(first + row * 4 + k % 8 / 2) * 6 + slot + k / 8 * slots_on];
    return float_of_16(u16(pair >> k % 2 * 16));
  }
  const u32 word = registers[(first + row * 4 + k % 4) * 6 + slot + k / 4 * slots_on];
  if (word & 0x1fffu) std::fprintf(stderr, "a product of float32 that is not TF32\n"), std::abort();
  return __uint_as_float(word);
}

// PTX ISA, "Matrix fragments for mma.m16n8k16" and, of .tf32, "mma.m16n8k8": which lane and register holds which element.
inline void multiply_add(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  static std::vector<u32> registers;  // six per thread
  registers.resize(host::slots.size() * 6);
  const int lane = host::current % 32, first = host::current - lane;
  const u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(&registers[host::current * 6], mine, sizeof(mine));
  host::wait_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 32 / kElementBytes; ++k) {
      const float left = fragment_element(registers, first, row % 8, k, row / 8, 2);
      const float right = fragment_element(registers, first, column, k, 4, 1);
      acc[i] = fmaf(left, right, acc[i]);
    }
  }
  host::wait_warp();
}
