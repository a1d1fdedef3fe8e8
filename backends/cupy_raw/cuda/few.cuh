// What the kernels for few query rows share: rows of several heads in one tile, keys shared out among blocks.
//
// A pack is all query rows of the heads that share a key head: in the plan they are neighbours. Its stream is every sorted key
// that some row of a tile of it sees, each once, in order. The stream is cut into `splits` chunks, which depend on nothing but
// the ranges of the tile's rows: what else is in the call changes no bit.
#pragma once
#include "params.cuh"
#include "ptx.cuh"

struct FewParams {
  Params call;
  float* part_out;  // (splits, batch, heads, seqlen_q, head_dim_v) contiguous, sorted rows: out of a chunk's keys
  float* part_lse;  // (splits, batch, heads, seqlen_q): its lse, -inf where the row sees none of them, and then no out
  int splits;       // 1: out and lse are written at once
  int unused;
};

constexpr int kFewRows = 16;  // of a tile
constexpr int kLeastChunk = 256;  // keys

// Where the stream of a tile lies in the sorted key list: segment s holds keys [first[s], ...) from place before[s] of the stream
// on. A row's keys are one piece of the stream. Segments without keys come before or after, and are never found.
struct Segments {
  int first[kFewRows], before[kFewRows];
  int total;

  // The last segment with values[s] <= bound; the first's is.
  SCFA_DEVICE int find(const int (&values)[kFewRows], int bound) const {
    int s = 0;
#pragma unroll
    for (int step = kFewRows / 2; step > 0; step /= 2) s += values[s + step] <= bound ? step : 0;
    return s;
  }
  SCFA_DEVICE int key_at(int place) const {
    const int s = find(before, place);
    return first[s] + place - before[s];
  }
  SCFA_DEVICE int place_of(int key) const {
    const int s = find(first, key);
    return before[s] + key - first[s];
  }
};

// Segments of rows whose ranges lanes 0 to 15 hold, by one warp: ranges in order of their starts, each less what those before
// it reach.
SCFA_DEVICE void warp_segments(Segments& segments, int (&starts)[kFewRows], int (&ends)[kFewRows], int start, int end) {
  const int lane = threadIdx.x % kWarpSize;
  if (start >= end || lane >= kFewRows) start = kIntMax, end = 0;
  int rank = 0;
#pragma unroll
  for (int other = 0; other < kFewRows; ++other) {
    const int its = __shfl_sync(kAllLanes, start, other);
    rank += its < start || (its == start && other < lane);
  }
  if (lane < kFewRows) starts[rank] = start, ends[rank] = end;
  __syncwarp();  // all ranges are in order
  start = lane < kFewRows ? starts[lane] : kIntMax;
  end = lane < kFewRows ? ends[lane] : 0;

  int reach = end;  // of this range and those before
#pragma unroll
  for (int step = 1; step < kFewRows; step *= 2) reach = max(reach, __shfl_up_sync(kAllLanes, reach, step));
  const int before = __shfl_up_sync(kAllLanes, reach, 1);
  const int first = lane > 0 ? max(start, before) : start;
  const int keys = max(end - first, 0);
  int sum = keys;
#pragma unroll
  for (int step = 1; step < kFewRows; step *= 2) {
    const int its = __shfl_up_sync(kAllLanes, sum, step);
    sum += lane >= step ? its : 0;
  }
  if (lane < kFewRows) segments.first[lane] = first, segments.before[lane] = sum - keys;
  if (lane == kFewRows - 1) segments.total = sum;
}
