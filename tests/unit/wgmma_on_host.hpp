// What only Hopper has, for the CPU: shared-memory barriers, copies, products from descriptors, bulk copies. Included
// after ptx_on_host.hpp, when the sm_90a kernels run on the fibers of cuda_on_host.hpp.
//
// The machine is as unkind as the PTX ISA lets it be. Copies land when the barrier they are to arrive at is told.
// Products read shared memory when they are waited for, from descriptors and swizzled bytes. Bulk copies read, and add,
// when they are waited for, or else when their thread starts the next one, or at the end of the kernel. By
// memory_on_host.hpp, products of what their warps may not see yet, or of what has been overwritten since, are NaN.
//
// What mbarrier.cuh says of fences, arrivals and waits is played as it stands there (hopper_host.py).
#pragma once
#include "memory_on_host.hpp"

namespace host {

struct PhaseBarrier {
  int expected = 0, arrived = 0;
  unsigned phases = 0;
  std::vector<std::function<void()>> awaited;  // what lands before this phase completes
};
static std::map<unsigned, PhaseBarrier> phase_barriers;
static std::map<int, Barrier> named_barriers;

inline void count_arrival(PhaseBarrier& barrier) {
  ++progress;
  if (++barrier.arrived < barrier.expected) return;
  for (const auto& land : barrier.awaited) land();
  barrier.awaited.clear();
  barrier.arrived = 0, ++barrier.phases;
}
inline bool is_last(const PhaseBarrier& barrier) { return barrier.arrived + 1 == barrier.expected; }

using Products = Groups<std::function<void()>>;
static std::vector<Products> products;  // of each thread

struct BackgroundCopy {
  unsigned target;
  const void* source;  // none: zeros
  int bytes;
};
static std::vector<std::vector<BackgroundCopy>> background_copies;  // of each thread, not landed yet

// Additions to sums of dq (bwd_fused_sm90_sums.cuh).
struct BulkSum {
  float* target = nullptr;
  unsigned source = 0, issued = 0;
  bool first = false, read = false, added = true;
  std::vector<float> values;
};
static std::map<int, BulkSum> bulk_sums;  // the last one of each thread
static std::vector<BulkSum> late_sums;    // that no thread of blocks that have ended waited for
static std::vector<unsigned> bulk_begun;  // of each thread

inline void read_sum(BulkSum& sum) {
  if (sum.read || sum.added) return;
  sum.read = true;
  for (size_t i = 0; i < sum.values.size(); ++i) {
    const unsigned address = sum.source + 4 * i;
    if (memory::time_of(address) > sum.issued) {
      memory::fault("a sum reads what was written after it began", address, memory::word(address).writer.actor);
    }
  }
  std::memcpy(sum.values.data(), dynamic_shared + sum.source, sum.values.size() * 4);
}
inline void add_sum(BulkSum& sum) {
  if (sum.added) return;
  read_sum(sum);
  sum.added = true;
  for (size_t i = 0; i < sum.values.size(); ++i) {
    sum.target[i] = sum.first ? sum.values[i] : sum.target[i] + sum.values[i];
  }
}
// Has all been added that was to be, here?
inline void look_for_sums(const float* place, const char* what) {
  for (auto& [thread, sum] : bulk_sums) {
    if (!sum.added && sum.target <= place && place < sum.target + sum.values.size()) memory::fault(what, 0, thread);
  }
  for (const BulkSum& sum : late_sums) {
    if (sum.target <= place && place < sum.target + sum.values.size()) memory::fault(what, 0, -1);
  }
}

inline void start_block(int threads, int shared_bytes) {
  phase_barriers.clear();
  named_barriers.clear();
  products = std::vector<Products>(threads);
  background_copies = std::vector<std::vector<BackgroundCopy>>(threads);
  bulk_begun.assign(threads, 0);
  memory::start_block(threads, shared_bytes);
}
inline void end_block() {
  for (auto& [thread, sum] : bulk_sums) {
    if (sum.added) continue;
    read_sum(sum);
    late_sums.push_back(sum);
  }
  bulk_sums.clear();
}
inline void end_grid() {
  for (BulkSum& sum : late_sums) add_sum(sum);
  late_sums.clear();
}

}  // namespace host

inline void barrier_init(unsigned address, unsigned arrivals) { host::phase_barriers[address].expected = arrivals; }
inline void barrier_init_done() {}
inline void barrier_arrive(unsigned address) {
  host::PhaseBarrier& barrier = host::phase_barriers.at(address);
  memory::release(&barrier, host::is_last(barrier));
  host::count_arrival(barrier);
}
inline bool barrier_try_wait(unsigned address, unsigned parity) {
  host::PhaseBarrier& barrier = host::phase_barriers.at(address);
  if ((barrier.phases & 1) == parity) return host::yield(), false;
  memory::acquire(&barrier);
  return true;
}
inline void named_barrier_sync(int id, int threads) { host::meet(host::named_barriers[id], threads); }
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
  memory::release(&barrier, barrier.arrived + 1 == threads);
  if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.generation;
}
template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}
inline int uniform(int value) {
  const int largest = __reduce_max_sync(~0u, value);
  if (largest != value) std::fprintf(stderr, "not uniform\n"), std::abort();
  memory::exchange_within_warp();
  return value;
}

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

// Background copies. They might write at once: whoever still reads there is disturbed.
inline void start_copy(unsigned target, const void* source, int bytes, bool wanted) {
  if (target % bytes || (wanted && (size_t)source % bytes)) std::fprintf(stderr, "unaligned copy\n"), std::abort();
  for (int i = 0; i < bytes; i += 4) memory::may_overwrite(target + i, false, false);
  host::background_copies[host::current].push_back({target, wanted ? source : nullptr, bytes});
}
inline void land_copies() {
  auto& copies = host::background_copies[host::current];
  const int actor = memory::copies_of(host::current);
  for (const auto& copy : copies) {
    for (int i = 0; i < copy.bytes; i += 4) {
      memory::may_overwrite(copy.target + i, false, false);
      memory::note_writer(copy.target + i, actor, memory::copies_begun[host::current], false);
    }
    if (copy.source) {
      std::memcpy(dynamic_shared + copy.target, copy.source, copy.bytes);
    } else {
      std::memset(dynamic_shared + copy.target, 0, copy.bytes);
    }
  }
  copies.clear();
}
inline void wait_for_copies() {
  land_copies();
  memory::mine().seen(memory::copies_of(host::current)) = memory::copies_begun[host::current]++;
}
inline void arrive_when_copied(unsigned address) {
  host::PhaseBarrier& barrier = host::phase_barriers.at(address);
  land_copies();
  const unsigned clock = memory::copies_begun[host::current]++;
  memory::release_by(memory::copies_of(host::current), clock, false, &barrier, host::is_last(barrier));
  host::count_arrival(barrier);
}

#include "mbarrier.cuh"

// What gathers call (copy_chunk and copy_word of gather_sm90.cuh).
template <int kPanels>
void copy_chunk(unsigned target, const char* source, int row) {
  start_copy(target, source, 16, row >= 0);
}
inline void copy_word(unsigned target, const void* source, bool valid) {
  if (kSanitize) return shared_store(target, valid ? *(const int*)source : 0);
  start_copy(target, source, 4, valid);
}
inline void row_address(const char*& address, const char* source, int row, int row_bytes) {
  address = source + (unsigned long long)(unsigned)row * (unsigned)row_bytes;
}

// A map as hopper_host.py writes it, for a (batch, heads, rows, columns) array: sizes and strides from the last axis on.
struct MapOnHost {
  const char* address;
  unsigned long long sizes[4], strides[3];
};
// The bulk tensor engine: 32 rows of 64 columns, as late as the barrier lets it; until then nothing is there.
inline void copy_box(unsigned target, const void* map_at, int column, int row, int h, int b, unsigned barrier_address) {
  MapOnHost map;
  std::memcpy(&map, map_at, sizeof(map));
  if (target % 1024) std::fprintf(stderr, "a box that begins inside a swizzle period\n"), std::abort();
  host::PhaseBarrier& barrier = host::phase_barriers.at(barrier_address);
  const int actor = memory::bulk_of(host::current);
  const unsigned clock = ++host::bulk_begun[host::current];
  for (unsigned i = 0; i < 32 * 128; i += 4) {
    memory::may_overwrite(target + i, true, false);
    memory::note_writer(target + i, actor, clock, true);
    std::memset(dynamic_shared + target + i, 0xff, 4);
  }
  memory::release_by(actor, clock, true, &barrier, false);
  barrier.awaited.push_back([=] {
    for (unsigned i = 0; i < 32 * 64; ++i) {
      const unsigned r = row + i / 64, c = column + i % 64, plain = target + 2 * i;
      const bool there = r < map.sizes[1] && c < map.sizes[0] && (unsigned)h < map.sizes[2] && (unsigned)b < map.sizes[3];
      const char* source = map.address + r * map.strides[0] + h * map.strides[1] + b * map.strides[2] + 2 * c;
      u16* place = (u16*)(dynamic_shared + (plain ^ (plain >> 7 & 7) << 4));
      *place = there ? *(const u16*)source : 0;
      memory::time_of(plain) = ++memory::now;
    }
  });
}
template <int kRows, int kPanels, class Map>
void copy_run(unsigned target, const Map& map, int first, int h, int b, unsigned barrier, int lane) {
  if (lane != 0) return;
  for (int panel = 0; panel < kPanels; ++panel) copy_box(target + panel * kRows * 128, &map, 64 * panel, first, h, b, barrier);
}

// An operand of a product: a tile in shared memory by its descriptor. A line is a row or a column of it, along which 16
// steps of the reduction lie.
struct Operand {
  unsigned long long descriptor;
  bool rows;            // the tile's rows are reduced over, its lines are columns
  unsigned issued = 0;  // when the product began
  bool stale = false;   // has read what was written later

  // `row` counts the tile's stored rows, `column` what lies along them.
  SCFA_INLINE unsigned address(int row, int column) const {
    const unsigned start = (descriptor & 0x3FFF) << 4, panel = (descriptor >> 16 & 0x3FFF) << 4,
                   group = (descriptor >> 32 & 0x3FFF) << 4;
    const unsigned plain = start + row / 8 * group + row % 8 * 128 + column / 64 * panel + column % 64 * 2;
    return plain ^ (plain >> 7 & 7) << 4;
  }
  SCFA_INLINE unsigned pair(unsigned address) {
    stale |= memory::time_of(address) > issued;
    return *(const unsigned*)(dynamic_shared + address);
  }
  SCFA_INLINE void read_line(float (&line)[16], int at) {
    if (rows) {
      for (int k = 0; k < 16; ++k) line[k] = float_of_16(u16(pair(address(k, at & ~1)) >> at % 2 * 16));
      return;
    }
    for (int k = 0; k < 16; k += 2) unpack_pair(pair(address(at, k)), line[k], line[k + 1]);
  }
  SCFA_INLINE void read_lines(float (&lines)[2][16], int even) {  // and the next one
    if (!rows) return read_line(lines[0], even), read_line(lines[1], even + 1);
    for (int k = 0; k < 16; ++k) unpack_pair(pair(address(k, even)), lines[0][k], lines[1][k]);
  }
  // Says that a product of the group `clock` of this warp will read a line; whether it may see it all.
  SCFA_FAST bool look_ahead(int at, unsigned clock) const {
    const int actor = memory::products_of(host::current);
    bool visible = true;
    for (int k = 0; k < 16; k += rows ? 1 : 2) {
      const unsigned place = rows ? address(k, at & ~1) : address(at, k);
      visible &= memory::read_asynchronously(place, actor, clock);
    }
    return visible;
  }
};

// Adds to columns of two rows what they and those of `right` make; where each test spends most of its time.
template <int kCount>
SCFA_FAST void multiply_on_host(float (&d)[kCount], bool accumulate, const float (&rows)[2][16], Operand& right, int lane) {
  float columns[2][16];
  for (int first = 0; first < kCount; first += 4) {
    right.read_lines(columns, 2 * first + 2 * (lane % 4));
    for (int i = 0; i < 4; ++i) {
      float sum = accumulate ? d[first + i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum = __builtin_fmaf(rows[i >> 1][k], columns[i & 1][k], sum);
      d[first + i] = sum;
    }
  }
}

// Leaves a product for later. `left`, an operand or the 2 x 16 numbers of this thread's rows, is that of 64 rows.
template <int kCount, class Left>
void issue_on_host(float (&d)[kCount], bool accumulate, Left left, Operand right) {
  static_assert(kCount % 4 == 0, "two rows by two columns at a time");
  constexpr bool kInMemory = std::is_same<Left, Operand>::value;
  host::Products& products = host::products[host::current];
  const int lane = host::current % 32, row = host::current % 128 / 32 * 16 + lane / 4;
  const unsigned clock = products.closed + 1;
  bool visible = true;  // a few lanes look for all
  if constexpr (kInMemory) {
    if (lane % 4 == 0) visible &= left.look_ahead(row, clock) & left.look_ahead(row + 8, clock);
    left.issued = memory::now;
  }
  for (int first = 0; lane < 4 && first < kCount; first += 4) {
    const int column = 2 * first + 2 * lane;
    visible &= right.look_ahead(column, clock);
    if (!right.rows) visible &= right.look_ahead(column + 1, clock);
  }
  right.issued = memory::now;
  products.open().push_back([=, &d]() mutable {
    float rows[2][16];
    if constexpr (kInMemory) {
      left.read_line(rows[0], row), left.read_line(rows[1], row + 8);
      right.stale |= left.stale;
    } else {
      std::memcpy(rows, left.data(), sizeof(rows));
    }
    multiply_on_host(d, accumulate, rows, right, lane);
    if (right.stale) memory::say("a product reads what was written after it began", 0, -1);
    if (right.stale || !visible) std::fill(d, d + kCount, __int_as_float(0x7fc00000));
  });
}

template <int kCount>
void wgmma_shared(float (&d)[kCount], unsigned long long a, unsigned long long b, int accumulate) {
  issue_on_host(d, accumulate, Operand{a, false}, Operand{b, false});
}

template <auto kReduce, int kCount>
void wgmma_registers(float (&d)[kCount], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned long long b,
                     int accumulate) {
  static std::vector<unsigned> registers;  // four per thread
  registers.resize(host::slots.size() * 4);
  const unsigned mine[4] = {a0, a1, a2, a3};
  std::memcpy(&registers[host::current * 4], mine, sizeof(mine));
  host::wait_warp();
  std::array<float, 32> left;
  const int quad = host::current / 4 * 4;
  for (int i = 0; i < 32; ++i) {
    const int k = i % 16;
    const unsigned pair = registers[(quad + k % 8 / 2) * 4 + i / 16 + k / 8 * 2];
    left[i] = float_of_16(u16(pair >> k % 2 * 16));
  }
  host::wait_warp();
  issue_on_host(d, accumulate, left, Operand{b, (int)kReduce == 1});  // ReduceOver::kRows
}

// kTransposed of wgmma_issue: both operands' rows are reduced over.
template <auto kReduce, bool kSum, int kCount>
void wgmma_issue(float (&d)[kCount], unsigned long long a, unsigned long long b) {
  const bool rows = (int)kReduce == 1;  // ReduceOver::kRows
  issue_on_host(d, kSum, Operand{a, rows}, Operand{b, rows});
}

inline void wgmma_fence() {}
inline void wgmma_commit() { host::products[host::current].close(); }
template <int kPending>
void wgmma_wait() {
  host::Products& products = host::products[host::current];
  products.wait(kPending, [](std::function<void()>& play) { play(); });
  memory::mine().seen(memory::products_of(host::current)) = products.ended;
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

// store_fragments of products_sm90.cuh: lane l holds row l / 4, columns 2 (l % 4) and + 1 of each 8 x 8 matrix.
inline void store_matrices(unsigned address, unsigned a0, unsigned a1, unsigned a2, unsigned a3) {
  const int lane = host::current % 32, first = host::current - lane;
  const unsigned a[4] = {a0, a1, a2, a3};
  host::slots[host::current] = address;
  host::wait_warp();
  for (int m = 0; m < 4; ++m) {
    memory::write(host::slots[first + 8 * m + lane / 4] + 4 * (lane % 4), &a[m], 4);
  }
  host::wait_warp();
}

inline int load_acquire(const int* address) {
  memory::acquire(address);
  return *(const volatile int*)address;
}
inline void store_release(int* address, int value) {
  memory::release(address, true);
  *(volatile int*)address = value;
  ++host::progress;
}
inline void wait_until(const int* address, int value) {
  while (load_acquire(address) != value) host::yield();
}
inline void global_proxy_fence() {}

inline void start_sum_on_host(float* target, unsigned source, bool first, int floats) {
  host::BulkSum& sum = host::bulk_sums[host::current];
  const unsigned clock = ++host::bulk_begun[host::current];
  host::look_for_sums(target, "adds to a sum that another addition is not done with");
  host::add_sum(sum);
  for (int i = 0; i < floats; ++i) {
    if (!memory::read_asynchronously(source + 4 * i, memory::bulk_of(host::current), clock)) ++memory::faults;
  }
  sum = {target, source, memory::now, first, false, false, std::vector<float>(floats)};
}
inline void let_others_go_on(int times) {
  for (; times > 0; --times) ++host::progress, host::yield();
}
inline void wait_until_read() {
  let_others_go_on(1);
  if (kSanitize) return;
  host::read_sum(host::bulk_sums[host::current]);
  memory::mine().seen(memory::bulk_of(host::current)) = host::bulk_begun[host::current];
}
inline void wait_until_added() {
  let_others_go_on(3);
  if (kSanitize) return __syncwarp();
  host::add_sum(host::bulk_sums[host::current]);
  memory::mine().seen(memory::bulk_of(host::current)) = host::bulk_begun[host::current];
}
inline void fetch_sum_on_host(unsigned tile, const float* source, unsigned barrier_address, int floats) {
  host::PhaseBarrier& barrier = host::phase_barriers.at(barrier_address);
  const int actor = memory::bulk_of(host::current);
  const unsigned clock = ++host::bulk_begun[host::current];
  host::look_for_sums(source, "fetches a sum that an addition is not done with");
  for (int i = 0; i < floats; ++i) {
    memory::may_overwrite(tile + 4 * i, true, false);
    memory::note_writer(tile + 4 * i, actor, clock, true);
  }
  std::memcpy(dynamic_shared + tile, source, floats * 4);
  memory::release(&barrier, false);  // this thread's own arrival, and then that of the bytes
  memory::release_by(actor, clock, true, &barrier, host::is_last(barrier));
  host::count_arrival(barrier);
}
inline void load_sum_four(const float* address, float (&values)[4]) {
  host::look_for_sums(address, "reads a sum that an addition is not done with");
  std::memcpy(values, address, 16);
}
#if SCFA_SANITIZE
#define start_sum add_by_warp
#define fetch_sum fetch_by_warp
#else
#define start_sum(target, source, first) start_sum_on_host(target, source, first, kSumFloats)
#define fetch_sum(tile, source, barrier) fetch_sum_on_host(tile, source, barrier, kSumFloats)
#endif
