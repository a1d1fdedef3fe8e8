// Gather rows by index from global memory into swizzled shared tiles (wgmma.cuh), and scatter accumulators back by index.
// One warpgroup gathers: eight lanes move the eight 16-byte chunks of a 128-byte row, sixteen rows a pass.
#pragma once

constexpr int kGatherThreads = 128;
constexpr int kLanesPerRow = 8;
constexpr int kRowsPerPass = kGatherThreads / kLanesPerRow;
constexpr int kRowsPerRegister = kRowsPerPass * kLanesPerRow;  // rows whose indices one register per thread can hold

// Row of a tile whose index this thread keeps in register `slot`: the lanes of a row group share the work.
__device__ __forceinline__ int gather_owned_row(int thread, int slot) {
    return thread / kLanesPerRow + kRowsPerPass * (thread % kLanesPerRow) + kRowsPerRegister * slot;
}

// Copy kRows rows of kPanels * 128 bytes; index -1 fills the row with zeros (and reads nothing).
// `source` is the head's first row plus this thread's chunk (16 bytes times its lane).
template <int kRows, int kPanels>
__device__ __forceinline__ void gather_rows(
    unsigned tile, const char* source, int row_bytes, const int (&index)[(kRows + 127) / 128], int thread) {
    const int lane = thread % kLanesPerRow, first = thread / kLanesPerRow;
    const unsigned target = tile + first * kRowBytes + ((lane ^ (first & 7)) << 4);
#pragma unroll
    for (int pass = 0; pass < kRows / kRowsPerPass; ++pass) {
        const int row = __shfl_sync(0xFFFFFFFFu, index[pass / kLanesPerRow], pass % kLanesPerRow, kLanesPerRow);
        const char* address = source + static_cast<long long>(max(row, 0)) * row_bytes;
        const unsigned bytes = row < 0 ? 0 : 16;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
            const unsigned chunk = target + (panel * kRows + pass * kRowsPerPass) * kRowBytes;
            if constexpr (kPanels == 1) {
                asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(chunk), "l"(address), "r"(bytes)
                             : "memory");
            } else {
                asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(chunk),
                             "l"(address + panel * kRowBytes), "r"(bytes)
                             : "memory");
            }
        }
    }
}

// Give lane t of each quad the values that the four lanes hold in their register t: a 4 x 4 transpose.
__device__ __forceinline__ void transpose_quad(unsigned (&r)[4], int lane) {
    const bool odd = lane & 1, upper = lane & 2;
    unsigned send = odd ? r[0] : r[1], other = __shfl_xor_sync(0xFFFFFFFFu, send, 1);
    if (odd) r[0] = other; else r[1] = other;
    send = odd ? r[2] : r[3];
    other = __shfl_xor_sync(0xFFFFFFFFu, send, 1);
    if (odd) r[2] = other; else r[3] = other;
    send = upper ? r[0] : r[2];
    other = __shfl_xor_sync(0xFFFFFFFFu, send, 2);
    if (upper) r[0] = other; else r[2] = other;
    send = upper ? r[1] : r[3];
    other = __shfl_xor_sync(0xFFFFFFFFu, send, 2);
    if (upper) r[1] = other; else r[3] = other;
}

// Write one warp's 16 rows of 2 * kCount columns, scaled, in 16 bits, to the rows given by this lane's two indices
// (rows g and g + 8; -1 writes nothing). Scale 0 writes exact zeros whatever the accumulator holds.
template <int kCount>
__device__ __forceinline__ void scatter_rows(
    const float (&values)[kCount], const float (&scale)[2], char* head, long long row_bytes, const int (&index)[2], int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        char* row = head + index[half] * row_bytes + (lane & 3) * 16;
#pragma unroll
        for (int block = 0; block < kCount / 16; ++block) {
            unsigned pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = 16 * block + 4 * i + 2 * half;
                pairs[i] = pack_pair(values[at] * scale[half], values[at + 1] * scale[half]);
                if (scale[half] == 0.0f) pairs[i] = 0;
            }
            transpose_quad(pairs, lane);
            if (index[half] >= 0) {
                *reinterpret_cast<uint4*>(row + block * 64) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            }
        }
    }
}
