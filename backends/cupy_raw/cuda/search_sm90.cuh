// Searches of a whole warp in a nondecreasing list. Include after mbarrier.cuh.
#pragma once

// Search of a whole warp for the first index in [0, count) of nondecreasing `values` that is greater
// than `bound` (count if none).
struct Search {
  const int* values;
  int bound, low, high;  // the answer is in [low, high]

  __device__ __forceinline__ bool done() const { return low >= high; }
  __device__ __forceinline__ int step() const { return (high - low + 31) / 32; }
  __device__ __forceinline__ int place(int lane) const { return low + step() * (lane + 1) - 1; }
  // What this lane looks at; of a search that is done, something that is there.
  __device__ __forceinline__ int probe(int lane) const {
    return values[max(min(place(lane), high - 1), 0)];
  }
  // Lanes whose value is not greater come first; the next one's place bounds the answer from above.
  __device__ __forceinline__ void narrow(int value, int lane) {
    const bool greater = place(lane) >= high || value > bound;
    const int before = uniform(__popc(__ballot_sync(0xFFFFFFFFu, !greater))), width = step();
    high = min(high, low + width * (before + 1) - 1);
    low = low + width * before;
  }
};

__device__ __forceinline__ int first_greater(const int* values, int count, int bound, int lane) {
  Search search{values, bound, 0, count};
  while (!search.done()) search.narrow(search.probe(lane), lane);
  return search.high;
}

// Several searches, whose loads are waited for together.
template <int kCount>
__device__ __forceinline__ void search_all(Search (&searches)[kCount], int lane) {
  for (bool done = false; !done;) {
    int values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = searches[i].probe(lane);
    done = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!searches[i].done()) searches[i].narrow(values[i], lane);
      done &= searches[i].done();
    }
  }
}
