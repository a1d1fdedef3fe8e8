// The instructions of ptx_on_host.hpp, compiled once and linked to every variant. Follows cuda_on_host.cpp.
#include "cuda_on_host.hpp"

namespace host {

struct PendingCopy {
  void* target;
  const void* source;
  int bytes;
  bool wanted;
};
static Groups<PendingCopy> copy_queues[kMostThreads];

void start_copies(int threads) {
  for (int i = 0; i < threads; ++i) copy_queues[i].start();
}
int copies_under_way(int threads) {
  int found = 0;
  for (int i = 0; i < threads; ++i) found += copy_queues[i].any();
  return found;
}
void queue_copy(unsigned target, const void* source, int bytes, bool wanted) {
  if ((size_t)source % bytes || target % bytes) std::fprintf(stderr, "unaligned copy\n"), std::abort();
  copy_queues[current].open().push_back({dynamic_shared + target, source, bytes, wanted});
}
void close_copies() { copy_queues[current].close(); }
void end_copies(unsigned pending) {
  copy_queues[current].wait(pending, [](const PendingCopy& copy) {
    if (copy.wanted) {
      std::memcpy(copy.target, copy.source, copy.bytes);
    } else {
      std::memset(copy.target, 0, copy.bytes);
    }
  });
}

static unsigned shared_element(unsigned long long address, int column) {
  return *(const unsigned short*)(dynamic_shared + address + 2 * column);
}

void load_matrices(unsigned (&r)[4], unsigned address, bool transposed) {
  const int lane = current % kWarp;
  if (address % 16) std::fprintf(stderr, "unaligned ldmatrix\n"), std::abort();
  const unsigned long long* addresses = exchange_all(address);
  for (int m = 0; m < 4; ++m) {
    unsigned pair[2];
    for (int i = 0; i < 2; ++i) {
      const int outer = lane / 4, inner = 2 * (lane % 4) + i;
      pair[i] = transposed ? shared_element(addresses[8 * m + inner], outer)
                           : shared_element(addresses[8 * m + outer], inner);
    }
    r[m] = pair[0] | pair[1] << 16;
  }
  wait_warp();  // before anyone overwrites what others read
}

// Element k of a row of fragments, of four lanes: 16 bits lie by twos, float32 by fours.
static inline float fragment_element(const unsigned (*registers)[6], int k, int slot, int slots_on, Kind kind) {
  if (kind != Kind::tf32) {
    const unsigned pair = registers[k % 8 / 2][slot + k / 8 * slots_on];
    return number_of_16(pair >> k % 2 * 16, kind == Kind::bfloat16);
  }
  const unsigned word = registers[k % 4][slot + k / 4 * slots_on];
  if (word & 0x1fffu) std::fprintf(stderr, "a product of float32 that is not TF32\n"), std::abort();
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

// PTX ISA, "Matrix fragments for mma.m16n8k16" and, of .tf32, "mma.m16n8k8": which lane and register holds which element.
void multiply_add(float (&acc)[4], const unsigned (&mine)[6], Kind kind) {
  static unsigned registers[kMostThreads][6];
  const int lane = current % kWarp, first = current - lane;
  std::memcpy(registers[current], mine, sizeof(mine));
  wait_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    const auto rows = registers + first + row % 8 * 4, columns = registers + first + column * 4;
    for (int k = 0; k < (kind == Kind::tf32 ? 8 : 16); ++k) {
      const float left = fragment_element(rows, k, row / 8, 2, kind);
      acc[i] = __builtin_fmaf(left, fragment_element(columns, k, 4, 1, kind), acc[i]);
    }
  }
  wait_warp();
}

}  // namespace host
