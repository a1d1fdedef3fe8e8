// Whether ranges are nondecreasing along the sorted queries (plan.monotone). Those in any order have
// kernels of their own, since what they ask takes registers that the gathering warpgroup does not have.
#pragma once

#ifdef SCFA_MONOTONE
constexpr bool kMonotone = SCFA_MONOTONE;
#else
constexpr bool kMonotone = true;
#endif

// Where ranges lie in any order, what dk/dv searches in their place (bwd_envelope_sm90.cu): the
// values of rows that see nothing, which make no envelope wider.
constexpr int kNoEnd = 0;              // no key lies before it
constexpr int kNoStart = 0x7FFFFFFF;  // no key lies beyond it
