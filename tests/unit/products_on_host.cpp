// The products of machine_on_host.hpp: begun when they are issued, played when they are waited for. Follows
// memory_on_host.cpp.
#include "machine_on_host.hpp"

namespace host {

constexpr int kMostSums = 128, kSteps = 16;  // of one thread, and of the reduction

struct Product {
  float* sums;
  int count;
  unsigned issued;  // when it began
  bool accumulate, bfloat16, in_memory, visible;
  Operand left, right;
  float rows[2][kSteps];  // in place of a left operand in memory
};
static Groups<Product> products[kMostThreads];  // of each thread

// `row` counts the tile's stored rows, `column` what lies along them. Eight columns from a multiple of eight on lie
// side by side.
static inline unsigned address_in(const Operand& operand, int row, int column) {
  const unsigned start = (operand.descriptor & 0x3FFF) << 4, panel = (operand.descriptor >> 16 & 0x3FFF) << 4,
                 group = (operand.descriptor >> 32 & 0x3FFF) << 4;
  const unsigned plain = start + row / 8 * group + row % 8 * 128 + column / 64 * panel + column % 64 * 2;
  return plain ^ (plain >> 7 & 7) << 4;
}

// Numbers of shared memory side by side; when the last of them was written.
static inline unsigned read_numbers(unsigned address, int count, bool bfloat16, float* numbers) {
  unsigned short bits[8];
  std::memcpy(bits, dynamic_shared + address, 2 * count);
  for (int i = 0; i < count; ++i) numbers[i] = number_of_16(bits[i], bfloat16);
  unsigned newest = 0;
  for (int i = 0; i < 2 * count; i += 4) newest = std::max(newest, memory::time_of(address + i));
  return newest;
}

// Says that a product of the group `clock` of this warp will read a line; whether it may see it all.
static bool look_ahead(const Operand& operand, int line, unsigned clock) {
  const int actor = memory::products_of(current);
  bool visible = true;
  if (operand.rows) {
    for (int k = 0; k < kSteps; ++k) {
      visible &= memory::read_asynchronously(address_in(operand, k, line & ~1), 4, actor, clock);
    }
    return visible;
  }
  for (int k = 0; k < kSteps; k += 8) {
    visible &= memory::read_asynchronously(address_in(operand, line, k), 16, actor, clock);
  }
  return visible;
}

// The right operand as numbers: threads that read the same between two writes to it share them.
struct Decoded {
  unsigned long long descriptor;
  int count;  // sums of a thread; 0: nothing is here
  bool rows, bfloat16;
  unsigned at;         // nothing is newer
  unsigned newest[4];  // of what the lanes l % 4 read
  int parts;
  unsigned short part[64];  // of shared memory, where it lies
  alignas(64) float numbers[4][kSteps][kMostSums / 2];
};
constexpr unsigned kDecoded = 256;
static Decoded decoded[kDecoded];

static void locate(Decoded& to, const Operand& operand) {
  const int columns = 2 * to.count;
  to.parts = 0;
  auto lies_at = [&](int row, int column) {
    const unsigned short part = address_in(operand, row, column) / memory::kPart;
    if (to.parts == 0 || to.part[to.parts - 1] != part) to.part[to.parts++] = part;
  };
  for (int i = 0; i < columns; i += operand.rows ? 64 : 8) {
    const int last = std::min(i + 63, columns - 1);
    if (!operand.rows) {
      lies_at(i, 0), lies_at(i + 7, kSteps - 1);
    } else {
      lies_at(0, i), lies_at(7, last), lies_at(8, i), lies_at(15, last);
    }
  }
}

// Column c is of the lanes c / 2 % 4; each has two of eight.
static void decode(Decoded& to, const Operand& operand) {
  std::fill(to.newest, to.newest + 4, 0);
  float line[8];
  for (int c = 0; c < 2 * to.count; c += 8) {
    float(*numbers)[kSteps][kMostSums / 2] = to.numbers;
    const int j = c / 4;
    if (operand.rows) {
      for (int k = 0; k < kSteps; ++k) {
        const unsigned address = address_in(operand, k, c);
        read_numbers(address, 8, to.bfloat16, line);
        for (int i = 0; i < 8; ++i) numbers[i / 2][k][j + i % 2] = line[i];
        for (int q = 0; q < 4; ++q) to.newest[q] = std::max(to.newest[q], memory::time_of(address + 4 * q));
      }
      continue;
    }
    for (int i = 0; i < 8; ++i) {
      for (int k = 0; k < kSteps; k += 8) {
        const unsigned newest = read_numbers(address_in(operand, c + i, k), 8, to.bfloat16, line);
        to.newest[i / 2] = std::max(to.newest[i / 2], newest);
        for (int step = 0; step < 8; ++step) numbers[i / 2][k + step][j + i % 2] = line[step];
      }
    }
  }
}

static const Decoded& right_operand(const Product& product) {
  const Operand& operand = product.right;
  const unsigned place = (operand.descriptor * 0x9E3779B97F4A7C15ull) >> 32;
  Decoded* of = &decoded[place % kDecoded];
  const auto fits = [&](const Decoded& one) {
    return one.descriptor == operand.descriptor && one.count == product.count && one.rows == operand.rows &&
           one.bfloat16 == product.bfloat16;
  };
  if (!fits(*of)) {
    Decoded* other = &decoded[(place ^ 1) % kDecoded];
    if (fits(*other) || other->at < of->at) of = other;
  }
  bool changed = !fits(*of);
  if (changed) {
    of->descriptor = operand.descriptor, of->count = product.count, of->rows = operand.rows;
    of->bfloat16 = product.bfloat16;
    locate(*of, operand);
  }
  if (changed || of->at != memory::now) {
    for (int i = 0; i < of->parts; ++i) changed |= memory::times_of_parts[of->part[i]] > of->at;
  }
  if (changed) decode(*of, operand);
  of->at = memory::now;
  return *of;
}

// Two rows by the columns of this lane: 16 columns at a time, whose sums stay in registers.
static void multiply(float* sums, int count, bool accumulate, const float (&rows)[2][kSteps],
                     const float (&columns)[kSteps][kMostSums / 2]) {
  typedef float Eight __attribute__((vector_size(32), may_alias));
  for (int first = 0; first < count / 2; first += 16) {
    const int here = std::min(16, count / 2 - first);
    float* own = sums + 2 * first;
    alignas(32) float held[2][16] = {};
    for (int j = 0; accumulate && j < here; ++j) {
      held[0][j] = own[j / 2 * 4 + j % 2], held[1][j] = own[j / 2 * 4 + 2 + j % 2];
    }
    Eight* of = (Eight*)held;
    Eight a = of[0], b = of[1], c = of[2], d = of[3];
    for (int k = 0; k < kSteps; ++k) {
      const Eight* at = (const Eight*)&columns[k][first];
      const float upper = rows[0][k], lower = rows[1][k];
      a += upper * at[0], b += upper * at[1];  // rounded once, where the machine can (host_build.py)
      c += lower * at[0], d += lower * at[1];
    }
    of[0] = a, of[1] = b, of[2] = c, of[3] = d;
    for (int j = 0; j < here; ++j) own[j / 2 * 4 + j % 2] = held[0][j], own[j / 2 * 4 + 2 + j % 2] = held[1][j];
  }
}

static unsigned read_row(const Product& product, int row, float* numbers) {
  const Operand& left = product.left;
  if (!left.rows) {
    const unsigned newest = read_numbers(address_in(left, row, 0), 8, product.bfloat16, numbers);
    return std::max(newest, read_numbers(address_in(left, row, 8), 8, product.bfloat16, numbers + 8));
  }
  unsigned newest = 0;
  for (int k = 0; k < kSteps; ++k) {
    float pair[2];
    newest = std::max(newest, read_numbers(address_in(left, k, row & ~1), 2, product.bfloat16, pair));
    numbers[k] = pair[row % 2];
  }
  return newest;
}

static int row_here() { return current % 128 / 32 * 16 + current % 32 / 4; }

static void play(Product& product) {
  const Decoded& right = right_operand(product);
  const int lane = current % 32, row = row_here();
  bool stale = right.newest[lane % 4] > product.issued;
  if (product.in_memory) {
    stale |= read_row(product, row, product.rows[0]) > product.issued;
    stale |= read_row(product, row + 8, product.rows[1]) > product.issued;
  }
  multiply(product.sums, product.count, product.accumulate, product.rows, right.numbers[lane % 4]);
  if (stale) memory::say("a product reads what was written after it began", 0, -1);
  if (stale || !product.visible) std::fill(product.sums, product.sums + product.count, __builtin_nanf(""));
}

// Another product of this thread, and whether its warp may see what it will read: a few lanes look for all.
static Product& begin(float* sums, int count, bool accumulate, const Operand* left, const Operand& right,
                      bool bfloat16) {
  const int lane = current % 32;
  const unsigned clock = products[current].closed + 1;
  if (count % 4 || count > kMostSums) std::fprintf(stderr, "not two rows by two columns at a time\n"), std::abort();
  bool visible = true;
  if (left && lane % 4 == 0) {
    visible &= look_ahead(*left, row_here(), clock) & look_ahead(*left, row_here() + 8, clock);
  }
  for (int first = 0; lane < 4 && first < count; first += 4) {
    const int column = 2 * first + 2 * lane;
    visible &= look_ahead(right, column, clock);
    if (!right.rows) visible &= look_ahead(right, column + 1, clock);
  }
  Product& product = products[current].open().emplace_back();
  product.sums = sums, product.count = count, product.accumulate = accumulate, product.bfloat16 = bfloat16;
  product.visible = visible, product.in_memory = left, product.right = right;
  if (left) product.left = *left;
  product.issued = memory::now;
  return product;
}

void multiply_later(float* sums, int count, bool accumulate, Operand left, Operand right, bool bfloat16) {
  begin(sums, count, accumulate, &left, right, bfloat16);
}

void multiply_later(float* sums, int count, bool accumulate, const unsigned (&registers)[4], Operand right,
                    bool bfloat16) {
  // Two words of each lane: those of the upper 8 rows, and of the lower ones.
  const auto both = [&](int i) { return registers[i] | (unsigned long long)registers[i + 1] << 32; };
  const int quad = current % 32 / 4 * 4;
  unsigned long long words[8];
  for (int i = 0; i < 8; i += 4) std::memcpy(words + i, exchange_all(both(i / 2)) + quad, 4 * sizeof(words[0]));
  Product& product = begin(sums, count, accumulate, nullptr, right, bfloat16);
  for (int k = 0; k < kSteps; ++k) {
    for (int i = 0; i < 2; ++i) product.rows[i][k] = number_of_16(words[k / 2] >> (32 * i + k % 2 * 16), bfloat16);
  }
}

void close_products() { products[current].close(); }
void wait_for_products(unsigned pending) {
  products[current].wait(pending, play);
  memory::mine().seen(memory::products_of(current)) = products[current].ended;
}

static void start_products(int threads) {
  for (int i = 0; i < threads; ++i) products[i].start();
  for (Decoded& one : decoded) one.count = 0;
}

}  // namespace host
