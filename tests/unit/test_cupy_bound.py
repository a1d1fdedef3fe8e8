"""Launches that were prepared once equal those packed anew, whatever the addresses."""

import struct

import pytest
import recorded_launches
from recorded_launches import (
    PLAN,
    STREAM,
    WORKSPACE,
    Context,
    backward_arrays,
    forward_arrays,
    problem,
)
from scfa_core.backends.cupy_raw import bound_sm90, launch, launch_sm90, planner, shapes_sm90
from scfa_core.backends.cupy_raw.params import POINTERS
from scfa_core.backends.cupy_raw.prepared import Template, marks
from scfa_core.backends.cupy_raw.tensor_maps import tensor_maps

from scfa_core.arrays import DeviceArray
from scfa_core.lowering import Clauses
from scfa_core.plan import PlanArrays

launched = recorded_launches.launched


def test_addresses_fill_their_holes():
    a, b, c = marks(3)
    packing = struct.Struct("<QqiiQQQ")
    template = Template(packing.pack(b, -5, 1, 2, a, b, 0), 3)
    assert template.fill((7, 8, 9)) == packing.pack(8, -5, 1, 2, 7, 8, 0)
    assert template.fill((2**64 - 1, 0, 9)) == packing.pack(0, -5, 1, 2, 2**64 - 1, 0, 0)
    with pytest.raises(ValueError, match="two addresses or more"):
        Template(struct.pack("<Q", c), 3)


def column(at, dtype="int32", rows=90):
    return DeviceArray(at, (2, 4, rows), (4 * rows, rows, 1), dtype, 0)


def grouped(q_type="int32", k_type="int32", **rest):
    return Clauses(q_groups=(column(0x1000, q_type),), k_groups=(column(0x2000, k_type),), **rest)


KEEPS = {"q_keeps": (column(0x3001, "uint8"),), "k_keeps": (column(0x4003, "uint8"),)}
PATTERNS = {
    "causal": Clauses(hi_offset=1),
    "ranges": Clauses(starts=(column(0x5000),), ends=(column(0x6000, "int64"),)),
    "hash, one pass": grouped(hi_offset=1),
    "hash, not causal": grouped(),
    "hash of two types": grouped(q_type="int64", hi_offset=0),
    "hash and keep": grouped(hi_offset=1, **KEEPS),
    "keep": Clauses(hi_offset=0, **KEEPS),
    "window of groups": grouped(hi_offset=1, lo_offset=-8),
}


@pytest.mark.parametrize("seqlen_k", [90, 700])
@pytest.mark.parametrize("name", PATTERNS)
def test_bound_planning_launches_the_same(launched, name, seqlen_k):
    clauses, sizes = PATTERNS[name], problem(seqlen_k=seqlen_k)
    lists = (DeviceArray(at, (), (), "int32", 0) for at in PLAN[:7])
    context = Context()
    planner.run_make_plan(sizes, clauses, PlanArrays(*lists, monotone=clauses.monotone), context)
    anew = launched.copy()
    launched.clear()
    without = clauses.with_arrays(x._replace(pointer=0) for x in clauses.arrays)
    bound = planner.bind_make_plan(sizes, without, 0)
    bound_context = Context()
    assert not launched
    bound(PLAN, tuple(x.pointer for x in clauses.arrays), bound_context)
    assert launched == anew
    assert len(anew) in (1, 2, 3, 4)
    assert bound_context.asked == context.asked


def pointers(params):
    return POINTERS.unpack(params[: POINTERS.size])


def test_portable_forward(launched):
    arrays = forward_arrays()
    bound = launch.bind_forward(problem(), *(x._replace(pointer=0) for x in arrays))
    lists = (PLAN.q_index, PLAN.k_index, PLAN.k_count, PLAN.key_start, PLAN.key_end)
    for shift in (0, 64):
        at = tuple(x.pointer for x in forward_arrays(shift))
        bound(PLAN, at, Context())
        name, constants, grid, _, _, stream, params = launched[-1]
        assert (name, stream, constants["ALIGNED"]) == ("scfa_fwd", STREAM, 1)
        assert grid[0] > 0
        assert pointers(params) == (*at, *[0] * 6, *lists)
    native = PlanArrays(*(DeviceArray(x, (), (), "int32", 0) for x in PLAN[:7]), monotone=True)
    launch.run_forward(problem(), native, *forward_arrays(64), Context())
    assert launched[-1] == launched[-2]


def test_rows_out_of_line_take_another_kernel(launched):
    bound = launch.bind_forward(problem(), *forward_arrays())
    for shift, aligned in ((0, 1), (2, 0), (16, 1), (6, 0)):
        bound(PLAN, tuple(x.pointer for x in forward_arrays(shift)), Context())
        assert launched[-1][1]["ALIGNED"] == aligned


def test_portable_backward(launched):
    arrays = backward_arrays()
    context = Context()
    bound = launch.bind_backward(problem(), *(x._replace(pointer=0) for x in arrays))
    bound(PLAN, tuple(x.pointer for x in arrays), context)
    dout, q, k, v, out, lse, dq, dk, dv = (x.pointer for x in arrays)
    n_rows = 2 * 4 * 90
    assert context.asked == [((2 * n_rows,), "float32")]
    assert [x[0] for x in launched] == ["scfa_bwd_dq", "scfa_bwd_dkdv"]
    for _, _, _, _, _, _, params in launched:
        assert pointers(params) == (
            *(q, k, v, out, lse, dout, dq, dk, dv),
            *(WORKSPACE, WORKSPACE + 4 * n_rows),
            *(PLAN.q_index, PLAN.k_index, PLAN.k_count, PLAN.key_start, PLAN.key_end),
        )
    any_order = PLAN._replace(monotone=False)
    bound(any_order, tuple(x.pointer for x in arrays), context)
    assert [x[1].get("MONOTONE") for x in launched] == [None, 1, None, 0]


def test_hopper_kernels_read_these_addresses(launched, monkeypatch):
    for module in (launch, launch_sm90):
        monkeypatch.setattr(module, "compute_capability", lambda device: (9, 0))
    arrays = backward_arrays()
    at = tuple(x.pointer for x in arrays)
    launch.bind_backward(problem(), *(x._replace(pointer=0) for x in arrays))(PLAN, at, Context())
    names = [x[0] for x in launched if x[0] != "zero"]
    assert names == ["scfa_bwd_dq_sm90", "scfa_bwd_dkdv_sm90"]
    for call in launched:
        if call[0] != "zero":
            words = struct.unpack(f"<{len(call[-1]) // 8}Q", call[-1])
            assert {*at, *PLAN[:6]} <= set(words)


def described(address):
    return DeviceArray(address, (), (), "int32", 0)


@pytest.mark.parametrize(
    ("monotone", "backward"), [(True, "split"), (False, "split"), (True, "fused")]
)
def test_hopper_arguments_are_those_packed_anew(launched, monkeypatch, monotone, backward):
    """Each field in its place, workspace too, at sizes and strides that all differ."""
    monkeypatch.setenv("SCFA_CUPY_BACKWARD", backward)
    plan = PLAN._replace(monotone=monotone)
    native = PlanArrays.of([described(at) for at in PLAN[:7]], monotone)
    sizes, arrays = problem(seqlen_k=300), backward_arrays()
    dout, q, k, v, out, lse, dq, dk, dv = arrays
    at = tuple(x.pointer for x in arrays)
    without = [x._replace(pointer=0) for x in arrays]
    n_rows, blank = 2 * 4 * 90, (None,) * 4

    bound_sm90.bind_forward(sizes, monotone, *without[1:6])(plan, at[1:6], Context())
    forward = (q, k, v, out, *blank)
    want = launch_sm90._params(
        *(sizes, native, forward, lse, (0, 0), WORKSPACE, (1, 8), 4),
        maps=tensor_maps(k, v),
        in_turn=2,
    )
    assert launched[-1][1]["RUNS"] == int(monotone)
    assert launched.pop()[-1] == want
    assert launched.pop() == ("zero", WORKSPACE, 8, STREAM, 0)

    bound_sm90.bind_backward(sizes, monotone, *without)(plan, at, Context())
    given = (q, k, v, out, dout, dq, dk, dv)
    stats = (WORKSPACE + 4, WORKSPACE + 4 + 4 * n_rows)
    second, third, fourth = (WORKSPACE + (i << 20) for i in (1, 2, 3))
    if backward == "fused":
        assert launched.pop(0) == ("zero", second, 8, STREAM, 0)
        records = third, third + 4 * 12 * (4 + 4 * 2)  # of key tiles, and what comes after them
        sums = launch_sm90.Sums(fourth, records[1], launch_sm90._sum_slots(sizes), 2)
        fields = (sizes, native, given, lse, stats, second, (3, 12), 2, sums)
        in_turn = launch_sm90._fused_in_turn(sizes, sums.slots)
        assert in_turn == 2
        rest = {"key_tiles": records[0], "maps": tensor_maps(q, dout), "in_turn": in_turn}
        want = launch_sm90._params(*fields, **rest)
        assert [x[1].get("RUNS") for x in launched] == [0, 1]
        names = ["prepare", "fused"]
        assert [x[0] for x in launched] == [f"scfa_bwd_{name}_sm90" for name in names]
        assert {x[-1] for x in launched} == {want}
        return
    assert launched.pop(0) == ("zero", second, 8, STREAM, 0)
    envelopes = (0, 0) if monotone else (third, third + 4 * n_rows)

    def params(counter, *tiles_and_heads):
        fields = (sizes, native, given, lse, stats, counter, *tiles_and_heads)
        return launch_sm90._params(*fields, envelopes=envelopes, maps=tensor_maps(q, dout))

    if not monotone:  # one block for each list and direction
        name, _, grid, threads, *_, envelope_params = launched.pop(0)
        assert (name, grid, threads) == ("scfa_bwd_envelope_sm90", (2 * 8, 1, 1), 1024)
        assert envelope_params == params(second, (1, 8), 4)
    assert [(x[0], x[-1]) for x in launched] == [
        ("scfa_bwd_dq_sm90", params(second, (1, 8), 4)),
        ("scfa_bwd_dkdv_sm90", params(second + 4, (3, 12), 2)),
    ]
    assert {x[1]["MONOTONE"] for x in launched} == {int(monotone)}


@pytest.mark.parametrize("monotone", [True, False])
def test_more_query_rows_than_an_int_counts_are_bound(launched, monotone):
    """More than 2^31 - 1 in a batch: rows are numbered within a list, lists within the batch."""
    sizes, arrays = problem(batch=3, heads=2, seqlen_q=(1 << 31) // 6 + 1), backward_arrays()
    at, context = tuple(x.pointer for x in arrays), Context()
    plan = PLAN._replace(monotone=monotone)
    bound_sm90.bind_backward(sizes, monotone, *arrays)(plan, at, context)
    n_rows = 6 * sizes.seqlen_q
    assert n_rows > 1 << 31
    assert context.asked[0] == ((2 * n_rows + 1,), "float32")
    names = [x[0] for x in launched if x[0] != "zero"]
    assert names[-2:] == ["scfa_bwd_dq_sm90", "scfa_bwd_dkdv_sm90"]
    assert ("scfa_bwd_envelope_sm90" in names) != monotone


def test_only_ranges_in_any_order_take_memory_for_envelopes(launched):
    arrays = backward_arrays()
    at = tuple(x.pointer for x in arrays)
    asked = []
    for monotone in (True, False):
        context = Context()
        plan = PLAN._replace(monotone=monotone)
        bound_sm90.bind_backward(problem(), monotone, *arrays)(plan, at, context)
        asked.append(context.asked)
    assert asked[1] == [*asked[0], ((2 * 2 * 4 * 90,), "int32")]


def test_hopper_takes_zeroed_counters_where_there_are_some(launched):
    arrays = backward_arrays()
    at = tuple(x.pointer for x in arrays)
    context = Context()
    context.counters = lambda: 0x7D00_0000_0008
    bound_sm90.bind_forward(problem(), True, *arrays[1:6])(PLAN, at[1:6], context)
    assert context.asked == []
    bound_sm90.bind_backward(problem(), True, *arrays)(PLAN, at, context)
    assert len(context.asked) == 1
    assert [x[0] for x in launched] == ["scfa_fwd_sm90", "scfa_bwd_dq_sm90", "scfa_bwd_dkdv_sm90"]
    for call, counter in zip(launched, (0x7D00_0000_0008,) * 2 + (0x7D00_0000_000C,), strict=True):
        assert struct.pack("<Q", counter) in call[-1]


def test_where_ranges_can_be_long_the_gpu_chooses(launched, monkeypatch):
    """All kernels are launched, with the words of the choice, a counter each, and room for sums."""
    monkeypatch.delenv("SCFA_CUPY_BACKWARD", raising=False)
    native = PlanArrays.of([described(at) for at in PLAN[:7]], True)
    keys = launch_sm90._FEW_KEYS[128] + 1
    sizes, arrays = problem(seqlen_k=keys, head_dim=128, head_dim_v=128), backward_arrays(128)
    dout, q, k, v, out, lse, dq, dk, dv = arrays
    at = tuple(x.pointer for x in arrays)
    without = [x._replace(pointer=0) for x in arrays]
    bound_sm90.bind_backward(sizes, True, *without)(PLAN, at, Context())
    counted, choice, records, room = (WORKSPACE + (i << 20) for i in (1, 2, 3, 4))
    added = records + 4 * 24 * (4 + 4 * 2)
    sums = launch_sm90.Sums(room, added, launch_sm90._sum_slots(sizes), 2)
    stats = (WORKSPACE + 4, WORKSPACE + 4 + 4 * 2 * 4 * 90)
    first = choice + 4 * launch_sm90._CHOICE_COUNTERS
    key_tiles = (6, 24)  # of 661 keys, two batch entries of two key heads
    given = (q, k, v, out, dout, dq, dk, dv)

    def want(counter, tiles, heads):
        return launch_sm90._params(
            *(sizes, native, given, lse, stats, counter, tiles, heads, sums, choice),
            key_tiles=records,
            maps=tensor_maps(q, dout),
        )

    assert launched[0] == ("zero", counted, 8, STREAM, 0)
    assert [(x[0], x[-1]) for x in launched[1:]] == [
        ("scfa_bwd_choose_sm90", want(counted, key_tiles, 2)),
        ("scfa_bwd_dq_sm90", want(first, (1, 8), 4)),
        ("scfa_bwd_dkdv_sm90", want(first + 4, key_tiles, 2)),
        ("scfa_bwd_prepare_sm90", want(first + 8, key_tiles, 2)),
        ("scfa_bwd_fused128_sm90", want(first + 8, key_tiles, 2)),
    ]


@pytest.mark.parametrize(
    ("head_dim", "backward", "keys"),
    [(64, "auto", 961), (128, "auto", 661), (64, "fused", 300), (128, "fused", 300)],
)
def test_where_ranges_may_be_in_order_the_gpu_chooses(
    launched, monkeypatch, head_dim, backward, keys
):
    """It looks at them first; kernels of the fused way are those of ranges in order."""
    monkeypatch.setenv("SCFA_CUPY_BACKWARD", backward)
    native = PlanArrays.of([described(at) for at in PLAN[:7]], False)
    sizes = problem(seqlen_k=keys, head_dim=head_dim, head_dim_v=head_dim)
    arrays = backward_arrays(head_dim)
    dout, q, k, v, out, lse, dq, dk, dv = arrays
    at, context = tuple(x.pointer for x in arrays), Context()
    without = [x._replace(pointer=0) for x in arrays]
    plan = PLAN._replace(monotone=False)
    bound_sm90.bind_backward(sizes, False, *without)(plan, at, context)
    counted, choice, records, room, envelopes = (WORKSPACE + (i << 20) for i in range(1, 6))
    n_rows, tiles = 2 * 4 * 90, -(-keys // 128)
    assert context.asked[2] == ((8 + 2 * 2 + 2 * 2 * 4,), "int32")  # the choice
    assert context.asked[5] == ((2 * n_rows,), "int32")
    added = records + 4 * 4 * tiles * (4 + 4 * 2)
    sums = launch_sm90.Sums(room, added, launch_sm90._sum_slots(sizes), 2)
    stats = (WORKSPACE + 4, WORKSPACE + 4 + 4 * n_rows)
    first, key_tiles = choice + 4 * launch_sm90._CHOICE_COUNTERS, (tiles, 4 * tiles)
    given = (q, k, v, out, dout, dq, dk, dv)

    def want(counter, tiles, heads, in_turn=0):
        return launch_sm90._params(
            *(sizes, native, given, lse, stats, counter, tiles, heads, sums, choice),
            envelopes=(envelopes, envelopes + 4 * n_rows),
            key_tiles=records,
            maps=tensor_maps(q, dout),
            in_turn=in_turn,
        )

    assert launched[0] == ("zero", counted, 8, STREAM, 0)
    fused = want(first + 8, key_tiles, 2, launch_sm90._fused_in_turn(sizes, sums.slots))
    assert [(x[0], x[-1]) for x in launched[1:]] == [
        ("scfa_bwd_envelope_sm90", want(first, (1, 8), 4)),
        ("scfa_bwd_choose_sm90", want(counted, key_tiles, 2)),
        ("scfa_bwd_dq_sm90", want(first, (1, 8), 4)),
        ("scfa_bwd_dkdv_sm90", want(first + 4, key_tiles, 2)),
        ("scfa_bwd_prepare_sm90", fused),
        (f"scfa_{shapes_sm90.FUSED_KERNELS[head_dim]}", fused),
    ]
    assert [x[1].get("MONOTONE") for x in launched[2:]] == [0, 0, 0, 1, 1]
    assert {x[1]["CHOICE"] for x in launched[3:]} == {1}
    assert launched[2][1]["LONG_KEYS"] == launch_sm90._LONG_KEYS.get(head_dim, 0)
