// Online softmax of one warpgroup's 64 rows on wgmma accumulators, in base 2, and the range mask.
// Thread (warp w, lane 4 g + q) holds rows 16 w + g and + 8; element i is of row half (i >> 1) & 1, column 8 (i >> 2) + 2 q + (i & 1).
#pragma once

#define SCFA_INFINITY __int_as_float(0x7F800000)
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2E = 1.442695040888963407f;

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

__device__ constexpr int half_of(int i) { return (i >> 1) & 1; }
__device__ constexpr int column_of(int i) { return 8 * (i >> 2) + (i & 1); }  // plus 2 q

// Smallest and largest range ends of the 64 rows of a warpgroup; rows that see nothing count for `inner` only.
struct RowExtremes {
    int outer_start, outer_end;  // some row sees something in here
    int inner_start, inner_end;  // every row sees all of this (empty if start >= end)
};

__device__ __forceinline__ RowExtremes row_extremes(unsigned starts, unsigned ends, int lane) {
    const int start0 = shared_load(starts + 4 * lane), start1 = shared_load(starts + 4 * lane + 128);
    const int end0 = shared_load(ends + 4 * lane), end1 = shared_load(ends + 4 * lane + 128);
    constexpr int kNone = 0x7FFFFFFF;
    RowExtremes e;
    e.outer_start = __reduce_min_sync(0xFFFFFFFFu, min(start0 < end0 ? start0 : kNone, start1 < end1 ? start1 : kNone));
    e.outer_end = __reduce_max_sync(0xFFFFFFFFu, max(start0 < end0 ? end0 : 0, start1 < end1 ? end1 : 0));
    e.inner_start = __reduce_max_sync(0xFFFFFFFFu, max(start0, start1));
    e.inner_end = __reduce_min_sync(0xFFFFFFFFu, min(end0, end1));
    return e;
}

// Scores outside [start, end) of their row become -inf; `first` is the key of column 0, q the lane within its quad.
template <int kCount>
__device__ __forceinline__ void mask_scores(
    float (&scores)[kCount], const int (&start)[2], const int (&end)[2], int first, int q) {
    const int shift = first + 2 * q;
    const int low[2] = {start[0] - shift, start[1] - shift};
    const int high[2] = {end[0] - shift, end[1] - shift};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const bool seen = column_of(i) >= low[half_of(i)] && column_of(i) < high[half_of(i)];
        scores[i] = seen ? scores[i] : -SCFA_INFINITY;
    }
}

struct OnlineSoftmax {
    float maximum[2] = {-SCFA_INFINITY, -SCFA_INFINITY};
    float sum[2] = {0.0f, 0.0f};  // this thread's columns only, until finalize()

    // Replace scores by exp2((score - running maximum) * scale_log2); returns in `decay` what earlier results shrink by.
    template <int kCount>
    __device__ __forceinline__ void update(float (&scores)[kCount], float (&decay)[2], float scale_log2) {
        float top[2] = {maximum[0], maximum[1]};
#pragma unroll
        for (int i = 0; i < kCount; ++i) top[half_of(i)] = fmaxf(top[half_of(i)], scores[i]);
        float shift[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            top[half] = quad_max(top[half]);
            // A row that has seen no key yet has maximum -inf: shift by 0, so that its weights are exp2(-inf) = 0.
            shift[half] = top[half] == -SCFA_INFINITY ? 0.0f : top[half] * scale_log2;
            decay[half] = exp2_fast(maximum[half] * scale_log2 - shift[half]);
            maximum[half] = top[half];
            sum[half] *= decay[half];
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            scores[i] = exp2_fast(scores[i] * scale_log2 - shift[half_of(i)]);
        }
        // Two accumulation chains a row half keep the additions independent.
        float extra[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < kCount; i += 2) {
            sum[half_of(i)] += scores[i];
            extra[half_of(i)] += scores[i + 1];
        }
        sum[0] += extra[0];
        sum[1] += extra[1];
    }

    // What to multiply each row's accumulator by (0 for rows without keys), and its log-sum-exp in nats.
    __device__ __forceinline__ void finalize(float (&inverse)[2], float (&lse)[2], float scale) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float total = quad_sum(sum[half]);
            inverse[half] = total == 0.0f ? 0.0f : 1.0f / total;
            lse[half] = total == 0.0f ? -SCFA_INFINITY : maximum[half] * scale + log2_fast(total) * kLn2;
        }
    }
};

template <int kCount>
__device__ __forceinline__ void scale_rows(float (&values)[kCount], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] *= factor[half_of(i)];
}
