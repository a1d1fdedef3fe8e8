// The careful way, one row at a time, for rows whose fast result is not finite.
//
// A tile product multiplies the zero of an invisible pair with whatever the row of that pair holds, and 0 * NaN is NaN.
// Kernels therefore check their accumulators at the end (NaN and Inf never go away again) and recompute a tainted row
// here from its visible pairs alone. So every result depends on visible pairs only, bit for bit, and the check costs one
// fused multiply-add per accumulator. A row stops early once all it computes is NaN. All threads of the block take part.
//
// Long sums of float32 rows are made of chains of kChain terms, joined with what the additions before them lost. Where rows are
// of half precision or TF32, the roundings of their weights outweigh those of the sums, which are made as tiles make them.
#pragma once
#include "mma.cuh"
#include "params.cuh"
#include "scores.cuh"

template <int kDim>
SCFA_DEVICE float dot_rows(const Element* a, const Element* b) {
  float sum = 0.0f;
#pragma unroll 1
  for (int d = 0; d < kDim; d += 8) {
    float x[8], y[8];
    load8(a + d, x);
    load8(b + d, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(as_multiplied(x[i]), as_multiplied(y[i]), sum);
  }
  return sum;
}

SCFA_DEVICE bool is_nan(float x) { return x != x; }

constexpr bool kMindsLoss = SCFA_ELEMENT == 0;
constexpr int kChain = kMindsLoss ? 32 : kIntMax;  // terms that are added one to the next before their sum joins a long one

// sum += term (Kahan's summation): `lost` is what roundings have added to the sum so far. Inf and NaN stay what they are.
SCFA_DEVICE void add_with_loss(float& sum, float& lost, float term) {
  if (!kMindsLoss) {
    sum += term;
    return;
  }
  const float corrected = term - lost;
  const float moved = sum + corrected;
  const float excess = (moved - sum) - corrected;
  lost = is_nan(excess - excess) ? 0.0f : excess;  // Inf - Inf: nothing finite was lost
  sum = moved;
}

// Whether a chain ends with term j of `count`.
SCFA_DEVICE bool ends_chain(int j, int count) { return j % kChain == kChain - 1 || j == count - 1; }

// Columns threadIdx.x, threadIdx.x + kThreads, ... of one row.
template <int kDim, int kThreads>
struct RowSlice {
  static constexpr int kColumns = ceil_div(kDim, kThreads);
  float value[kColumns], lost[kColumns], chain[kColumns];

  SCFA_DEVICE void init() {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) value[c] = lost[c] = chain[c] = 0.0f;
  }
  SCFA_DEVICE void scale(float factor) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) value[c] *= factor, lost[c] *= factor;
  }
  SCFA_DEVICE void add(float factor, const Element* row) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      float& sum = kMindsLoss ? chain[c] : value[c];
      if (column(c) < kDim) sum = fmaf(factor, as_multiplied(to_float(row[column(c)])), sum);
    }
  }
  SCFA_DEVICE void join_chain() {
    if constexpr (kMindsLoss) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) add_with_loss(value[c], lost[c], chain[c]), chain[c] = 0.0f;
    }
  }
  template <class Out>
  SCFA_DEVICE void store(Out* row) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (column(c) < kDim) row[column(c)] = from_float<Out>(value[c]);
  }
  SCFA_DEVICE bool all_nan() const {
    bool all = true;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) all &= column(c) >= kDim || is_nan(value[c]);
    return all;
  }
  SCFA_DEVICE static int column(int c) { return c * kThreads + threadIdx.x; }
};

// out and lse of one query row over sorted keys [start, end). `scratch`: kThreads floats of shared memory; Out: Element or float.
template <int kThreads, class Out>
SCFA_DEVICE void block_exact_out(const Element* q_row, const Element* k, const Element* v, const int* k_index, int start, int end,
                                 const Params& p, float* scratch, Out* out_row, float* lse) {
  RowSlice<kHeadDimV, kThreads> acc;
  acc.init();
  float reference = -infinity(), row_sum = 0.0f, row_lost = 0.0f;
  for (int first = start; first < end; first += kThreads) {
    const int count = min(kThreads, end - first);
    const int mine = first + threadIdx.x;
    __syncthreads();  // the scores of the last round have been read
    if (mine < end) {
      scratch[threadIdx.x] = score_of(dot_rows<kHeadDim>(q_row, k + k_index[mine] * p.k_strides.row), p);
    }
    __syncthreads();  // scores are complete

    float moved = reference;
    for (int j = 0; j < count; ++j) moved = fmaxf(moved, scratch[j]);
    const float factor = moved == reference ? 1.0f : weight_of(reference - moved);
    acc.scale(factor);
    row_sum *= factor;
    row_lost *= factor;
    reference = moved;
    float chain = 0.0f;
    for (int j = 0; j < count; ++j) {
      const float probability = weight_of(scratch[j] - reference);
      chain += probability;
      acc.add(probability, v + k_index[first + j] * p.v_strides.row);
      if (!ends_chain(j, count)) continue;
      add_with_loss(row_sum, row_lost, chain);
      acc.join_chain();
      chain = 0.0f;
    }
    if (__syncthreads_and(acc.all_nan() && is_nan(row_sum))) break;
  }
  const bool empty = reference == -infinity() && !is_nan(row_sum);
  acc.scale(empty ? 0.0f : 1.0f / row_sum);
  acc.store(out_row);
  if (threadIdx.x == 0) *lse = empty ? -infinity() : lse_of(reference, row_sum);
}

// dq of one query row. `scratch`: kThreads floats of shared memory.
template <int kThreads>
SCFA_DEVICE void block_exact_dq(const Element* q_row, const Element* dout_row, float row_lse, float delta, const Element* k,
                                const Element* v, const int* k_index, int start, int end, const Params& p, float* scratch,
                                Element* dq_row) {
  RowSlice<kHeadDim, kThreads> acc;
  acc.init();
  for (int first = start; first < end; first += kThreads) {
    const int count = min(kThreads, end - first);
    const int mine = first + threadIdx.x;
    __syncthreads();  // the gradients of the last round have been read
    if (mine < end) {
      const float score = score_of(dot_rows<kHeadDim>(q_row, k + k_index[mine] * p.k_strides.row), p);
      const float dp = dot_rows<kHeadDimV>(dout_row, v + k_index[mine] * p.v_strides.row);
      scratch[threadIdx.x] = weight_of(score - row_lse) * (dp - delta);
    }
    __syncthreads();  // gradients of the scores are complete
    for (int j = 0; j < count; ++j) {
      acc.add(as_multiplied(scratch[j]), k + k_index[first + j] * p.k_strides.row);
      if (ends_chain(j, count)) acc.join_chain();
    }
    if (__syncthreads_and(acc.all_nan())) break;
  }
  acc.scale(p.softmax_scale);
  acc.store(dq_row);
}

// What one key row gathers from its queries, head after head. `scratch`: 2 * kThreads floats of shared memory.
template <int kThreads>
struct ExactKeyRow {
  RowSlice<kHeadDim, kThreads> acc_dk;
  RowSlice<kHeadDimV, kThreads> acc_dv;

  SCFA_DEVICE void init() { acc_dk.init(), acc_dv.init(); }

  // Adds the queries of head `head` among sorted rows [first_query, last_query) that see sorted key `key`.
  SCFA_DEVICE void add_head(const Params& p, int batch, int head, int key, const Element* k_row, const Element* v_row,
                            int first_query, int last_query, float* scratch) {
    const Element* q = head_base(p.q, p.q_strides, batch, head);
    const Element* dout = head_base(p.dout, p.dout_strides, batch, head);
    const i64 list = (i64(batch) * p.heads + head) * p.seqlen_q;
    const int* q_index = p.q_index + list;
    float* probabilities = scratch;
    float* gradients = scratch + kThreads;
    for (int first = first_query; first < last_query; first += kThreads) {
      const int count = min(kThreads, last_query - first);
      const int mine = first + threadIdx.x;
      __syncthreads();  // the values of the last round have been read
      if (mine < last_query) {
        // A probability of -1 marks a query that does not see the key.
        probabilities[threadIdx.x] = -1.0f;
        if (key >= p.key_start[list + mine] && key < p.key_end[list + mine]) {
          const float score = score_of(dot_rows<kHeadDim>(q + q_index[mine] * p.q_strides.row, k_row), p);
          const float dp = dot_rows<kHeadDimV>(dout + q_index[mine] * p.dout_strides.row, v_row);
          probabilities[threadIdx.x] = weight_of(score - p.row_lse[list + mine]);
          gradients[threadIdx.x] = probabilities[threadIdx.x] * (dp - p.delta[list + mine]);
        }
      }
      __syncthreads();  // probabilities and gradients are complete
      for (int j = 0; j < count; ++j) {
        if (probabilities[j] != -1.0f) {
          acc_dk.add(as_multiplied(gradients[j]), q + q_index[first + j] * p.q_strides.row);
          acc_dv.add(as_multiplied(probabilities[j]), dout + q_index[first + j] * p.dout_strides.row);
        }
        if (ends_chain(j, count)) acc_dk.join_chain(), acc_dv.join_chain();
      }
      if (__syncthreads_and(acc_dk.all_nan() && acc_dv.all_nan())) return;
    }
  }
};
