// Shared-memory barriers of sm_90: mbarrier objects, asynchronous-copy arrivals, named barriers,
// and the proxy fence. Knows nothing of the kernels. All shared-memory addresses are 32-bit (the
// shared window).
#pragma once

#ifndef SCFA_DEBUG_WAIT
#define SCFA_DEBUG_WAIT \
  0  // 1: a wait of more than about a second traps instead of hanging the card
#endif
#ifndef SCFA_PROXY_FENCE
#define SCFA_PROXY_FENCE \
  1  // 0: no proxy fence between cp.async data and wgmma (measured in docs/perf/hopper.md)
#endif
#ifndef SCFA_SANITIZE
#define SCFA_SANITIZE 0  // 1: the build that racecheck and initcheck look at
#endif

// compute-sanitizer follows what a thread has read or written to the barriers at which this thread
// arrives, but not on through __syncwarp() or a named barrier to where another thread arrives for
// it; bulk copies it does not see, and what it makes of arrivals by cp.async depends on its version.
// Its build has the same buffers, barriers, phases and waits, but each thread arrives for itself,
// after its copies, and copies of words and of sums are loads and stores. What differs lies in the
// functions that ask for kSanitize.
constexpr bool kSanitize = SCFA_SANITIZE;

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(unsigned barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Make the initialised barriers visible to the asynchronous units; a __syncthreads() must follow.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One warp is done with a buffer: all its lanes' reads and products of it are complete.
__device__ __forceinline__ void barrier_release(unsigned barrier, int lane) {
  __syncwarp();
  if (kSanitize || lane == 0) barrier_arrive(barrier);
}
constexpr int kReleases = kSanitize ? 32 : 1;  // arrivals of one barrier_release

// A group of threads has written something, and all have been at a named barrier since.
__device__ __forceinline__ void barrier_publish(unsigned barrier, int thread) {
  if (kSanitize || thread == 0) barrier_arrive(barrier);
}
// Arrivals of one barrier_publish by so many threads.
__device__ constexpr int publications(int threads) { return kSanitize ? threads : 1; }

// Arrive once every earlier cp.async of this thread has landed; counts against the initialised
// arrivals.
__device__ __forceinline__ void barrier_arrive_after_copies(unsigned barrier) {
  if constexpr (kSanitize) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    barrier_arrive(barrier);
  } else {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
  }
}

__device__ __forceinline__ bool barrier_try_wait(unsigned barrier, unsigned parity) {
  unsigned done;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// Return when the phase of this parity has completed.
__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
#if SCFA_DEBUG_WAIT
  const long long begin = clock64();
  while (!barrier_try_wait(barrier, parity)) {
    if (clock64() - begin > 2000000000LL) asm volatile("trap;");
  }
#else
  while (!barrier_try_wait(barrier, parity)) {
  }
#endif
}

// Rows written by cp.async are read by wgmma through the asynchronous proxy.
__device__ __forceinline__ void async_proxy_fence() {
#if SCFA_PROXY_FENCE
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// What this thread wrote to shared memory will be read by wgmma or by bulk copies.
__device__ __forceinline__ void shared_writes_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Synchronise and tell every thread whether any of them voted true.
__device__ __forceinline__ bool named_barrier_any(int id, int threads, bool vote) {
  unsigned any;
  asm volatile(
      "{\n.reg .pred in, out;\n"
      "setp.ne.u32 in, %3, 0;\n"
      "barrier.cta.red.or.pred out, %1, %2, in;\n"
      "selp.u32 %0, 1, 0, out;\n}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<unsigned>(vote))
      : "memory");
  return any != 0;
}

// Registers of one thread of each warpgroup, in sum, that a block of so many threads is launched
// with: setmaxnreg hands out no others, and a warpgroup that asks for more waits for ever.
__device__ constexpr int launched_registers(int threads) {
  return 65536 / threads / 8 * 8 * (threads / 128);
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A value that all lanes hold alike, known to be so by the compiler as well: it then lives in
// uniform registers, and so does every branch and address made of it.
__device__ __forceinline__ int uniform(int value) { return __reduce_max_sync(0xFFFFFFFFu, value); }

// Position in a ring of kSlots buffers: the slot in use and the parity of its current round.
template <int kSlots>
struct Ring {
  unsigned slot = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ int shared_load(unsigned address) {
  int value;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void shared_store(unsigned address, int value) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ float shared_load_float(unsigned address) {
  return __int_as_float(shared_load(address));
}

__device__ __forceinline__ void shared_store_float(unsigned address, float value) {
  shared_store(address, __float_as_int(value));
}

__device__ __forceinline__ void shared_load_words(unsigned (&words)[4], unsigned address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ int2 shared_load_pair(unsigned address) {
  int2 value;
  asm volatile("ld.shared.v2.s32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "r"(address)
               : "memory");
  return value;
}

// Four numbers to shared memory at once.
__device__ __forceinline__ void shared_store_four(unsigned address, int a, int b, int c, int d) {
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

__device__ __forceinline__ void shared_store_four(unsigned address, float a, float b, float c,
                                                  float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c),
               "f"(d)
               : "memory");
}
