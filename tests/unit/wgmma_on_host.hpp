// mbarrier.cuh for the CPU, and what else only Hopper has: takes its place when the sm_90a kernels run on the fibers of
// cuda_on_host.hpp, after ptx_on_host.hpp.
//
// Copies land when the barrier they are to arrive at is told; products are complete as soon as they are issued, from
// descriptors and swizzled bytes as the PTX ISA describes them.
#pragma once
#include <map>

#ifndef SCFA_SANITIZE
#define SCFA_SANITIZE 0
#endif
constexpr bool kSanitize = SCFA_SANITIZE;  // as in mbarrier.cuh: each thread arrives for itself
constexpr int kReleases = kSanitize ? 32 : 1;
constexpr int publications(int threads) { return kSanitize ? threads : 1; }

namespace host {

struct PhaseBarrier {
  int expected = 0, arrived = 0;
  unsigned phases = 0;
};
static std::map<unsigned, PhaseBarrier> phase_barriers;
static std::map<int, Barrier> named_barriers;

inline void arrive(unsigned address) {
  PhaseBarrier& barrier = phase_barriers.at(address);
  ++progress;
  if (++barrier.arrived == barrier.expected) barrier.arrived = 0, ++barrier.phases;
}

inline void start_block(int threads) {
  phase_barriers.clear();
  named_barriers.clear();
  copy_queues.assign(threads, CopyQueue());
}

}  // namespace host

inline void barrier_init(unsigned address, unsigned arrivals) { host::phase_barriers[address].expected = arrivals; }
inline void barrier_init_done() {}
inline void barrier_arrive(unsigned address) { host::arrive(address); }
inline void barrier_release(unsigned address, int lane) {
  __syncwarp();
  if (kSanitize || lane == 0) host::arrive(address);
}
inline void barrier_publish(unsigned address, int thread) {
  if (kSanitize || thread == 0) host::arrive(address);
}
inline void barrier_arrive_after_copies(unsigned address) {
  copies_commit();
  copies_wait<0>();
  host::arrive(address);
}
inline void barrier_wait(unsigned address, unsigned parity) {
  while ((host::phase_barriers.at(address).phases & 1) == parity) host::yield();
}
inline void named_barrier_sync(int id, int threads) { host::wait(host::named_barriers[id], threads); }
// The threads that meet are neighbours.
inline bool named_barrier_any(int id, int threads, bool vote) {
  host::slots[host::current] = vote;
  named_barrier_sync(id, threads);
  bool any = false;
  const int first = host::current / threads * threads;
  for (int i = 0; i < threads; ++i) any |= host::slots[first + i] != 0;
  named_barrier_sync(id, threads);
  return any;
}
inline void named_barrier_arrive(int id, int threads) {
  host::Barrier& barrier = host::named_barriers[id];
  ++host::progress;
  if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.generation;
}
inline void async_proxy_fence() {}
inline void shared_writes_fence() {}
constexpr int launched_registers(int threads) { return 65536 / threads / 8 * 8 * (threads / 128); }
template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}
inline int uniform(int value) {
  const int largest = __reduce_max_sync(~0u, value);
  if (largest != value) std::fprintf(stderr, "not uniform\n"), std::abort();
  return value;
}

template <int kSlots>
struct Ring {
  unsigned slot = 0, parity = 0;
  void advance() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

inline int shared_load(unsigned address) { return *(const int*)(dynamic_shared + address); }
inline void shared_store(unsigned address, int value) { *(int*)(dynamic_shared + address) = value; }
inline float shared_load_float(unsigned address) { return *(const float*)(dynamic_shared + address); }
inline void shared_store_float(unsigned address, float value) { *(float*)(dynamic_shared + address) = value; }
inline int2 shared_load_pair(unsigned address) { return *(const int2*)(dynamic_shared + address); }
inline int __float_as_int(float x) { return bits_of<int>(x); }

template <class T>
T __shfl_sync(unsigned, T value, int lane, int width) {
  return host::exchange(value, host::current % 32 / width * width + lane);
}

// What gathers call (copy_chunk and copy_word of gather_sm90.cuh).
template <int kPanels>
void copy_chunk(unsigned target, const char* source, int row) {
  copy16_async(target, row >= 0 ? source : nullptr, row >= 0);
}
inline void copy_word(unsigned target, const void* source, bool valid) {
  if (kSanitize) return shared_store(target, valid ? *(const int*)source : 0);
  copy4_async(target, source, valid);
}
inline void row_address(const char*& address, const char* source, int row, int row_bytes) {
  address = source + (unsigned long long)(unsigned)row * (unsigned)row_bytes;
}

// Element of a tile read through a descriptor: `row` counts the tile's stored rows, `column` what lies along them.
inline float described_element(unsigned long long descriptor, int row, int column) {
  const unsigned start = (descriptor & 0x3FFF) << 4, panel = (descriptor >> 16 & 0x3FFF) << 4,
                 group = (descriptor >> 32 & 0x3FFF) << 4;
  unsigned address = start + row / 8 * group + row % 8 * 128 + column / 64 * panel + column % 64 * 2;
  address ^= (address >> 7 & 7) << 4;
  return float_of_16(*(const u16*)(dynamic_shared + address));
}

template <int kCount, class Left, class Right>
void multiply_on_host(float (&d)[kCount], bool accumulate, Left left, Right right) {
  static_assert(kCount % 4 == 0, "two rows by two columns at a time");
  const int lane = host::current % 32;
  float rows[2][16], columns[2][16];
  for (int k = 0; k < 16; ++k) rows[0][k] = left(lane / 4, k), rows[1][k] = left(lane / 4 + 8, k);
  for (int first = 0; first < kCount; first += 4) {
    const int column = 2 * first + 2 * (lane % 4);
    for (int k = 0; k < 16; ++k) columns[0][k] = right(column, k), columns[1][k] = right(column + 1, k);
    for (int i = 0; i < 4; ++i) {
      float sum = accumulate ? d[first + i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum = fmaf(rows[i >> 1][k], columns[i & 1][k], sum);
      d[first + i] = sum;
    }
  }
}

template <int kCount>
void wgmma_shared(float (&d)[kCount], unsigned long long a, unsigned long long b, int accumulate) {
  const int warp = host::current % 128 / 32;
  multiply_on_host(
      d, accumulate, [&](int row, int k) { return described_element(a, 16 * warp + row, k); },
      [&](int column, int k) { return described_element(b, column, k); });
}

template <auto kReduce, int kCount>
void wgmma_registers(float (&d)[kCount], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned long long b,
                     int accumulate) {
  static std::vector<unsigned> registers;  // four per thread
  registers.resize(host::slots.size() * 4);
  const unsigned mine[4] = {a0, a1, a2, a3};
  std::memcpy(&registers[host::current * 4], mine, sizeof(mine));
  host::wait_warp();
  const int first = host::current / 32 * 32;
  const bool rows = (int)kReduce == 1;  // ReduceOver::kRows
  multiply_on_host(
      d, accumulate,
      [&](int row, int k) {
        const unsigned pair = registers[(first + row % 8 * 4 + k % 8 / 2) * 4 + row / 8 + k / 8 * 2];
        return float_of_16(u16(pair >> k % 2 * 16));
      },
      [&](int column, int k) { return rows ? described_element(b, k, column) : described_element(b, column, k); });
  host::wait_warp();
}

// kTransposed of wgmma_issue: both operands' rows are reduced over.
template <auto kReduce, bool kSum, int kCount>
void wgmma_issue(float (&d)[kCount], unsigned long long a, unsigned long long b) {
  const int warp = host::current % 128 / 32;
  const bool rows = (int)kReduce == 1;  // ReduceOver::kRows
  const auto element = [&](unsigned long long descriptor, int column, int k) {
    return rows ? described_element(descriptor, k, column) : described_element(descriptor, column, k);
  };
  multiply_on_host(
      d, kSum, [&](int row, int k) { return element(a, 16 * warp + row, k); },
      [&](int column, int k) { return element(b, column, k); });
}

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kPending>
void wgmma_wait() {}
template <class T, int kCount>
void pin(T (&)[kCount]) {}

// load_fragments of products_sm90.cuh, four 8 x 8 matrices at a time.
inline void load_matrices_of(unsigned& a0, unsigned& a1, unsigned& a2, unsigned& a3, unsigned address) {
  unsigned r[4];
  load_matrices(r, address);
  a0 = r[0], a1 = r[1], a2 = r[2], a3 = r[3];
}
inline void load_words(unsigned (&r)[4], unsigned address) { std::memcpy(r, dynamic_shared + address, 16); }

// store_fragments of products_sm90.cuh: lane l holds row l / 4, columns 2 (l % 4) and + 1 of each 8 x 8 matrix.
inline void store_matrices(unsigned address, unsigned a0, unsigned a1, unsigned a2, unsigned a3) {
  const int lane = host::current % 32, first = host::current - lane;
  const unsigned a[4] = {a0, a1, a2, a3};
  host::slots[host::current] = address;
  host::wait_warp();
  for (int m = 0; m < 4; ++m) {
    std::memcpy(dynamic_shared + host::slots[first + 8 * m + lane / 4] + 4 * (lane % 4), &a[m], 4);
  }
  host::wait_warp();
}

// Sums of bwd_fused_sm90_sums.cuh. Bulk copies read, and add, as late as their waits allow.
struct BulkCopy {
  float* target = nullptr;
  unsigned source = 0;
  bool first = false;
  std::vector<float> values;
};
static std::map<int, BulkCopy> bulk_copies;  // one per thread

inline int load_acquire(const int* address) { return *(const volatile int*)address; }
inline void store_release(int* address, int value) {
  *(volatile int*)address = value;
  ++host::progress;
}
inline void wait_until(const int* address, int value) {
  while (load_acquire(address) != value) host::yield();
}
inline void global_proxy_fence() {}
inline void start_sum_on_host(float* target, unsigned source, bool first, int floats) {
  bulk_copies[host::current] = {target, source, first, std::vector<float>(floats)};
}
inline void wait_until_read() {
  host::yield();
  if (kSanitize) return;
  BulkCopy& copy = bulk_copies.at(host::current);
  std::memcpy(copy.values.data(), dynamic_shared + copy.source, copy.values.size() * 4);
}
inline void wait_until_added() {
  for (int i = 0; i < 3; ++i) host::yield();
  if (kSanitize) return __syncwarp();
  BulkCopy& copy = bulk_copies.at(host::current);
  for (size_t i = 0; i < copy.values.size(); ++i) {
    copy.target[i] = copy.first ? copy.values[i] : copy.target[i] + copy.values[i];
  }
}
inline void fetch_sum_on_host(unsigned tile, const float* source, unsigned barrier, int floats) {
  std::memcpy(dynamic_shared + tile, source, floats * 4);
  host::arrive(barrier);
}
template <class T>
void shared_store_four(unsigned address, T a, T b, T c, T d) {
  const T values[4] = {a, b, c, d};
  std::memcpy(dynamic_shared + address, values, 16);
}
inline void load_sum_four(const float* address, float (&values)[4]) { std::memcpy(values, address, 16); }
#if SCFA_SANITIZE
#define start_sum add_by_warp
#define fetch_sum fetch_by_warp
#else
#define start_sum(target, source, first) start_sum_on_host(target, source, first, kSumFloats)
#define fetch_sum(tile, source, barrier) fetch_sum_on_host(tile, source, barrier, kSumFloats)
#endif
