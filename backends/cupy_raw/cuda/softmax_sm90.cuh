// Online softmax of one warpgroup's 64 rows on wgmma accumulators, in base 2, and the range mask.
// Thread (warp w, lane 4 g + q) holds rows 16 w + g and + 8; element i is of row half (i >> 1) & 1,
// column 8 (i >> 2) + 2 q + (i & 1).
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

// Smallest and largest range ends of the 64 rows of a warpgroup; rows that see nothing count for
// `inner` only.
struct RowExtremes {
  int outer_start, outer_end;  // some row sees something in here
  int inner_start, inner_end;  // every row sees all of this (empty if start >= end)
};

__device__ __forceinline__ RowExtremes row_extremes(unsigned starts, unsigned ends, int lane) {
  constexpr int kNone = 0x7FFFFFFF;
  RowExtremes e{kNone, 0, 0, kNone};
#pragma unroll
  for (int r = 0; r < 64; r += 32) {
    const int start = shared_load(starts + 4 * (lane + r)),
              end = shared_load(ends + 4 * (lane + r));
    e.outer_start = min(e.outer_start, start < end ? start : kNone);
    e.outer_end = max(e.outer_end, start < end ? end : 0);
    e.inner_start = max(e.inner_start, start);
    e.inner_end = min(e.inner_end, end);
  }
  e.outer_start = __reduce_min_sync(0xFFFFFFFFu, e.outer_start);
  e.outer_end = __reduce_max_sync(0xFFFFFFFFu, e.outer_end);
  e.inner_start = __reduce_max_sync(0xFFFFFFFFu, e.inner_start);
  e.inner_end = __reduce_min_sync(0xFFFFFFFFu, e.inner_end);
  return e;
}

// A bit for each of a row's scores that a thread holds, in their order: does its column, less 2 q,
// lie before `column`?
__device__ __forceinline__ unsigned columns_before(int column) {
  const int clipped = max(column, 0), count = 2 * (clipped >> 3) + min(clipped & 7, 2);
  return count < 32 ? (1u << count) - 1 : ~0u;
}

// Scores of keys outside their row's range become -inf, where a row of this warpgroup does not see the
// whole block. `starts` and `ends` are addresses of those of this thread's first row, `first` is the key of
// column 0, q the lane within its quad.
template <int kCount>
__device__ __forceinline__ void mask_block(float (&scores)[kCount], const RowExtremes& rows,
                                           unsigned starts, unsigned ends, int first, int q) {
  static_assert(kCount <= 64, "32 bits a row");
  if (first + 2 * kCount <= rows.inner_end && first >= rows.inner_start) return;
  const int origin = first + 2 * q;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const unsigned seen = columns_before(shared_load(ends + 32 * half) - origin) &
                          ~columns_before(shared_load(starts + 32 * half) - origin);
#pragma unroll
    for (int j = 0; j < kCount / 2; ++j) {
      const int i = 4 * (j >> 1) + 2 * half + (j & 1);
      scores[i] = seen & 1u << j ? scores[i] : -SCFA_INFINITY;
    }
  }
}

// A row's reference moves to its maximum so far only once a weight would grow beyond 2^kSlack; until then
// nothing is exchanged between threads, and earlier results need not shrink. Scores stay as they came
// until they become weights: differences of large scores are exact. What goes beyond a reference that is
// not negative is cheaper to see, so one below zero moves as soon as its row has a score above zero.
struct OnlineSoftmax {
  static constexpr float kSlack = 8.0f;
  float maximum[2] = {-SCFA_INFINITY, -SCFA_INFINITY};  // the reference: of the row when it moved
  float sum[2] = {0.0f, 0.0f};  // this thread's columns only, until finalize()
  bool positive = false;        // no reference of the warp's rows is below zero

  // Replace scores by exp2((score - reference) * scale_log2); `decay` is what earlier results shrink by,
  // if they do (the answer, the same for a whole warp).
  template <int kCount>
  __device__ __forceinline__ bool update(float (&scores)[kCount], float (&decay)[2],
                                         float scale_log2) {
    static_assert(kCount % 4 == 0, "two scores of each row at a time");
    float top[2] = {maximum[0], maximum[1]}, shift[2], growth;
    // Infinite at the first key that a row sees; NaN, which fmaxf does not take, until then.
    const auto beyond = [&]() {
      return fmaxf(top[0] - maximum[0], top[1] - maximum[1]) * scale_log2;
    };
    if (positive) {
      // What lies above such a reference compares as integers do, and those three at a time.
#pragma unroll
      for (int i = 0; i < kCount; i += 2) {
        const int pair = max(__float_as_int(scores[i]), __float_as_int(scores[i + 1]));
        top[half_of(i)] = __int_as_float(max(__float_as_int(top[half_of(i)]), pair));
      }
      shift[0] = maximum[0] * scale_log2;
      shift[1] = maximum[1] * scale_log2;
      growth = beyond();
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) top[half_of(i)] = fmaxf(top[half_of(i)], scores[i]);
      const bool rises =
          (maximum[0] < 0.0f & top[0] > 0.0f) | (maximum[1] < 0.0f & top[1] > 0.0f);
      growth = rises ? SCFA_INFINITY : beyond();
      shift[0] = shift_of(maximum[0], scale_log2);
      shift[1] = shift_of(maximum[1], scale_log2);
    }
    const bool moves = __any_sync(0xFFFFFFFFu, growth > kSlack);
    if (moves) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[half] = quad_max(top[half]);
        shift[half] = shift_of(top[half], scale_log2);
        decay[half] = exp2_fast(maximum[half] * scale_log2 - shift[half]);
        maximum[half] = top[half];
        sum[half] *= decay[half];
      }
      const int sign = __float_as_int(maximum[0]) | __float_as_int(maximum[1]);
      positive = __all_sync(0xFFFFFFFFu, sign >= 0);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      scores[i] = exp2_fast(scores[i] * scale_log2 - shift[half_of(i)]);
    // Two accumulation chains a row half keep the additions independent. They are of this block:
    // added to the row's sum one by one, small weights would vanish in a long row.
    float even[2] = {scores[0], scores[2]}, odd[2] = {scores[1], scores[3]};
#pragma unroll
    for (int i = 4; i < kCount; i += 2) {
      even[half_of(i)] += scores[i];
      odd[half_of(i)] += scores[i + 1];
    }
    sum[0] += even[0] + odd[0];
    sum[1] += even[1] + odd[1];
    return moves;
  }

  // A row that has seen no key yet has maximum -inf: shift by 0, so that its weights are
  // exp2(-inf) = 0.
  __device__ __forceinline__ static float shift_of(float maximum, float scale_log2) {
    return maximum == -SCFA_INFINITY ? 0.0f : maximum * scale_log2;
  }

  // What to multiply each row's accumulator by (0 for rows without keys), and its log-sum-exp in
  // nats.
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
