"""Faults in the Hopper kernel that makes all gradients in one pass, and in what it is told."""

from fault import SUITES, Fault
from faults_hopper import CUDA

SUITES["hopper-one-pass"] = (
    ("tests/unit/test_hopper_on_host.py", "-k", "one_pass and 64"),
    ("tests/unit/test_hopper_on_host.py", "-k", "one_pass and 128"),
)
SUITES["hopper-ends"] = (("tests/unit/test_hopper_on_host.py::test_who_says_that_a_tile_ends",),)

FUSED_DQ, KEY_TILES = CUDA + "bwd_fused_sm90_dq.cuh", CUDA + "key_tiles_sm90.cuh"

FAULTS = (
    # the key tile that finishes a head, and the start of a tile
    Fault(
        "hopper-join-lost",
        FUSED_DQ,
        "product_of_columns<kBlockN, true>(",
        "product_of_columns<kBlockN, false>(",
        "what other key tiles gave to dq is lost",
        "hopper-one-pass",
    ),
    Fault(
        "hopper-join-part",
        FUSED_DQ,
        "load_sum_four(source + 128 * i, sum);",
        "load_sum_four(source + 64 * i, sum);",
        "a finished dq is joined with other rows of the sum",
        "hopper-one-pass",
    ),
    Fault(
        "hopper-join-room",
        FUSED_DQ,
        "        if (lane == 0) store_release(p.added + tile, kComplete);\n",
        "",
        "the room of a sum that was read is never free again",
        "hopper-one-pass",
    ),
    Fault(
        "hopper-join-alone",
        FUSED_DQ,
        "joins = finishes && before > 0;",
        "joins = finishes;",
        "a key tile that is alone joins a sum that nobody made",
        "hopper-one-pass",
    ),
    Fault(
        "hopper-search-narrowed",
        CUDA + "search_sm90.cuh",
        "searches[i].narrow(values[i], lane);",
        "searches[i].narrow(values[0], lane);",
        "of several searches all follow what the first one found",
        "hopper-one-pass",
    ),
    Fault(
        "hopper-seen-early",
        KEY_TILES,
        "int before = key0;",
        "int before = key0 + kTileKeys - 1;",
        "keys before the first range of a tile are taken for seen",
        "hopper-one-pass",
    ),
    Fault(
        "hopper-seen-by-one",
        KEY_TILES,
        "seen[i] |= ~unseen[i];",
        "seen[i] = ~unseen[i];",
        "keys that only an earlier query head sees are not fetched",
        "hopper-one-pass",
    ),
    Fault(
        "hopper-gap-carried",
        KEY_TILES,
        "__shfl_sync(0xFFFFFFFFu, end[i], 31);",
        "__shfl_sync(0xFFFFFFFFu, end[i], 30);",
        "a key between the ranges of two rows, 32 apart, is taken for unseen",
        "hopper-one-pass",
    ),
    Fault(
        "hopper-bound-lost",
        KEY_TILES,
        "bounds[1] = beyond;",
        "bounds[1] = beyond - 1;",
        "the last query that sees a key of the tile is not visited",
        "hopper-one-pass",
    ),
    Fault(
        "hopper-upper-late",
        CUDA + "bwd_fused_sm90.cu",
        "head_first + bound / kBlockM));",
        "head_first + (bound + kBlockM - 1) / kBlockM));",
        "the block where queries begin to see a tile's upper half is left out",
        "hopper-one-pass",
    ),
    Fault(
        "hopper-lower-early",
        CUDA + "bwd_fused_sm90.cu",
        "head_first + (bound + kBlockM - 1) / kBlockM));",
        "head_first + bound / kBlockM));",
        "the block where queries cease to see its lower half is passed over",
        "hopper-one-pass",
    ),
    Fault(
        "hopper-passed-changes",
        CUDA + "bwd_fused_sm90.cu",
        "for (int i = 0; i < kBlockM / 4; ++i) changes[i] = 0;",
        "for (int i = 0; i < kBlockM / 4; ++i) changes[i] = weights[i];",
        "a block that is passed over adds what was there before to dq",
        "hopper-one-pass",
    ),
    Fault(
        "hopper-ends-early",
        CUDA + "bwd_fused_sm90.cu",
        "ended = member + 1 == p.group_size;",
        "ended = true;",
        "keys are let go of by the first query head that sees them",
        "hopper-ends",
    ),
    Fault(
        "hopper-ends-unsaid",
        CUDA + "bwd_fused_sm90.cu",
        "if (!ended) announce_end(kTileDone);",
        "",
        "keys that the last query head does not see are never let go of",
        "hopper-ends",
    ),
    Fault(
        "hopper-half-bounds",
        KEY_TILES,
        "{ends, key0 + kHalf, 0, count},",
        "{ends, key0 + kHalf + 1, 0, count},",
        "a query whose last key is the first of the upper half is passed over",
        "hopper-one-pass",
    ),
    Fault(
        "hopper-unseen-fetched",
        CUDA + "bwd_fused_sm90_keys.cuh",
        "rows[i] = seen[i] ? rows[i] : -1;",
        "rows[i] = rows[i];",
        "keys that nobody sees, not numbers perhaps, are multiplied by zero",
        "hopper-one-pass",
    ),
)
