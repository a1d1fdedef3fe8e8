"""Faults in the Hopper kernels that the tests run on the CPU."""

from fault import SUITES, Fault
from faults_gpu import FAULTS as ON_A_CARD

HOPPER = "tests/unit/test_hopper_any_order.py"
SUITES["hopper"] = (
    (f"{HOPPER}::test_a_gap_beside_the_edge_of_a_block",),
    (f"{HOPPER}::test_keys_that_a_tile_sees",),
    (f"{HOPPER}::test_ranges_that_begin_and_end_beside_blocks",),
)
SUITES["hopper-turns"] = (("tests/unit/test_hopper_on_host.py::test_two_gathering_warpgroups",),)
SUITES["hopper-wide"] = (
    ("tests/unit/test_hopper_on_host.py", "-k", "wide"),
    (HOPPER, "-k", "256"),
)
SUITES["hopper-dkdv"] = (
    (f"{HOPPER}::test_envelopes",),
    (f"{HOPPER}::test_gradients_where_blocks_of_queries_see_nothing_of_a_tile",),
    (f"{HOPPER}::test_ranges_that_begin_and_end_beside_blocks",),
)


def _ordered(shapes: str) -> tuple[tuple[str, ...], ...]:
    """Kernels whose accesses memory_on_host.hpp follows; `shapes`: head_dim, in one pass or not."""
    return (("tests/unit/test_hopper_on_host.py", "-k", f"as_far_as_they_can and {shapes}"),)


SUITES["hopper-memory"] = _ordered("64-False")
SUITES["hopper-memory-long"] = (
    ("tests/unit/test_hopper_on_host.py", "-k", "more_blocks_than_buffers and 64"),
)
SUITES["hopper-memory-wide"] = _ordered("256-False")
SUITES["hopper-memory-fused64"] = _ordered("64-True")
SUITES["hopper-memory-fused128"] = _ordered("128-True")

SUITES["hopper-runs"] = (("tests/unit/test_hopper_runs.py",),)

CUDA = "backends/cupy_raw/cuda/"
RUNS = CUDA + "runs_sm90.cuh"

FAULTS = (
    # ranges in any order
    Fault("hopper-gap-upwards", CUDA + "tiles_sm90.cuh",
        "next[i] > end[i];",
        "next[i] > end[i] + 1;",
        "a key between a row's range and that of the row after it is taken for seen", "hopper",
    ),
    Fault("hopper-gap-downwards", CUDA + "tiles_sm90.cuh",
        "start[i] > next_end;",
        "start[i] > next_end + 1;",
        "the same where the row after it sees earlier keys", "hopper",
    ),
    Fault("hopper-gap-first", CUDA + "tiles_sm90.cuh",
        "min(keys.gap_first, next_end)",
        "min(keys.gap_first, next_end + 1)",
        "the first key of a gap is taken for seen", "hopper",
    ),
    Fault("hopper-gap-end", CUDA + "tiles_sm90.cuh",
        "max(keys.gap_end, start[i])",
        "max(keys.gap_end, start[i] - 1)",
        "the last key of a gap is taken for seen", "hopper",
    ),
    Fault("hopper-whole-start", CUDA + "tiles_sm90.cuh",
        "whole |= start <= first &&",
        "whole |= start <= first + 1 &&",
        "a block whose first key nobody sees counts as seen", "hopper",
    ),
    Fault("hopper-whole-end", CUDA + "tiles_sm90.cuh",
        "&& end <= stop;",
        "&& end <= stop + 1;",
        "a block whose last key nobody sees counts as seen", "hopper",
    ),
    Fault("hopper-part-start", CUDA + "tiles_sm90.cuh",
        "part |= start < end &&",
        "part |= start + 1 < end &&",
        "a block is lost of which but the last key is seen", "hopper",
    ),
    Fault("hopper-part-end", CUDA + "tiles_sm90.cuh",
        "&& first < stop;",
        "&& first + 1 < stop;",
        "a block is lost of which but the first key is seen", "hopper",
    ),
    Fault("hopper-seen-start", CUDA + "tiles_sm90.cuh",
        "data.starts() + 4 * (row + lane)) - origin);",
        "data.starts() + 4 * (row + lane)) - origin + 1);",
        "the first key of a range is not gathered", "hopper",
    ),
    Fault("hopper-seen-end", CUDA + "tiles_sm90.cuh",
        "data.ends() + 4 * (row + lane)) - origin)",
        "data.ends() + 4 * (row + lane)) - origin + 1)",
        "the key after a range is gathered", "hopper",
    ),
    Fault("hopper-outer-start", CUDA + "softmax_sm90.cuh",
        "min(e.outer_start, start < end ? start : kNone)",
        "min(e.outer_start, start < end ? start + 1 : kNone)",
        "a block is skipped of which a row sees but the last key", "hopper",
    ),
    Fault("hopper-outer-end", CUDA + "softmax_sm90.cuh",
        "max(e.outer_end, start < end ? end : 0)",
        "max(e.outer_end, start < end ? end - 1 : 0)",
        "a block is skipped of which a row sees but the first key", "hopper",
    ),
    Fault("hopper-inner-start", CUDA + "softmax_sm90.cuh",
        "max(e.inner_start, start);",
        "max(e.inner_start, start - 1);",
        "a block is not masked whose first key a row does not see", "hopper",
    ),
    Fault("hopper-inner-end", CUDA + "softmax_sm90.cuh",
        "min(e.inner_end, end);",
        "min(e.inner_end, end + 1);",
        "a block is not masked whose last key a row does not see", "hopper",
    ),
    Fault("hopper-envelope-end", CUDA + "bwd_envelope_sm90.cu",
        "if (start < end) next[i]",
        "if (start <= end) next[i]",
        "rows that see nothing widen the envelopes", "hopper-dkdv",
    ),
    Fault("hopper-envelope-carry", CUDA + "bwd_envelope_sm90.cu",
        "before = max(before, __reduce_max_sync(0xFFFFFFFFu, of_lane));",
        "before = __reduce_max_sync(0xFFFFFFFFu, of_lane);",
        "an envelope forgets all but the 4096 rows before", "hopper-dkdv",
    ),
    Fault("hopper-envelope-warps", CUDA + "bwd_envelope_sm90.cu",
        "lane < warp ? of_lane : least",
        "lane <= warp ? of_lane : least",
        "an envelope looks ahead, to the end of a warp's rows", "hopper-dkdv",
    ),
    Fault("hopper-envelope-lane", CUDA + "bwd_envelope_sm90.cu",
        "lane > 0 ? neighbour : least",
        "lane > 1 ? neighbour : least",
        "an envelope forgets the rows of the first lane", "hopper-dkdv",
    ),
    Fault("hopper-envelope-list", CUDA + "bwd_envelope_sm90.cu",
        "static_cast<long long>(blockIdx.x / 2) * p.seqlen_q",
        "static_cast<long long>(blockIdx.x / 4) * p.seqlen_q",
        "every second list has no envelopes", "hopper-dkdv",
    ),
    Fault("hopper-bounds-searched", CUDA + "bwd_dkdv_sm90_gather.cuh",
        ": i & 1   ? p.envelope_start",
        ": i & 1   ? p.key_start",
        "dk/dv searches starts that lie in any order", "hopper-dkdv",
    ),
    Fault("hopper-bounds-ends", CUDA + "bwd_dkdv_sm90_gather.cuh",
        ": p.envelope_end;",
        ": p.key_end;",
        "dk/dv searches ends that lie in any order", "hopper-dkdv",
    ),
    Fault("hopper-block-wanted", CUDA + "bwd_dkdv_sm90_gather.cuh",
        "named_barrier_any(kGathererBarrier + gatherer, kGatherThreads, sees);",
        "__any_sync(0xFFFFFFFFu, sees);",
        "a warp fetches its rows of a block only if one of these sees the tile", "hopper-dkdv",
    ),
    Fault("hopper-turn", CUDA + "bwd_dq_sm90_gather.cuh",
        "if (block >= kGatherers) upcoming = key_row(block - kGatherers);",
        "if (block >= kGatherers) upcoming = key_row(block - 1);",
        "a gathering warpgroup fetches the keys of the other's block", "hopper-turns",
    ),
    Fault("hopper-first-turn", CUDA + "bwd_dkdv_sm90_gather.cuh",
        "const int ahead = kGatherers == 1 ? 0 : gatherer ^ turn;",
        "const int ahead = kGatherers == 1 ? 0 : gatherer;",
        "a tile's first queries are those of the other warpgroup's block", "hopper-turns",
    ),
    Fault("hopper-out-share", CUDA + "bwd_dq_sm90_gather.cuh",
        "row_of(kShare * gatherer + ", "row_of(kShare * (1 - gatherer) + ",
        "the halves of out are exchanged: delta of other rows", "hopper-turns",
    ),
    Fault("hopper-kept-keys", CUDA + "bwd_dkdv_sm90_gather.cuh",
        "sorted < min(key1, kept) ? row : -1;", "sorted < min(key1, kept - 1) ? row : -1;",
        "the last key that is kept is not fetched", "hopper-turns",
    ),
    Fault("hopper-kept-tile", CUDA + "bwd_dkdv_sm90_gather.cuh",
        "key0 < kept ? first_greater(", "key0 + kBlockN <= kept ? first_greater(",
        "a tile that holds dropped keys too gets no queries", "hopper-turns",
    ),
    Fault("hopper-look-half", CUDA + "weigh_columns_sm90.cuh",
        "for (int i = 0; i < 2; ++i) seen |=",
        "for (int i = 0; i < 1; ++i) seen |=",
        "blocks are passed over that only their last 32 queries see", "hopper-dkdv",
    ),
    Fault("hopper-look-first", CUDA + "weigh_columns_sm90.cuh",
        "max(start[i], key0) < min(",
        "max(start[i], key0 + 1) < min(",
        "blocks are passed over that see but a warpgroup's first key", "hopper-dkdv",
    ),
    Fault("hopper-look-last", CUDA + "weigh_columns_sm90.cuh",
        "min(end[i], key0 + 64);",
        "min(end[i], key0 + 63);",
        "blocks are passed over that see but a warpgroup's last key", "hopper-dkdv",
    ),
    Fault("hopper-columns-end", CUDA + "weigh_columns_sm90.cuh",
        "first_end = min(end[0], end[1]);",
        "first_end = end[0];",
        "a block is not masked of which a query after the first 32 ends inside", "hopper-dkdv",
    ),
    Fault("hopper-columns-start", CUDA + "weigh_columns_sm90.cuh",
        "last_start = max(start[0], start[1]);",
        "last_start = start[1];",
        "a block is not masked of which one of the first 32 queries starts inside", "hopper-dkdv",
    ),
    Fault("hopper-run", CUDA + "bwd_dkdv_sm90_both.cuh",
        "if (++block == high || !sees_keys()) break;",
        "if (++block == high) break;",
        "a block that was not fetched is multiplied", "hopper-dkdv",
    ),
    Fault("hopper-run-release", CUDA + "bwd_dkdv_sm90_both.cuh",
        "if (block > run) barrier_release",
        "if (block > low) barrier_release",
        "a buffer is given back twice", "hopper-dkdv",
    ),
    Fault("hopper-skip", CUDA + "bwd_dkdv_sm90_both.cuh",
        "for (; block < high && !sees_keys(); ++block) skip_block();",
        "",
        "a run begins with a block that was not fetched", "hopper-dkdv",
    ),
    Fault("hopper-held-buffer", CUDA + "bwd_dkdv_sm90_both.cuh",
        "if (++block == high || !sees_keys()) break;",
        "for (++block; block < high && !sees_keys(); ++block) skip_block();\n"
        "if (block == high) break;",
        "a buffer is held while more blocks are passed over than there are buffers", "hopper-dkdv",
    ),
    Fault("hopper-wide-unseen", CUDA + "bwd_dkdv_sm90_roles.cuh",
        "constexpr float kUnseen = -1.0f;", "constexpr float kUnseen = 0.0f;",
        "a slope that may be NaN is multiplied by the weight 0 of an unseen pair", "hopper-wide",
    ),
    Fault("hopper-wide-weights", CUDA + "bwd_dkdv_sm90_roles.cuh",
        "product[i] = product[i] < 0.0f ? 0.0f : product[i];", "product[i] = product[i];",
        "dv adds up what marks unseen pairs", "hopper-wide",
    ),
    Fault("hopper-wide-handed", CUDA + "bwd_dkdv_sm90_roles.cuh",
        "barrier_wait(shared.weights_full(), weights.parity);", "",
        "weights are read before they are handed over", "hopper-wide",
    ),
    Fault("hopper-wide-keys", CUDA + "bwd_dq_sm90.cu",
        "        barrier_release(shared.value_empty(key.slot), lane);\n"
        "        barrier_release(shared.key_empty(key.slot), lane);\n      }\n    }\n"
        "    const float lse[2]",
        "      }\n    }\n    const float lse[2]",
        "the room of out is never given back: the kernel waits for ever", "hopper-wide",
    ),
    Fault("hopper-wide-look", CUDA + "weigh_columns_sm90.cuh",
        "min(32, kBlockM - 1 - lane)", "min(32, kBlockM - 2 - lane)",
        "blocks of 48 are passed over that only their last query sees", "hopper-wide",
    ),
    # order in shared memory, beside what is planted on a card (below)
    Fault("hopper-fwd-key-fence", CUDA + "fwd_sm90.cu",
        "        barrier_wait(shared.key_full(key.slot), key.parity);\n"
        "        async_proxy_fence();\n        take_turn();\n        wgmma_fence();",
        "        barrier_wait(shared.key_full(key.slot), key.parity);\n"
        "        take_turn();\n        wgmma_fence();",
        "the first scores of a tile may not see its keys", "hopper-memory",
    ),
    Fault("hopper-fwd-value-fence", CUDA + "fwd_sm90.cu",
        "          barrier_wait(shared.value_full(value.slot), value.parity);\n"
        "          async_proxy_fence();",
        "          barrier_wait(shared.value_full(value.slot), value.parity);",
        "products with the weights may not see the values", "hopper-memory",
    ),
    Fault("hopper-fwd-early", CUDA + "fwd_sm90.cu",
        "        wgmma_wait<1>();\n        pin(scores);\n"
        "        barrier_release(shared.key_empty(key.slot), lane);",
        "        barrier_release(shared.key_empty(key.slot), lane);\n        wgmma_wait<1>();\n"
        "        pin(scores);",
        "the room of keys is given back before their product is done", "hopper-memory-long",
    ),
    Fault("hopper-dq-fence", CUDA + "bwd_dq_sm90.cu",
        "        barrier_wait(shared.key_full(key.slot), key.parity);\n"
        "        async_proxy_fence();\n        pin(scores);",
        "        barrier_wait(shared.key_full(key.slot), key.parity);\n        pin(scores);",
        "scores may not see the keys of the next block", "hopper-memory",
    ),
    Fault("hopper-dq-early", CUDA + "bwd_dq_sm90.cu",
        "        wgmma_wait<2>();\n        pin(gradient);\n        pin(weights);\n"
        "        barrier_release(shared.key_empty(slot), lane);",
        "        barrier_release(shared.key_empty(slot), lane);\n        wgmma_wait<2>();\n"
        "        pin(gradient);\n        pin(weights);",
        "the room of keys is given back before dq has been added to", "hopper-memory",
    ),
    Fault("hopper-dkdv-early", CUDA + "bwd_dkdv_sm90_roles.cuh",
        "        wgmma_wait<0>();\n        pin(gradient);\n        pin(packed);\n"
        "        barrier_release(shared.query_empty(slot), lane);",
        "        barrier_release(shared.query_empty(slot), lane);\n        wgmma_wait<0>();\n"
        "        pin(gradient);\n        pin(packed);",
        "the room of queries is given back before the last product is done", "hopper-memory-wide",
    ),
    Fault("hopper-fused128-rows-fence", CUDA + "bwd_fused128_sm90.cu",
        "      wait_for_rows();\n      async_proxy_fence();\n",
        "      wait_for_rows();\n",
        "the first scores of a head may not see its queries", "hopper-memory-fused128",
    ),
    # runs of rows, and tiles that begin before the first row
    Fault("hopper-run-unproven", RUNS,
        "row == first + lane);", "row >= first);",
        "rows that only begin like a run are taken for one", "hopper-runs",
    ),
    Fault("hopper-run-unseen", CUDA + "bwd_fused_sm90_gather.cuh",
        "fetch_own_rows<kBlockM, 1, kHeadDim>(tile, p.maps[0], h, at.b, q, p.q.row, row, full,",
        "fetch_own_rows<kBlockM, 1, kHeadDim>(tile, p.maps[0], h, at.b, q, p.q.row, own.row, full,",
        "queries that see nothing of a tile are fetched", "hopper-runs",
    ),
    Fault("hopper-run-head", CUDA + "fwd_sm90_gather.cuh",
        "(tile, map, at.h_kv, at.b, source,", "(tile, map, at.h, at.b, source,",
        "runs of keys are those of the query head's number", "hopper-runs",
    ),
    Fault("hopper-run-fence", CUDA + "fwd_sm90.cu",
        "if constexpr (kRuns) async_proxy_fence();", "",
        "rows by index, and a run over them, reach shared memory in any order", "hopper-runs",
    ),
    Fault("hopper-own-swizzle", RUNS,
        "(i & 1 ? even ^ 64 : even)", "even",
        "rows between runs lie in the wrong half of their swizzle", "hopper-runs",
    ),
    Fault("hopper-own-part", RUNS,
        "block + thread / 32 * kRunRows * kRowBytes", "block",
        "all warps fetch to the first 32 rows", "hopper-runs",
    ),
    Fault("hopper-rows-before", CUDA + "bwd_dq_sm90.cu",
        "if (sorted >= 0) {", "if (sorted >= -1) {",
        "rows before the first overwrite what belongs to the head before", "hopper-turns",
    ),
)  # fmt: skip

# What is planted on a card is planted here too: what one thread or unit does to shared memory, and
# another does to the same bytes, is ordered by barriers and fences or is found. Key tiles that add
# to dq out of turn belong to blocks that run at the same time; here one runs after the other.
_SUITES = {
    "gpu-split": "hopper-memory",
    "gpu-all": "hopper-memory",
    "gpu-wide": "hopper-memory-wide",
    "gpu-fused64": "hopper-memory-fused64",
    "gpu-fused128": "hopper-memory-fused128",
}
ONLY_ON_A_CARD = ("gpu-fused-turn", "gpu-fused128-turn")


def on_cpu(name: str) -> str:
    """Name here of a fault of faults_gpu.py."""
    return "hopper-" + name.removeprefix("gpu-")


FAULTS += tuple(
    fault._replace(name=on_cpu(fault.name), suite=_SUITES[fault.suite])
    for fault in ON_A_CARD
    if fault.name not in ONLY_ON_A_CARD
)
