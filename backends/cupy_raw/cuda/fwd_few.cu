// scfa_fwd_few: attention of few query rows over many keys, as when decoding, by tensor cores.
//
// Computes   what scfa_fwd does, for the keys of one chunk of a tile's stream (few.cuh); fwd_few_merge makes one result of the chunks
// Grid       x: one block per kFewRows rows of a pack, tiles of a key head one after another; y: blocks that share its chunks. Every
//            warp takes 16 keys of each tile of keys for all rows; what they found is added up at the end of a chunk.
// Shared     q tile + kStages * (k tile + v tile) + keys of 2 * kStages tiles + ranges and segments; see Shared.
// Inputs     as scfa_fwd, 16-bit elements
// Outputs    out and lse of the call where there is one chunk, else the parts; every row, those of no key too
// Exactness  keys that no row of the tile sees are not read at all; otherwise as scfa_fwd.
// Source     Dao et al., Flash-Decoding (keys shared out among blocks). This version: by what is visible, in any pattern.
#include "exact.cuh"
#include "few.cuh"
#include "stream.cuh"

constexpr int kBlockM = SCFA_BLOCK_M;
constexpr int kBlockN = SCFA_BLOCK_N;
constexpr int kStages = SCFA_STAGES;
constexpr int kWarps = SCFA_NUM_WARPS;
constexpr bool kQInRegisters = SCFA_OWN_IN_REGISTERS != 0;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpKeys = 16;
constexpr int kSlots = 2 * kStages;  // key numbers are known so many tiles at a time
constexpr int kSteps = padded(kHeadDim) / kStepColumns;
constexpr int kOutBlocks = padded(kHeadDimV) / 8;
constexpr int kPitch = padded(kHeadDimV) + 8;  // floats from row to row of what warps add up
constexpr float kMostExponent = 10.0f;         // a weight may grow to 2^10 before its reference moves: see softmax.cuh
static_assert(kBlockM == kFewRows && kBlockN == kWarps * kWarpKeys, "a warp takes 16 keys for all rows");
static_assert(kStages >= 2, "the next tile loads while this one computes");
static_assert(kElementBytes == 2, "float32 is multiplied elsewhere");

struct Shared {
  char q[tile_bytes(kBlockM, kHeadDim)];
  KeyStages<kBlockN, kStages> keys;  // in the end, what each warp found
  int key_rows[kSlots][kBlockN];     // of the user's tensors
  int key_numbers[kSlots][kBlockN];  // in the sorted list; -1: not there
  RowRanges<kBlockM> rows;
  Segments segments;
  KeySource source;
  float reference[kWarps][kBlockM], row_sum[kWarps][kBlockM];
  int tainted[kBlockM];
};
static_assert(sizeof(Shared) <= SCFA_SHARED_BYTES, "variants.py asks for less shared memory than Shared needs");
static_assert(sizeof(float) * kWarps * kBlockM * kPitch <= sizeof(KeyStages<kBlockN, kStages>), "warps add up where keys were");

// Which rows are mine; an epilogue that asks again keeps nothing alive through the main loop.
struct Pack {
  int batch, head_kv, first_row, rows;  // of the pack's rows
  i64 entry;                            // of the first row, in the plan's lists

  SCFA_DEVICE explicit Pack(const Params& p) {
    const int all = p.group_size * p.seqlen_q, tiles = ceil_div(all, kBlockM);
    const int list = block_here() / tiles;
    batch = list / p.heads_kv, head_kv = list % p.heads_kv;
    first_row = block_here() % tiles * kBlockM;
    rows = min(kBlockM, all - first_row);
    entry = i64(list) * all + first_row;
  }
  SCFA_DEVICE int head(const Params& p, int row) const { return head_kv * p.group_size + (first_row + row) / p.seqlen_q; }
};

// A block's share of the stream, places [first, last).
struct Chunk {
  int number, first, last;

  SCFA_DEVICE Chunk(const FewParams& few, const Segments& segments, int chunk) : number(chunk) {
    const int total = segments.total, share = max(total - 1, 0) / few.splits / kBlockN * kBlockN;  // and a tile: enough for all
    const i64 keys = max(share, kLeastChunk - kBlockN) + kBlockN, begin = chunk * keys, end = begin + keys;
    first = int(begin < total ? begin : total), last = int(end < total ? end : total);
  }
};

// Where tile t of the chunk lies: numbers of its keys at once, their rows in the background.
SCFA_DEVICE void block_find_keys(Shared& shared, const Chunk& chunk, int t) {
  for (int i = thread_here(); i < kBlockN; i += kThreads) {
    const i64 place = i64(chunk.first) + i64(t) * kBlockN + i;
    const bool there = place < chunk.last;
    const int key = there ? shared.segments.key_at(int(place)) : -1;
    shared.key_numbers[t % kSlots][i] = key;
    copy4_async(shared_address(&shared.key_rows[t % kSlots][i]), shared.source.index + (there ? key : 0), there);
  }
}

// Group t of the background copies: k and v of tile t, and the rows of tile t + kStages - 1.
SCFA_DEVICE void block_stream_keys(Shared& shared, const Params& p, const Chunk& chunk, int t) {
  const i64 left = i64(chunk.last) - chunk.first - i64(t) * kBlockN;
  if (left > 0) {
    const int* rows = shared.key_rows[t % kSlots];
    const int valid = int(left < kBlockN ? left : kBlockN), stage = t % kStages;
    block_gather<kBlockN, kHeadDim, kThreads>(shared.keys.k[stage], shared.source.k, p.k_strides.row, rows, valid);
    block_gather<kBlockN, kHeadDimV, kThreads>(shared.keys.v[stage], shared.source.v, p.v_strides.row, rows, valid);
    if (left > (kStages - 1) * kBlockN) block_find_keys(shared, chunk, t + kStages - 1);
  }
  copies_commit();
}

SCFA_DEVICE void block_gather_queries(Shared& shared, const Params& p, const Pack& pack) {
  constexpr int kChunks = padded(kHeadDim) / kChunkColumns;
  for (int item = threadIdx.x; item < kBlockM * kChunks; item += kThreads) {
    const int row = item / kChunks, chunk = item % kChunks;
    const bool wanted = row < pack.rows && chunk * kChunkColumns < kHeadDim;
    const Element* source = p.q;
    if (wanted) {
      source = head_base(p.q, p.q_strides, pack.batch, pack.head(p, row)) + p.q_index[pack.entry + row] * p.q_strides.row;
    }
    char* target = shared.q + chunk_offset(row, chunk, kBlockM);
    if constexpr (kAligned) {
      copy16_async(shared_address(target), source + (wanted ? chunk * kChunkColumns : 0), wanted);
    } else {
      uint4 packed = make_uint4(0, 0, 0, 0);
      if (wanted) load_chunk(packed, source + chunk * kChunkColumns);
      *reinterpret_cast<uint4*>(target) = packed;
    }
  }
}

// The rows that this lane holds scores of, lane / 4 and 8 on, and what its warp has found for them.
struct WarpState {
  int start[2], end[2];
  float reference[2], row_sum[2];  // as in softmax.cuh
  float acc_o[1][kOutBlocks][4];
};

// This warp's keys of tile t.
SCFA_DEVICE void visit_keys(const Shared& shared, int t, const u32 (&q)[1][kQInRegisters ? kSteps : 1][4], WarpState& state, float scale) {
  const int first = thread_here() / kWarpSize * kWarpKeys, lane = thread_here() % kWarpSize;
  float acc_s[1][kWarpKeys / 8][4] = {};

  // acc_s = q @ k^T, -inf where row i does not see key j
  const auto k = right_operand<kBlockN>(shared.keys.k[t % kStages], first);
  if constexpr (kQInRegisters) {
    warp_product_nt(acc_s, q, k);
  } else {
    warp_product_nt<kSteps>(acc_s, left_operand<kBlockM>(shared.q, 0), k);
  }
#pragma unroll
  for (int nb = 0; nb < kWarpKeys / 8; ++nb)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = shared.key_numbers[t % kSlots][first + nb * 8 + 2 * (lane % 4) + i % 2];
      if (!is_visible(key, state.start[i / 2], state.end[i / 2])) acc_s[0][nb][i] = -infinity();
    }

  // p = 2^(acc_s * scale - reference); the references move where some weight would outgrow kMostExponent
  float most[2];
  bool outgrown = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    most[half] = fmaxf(fmaxf(acc_s[0][0][2 * half], acc_s[0][0][2 * half + 1]), fmaxf(acc_s[0][1][2 * half], acc_s[0][1][2 * half + 1]));
    most[half] = fmaxf(most[half], __shfl_xor_sync(kAllLanes, most[half], 1));
    most[half] = fmaxf(most[half], __shfl_xor_sync(kAllLanes, most[half], 2)) * scale;
    outgrown |= most[half] > state.reference[half] + kMostExponent;
  }
  if (__any_sync(kAllLanes, outgrown)) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float moved = fmaxf(state.reference[half], most[half]);
      const float factor = moved == -infinity() ? 1.0f : exp2_fast(state.reference[half] - moved);
      state.reference[half] = moved;
      state.row_sum[half] *= factor;
#pragma unroll
      for (int nb = 0; nb < kOutBlocks; ++nb) state.acc_o[0][nb][2 * half] *= factor, state.acc_o[0][nb][2 * half + 1] *= factor;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float offset = state.reference[half] == -infinity() ? 0.0f : -state.reference[half];
    float sum = 0.0f;
#pragma unroll
    for (int nb = 0; nb < kWarpKeys / 8; ++nb)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        acc_s[0][nb][i] = exp2_fast(fmaf(acc_s[0][nb][i], scale, offset));
        sum += acc_s[0][nb][i];
      }
    state.row_sum[half] += sum;
  }

  // acc_o += p @ v
  warp_product_nn_unrounded(state.acc_o, acc_s, rows_operand<kBlockN>(shared.keys.v[t % kStages], first));
}

// Adds up what the warps have found and stores it; by all threads, each of which is done with its keys.
SCFA_DEVICE void block_finish(const FewParams& few, Shared& shared, const Chunk& chunk, WarpState& state) {
  const Params& p = few.call;
  const Pack pack(p);
  const int lane = thread_here() % kWarpSize, warp = thread_here() / kWarpSize;
  const i64 rows_of_all = i64(p.batch) * p.heads * p.seqlen_q;
  const bool whole = few.splits == 1;
  float* parts = reinterpret_cast<float*>(&shared.keys);

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = state.row_sum[half];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    if (lane % 4 == 0) shared.reference[warp][lane / 4 + 8 * half] = state.reference[half], shared.row_sum[warp][lane / 4 + 8 * half] = sum;
  }
  if (threadIdx.x < kBlockM) shared.tainted[threadIdx.x] = 0;
  __syncthreads();  // references of all warps are known, and keys no longer needed
  const auto reference_of = [&](int row) {
    float most = shared.reference[0][row];
    for (int w = 1; w < kWarps; ++w) most = fmaxf(most, shared.reference[w][row]);
    return most;
  };
  const auto factor_of = [&](int w, int row, float reference) {
    return reference == -infinity() ? 1.0f : exp2_fast(shared.reference[w][row] - reference);
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const float factor = factor_of(warp, row, reference_of(row));
    float* mine = parts + (warp * kBlockM + row) * kPitch + 2 * (lane % 4);
#pragma unroll
    for (int nb = 0; nb < kOutBlocks; ++nb) {
      *reinterpret_cast<float2*>(mine + 8 * nb) =
          make_float2(state.acc_o[0][nb][2 * half] * factor, state.acc_o[0][nb][2 * half + 1] * factor);
    }
  }
  __syncthreads();  // every warp's part is there

  for (int item = threadIdx.x; item < pack.rows * kHeadDimV; item += kThreads) {
    const int row = item / kHeadDimV, column = item % kHeadDimV;
    const float reference = reference_of(row);
    float sum = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum += shared.row_sum[w][row] * factor_of(w, row, reference);
      value += parts[(w * kBlockM + row) * kPitch + column];
    }
    const bool empty = reference == -infinity() && sum == 0.0f;
    if (is_nan(value - value)) shared.tainted[row] = 1;
    value *= empty ? 0.0f : 1.0f / sum;
    const float lse = empty ? -infinity() : reference == -infinity() ? sum : lse_of(reference, sum);
    if (whole) {
      const int head = pack.head(p, row), q_row = shared.rows.index[row];
      head_base(p.out, p.out_strides, pack.batch, head)[q_row * p.out_strides.row + column] = from_float<Element>(value);
      if (column == 0) head_base(p.lse, p.lse_strides, pack.batch, head)[q_row * p.lse_strides.row] = lse;
    } else {
      const i64 place = chunk.number * rows_of_all + pack.entry + row;
      if (!empty) few.part_out[place * kHeadDimV + column] = value;
      if (column == 0) few.part_lse[place] = lse;
    }
  }
  __syncthreads();  // tainted rows are known, and parts no longer needed

  // rows with NaN or Inf once more, from visible pairs alone
  for (int row = 0; row < pack.rows; ++row) {
    if (!shared.tainted[row]) continue;
    const int head = pack.head(p, row), q_row = shared.rows.index[row];
    const int start = shared.rows.start[row], place = start < shared.rows.end[row] ? shared.segments.place_of(start) : 0;
    const int keys = max(shared.rows.end[row] - start, 0);
    const int first = start + min(max(chunk.first - place, 0), keys), last = start + min(max(chunk.last - place, 0), keys);
    const Element* q = head_base(p.q, p.q_strides, pack.batch, head) + q_row * p.q_strides.row;
    const auto again = [&](auto* out, float* lse) {
      block_exact_out<kThreads>(q, shared.source.k, shared.source.v, shared.source.index, first, last, p, parts, out, lse);
    };
    if (whole) {
      again(head_base(p.out, p.out_strides, pack.batch, head) + q_row * p.out_strides.row,
            head_base(p.lse, p.lse_strides, pack.batch, head) + q_row * p.lse_strides.row);
    } else {
      const i64 part = chunk.number * rows_of_all + pack.entry + row;
      again(few.part_out + part * kHeadDimV, few.part_lse + part);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, SCFA_MIN_BLOCKS) scfa_fwd_few(const __grid_constant__ FewParams few) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  const Params& p = few.call;
  const Pack pack(p);

  // ranges of the rows, and the stream of their keys
  if (threadIdx.x < kWarpSize) {
    const int row = threadIdx.x;
    const bool there = row < pack.rows;
    const int start = there ? p.key_start[pack.entry + row] : 0, end = there ? p.key_end[pack.entry + row] : 0;
    warp_segments(shared.segments, shared.rows.start, shared.rows.end, start, end);
    __syncwarp();  // the ranges in order have been read
    if (row < kBlockM) {
      shared.rows.start[row] = start, shared.rows.end[row] = end;
      shared.rows.index[row] = there ? p.q_index[pack.entry + row] : -1;
    }
    if (row == 0) {
      shared.source = {head_base(p.k, p.k_strides, pack.batch, pack.head_kv), head_base(p.v, p.v_strides, pack.batch, pack.head_kv),
                       p.k_index + (i64(pack.batch) * p.heads_kv + pack.head_kv) * p.seqlen_k, 0, 0};
    }
  }
  block_gather_queries(shared, p, pack);
  copies_commit();
  copies_wait<0>();
  __syncthreads();  // q and segments are complete
  if (p.negative_scale) {
    if (threadIdx.x < kWarpSize) warp_negate_rows<kBlockM, kBlockM, kHeadDim>(shared.q, 0);
    __syncthreads();  // q is negated
  }
  u32 q_operand[1][kQInRegisters ? kSteps : 1][4];
  if constexpr (kQInRegisters) warp_load_left(q_operand, left_operand<kBlockM>(shared.q, 0));

#pragma unroll 1
  for (int number = blockIdx.y; number < few.splits; number += gridDim.y) {
    const Chunk chunk(few, shared.segments, number);
    if (chunk.first == chunk.last && few.splits > 1) {
      const i64 entry = number * (i64(p.batch) * p.heads * p.seqlen_q) + pack.entry;
      if (threadIdx.x < pack.rows) few.part_lse[entry + threadIdx.x] = -infinity();
      continue;
    }

    // the first kStages - 1 tiles of keys
#pragma unroll
    for (int t = 0; t < kStages - 1; ++t) block_find_keys(shared, chunk, t);
    copies_commit();
    copies_wait<0>();
    __syncthreads();  // the rows of these tiles are known
#pragma unroll
    for (int t = 0; t < kStages - 1; ++t) block_stream_keys(shared, p, chunk, t);

    WarpState state = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = thread_here() % kWarpSize / 4 + 8 * half;
      state.start[half] = shared.rows.start[row], state.end[half] = shared.rows.end[row];
      state.reference[half] = -infinity();
    }
    const int tiles = ceil_div(chunk.last - chunk.first, kBlockN);
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      copies_wait<kStages - 2>();
      __syncthreads();  // tile t is complete, and everyone has left the stage that is filled next
      block_stream_keys(shared, p, chunk, t + kStages - 1);
      visit_keys(shared, t, q_operand, state, p.exponent_scale);
    }
    block_finish(few, shared, chunk, state);
  }
}
