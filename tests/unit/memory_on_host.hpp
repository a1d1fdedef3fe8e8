// Who may see what of dynamic shared memory, when the sm_90a kernels run on the fibers of cuda_on_host.hpp: the order
// that barriers give, and the two proxies of the PTX ISA.
//
// Every thread has vector clocks of what it has seen of others and of what lies before a proxy fence; barriers hand
// both on. Whoever acts for a thread has a clock too: its copies, a warp's products, a warp's bulk copies. A word knows
// who wrote it and who has read it. What the kernel's barriers and fences leave without order is found, whichever way
// the fibers ran: writes that are read before they are announced, or by the asynchronous proxy with no fence between,
// and words that are overwritten while others may still read them.
#pragma once
#include "cuda_on_host.hpp"

#pragma GCC visibility push(hidden)
namespace memory {

extern int faults;
extern unsigned in_vain, in_vain_end;  // where products may read, and forget, what others overwrite meanwhile

// Arrivals hand on what this thread has seen; `last` completes the phase that others wait for.
void release(const void* place, bool last);
void acquire(const void* place);
void proxy_fence();
// Lanes that have one another's values, made of what each has read: all of that has been read.
void exchange_within_warp();

void read(unsigned address, int bytes);
void write(unsigned address, const void* bytes, int count);  // a store of this thread

void start_block(int count, int shared_bytes);

}  // namespace memory
#pragma GCC visibility pop
