// The fibers of cuda_on_host.hpp, compiled once and linked to every variant.
#undef _FORTIFY_SOURCE  // which takes a jump to another stack for a mistake
#include "cuda_on_host.hpp"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>

Index3 threadIdx, blockIdx, blockDim, gridDim;
char* dynamic_shared;

namespace host {

Body body;
int current;
long progress;
unsigned long long slots[kMostThreads];
int stuck_blocks;
bool counts_stuck_blocks;
void (*told)(const void* barrier, bool last);
void (*heard)(const void* barrier);

// Where a fiber goes on. A jump, unlike swapcontext, is no system call; that of GCC saves three registers, not all.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
using Place = void* [5];
#define SCFA_SET __builtin_setjmp
#define SCFA_JUMP __builtin_longjmp
#define SCFA_APART __attribute__((noipa))  // others run meanwhile: no caller may know what it leaves alone
#else
using Place = jmp_buf;
#define SCFA_SET _setjmp
#define SCFA_JUMP _longjmp
#define SCFA_APART __attribute__((noinline))
#endif

constexpr int kStackBytes = 64 * 1024;
struct Fiber {
  ucontext_t start;
  Place place;
  bool begun;
};
static Fiber* fibers[kMostThreads];  // kept, with their stacks, from block to block
static bool finished[kMostThreads];
// Who waits for a change need not be asked before it comes.
struct Watched {
  const int* place;
  int value;
};
static Watched watched[kMostThreads];
static int turn[kMostThreads];  // order in which fibers are resumed
static Barrier warps[kMostThreads / kWarp], block;
static Place scheduler;

// Functions of their own: who sets a place may not be who jumps there.
SCFA_APART __attribute__((noreturn)) static void jump(Place& place) { SCFA_JUMP(place, 1); }

SCFA_APART void yield() {
  if (SCFA_SET(fibers[current]->place) == 0) jump(scheduler);
}

// Lets the current fiber run until it yields.
SCFA_APART static void resume() {
  Fiber* fiber = fibers[current];
  if (SCFA_SET(scheduler) != 0) return;
  if (fiber->begun) jump(fiber->place);
  fiber->begun = true;
  setcontext(&fiber->start);
}

void wait_while(const int& place, int value) {
  watched[current] = {&place, value};
  yield();
  watched[current].place = nullptr;
}

static inline void wait(Barrier& barrier, int members) {
  const int generation = barrier.generation;
  ++progress;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  wait_while(barrier.generation, generation);
}

void wait_warp() { wait(warps[current / kWarp], kWarp); }

void meet(Barrier& barrier, int members) {
  if (told) told(&barrier, barrier.arrived + 1 == members);
  wait(barrier, members);
  if (heard) heard(&barrier);
}
void meet_block() { meet(block, blockDim.x); }
void meet_warp() { meet(warps[current / kWarp], kWarp); }

// By turns two of each: who writes again has waited for all who read.
static unsigned long long exchanged[2][kMostThreads];
static bool second[kMostThreads];

const unsigned long long* exchange_all(unsigned long long bits) {
  const int own = current;
  unsigned long long* values = exchanged[second[own]];
  second[own] = !second[own];
  values[own] = bits;
  wait_warp();
  return values + own / kWarp * kWarp;
}

unsigned long long exchange_bits(unsigned long long bits, int lane) { return exchange_all(bits)[lane]; }

unsigned ballot(bool vote) {
  const unsigned long long* voted = exchange_all(vote);
  unsigned votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) votes |= (unsigned)(voted[lane] != 0) << lane;
  return votes;
}

bool any_of_block(bool vote) {
  slots[current] = vote;
  meet_block();
  bool any = false;
  for (unsigned i = 0; i < blockDim.x; ++i) any |= slots[i] != 0;
  meet_block();
  return any;
}

int reduce_warp(int value, bool largest) {
  const unsigned long long* values = exchange_all((unsigned)value);
  for (int lane = 0; lane < kWarp; ++lane) {
    const int theirs = (int)values[lane];
    value = (theirs > value) == largest ? theirs : value;
  }
  return value;
}

static void enter() {
  for (;;) {  // once for each block
    body.call(body.closure);
    finished[current] = true;
    ++progress;
    yield();
  }
}

static Fiber* new_fiber() {
  Fiber* fiber = new Fiber();
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = std::malloc(kStackBytes);
  fiber->start.uc_stack.ss_size = kStackBytes;
  fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, enter, 0);
  return fiber;
}

// Lets a thread run until it yields; whether it came to its end.
static inline bool go_on(int thread) {
  if (finished[thread]) return false;
  const Watched& waits_for = watched[thread];
  if (waits_for.place && *waits_for.place == waits_for.value) return false;
  current = thread;
  threadIdx = {(unsigned)thread, 0, 0};
  resume();
  return finished[thread];
}

static int resume_warp(int warp, int threads) {
  int ended = 0;
  for (int i = warp * kWarp; i < (warp + 1) * kWarp && i < threads; ++i) ended += go_on(i);
  return ended;
}

static void stuck() {
  std::fprintf(stderr, "cuda_on_host: every thread of block %u waits for another\n", blockIdx.x);
  if (!counts_stuck_blocks) std::abort();
  ++stuck_blocks;
  std::fill(fibers, fibers + kMostThreads, nullptr);  // they stay where they are, and their stacks with them
}

// Runs the first warp that can go on, as far as it can, before any warp after it.
static void run_greedily(int threads, bool downwards) {
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

void run_block(int threads, int order) {
  if (threads > kMostThreads) std::fprintf(stderr, "cuda_on_host: too many threads\n"), std::abort();
  for (int i = 0; i < threads; ++i) {
    if (!fibers[i]) fibers[i] = new_fiber();
    finished[i] = second[i] = false;
    slots[i] = 0;
    watched[i].place = nullptr;
  }
  std::fill(warps, warps + kMostThreads / kWarp, Barrier());
  block = Barrier();
  if (order >= kUpwards) return run_greedily(threads, order == kDownwards);
  for (int i = 0; i < threads; ++i) turn[i] = order == 0 ? i : order == 1 ? threads - 1 - i : (i * 37 + 11) % threads;
  for (int left = threads; left > 0;) {
    const long before = progress;
    for (int i = 0; i < threads; ++i) left -= go_on(turn[i]);
    if (progress == before) return stuck();
  }
}

void run_grid(unsigned grid, int threads, int shared_bytes, int order) {
  std::vector<char> shared(shared_bytes + 64);
  dynamic_shared = (char*)(((size_t)shared.data() + 63) / 64 * 64);
  gridDim = {grid, 1, 1};
  blockDim = {(unsigned)threads, 1, 1};
  for (unsigned b = 0; b < grid; ++b) {
    std::memset(shared.data(), 0xa5, shared.size());
    blockIdx = {order == 1 ? grid - 1 - b : b, 0, 0};
    run_block(threads, order);
  }
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
  bool any() const {
    for (const std::vector<T>& things : kept)
      if (!things.empty()) return true;
    return false;
  }
  void start() {
    for (std::vector<T>& things : kept) things.clear();
    closed = ended = 0;
  }
};

}  // namespace host
