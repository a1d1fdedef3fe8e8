// Enough of CUDA to run one block after another on the host, so that kernels without tensor cores can be tested where
// there is no GPU. Every thread is a fiber that runs until a barrier; `order` chooses who goes first, so that a
// missing barrier shows as a result that depends on it. Reads and writes of shared memory are real.
#pragma once
#undef _FORTIFY_SOURCE  // which takes a jump to another stack for a mistake
#include <setjmp.h>
#include <ucontext.h>

// All that any header here includes: this one is parsed once.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <type_traits>
#include <unordered_map>
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
static Index3 threadIdx, blockIdx, blockDim, gridDim;
static char* dynamic_shared;

namespace host {

constexpr int kWarp = 32, kStackBytes = 64 * 1024;

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it goes on; a jump, unlike swapcontext, is no system call
  bool begun;
};
static std::vector<Fiber*> fibers;  // kept, with their stacks, from block to block
static std::vector<char> finished;
static std::vector<int> turn;  // order in which fibers are resumed
static std::vector<Barrier> warps;
static std::vector<unsigned long long> slots;  // one per thread, for exchanges within a warp
static Barrier block;
static jmp_buf scheduler;
static int current;
static long progress;
static std::function<void()> body;

inline void yield() {
  if (_setjmp(fibers[current]->place) == 0) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier, int members) {
  const int generation = barrier.generation;
  ++progress;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void wait_warp() { wait(warps[current / kWarp], kWarp); }

// Who follows what barriers order (memory_on_host.hpp): told of arrivals, the last of a phase among them, and of those
// who go on. An exchange within a warp orders nothing.
static void (*told)(const void* barrier, bool last);
static void (*heard)(const void* barrier);

inline void meet(Barrier& barrier, int members) {
  if (told) told(&barrier, barrier.arrived + 1 == members);
  wait(barrier, members);
  if (heard) heard(&barrier);
}

// What a thread has begun, in groups that end in the order in which they were closed.
template <class T>
struct Groups {
  static constexpr unsigned kMost = 8;
  std::vector<T> kept[kMost];
  unsigned closed = 0, ended = 0;
  std::vector<T>& open() { return kept[closed % kMost]; }
  void close() {
    if (++closed - ended == kMost) std::fprintf(stderr, "cuda_on_host: too many groups\n"), std::abort();
  }
  // Lets groups end, each thing by end(thing), until so many are left.
  template <class End>
  void wait(unsigned left, End end) {
    for (; closed - ended > left; ++ended) {
      std::vector<T>& oldest = kept[ended % kMost];
      for (T& thing : oldest) end(thing);
      oldest.clear();
    }
  }
};

// Value that another lane of this warp passed to the same call.
template <class T>
T exchange(T value, int lane) {
  unsigned long long bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  slots[current] = bits;
  wait_warp();
  bits = slots[current / kWarp * kWarp + lane];
  wait_warp();
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void enter() {
  for (;;) {  // once for each block
    body();
    finished[current] = 1;
    ++progress;
    yield();
  }
}

inline void add_fiber() {
  Fiber* fiber = new Fiber();
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = std::malloc(kStackBytes);
  fiber->start.uc_stack.ss_size = kStackBytes;
  fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, enter, 0);
  fibers.push_back(fiber);
}

// Lets the current fiber run until it yields.
inline void resume() {
  Fiber* fiber = fibers[current];
  if (_setjmp(scheduler) != 0) return;
  if (fiber->begun) _longjmp(fiber->place, 1);
  fiber->begun = true;
  setcontext(&fiber->start);
}

constexpr int kUpwards = 3, kDownwards = 4;  // orders in which one warp runs as far as it can before another does

// Lets every thread of one warp run until it yields; how many came to their end.
inline int resume_warp(int warp, int threads) {
  int ended = 0;
  for (int i = warp * kWarp; i < (warp + 1) * kWarp && i < threads; ++i) {
    if (finished[i]) continue;
    current = i;
    threadIdx = {(unsigned)i, 0, 0};
    resume();
    ended += finished[i];
  }
  return ended;
}

// Blocks whose threads all waited for another. A driver that asks for their number goes on without them.
static int stuck_blocks;
static bool counts_stuck_blocks;

inline void stuck() {
  std::fprintf(stderr, "cuda_on_host: every thread of block %u waits for another\n", blockIdx.x);
  if (!counts_stuck_blocks) std::abort();
  ++stuck_blocks;
  fibers.clear();  // they stay where they are, and their stacks with them
}

// Runs the first warp that can go on, as far as it can, before any warp after it.
inline void run_greedily(int threads, bool downwards) {
  const int count = (threads + kWarp - 1) / kWarp;
  for (int left = threads; left > 0;) {
    bool went_on = false;
    for (int i = 0; i < count && !went_on; ++i) {
      for (long before = -1; before != progress;) {
        before = progress;
        left -= resume_warp(downwards ? count - 1 - i : i, threads);
        went_on |= before != progress;
      }
    }
    if (!went_on) return stuck();
  }
}

// Runs one block of `threads` fibers to its end.
inline void run_block(int threads, int order) {
  while (fibers.size() < (size_t)threads) add_fiber();
  finished.assign(threads, 0);
  warps.assign(threads / kWarp, Barrier());
  slots.assign(threads, 0);
  block = Barrier();
  if (order >= kUpwards) return run_greedily(threads, order == kDownwards);
  turn.resize(threads);
  for (int i = 0; i < threads; ++i) turn[i] = order == 0 ? i : order == 1 ? threads - 1 - i : (i * 37 + 11) % threads;
  for (int left = threads; left > 0;) {
    const long before = progress;
    for (int i : turn) {
      if (finished[i]) continue;
      current = i;
      threadIdx = {(unsigned)i, 0, 0};
      resume();
      left -= finished[i];
    }
    if (progress == before) return stuck();
  }
}

// Runs a grid, block after block; dynamic shared memory starts as noise.
template <class Kernel, class Params>
void launch(Kernel kernel, const Params& params, unsigned grid, int threads, int shared_bytes, int order) {
  std::vector<char> shared(shared_bytes + 64);
  dynamic_shared = (char*)(((size_t)shared.data() + 63) / 64 * 64);
  gridDim = {grid, 1, 1};
  blockDim = {(unsigned)threads, 1, 1};
  for (unsigned b = 0; b < grid; ++b) {
    std::memset(shared.data(), 0xa5, shared.size());
    blockIdx = {order == 1 ? grid - 1 - b : b, 0, 0};
    body = [&] { kernel(params); };
    run_block(threads, order);
  }
}

}  // namespace host

inline void __syncthreads() { host::meet(host::block, blockDim.x); }
inline void __syncwarp() { host::meet(host::warps[host::current / host::kWarp], host::kWarp); }

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
inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = 0;
  host::slots[host::current] = vote;
  host::wait_warp();
  const int first = host::current / host::kWarp * host::kWarp;
  for (int lane = 0; lane < host::kWarp; ++lane) votes |= (unsigned)(host::slots[first + lane] != 0) << lane;
  host::wait_warp();
  return votes;
}

inline bool __any_sync(unsigned lanes, bool vote) { return __ballot_sync(lanes, vote) != 0; }

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
