// Which tile of sorted query rows a block works on, which keys that tile's rows see, and the row data shared between the
// gathering warpgroup and the multiplying ones. Used by the kernels that own query tiles (fwd_sm90.cu, bwd_dq_sm90.cu).
#pragma once

constexpr int kProducerBarrier = 1;  // named barrier of the gathering warpgroup

// Shared-memory addresses of one query buffer's row data: kRows ints each of key_start, key_end, q_index, then the header.
template <int kRows>
struct TileData {
    static constexpr int kBytes = 12 * kRows + 16;
    unsigned base;

    __device__ __forceinline__ unsigned starts() const { return base; }
    __device__ __forceinline__ unsigned ends() const { return base + 4 * kRows; }
    __device__ __forceinline__ unsigned indices() const { return base + 8 * kRows; }
    __device__ __forceinline__ unsigned tile() const { return base + 12 * kRows; }
    __device__ __forceinline__ unsigned first_key() const { return base + 12 * kRows + 4; }
    __device__ __forceinline__ unsigned key_blocks() const { return base + 12 * kRows + 8; }
};

// The keys a query tile visits: [first, end) of the sorted list; `gaps`: some key in there is seen by no row of the tile.
struct KeyUnion {
    int first, end;
    bool gaps;
};

// Load the tile's row data into shared memory and agree on its key range. All threads of the gathering warpgroup call it.
template <int kRows>
__device__ __forceinline__ KeyUnion load_tile_rows(
    const Params& p, TileData<kRows> data, unsigned scratch, long long z, int first_row, int thread) {
    const int* starts = p.key_start + z * p.seqlen_q;
    const int* ends = p.key_end + z * p.seqlen_q;
    const int* indices = p.q_index + z * p.seqlen_q;
    const int last = p.seqlen_q - 1;
    constexpr int kNone = 0x7FFFFFFF;
    int low = kNone, high = 0;
    bool gaps = false;
#pragma unroll
    for (int r = thread; r < kRows; r += kGatherThreads) {
        // Rows past the end repeat the last row's range, and are neither gathered nor stored.
        const int row = min(first_row + r, last);
        const int start = starts[row], end = ends[row];
        shared_store(data.starts() + 4 * r, start);
        shared_store(data.ends() + 4 * r, end);
        shared_store(data.indices() + 4 * r, first_row + r <= last ? indices[row] : -1);
        if (start < end) {
            low = min(low, start);
            high = max(high, end);
        }
        if (r + 1 < kRows && row < last) gaps |= starts[row + 1] > end;
    }
    low = __reduce_min_sync(0xFFFFFFFFu, low);
    high = __reduce_max_sync(0xFFFFFFFFu, high);
    if (thread % 32 == 0) {
        shared_store(scratch + 8 * (thread / 32), low);
        shared_store(scratch + 8 * (thread / 32) + 4, high);
    }
    KeyUnion keys;
    keys.gaps = named_barrier_any(kProducerBarrier, kGatherThreads, gaps || !p.monotone);
    keys.first = kNone;
    keys.end = 0;
#pragma unroll
    for (int warp = 0; warp < kGatherThreads / 32; ++warp) {
        keys.first = min(keys.first, shared_load(scratch + 8 * warp));
        keys.end = max(keys.end, shared_load(scratch + 8 * warp + 4));
    }
    if (keys.first >= keys.end) keys.first = keys.end = 0;
    return keys;
}

// Is this key seen by any row of the tile? Exact, so that rows nobody sees are never multiplied, not even by zero.
template <int kRows>
__device__ __forceinline__ bool seen_by_tile(TileData<kRows> data, int key, bool monotone) {
    if (monotone) {
        int row = 0;  // lower bound: the first row whose range ends beyond the key
#pragma unroll 1
        for (int count = kRows; count > 0;) {
            const int half = count / 2;
            const bool beyond = shared_load(data.ends() + 4 * (row + half)) > key;
            row = beyond ? row : row + half + 1;
            count = beyond ? half : count - half - 1;
        }
        return row < kRows && shared_load(data.starts() + 4 * row) <= key;
    }
    bool seen = false;
#pragma unroll 1
    for (int row = 0; row < kRows; ++row) {
        seen |= shared_load(data.starts() + 4 * row) <= key && key < shared_load(data.ends() + 4 * row);
    }
    return seen;
}
