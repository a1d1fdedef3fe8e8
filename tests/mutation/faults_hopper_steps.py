"""Faults in what Hopper kernels do at each step: softmax, loads, and in which order tiles come.

Planted as those of faults_hopper.py, whose suites are used as well.
"""

from fault import SUITES, Fault
from faults_hopper import CUDA

SUITES["hopper-softmax"] = (
    ("tests/unit/test_hopper_on_host.py", "-k", "outgrow and 64"),
    ("tests/unit/test_hopper_on_host.py", "-k", "outgrow or two_gathering or far_below"),
)
SUITES["hopper-order"] = (("tests/unit/test_hopper_turns.py",),)

FAULTS = (
    Fault("hopper-steady-output", CUDA + "fwd_sm90.cu",
        "if (decays) scale_rows(output, decay);", "",
        "a row's reference moves and its output does not shrink", "hopper-softmax",
    ),
    Fault("hopper-steady-sum", CUDA + "softmax_sm90.cuh",
        "        sum[half] *= decay[half];\n", "",
        "a row's reference moves and its sum does not shrink", "hopper-softmax",
    ),
    Fault("hopper-steady-half", CUDA + "softmax_sm90.cuh",
        "outgrows(1, top, scale_log2));", "outgrows(0, top, scale_log2));",
        "the second of a thread's rows has no say when the reference moves", "hopper-softmax",
    ),
    Fault("hopper-steady-warp", CUDA + "softmax_sm90.cuh",
        "top[half] = quad_max(top[half]);", "",
        "the four threads of a row have references of their own", "hopper-softmax",
    ),
    Fault("hopper-order-last", CUDA + "tiles_sm90.cuh",
        "last = p.by_tiles.quotient(p.tiles) - together;",
        "last = p.by_tiles.quotient(p.tiles) - together + 1;",
        "the heads in turn begin one late, and end beyond the last", "hopper-order",
    ),
    Fault("hopper-order-number", CUDA + "tiles_sm90.cuh",
        "number = turn >> p.in_turn;", "number = (turn + 1) >> p.in_turn;",
        "one of the heads in turn gets its next tile instead of this one", "hopper-order",
    ),
    Fault("hopper-delta-sign", CUDA + "bwd_dq_sm90.cu",
        "+ sorted] = -delta;", "+ sorted] = delta;",
        "dk/dv adds delta where it should subtract it", "hopper-turns",
    ),
    Fault("hopper-delta-start", CUDA + "bwd_dkdv_sm90_both.cuh",
        "      columns.start(slopes, shared, slot, q);\n", "",
        "slopes start from those of the block before", "hopper-turns",
    ),
    Fault("hopper-128-early", CUDA + "bwd_fused128_sm90_weigh.cuh",
        "load_columns(shared.delta(slot), kEarly);",
        "load_columns(shared.delta(slot), kEarly + 1);",
        "two columns take lse for delta", "hopper-one-pass",
    ),
    Fault("hopper-128-next", CUDA + "bwd_fused128_sm90.cu",
        "if (++block == last) break;\n        weighing.load(shared, data.slot);",
        "if (++block == last) break;\n        weighing.load(shared, (data.slot + 2) % 3);",
        "a block is weighed by the lse and ends of the one before", "hopper-one-pass",
    ),
)  # fmt: skip
