// The machine of machine_on_host.hpp but for its products: barriers, copies, sums. Follows products_on_host.cpp.
#include <functional>
#include <map>

namespace host {

struct PhaseBarrier {
  int expected = 0, arrived = 0, phases = 0;
  std::vector<std::function<void()>> awaited;  // what lands before this phase completes
};
static std::map<unsigned, PhaseBarrier> phase_barriers;
static std::map<int, Barrier> named_barriers;

static PhaseBarrier& phase_barrier(unsigned address) {
  const auto found = phase_barriers.find(address);
  if (found != phase_barriers.end()) return found->second;
  std::fprintf(stderr, "no barrier at byte %u\n", address), std::abort();
}
static void count_arrival(PhaseBarrier& barrier) {
  ++progress;
  if (++barrier.arrived < barrier.expected) return;
  for (const auto& land : barrier.awaited) land();
  barrier.awaited.clear();
  barrier.arrived = 0, ++barrier.phases;
}
static bool is_last(const PhaseBarrier& barrier) { return barrier.arrived + 1 == barrier.expected; }

struct BackgroundCopy {
  unsigned target;
  const void* source;  // none: zeros
  int bytes;
};
static std::vector<BackgroundCopy> background_copies[kMostThreads];  // of each thread, not landed yet

// Additions to sums of dq (bwd_fused_sm90_sums.cuh).
struct BulkSum {
  float* target = nullptr;
  unsigned source = 0, issued = 0;
  bool first = false, read = false, added = true;
  std::vector<float> values;
};
static std::map<int, BulkSum> bulk_sums;   // the last one of each thread
static std::vector<BulkSum> late_sums;     // that no thread of blocks that have ended waited for
static unsigned bulk_begun[kMostThreads];  // of each thread

static void read_sum(BulkSum& sum) {
  if (sum.read || sum.added) return;
  sum.read = true;
  for (size_t i = 0; i < sum.values.size(); ++i) {
    const unsigned address = sum.source + 4 * i;
    if (memory::time_of(address) > sum.issued) {
      memory::fault("a sum reads what was written after it began", address, memory::writers[address / 4].actor);
    }
  }
  std::memcpy(sum.values.data(), dynamic_shared + sum.source, sum.values.size() * 4);
}
static void add_sum(BulkSum& sum) {
  if (sum.added) return;
  read_sum(sum);
  sum.added = true;
  for (size_t i = 0; i < sum.values.size(); ++i) {
    sum.target[i] = sum.first ? sum.values[i] : sum.target[i] + sum.values[i];
  }
}
// Has all been added that was to be, here?
static void look_for_sums(const float* place, const char* what) {
  for (auto& [thread, sum] : bulk_sums) {
    if (!sum.added && sum.target <= place && place < sum.target + sum.values.size()) memory::fault(what, 0, thread);
  }
  for (const BulkSum& sum : late_sums) {
    if (sum.target <= place && place < sum.target + sum.values.size()) memory::fault(what, 0, -1);
  }
}

void start_block(int threads, int shared_bytes) {
  phase_barriers.clear();
  named_barriers.clear();
  for (int i = 0; i < threads; ++i) background_copies[i].clear(), bulk_begun[i] = 0;
  memory::start_block(threads, shared_bytes);
  start_products(threads);
}
void end_block() {
  for (auto& [thread, sum] : bulk_sums) {
    if (sum.added) continue;
    read_sum(sum);
    late_sums.push_back(sum);
  }
  bulk_sums.clear();
}
void end_grid() {
  for (BulkSum& sum : late_sums) add_sum(sum);
  late_sums.clear();
}

// Background copies. They might write at once: whoever still reads there is disturbed.
void start_copy(unsigned target, const void* source, int bytes, bool wanted) {
  if (target % bytes || (wanted && (size_t)source % bytes)) std::fprintf(stderr, "unaligned copy\n"), std::abort();
  memory::may_overwrite(target, bytes, false);
  background_copies[current].push_back({target, wanted ? source : nullptr, bytes});
}
static void land_copies() {
  auto& copies = background_copies[current];
  const int actor = memory::copies_of(current);
  for (const auto& copy : copies) {
    memory::may_overwrite(copy.target, copy.bytes, false);
    memory::note_writer(copy.target, copy.bytes, actor, memory::copies_begun[current], false);
    if (copy.source) {
      std::memcpy(dynamic_shared + copy.target, copy.source, copy.bytes);
    } else {
      std::memset(dynamic_shared + copy.target, 0, copy.bytes);
    }
  }
  copies.clear();
}

// A map as hopper_host.py writes it, for a (batch, heads, rows, columns) array: sizes and strides from the last axis on.
struct MapOnHost {
  const char* address;
  unsigned long long sizes[4], strides[3];
};
// The bulk tensor engine: 32 rows of 64 columns, as late as the barrier lets it; until then nothing is there.
void copy_box(unsigned target, const void* map_at, int column, int row, int h, int b, unsigned barrier_address) {
  constexpr int kBytes = 32 * 128;
  MapOnHost map;
  std::memcpy(&map, map_at, sizeof(map));
  if (target % 1024) std::fprintf(stderr, "a box that begins inside a swizzle period\n"), std::abort();
  PhaseBarrier& barrier = phase_barrier(barrier_address);
  const int actor = memory::bulk_of(current);
  const unsigned clock = ++bulk_begun[current];
  memory::may_overwrite(target, kBytes, true);
  memory::note_writer(target, kBytes, actor, clock, true);
  std::memset(dynamic_shared + target, 0xff, kBytes);
  memory::release_by(actor, clock, true, &barrier, false);
  const bool head = (unsigned)h < map.sizes[2] && (unsigned)b < map.sizes[3];
  barrier.awaited.push_back([=] {
    for (unsigned i = 0; i < 32 * 64; ++i) {
      const unsigned r = row + i / 64, c = column + i % 64, plain = target + 2 * i;
      const bool there = head && r < map.sizes[1] && c < map.sizes[0];
      const char* source = map.address + r * map.strides[0] + h * map.strides[1] + b * map.strides[2] + 2 * c;
      short* place = (short*)(dynamic_shared + (plain ^ (plain >> 7 & 7) << 4));
      *place = there ? *(const short*)source : 0;
      memory::stamp(plain / 4);
    }
  });
}

void start_sum(float* target, unsigned source, bool first, int floats) {
  BulkSum& sum = bulk_sums[current];
  const unsigned clock = ++bulk_begun[current];
  look_for_sums(target, "adds to a sum that another addition is not done with");
  add_sum(sum);
  for (int i = 0; i < floats; ++i) {
    if (!memory::read_asynchronously(source + 4 * i, 4, memory::bulk_of(current), clock)) ++memory::faults;
  }
  sum = {target, source, memory::now, first, false, false, std::vector<float>(floats)};
}
static void bulk_is_done() { memory::mine().seen(memory::bulk_of(current)) = bulk_begun[current]; }
void read_sum_here() { read_sum(bulk_sums[current]), bulk_is_done(); }
void add_sum_here() { add_sum(bulk_sums[current]), bulk_is_done(); }
void let_others_go_on(int times) {
  for (; times > 0; --times) ++progress, yield();
}
void fetch_sum(unsigned tile, const float* source, unsigned barrier_address, int floats) {
  PhaseBarrier& barrier = phase_barrier(barrier_address);
  const int actor = memory::bulk_of(current);
  const unsigned clock = ++bulk_begun[current];
  look_for_sums(source, "fetches a sum that an addition is not done with");
  memory::may_overwrite(tile, 4 * floats, true);
  memory::note_writer(tile, 4 * floats, actor, clock, true);
  std::memcpy(dynamic_shared + tile, source, floats * 4);
  memory::release(&barrier, false);  // this thread's own arrival, and then that of the bytes
  memory::release_by(actor, clock, true, &barrier, is_last(barrier));
  count_arrival(barrier);
}

}  // namespace host

void barrier_init(unsigned address, unsigned arrivals) { host::phase_barriers[address].expected = arrivals; }
void barrier_arrive(unsigned address) {
  host::PhaseBarrier& barrier = host::phase_barrier(address);
  memory::release(&barrier, host::is_last(barrier));
  host::count_arrival(barrier);
}
bool barrier_try_wait(unsigned address, unsigned parity) {
  host::PhaseBarrier& barrier = host::phase_barrier(address);
  if (((unsigned)barrier.phases & 1) == parity) return host::wait_while(barrier.phases, barrier.phases), false;
  memory::acquire(&barrier);
  return true;
}
void named_barrier_sync(int id, int threads) { host::meet(host::named_barriers[id], threads); }
// The threads that meet are neighbours.
bool named_barrier_any(int id, int threads, bool vote) {
  host::slots[host::current] = vote;
  named_barrier_sync(id, threads);
  bool any = false;
  const int first = host::current / threads * threads;
  for (int i = 0; i < threads; ++i) any |= host::slots[first + i] != 0;
  named_barrier_sync(id, threads);
  return any;
}
void named_barrier_arrive(int id, int threads) {
  host::Barrier& barrier = host::named_barriers[id];
  ++host::progress;
  memory::release(&barrier, barrier.arrived + 1 == threads);
  if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.generation;
}

void wait_for_copies() {
  host::land_copies();
  memory::mine().seen(memory::copies_of(host::current)) = memory::copies_begun[host::current]++;
}
void arrive_when_copied(unsigned address) {
  host::PhaseBarrier& barrier = host::phase_barrier(address);
  host::land_copies();
  const unsigned clock = memory::copies_begun[host::current]++;
  memory::release_by(memory::copies_of(host::current), clock, false, &barrier, host::is_last(barrier));
  host::count_arrival(barrier);
}

// store_fragments of products_sm90.cuh: lane l holds row l / 4, columns 2 (l % 4) and + 1 of each 8 x 8 matrix.
void store_matrices(unsigned address, unsigned a0, unsigned a1, unsigned a2, unsigned a3) {
  const int lane = host::current % 32;
  const unsigned a[4] = {a0, a1, a2, a3};
  const unsigned long long* addresses = host::exchange_all(address);
  for (int m = 0; m < 4; ++m) memory::write(addresses[8 * m + lane / 4] + 4 * (lane % 4), &a[m], 4);
  host::wait_warp();
}

int uniform(int value) {
  const int largest = host::reduce_warp(value, true);
  if (largest != value) std::fprintf(stderr, "not uniform\n"), std::abort();
  memory::exchange_within_warp();
  return value;
}

int load_acquire(const int* address) {
  memory::acquire(address);
  return *(const volatile int*)address;
}
void store_release(int* address, int value) {
  memory::release(address, true);
  *(volatile int*)address = value;
  ++host::progress;
}
void wait_until(const int* address, int value) {
  for (int found; (found = load_acquire(address)) != value;) host::wait_while(*address, found);
}
void count_release(int* address) { store_release(address, *address + 1); }
void load_sum_four(const float* address, float (&values)[4]) {
  host::look_for_sums(address, "reads a sum that an addition is not done with");
  std::memcpy(values, address, 16);
}
