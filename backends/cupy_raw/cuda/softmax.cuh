// Online softmax of the rows one warp owns, in base 2.
//
// `reference` is the exponent everything is measured from: a recent row maximum, times exponent_scale. It moves only when
// some row of the warp outgrows it by more than kSlack, so most tiles rescale nothing; p stays below 2^kSlack, harmless in
// fp32 sums and 16-bit p alike. A row that has seen nothing has reference -inf and row_sum 0: its out is 0, its lse -inf.
#pragma once
#include "mma.cuh"

template <int kMi>
struct SoftmaxState {
  static constexpr float kSlack = 8.0f;
  float reference[kMi][2];
  float row_sum[kMi][2];  // this lane's columns only, until finalize

  SCFA_DEVICE void init() {
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half) reference[mi][half] = -infinity(), row_sum[mi][half] = 0.0f;
  }

  // Turns scores (-inf where masked) into p = 2^(score * scale - reference), rescaling acc_o if the reference moved.
  template <int kNb, int kOb>
  SCFA_DEVICE void update(float (&acc_s)[kMi][kNb][4], float (&acc_o)[kMi][kOb][4], float scale) {
    float row_max[kMi][2];
    bool outgrown = false;
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float m = fmaxf(acc_s[mi][0][2 * half], acc_s[mi][0][2 * half + 1]);
#pragma unroll
        for (int nb = 1; nb < kNb; ++nb) m = fmaxf(m, fmaxf(acc_s[mi][nb][2 * half], acc_s[mi][nb][2 * half + 1]));
        m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 1));
        m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 2));
        row_max[mi][half] = m * scale;
        outgrown |= row_max[mi][half] > reference[mi][half] + kSlack;
      }

    if (__any_sync(kAllLanes, outgrown)) {
#pragma unroll
      for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float moved = fmaxf(reference[mi][half], row_max[mi][half]);
          const float factor = moved == -infinity() ? 1.0f : exp2_fast(reference[mi][half] - moved);
          reference[mi][half] = moved;
          row_sum[mi][half] *= factor;
#pragma unroll
          for (int nb = 0; nb < kOb; ++nb) acc_o[mi][nb][2 * half] *= factor, acc_o[mi][nb][2 * half + 1] *= factor;
        }
    }

#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float offset = reference[mi][half] == -infinity() ? 0.0f : -reference[mi][half];
        float sum = 0.0f;
#pragma unroll
        for (int nb = 0; nb < kNb; ++nb)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            acc_s[mi][nb][i] = exp2_fast(fmaf(acc_s[mi][nb][i], scale, offset));
            sum += acc_s[mi][nb][i];
          }
        row_sum[mi][half] += sum;
      }
  }

  // The factor that normalises out and the natural-log lse of each row.
  SCFA_DEVICE void finalize(float (&inverse)[kMi][2], float (&lse)[kMi][2]) {
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = row_sum[mi][half];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        const bool empty = reference[mi][half] == -infinity() && sum == 0.0f;
        inverse[mi][half] = empty ? 0.0f : 1.0f / sum;
        lse[mi][half] = empty ? -infinity() : (reference[mi][half] == -infinity() ? sum : (reference[mi][half] + log2_fast(sum)) * kLn2);
      }
  }
};
