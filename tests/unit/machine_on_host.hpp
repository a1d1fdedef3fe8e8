// What of Hopper wgmma_on_host.hpp makes the kernels' functions of: barriers, copies, products, bulk copies.
//
// The machine is as unkind as the PTX ISA lets it be. Copies land when the barrier they are to arrive at is told.
// Products read shared memory when they are waited for, from descriptors and swizzled bytes. Bulk copies read, and add,
// when they are waited for, or else when their thread starts the next one, or at the end of the kernel. By
// memory_on_host.hpp, products of what their warps may not see yet, or of what has been overwritten since, are NaN.
#pragma once
#include "memory_on_host.hpp"

#pragma GCC visibility push(hidden)
namespace host {

void start_block(int threads, int shared_bytes);
void end_block();
void end_grid();

// An operand of a product: a tile in shared memory by its descriptor. A line is a row or a column of it, along which 16
// steps of the reduction lie.
struct Operand {
  unsigned long long descriptor;
  bool rows;  // the tile's rows are reduced over, its lines are columns
};
// Leave a product for later: to `count` sums of this thread is added, or they become, what two of the left operand's
// rows and columns of the right one make. `registers`: those of this thread, in place of a left operand in memory.
void multiply_later(float* sums, int count, bool accumulate, Operand left, Operand right, bool bfloat16);
void multiply_later(float* sums, int count, bool accumulate, const unsigned (&registers)[4], Operand right,
                    bool bfloat16);
void close_products();
void wait_for_products(unsigned pending);

void start_copy(unsigned target, const void* source, int bytes, bool wanted);
void copy_box(unsigned target, const void* map, int column, int row, int h, int b, unsigned barrier);
void start_sum(float* target, unsigned source, bool first, int floats);
void read_sum_here();
void add_sum_here();
void fetch_sum(unsigned tile, const float* source, unsigned barrier, int floats);
void let_others_go_on(int times);

}  // namespace host

void barrier_init(unsigned address, unsigned arrivals);
void barrier_arrive(unsigned address);
bool barrier_try_wait(unsigned address, unsigned parity);
void named_barrier_sync(int id, int threads);
bool named_barrier_any(int id, int threads, bool vote);
void named_barrier_arrive(int id, int threads);
void wait_for_copies();
void arrive_when_copied(unsigned address);
void store_matrices(unsigned address, unsigned a0, unsigned a1, unsigned a2, unsigned a3);
int uniform(int value);
int load_acquire(const int* address);
void store_release(int* address, int value);
void wait_until(const int* address, int value);
void count_release(int* address);
void load_sum_four(const float* address, float (&values)[4]);
#pragma GCC visibility pop
