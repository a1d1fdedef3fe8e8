// Enough of CUDA to run one block after another on the host, so that kernels without tensor cores can be tested where
// there is no GPU. Every thread is a fiber that runs until a barrier; `order` chooses who goes first, so that a
// missing barrier shows as a result that depends on it. Reads and writes of shared memory are real.
//
// Every variant of a kernel parses this, so it only declares: cuda_on_host.cpp, compiled once, is linked to each.
#pragma once

// All that any header here includes: this one is parsed once. <cmath> would be two thirds of it.
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <math.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define SCFA_HOST 1
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SCFA_INLINE inline __attribute__((always_inline))  // also under -Og: small, and called without end

struct Index3 {
  unsigned x, y, z;
};
struct ushort4 {
  unsigned short x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};

#pragma GCC visibility push(hidden)  // each library has its own of all this, and finds it without a table
extern Index3 threadIdx, blockIdx, blockDim, gridDim;
extern char* dynamic_shared;

namespace host {

constexpr int kWarp = 32, kMostThreads = 1024;

struct Barrier {
  int arrived = 0, generation = 0;
};

// What every thread of a block does: a closure of references and numbers, which is held here.
struct Body {
  alignas(16) char closure[64];
  void (*call)(const char*);
  template <class Closure>
  void operator=(const Closure& given) {
    static_assert(__is_trivially_copyable(Closure) && sizeof(Closure) <= sizeof(closure), "held as bytes");
    std::memcpy(closure, &given, sizeof(Closure));
    call = [](const char* held) { (*(const Closure*)held)(); };
  }
};
extern Body body;
extern int current;
extern long progress;
extern unsigned long long slots[kMostThreads];  // for exchanges within a warp, and a block

// Blocks whose threads all waited for another. A driver that asks for their number goes on without them.
extern int stuck_blocks;
extern bool counts_stuck_blocks;

// Who follows what barriers order (memory_on_host.hpp): told of arrivals, the last of a phase among them, and of those
// who go on. An exchange within a warp orders nothing.
extern void (*told)(const void* barrier, bool last);
extern void (*heard)(const void* barrier);

void yield();
void wait_while(const int& place, int value);  // others go on until `place` holds something else
void wait_warp();
void meet(Barrier& barrier, int members);
void meet_block();
void meet_warp();

// Values of all lanes of this warp, to be read before the next exchange.
const unsigned long long* exchange_all(unsigned long long bits);
unsigned long long exchange_bits(unsigned long long bits, int lane);
unsigned ballot(bool vote);
bool any_of_block(bool vote);
int reduce_warp(int value, bool largest);

// Value that another lane of this warp passed to the same call.
template <class T>
T exchange(T value, int lane) {
  unsigned long long bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange_bits(bits, lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Instructions of ptx_on_host.hpp. What 16 bits say: a bfloat16, or else a float16.
enum class Kind { float16, bfloat16, tf32 };
SCFA_INLINE float number_of_16(unsigned bits, bool bfloat16) {
  if (bfloat16) {
    float x;
    bits <<= 16;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return (float)x;
}
void start_copies(int threads);
int copies_under_way(int threads);
void queue_copy(unsigned target, const void* source, int bytes, bool wanted);
void close_copies();
void end_copies(unsigned pending);
void load_matrices(unsigned (&r)[4], unsigned address, bool transposed);
void multiply_add(float (&acc)[4], const unsigned (&mine)[6], Kind kind);

constexpr int kUpwards = 3, kDownwards = 4;  // orders in which one warp runs as far as it can before another does

// Runs one block of `threads` fibers, each through the body, to its end.
void run_block(int threads, int order);
// Runs a grid, block after block; dynamic shared memory starts as noise.
void run_grid(unsigned grid, int threads, int shared_bytes, int order);

template <class Kernel, class Params>
void launch(Kernel kernel, const Params& params, unsigned grid, int threads, int shared_bytes, int order) {
  body = [&] { kernel(params); };
  run_grid(grid, threads, shared_bytes, order);
}

}  // namespace host
#pragma GCC visibility pop

inline void __syncthreads() { host::meet_block(); }
inline void __syncwarp() { host::meet_warp(); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return host::exchange(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return host::exchange(value, (host::current % host::kWarp) ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = host::current % host::kWarp;
  return host::exchange(value, lane < step ? lane : lane - step);
}
inline unsigned __ballot_sync(unsigned, bool vote) { return host::ballot(vote); }
inline bool __any_sync(unsigned, bool vote) { return host::ballot(vote) != 0; }

inline void __threadfence() {}  // one block runs after the other

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }

template <class T>
T atomicAdd(T* place, T value) {
  T old = *place;
  *place += value;
  return old;
}
template <class T>
T atomicOr(T* place, T value) {
  T old = *place;
  *place |= value;
  return old;
}
template <class T>
T atomicAnd(T* place, T value) {
  T old = *place;
  *place &= value;
  return old;
}
template <class T>
T atomicMin(T* place, T value) {
  T old = *place;
  if (value < old) *place = value;
  return old;
}
template <class T>
T atomicMax(T* place, T value) {
  T old = *place;
  if (value > old) *place = value;
  return old;
}
