// Online softmax of the rows one warp owns, in base 2.
//
// `reference` is the exponent everything is measured from: an earlier row maximum, times exponent_scale. It need not be the
// maximum: p may grow to kMost before anything is lost, in fp32 sums and 16-bit p alike. So once every row has a reference
// (`settled`), a tile is first tried without looking for its maximum; the sums tell if p outgrew kMost, or is NaN, and then
// the scores are formed again and `update` moves the reference. A row that has seen nothing has reference -inf and
// row_sum 0: its out is 0, its lse -inf.
#pragma once
#include "mma.cuh"

template <int kMi>
struct SoftmaxState {
  static constexpr float kMost = 1024.0f;
  bool settled;
  float reference[kMi][2];
  float row_sum[kMi][2];  // this lane's columns only, until finalize

  SCFA_DEVICE void init() {
    settled = false;
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half) reference[mi][half] = -infinity(), row_sum[mi][half] = 0.0f;
  }

  // Turns scores (-inf where masked) into p = 2^(score * scale - reference), first moving the reference to their maximum.
  template <int kNb, int kOb>
  SCFA_DEVICE void update(float (&acc_s)[kMi][kNb][4], float (&acc_o)[kMi][kOb][4], float scale) {
    bool all_seen = true;
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float m = fmaxf(acc_s[mi][0][2 * half], acc_s[mi][0][2 * half + 1]);
#pragma unroll
        for (int nb = 1; nb < kNb; ++nb) m = fmaxf(m, fmaxf(acc_s[mi][nb][2 * half], acc_s[mi][nb][2 * half + 1]));
        m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 1));
        m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 2));
        const float moved = fmaxf(reference[mi][half], m * scale);
        const float factor = moved == -infinity() ? 1.0f : exp2_fast(reference[mi][half] - moved);
        reference[mi][half] = moved;
        all_seen &= moved != -infinity();
        row_sum[mi][half] *= factor;
#pragma unroll
        for (int nb = 0; nb < kOb; ++nb) acc_o[mi][nb][2 * half] *= factor, acc_o[mi][nb][2 * half + 1] *= factor;
      }
    settled = __all_sync(kAllLanes, all_seen);

    float sums[kMi][2];
    exponentials(acc_s, sums, scale);
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi) row_sum[mi][0] += sums[mi][0], row_sum[mi][1] += sums[mi][1];
  }

  // The same with the reference as it is; false, and then nothing but acc_s is changed, if p outgrows kMost or is NaN.
  template <int kNb>
  SCFA_DEVICE bool try_update(float (&acc_s)[kMi][kNb][4], float scale) {
    float sums[kMi][2];
    exponentials(acc_s, sums, scale);
    bool outgrown = false;
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi) outgrown |= !(sums[mi][0] <= kMost) || !(sums[mi][1] <= kMost);
    if (__any_sync(kAllLanes, outgrown)) return false;
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi) row_sum[mi][0] += sums[mi][0], row_sum[mi][1] += sums[mi][1];
    return true;
  }

  template <int kNb>
  SCFA_DEVICE void exponentials(float (&acc_s)[kMi][kNb][4], float (&sums)[kMi][2], float scale) {
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float offset = reference[mi][half] == -infinity() ? 0.0f : -reference[mi][half];
        sums[mi][half] = 0.0f;
#pragma unroll
        for (int nb = 0; nb < kNb; ++nb)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            acc_s[mi][nb][i] = exp2_fast(fmaf(acc_s[mi][nb][i], scale, offset));
            sums[mi][half] += acc_s[mi][nb][i];
          }
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
