// What only Hopper has, for the CPU: shared-memory barriers, copies, products from descriptors, bulk copies. Included
// after ptx_on_host.hpp, when the sm_90a kernels run on the fibers of cuda_on_host.hpp; played by machine_on_host.cpp.
//
// What mbarrier.cuh says of fences, arrivals and waits is played as it stands there (hopper_host.py).
#pragma once
#include "machine_on_host.hpp"

inline void barrier_init_done() {}
template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}
inline void global_proxy_fence() {}

template <class T>
T shared_read(unsigned address) {
  memory::read(address, sizeof(T));
  return *(const T*)(dynamic_shared + address);
}
inline int shared_load(unsigned address) { return shared_read<int>(address); }
inline int2 shared_load_pair(unsigned address) { return shared_read<int2>(address); }
inline void shared_load_words(unsigned (&words)[4], unsigned address) {
  memory::read(address, 16);
  std::memcpy(words, dynamic_shared + address, 16);
}
inline void shared_store(unsigned address, int value) { memory::write(address, &value, 4); }
template <class T>
void shared_store_four(unsigned address, T a, T b, T c, T d) {
  const T values[4] = {a, b, c, d};
  memory::write(address, values, 16);
}
inline int __float_as_int(float x) { return bits_of<int>(x); }

template <class T>
T __shfl_sync(unsigned, T value, int lane, int width) {
  return host::exchange(value, host::current % 32 / width * width + lane);
}

#include "mbarrier.cuh"

// What gathers call (copy_chunk and copy_word of gather_sm90.cuh).
template <int kPanels>
void copy_chunk(unsigned target, const char* source, int row) {
  host::start_copy(target, source, 16, row >= 0);
}
inline void copy_word(unsigned target, const void* source, bool valid) {
  if (kSanitize) return shared_store(target, valid ? *(const int*)source : 0);
  host::start_copy(target, source, 4, valid);
}
inline void row_address(const char*& address, const char* source, int row, int row_bytes) {
  address = source + (unsigned long long)(unsigned)row * (unsigned)row_bytes;
}
template <int kRows, int kPanels, class Map>
void copy_run(unsigned target, const Map& map, int first, int h, int b, unsigned barrier, int lane) {
  if (lane != 0) return;
  for (int panel = 0; panel < kPanels; ++panel) {
    host::copy_box(target + panel * kRows * 128, &map, 64 * panel, first, h, b, barrier);
  }
}

template <int kCount>
void wgmma_shared(float (&d)[kCount], unsigned long long a, unsigned long long b, int accumulate) {
  host::multiply_later(d, kCount, accumulate, host::Operand{a, false}, host::Operand{b, false}, kIsBf16);
}
template <auto kReduce, int kCount>
void wgmma_registers(float (&d)[kCount], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned long long b,
                     int accumulate) {
  const bool rows = (int)kReduce == 1;  // ReduceOver::kRows
  host::multiply_later(d, kCount, accumulate, {a0, a1, a2, a3}, host::Operand{b, rows}, kIsBf16);
}
// kTransposed of wgmma_issue: both operands' rows are reduced over.
template <auto kReduce, bool kSum, int kCount>
void wgmma_issue(float (&d)[kCount], unsigned long long a, unsigned long long b) {
  const bool rows = (int)kReduce == 1;  // ReduceOver::kRows
  host::multiply_later(d, kCount, kSum, host::Operand{a, rows}, host::Operand{b, rows}, kIsBf16);
}
inline void wgmma_fence() {}
inline void wgmma_commit() { host::close_products(); }
template <int kPending>
void wgmma_wait() {
  host::wait_for_products(kPending);
}
template <class T, int kCount>
void pin(T (&)[kCount]) {}

// load_fragments of products_sm90.cuh, four 8 x 8 matrices at a time.
inline void load_matrices_of(unsigned& a0, unsigned& a1, unsigned& a2, unsigned& a3, unsigned address) {
  unsigned r[4];
  memory::read(address, 16);
  load_matrices(r, address);
  a0 = r[0], a1 = r[1], a2 = r[2], a3 = r[3];
}

inline void wait_until_read() {
  host::let_others_go_on(1);
  if (!kSanitize) host::read_sum_here();
}
inline void wait_until_added() {
  host::let_others_go_on(3);
  if (kSanitize) return __syncwarp();
  host::add_sum_here();
}
#if SCFA_SANITIZE
#define start_sum add_by_warp
#define fetch_sum fetch_by_warp
#else
#define start_sum(target, source, first) host::start_sum(target, source, first, kSumFloats)
#define fetch_sum(tile, source, barrier) host::fetch_sum(tile, source, barrier, kSumFloats)
#endif
