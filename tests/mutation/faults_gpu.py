"""Faults of memory order on a card: fences, asynchronous copies, products that still run.

`run_gpu.py` plants them one at a time, each in a copy of its own, and runs the tests named here on
the GPU. The kernels are those of Hopper, where producers and consumers meet at barriers in shared
memory. A wait for products that is missing is no fault here: the compiler sees it and puts products
in order. The same faults are planted on the CPU (faults_hopper.py), whose memory keeps no order but
that of barriers and fences.
"""

from fault import SUITES, Fault

RUNTIME, EXACT = "tests/gpu/test_runtime.py", "tests/gpu/test_exact.py"


def _both(way: str, head_dim: str) -> tuple[tuple[str, ...], ...]:
    """Calls compared bit by bit, hundreds of small and tens of large, then rows against torch."""
    return (
        (RUNTIME, "-k", f"(hundreds or full_card) and {way} and {head_dim}"),
        (EXACT, "-k", f"thousands and {way} and {head_dim}"),
    )


SUITES["gpu-split"] = _both("auto", "(64 or 128)")
SUITES["gpu-fused64"] = _both("fused", "64")
SUITES["gpu-fused128"] = _both("fused", "128")
SUITES["gpu-wide"] = _both("auto", "256")
SUITES["gpu-all"] = _both("(auto or fused)", "(64 or 128)")

CUDA = "backends/cupy_raw/cuda/"
FUSED128, CARRY = CUDA + "bwd_fused128_sm90.cu", CUDA + "bwd_fused128_sm90_carry.cuh"
GATHER128 = CUDA + "bwd_fused128_sm90_gather.cuh"
FUSED64_DQ, FUSED64 = CUDA + "bwd_fused_sm90_dq.cuh", CUDA + "bwd_fused_sm90.cu"

FAULTS = (
    # what all of them share
    Fault("gpu-arrival", CUDA + "mbarrier.cuh",
        '    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];"'
        ' ::"r"(barrier) : "memory");',
        "    barrier_arrive(barrier);",
        "rows are announced before their copies have landed", "gpu-all",
    ),
    Fault("gpu-proxy", CUDA + "mbarrier.cuh",
        "#if SCFA_PROXY_FENCE\n", "#if 0\n",
        "no proxy fence between copied rows and products", "gpu-all",
    ),
    # forward
    Fault("gpu-fwd-key-room", CUDA + "fwd_sm90_gather.cuh",
        "      barrier_wait(shared.key_empty(key.slot), key.parity ^ 1);\n", "",
        "keys are overwritten that products still read", "gpu-split",
    ),
    # backward in two kernels
    Fault("gpu-dq-key-room", CUDA + "bwd_dq_sm90_gather.cuh",
        "      barrier_wait(shared.key_empty(key.slot), key.parity ^ 1);\n", "",
        "keys and values are overwritten that products still read", "gpu-split",
    ),
    Fault("gpu-dkdv-query-room", CUDA + "bwd_dkdv_sm90_gather.cuh",
        "        barrier_wait(shared.query_empty(query.slot), query.parity ^ 1);\n", "",
        "queries are overwritten that products still read", "gpu-split",
    ),
    # the same beyond 128 columns
    Fault("gpu-wide-room", CUDA + "bwd_dkdv_sm90_roles.cuh",
        "        barrier_wait(shared.weights_empty(), weights.parity ^ 1);\n", "",
        "weights are handed over where others have not been read yet", "gpu-wide",
    ),
    Fault("gpu-wide-out", CUDA + "bwd_dq_sm90_gather.cuh",
        "        barrier_wait(shared.key_empty(room.slot), room.parity ^ 1);\n", "",
        "out of a tile is fetched over keys of the tile before", "gpu-wide",
    ),
    Fault("gpu-wide-values", CUDA + "bwd_dq_sm90_gather.cuh",
        "          barrier_wait(shared.value_empty(key.slot), key.parity ^ 1);\n", "",
        "values are fetched over others in use", "gpu-wide",
    ),
    # backward in one kernel, head_dim 64
    Fault("gpu-fused-query-room", CUDA + "bwd_fused_sm90_gather.cuh",
        "        barrier_wait(shared.query_empty(query.slot), query.parity ^ 1);\n", "",
        "queries are overwritten that products still read", "gpu-fused64",
    ),
    Fault("gpu-fused-changes-fence", FUSED64,
        "      async_proxy_fence();\n"
        "      barrier_release(shared.changes_full(change.slot), lane);",
        "      barrier_release(shared.changes_full(change.slot), lane);",
        "dS is announced before the products of dq can see it", "gpu-fused64",
    ),
    Fault("gpu-fused-sum-fence", FUSED64_DQ,
        "      shared_writes_fence();\n      tell_carrier(tile, before);",
        "      tell_carrier(tile, before);",
        "a dq tile is announced before the bulk copy can see it", "gpu-fused64",
    ),
    Fault("gpu-fused-sum-room", FUSED64_DQ,
        "      wait_until_read();\n", "",
        "the room of a dq tile is given back while it is being copied", "gpu-fused64",
    ),
    Fault("gpu-fused-sum-added", FUSED64_DQ,
        "      wait_until_added();  // from here", "      // from here",
        "a sum of dq is announced before it has been added to", "gpu-fused64",
    ),
    Fault("gpu-fused-turn", FUSED64_DQ,
        "          wait_until(p.added + tile, before);\n        }\n        global_proxy_fence();",
        "        }\n        global_proxy_fence();",
        "key tiles add to dq out of turn", "gpu-fused64",
    ),
    # backward in one kernel, head_dim 128
    Fault("gpu-fused128-fetch-fence", FUSED128,
        "  shared_writes_fence();\n  barrier_release(shared.sum_empty(turn.carrier), lane);",
        "  barrier_release(shared.sum_empty(turn.carrier), lane);",
        "the next sum of dq is copied over the one that is being read", "gpu-fused128",
    ),
    Fault("gpu-fused128-changes-fence", FUSED128,
        "        shared_writes_fence();\n"
        "        barrier_release(shared.changes_full(change.slot), lane);",
        "        barrier_release(shared.changes_full(change.slot), lane);",
        "dS is announced before the products of dq can see it", "gpu-fused128",
    ),
    Fault("gpu-fused128-loaded", FUSED128,
        "  barrier_wait(shared.sum_loaded(), turn.fetch);\n", "",
        "a sum of dq is read before it has come", "gpu-fused128",
    ),
    Fault("gpu-fused128-rows", GATHER128,
        "        barrier_wait(shared.rows_empty(ring.slot), ring.parity ^ 1);\n"
        "        fetch(dout, p.dout.row, p.maps[1], current);\n",
        "        fetch(dout, p.dout.row, p.maps[1], current);\n",
        "queries are overwritten that products still read", "gpu-fused128",
    ),
    Fault("gpu-fused128-sum-room", CARRY,
        "        wait_until_read();\n", "",
        "the room of a dq tile is given back while it is being copied", "gpu-fused128",
    ),
    Fault("gpu-fused128-sum-added", CARRY,
        "        wait_until_added();  // from here", "        // from here",
        "a sum of dq is announced before it has been added to", "gpu-fused128",
    ),
    Fault("gpu-fused128-turn", CARRY,
        "        wait_until(p.added + tile, before);\n", "",
        "key tiles add to dq out of turn", "gpu-fused128",
    ),
)  # fmt: skip

# Faults that no test noticed on the cards tried, and why they may stay unseen there: each takes out
# an order that PTX does not promise, and that the card kept by itself in thousands of calls. On the
# CPU, under the same name with `hopper-` for `gpu-`, each of them is caught.
_PROXY = (
    "rows or tiles written by one proxy are read by the other behind a barrier that is waited for "
    "in between; PTX asks for the fence, and no result differed without it"
)
_ADDED = (
    "the next key tile's addition starts on another multiprocessor after an acquire, a bulk copy "
    "later; that it overtook this one was not seen"
)
NOT_SEEN: dict[str, str] = {
    "gpu-proxy": _PROXY,
    "gpu-fused-changes-fence": _PROXY,
    "gpu-fused-sum-fence": _PROXY,
    "gpu-fused-sum-added": _ADDED,
    "gpu-fused128-changes-fence": _PROXY,
    "gpu-fused128-sum-added": _ADDED,
    "gpu-wide-room": "the next weights come a product and a softmax after these are read",
    "gpu-wide-out": "the rows of the next tile are looked up while the last product still runs",
}
