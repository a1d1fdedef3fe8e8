// Units of a score, and of the lse that dq's kernel hands on.
//
// Natural where float32 is multiplied as it is: a change of base rounds a large score once more each way, so that the weight
// of a row's only key would not be 1. Elsewhere base 2 with the scale folded in, one operation less for each score; factors
// of 16 bits, or of TF32, lose more than that.
#pragma once
#include "params.cuh"
#include "ptx.cuh"

constexpr bool kNaturalScores = SCFA_ELEMENT == 0;

// Rounded here, not fused with a later subtraction: forward and backward find the same score.
SCFA_DEVICE float score_of(float product, const Params& p) {
  return kNaturalScores ? __fmul_rn(product, p.softmax_scale) : product * p.softmax_scale_log2;
}

SCFA_DEVICE float weight_of(float score) { return exp2_fast(kNaturalScores ? score * kLog2E : score); }

// The natural logarithm of sum * exp(reference), or sum * 2^reference.
SCFA_DEVICE float lse_of(float reference, float sum) {
  return kNaturalScores ? reference + logf(sum) : (reference + log2f(sum)) * kLn2;
}
