"""The Hopper launches' arithmetic: division by multiplication, shared memory, argument size."""

from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scfa_core.backends.cupy_raw import bound_sm90, launch_sm90, nvrtc, shapes_sm90

from scfa_core.arrays import DeviceArray
from scfa_core.errors import BackendUnavailable
from scfa_core.problem import Problem

LARGEST = 2**31 - 1
BLOCK_LIMIT = 232_448  # bytes of shared memory a block may have on sm_90
PARTIAL = [dim for dim in range(16, 257, 8) if dim % 64]
SHAPES = [
    (name, dim, shape) for name, table in shapes_sm90.TABLES.items() for dim, shape in table.items()
]


@given(st.integers(1, LARGEST), st.integers(0, LARGEST))
@example(1, LARGEST)
@example(LARGEST, LARGEST)
@example(3, LARGEST)
def test_divisor_is_exact(number, n):
    multiplier, shift = launch_sm90._divisor(number)
    assert multiplier < 2**32
    assert shift < 64
    assert n * multiplier >> shift == n // number


@given(st.integers(1, 100_000), st.integers(1, 20_000))
def test_divisor_at_multiples(number, times):
    multiplier, shift = launch_sm90._divisor(number)
    for n in (number * times - 1, number * times):
        if n <= LARGEST:
            assert n * multiplier >> shift == n // number


@pytest.mark.parametrize("table", [shapes_sm90.FORWARD, shapes_sm90.DQ, shapes_sm90.DKDV])
def test_every_head_dim_has_the_shape_of_the_tiles_that_hold_it(table):
    for head_dim in PARTIAL:
        assert table[head_dim] == table[min(width for width in table if width > head_dim)]
    with pytest.raises(KeyError):
        table[320]


def test_dq_and_dkdv_serve_the_same():
    for head_dim in range(16, 300, 8):
        assert bool(shapes_sm90.DQ.width(head_dim)) == bool(shapes_sm90.DKDV.width(head_dim))


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "forward", "backward"),
    [
        (16, 16, True, True),
        (40, 40, True, True),
        (64, 64, True, True),
        (96, 96, True, True),
        (120, 120, True, True),
        (136, 136, True, True),
        (256, 256, True, True),
        (264, 264, False, False),
        (100, 100, False, False),
        (64, 128, False, False),
    ],
)
def test_head_dims_served(monkeypatch, head_dim, head_dim_v, forward, backward):
    monkeypatch.setattr(launch_sm90, "compute_capability", lambda device: (9, 0))
    problem = Problem(1, 1, 1, 8, 8, head_dim, head_dim_v, "bfloat16", "cuda:0", 0.1)
    row = -(-head_dim // 8) * 8
    rows = DeviceArray(1 << 20, (1, 1, 8, head_dim), (8 * row, 8 * row, row, 1), "bfloat16", 0)
    arrays = (rows,) * 3
    for monotone in (True, False):
        plan = SimpleNamespace(monotone=monotone)
        assert launch_sm90.supports_forward(problem, *arrays, plan) is forward
        assert launch_sm90.supports_backward(problem, rows, *arrays, rows, plan) is backward


@pytest.mark.parametrize("monotone", [True, False])
@pytest.mark.parametrize("group", [16, 17])
def test_head_groups_served(monkeypatch, caplog, group, monotone):
    monkeypatch.setattr(launch_sm90, "compute_capability", lambda device: (9, 0))
    problem = Problem(1, group, 1, 8, 8, 64, 64, "bfloat16", "cuda:0", 0.1)
    rows = DeviceArray(1 << 20, (1, 1, 8, 64), (512, 512, 64, 1), "bfloat16", 0)
    caplog.set_level("DEBUG", "scfa_core")
    served = launch_sm90.supports_backward(
        problem, *(rows,) * 5, SimpleNamespace(monotone=monotone)
    )
    assert served is (group <= 16)
    assert ("portable kernels (17 heads to a key head)" in caplog.text) is not served


@pytest.mark.parametrize(("name", "head_dim", "shape"), SHAPES)
def test_shapes_fit_a_block(name, head_dim, shape):
    assert shapes_sm90.SHARED[name](head_dim, shape) <= BLOCK_LIMIT


def test_kernel_refuses_another_layout():
    """A size that differs from the kernel's own layout does not compile."""
    try:
        compiler = nvrtc.wheel_compiler()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    shape = shapes_sm90.FORWARD[64]
    constants = (
        ("BFLOAT16", 1),
        ("HEAD_DIM", 64),
        ("BLOCK_N", shape.block_n),
        ("WARPGROUPS", shape.warpgroups),
        ("STAGES", shape.stages),
        ("QUERY_BUFFERS", shape.query_buffers),
        ("SHARED_BYTES", shapes_sm90.SHARED["fwd_sm90"](64, shape) + 8),
    )
    with pytest.raises(nvrtc.CompileError, match="asks for as much as is laid out"):
        nvrtc.compile_to_cubin("fwd_sm90.cu", constants, "90a", compiler)


@pytest.mark.parametrize(
    ("scale", "served"), [(0.125, True), (1e-30, True), (1e-46, False), (0.0, False), (-1.0, False)]
)
def test_scales_that_float32_makes_zero_go_to_the_portable_kernels(monkeypatch, scale, served):
    """-inf, which stands for no key, times a scale of 0 would be NaN."""
    monkeypatch.setattr(launch_sm90, "compute_capability", lambda device: (9, 0))
    problem = Problem(1, 1, 1, 8, 8, 64, 64, "bfloat16", "cuda:0", scale)
    rows = DeviceArray(1 << 20, (1, 1, 8, 64), (512, 512, 64, 1), "bfloat16", 0)
    assert launch_sm90.supports_forward(problem, rows, rows, rows, plan=None) == served


@given(
    st.integers(1, 8),
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 200_000),
    st.sampled_from([64, 128]),
)
@example(4, 48, 1, 16_384, 64)
def test_sums_of_dq_keep_to_their_room(batch, heads_kv, group, seqlen, head_dim):
    """That of 2^17 query rows and 8 bytes for each, counted in whole heads."""
    heads = heads_kv * group
    problem = Problem(
        batch, heads, heads_kv, seqlen, seqlen, head_dim, head_dim, "bfloat16", "cuda:0", 0.1
    )
    slots = launch_sm90._sum_slots(problem)
    head_bytes = 4 * head_dim * 64 * -(-seqlen // 64)
    room = (head_dim << 19) + 8 * batch * heads * seqlen
    assert slots * head_bytes <= room
    assert slots == batch * heads or (slots + 1) * head_bytes > room


@pytest.mark.parametrize("monotone", [True, False])
@pytest.mark.parametrize("mapped", [True, False])
def test_which_kernels_fetch_runs(monkeypatch, monotone, mapped):
    """Forward up to head_dim 128 and the fused ones, where they have maps and ranges in order.

    The fused ones are given nothing else, whatever the host knows of the plan.
    """
    asked = []
    monkeypatch.setattr(launch_sm90, "get_kernel", lambda *x, arch_suffix: asked.append(x))
    fetch = set()
    for name, head_dim, shape in SHAPES:
        launch_sm90._kernel.__wrapped__(name, 0, "bfloat16", head_dim, shape, monotone, mapped)
        if dict(asked[-1][2])["RUNS"]:
            fetch.add((name, head_dim))
    whole = {("bwd_fused_sm90", 64), ("bwd_fused128_sm90", 128)}
    whole |= {("fwd_sm90", 64), ("fwd_sm90", 128)} if monotone else set()
    assert fetch == (whole if mapped else set())


@pytest.mark.parametrize(("name", "head_dim", "shape"), SHAPES)
def test_which_kernels_are_told_of_a_choice(monkeypatch, name, head_dim, shape):
    """Of plans in order those of head_dim 128; of others all of a backward that has two ways."""
    asked = []
    monkeypatch.setattr(launch_sm90, "get_kernel", lambda *x, arch_suffix: asked.append(x))
    for monotone in (True, False):
        launch_sm90._kernel.__wrapped__(name, 0, "bfloat16", head_dim, shape, monotone)
    known, unknown = (dict(x[2]) for x in asked)
    assert known["CHOICE"] == int(head_dim == 128)
    assert unknown["CHOICE"] == int(name != "fwd_sm90" and head_dim in (64, 128))
    fused = "fused" in name or name == "bwd_prepare_sm90"
    assert (known["MONOTONE"], unknown["MONOTONE"]) == (1, int(fused))


@pytest.mark.parametrize("head_dim", sorted(shapes_sm90.FUSED))
def test_few_keys_are_not_asked_about(head_dim):
    """Beyond them ranges decide at head_dim 128; at 64 the fused way is always the faster one."""
    few = launch_sm90._FEW_KEYS[head_dim]
    assert few > launch_sm90._LONG_KEYS.get(head_dim, 0)
    for keys, ways in ((few, (True, False)), (few + 1, (head_dim == 128, True))):
        sizes = (1, 1, 300, keys, head_dim, head_dim)
        problem = Problem(1, *sizes, "bfloat16", "cuda:0", 0.1)
        assert bound_sm90._ways(problem, "auto") == ways


def test_an_unknown_backward_is_refused(monkeypatch):
    monkeypatch.setenv("SCFA_CUPY_BACKWARD", "both")
    problem = Problem(1, 1, 1, 8, 8, 64, 64, "bfloat16", "cuda:0", 0.1)
    rows = DeviceArray(1 << 20, (1, 1, 8, 64), (512, 512, 64, 1), "bfloat16", 0)
    bound = bound_sm90.bind_backward(problem, True, *(rows,) * 9)
    wanted = r"SCFA_CUPY_BACKWARD must be one of .*'split'.*, got 'both': change or unset it"
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match=wanted):
            bound(None, (1 << 20,) * 9, None)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 16), st.integers(1, 400_000))
@example(2, 8, 4, 65_536)
@example(4, 8, 4, 131_072)
def test_batch_and_heads_do_not_decide_which_kernels_run(batch, heads_kv, group, seqlen):
    """Only then are the bits of a head's gradients its own."""

    def problem(batch, heads_kv):
        sizes = (heads_kv * group, heads_kv, seqlen, seqlen, 64, 64)
        return Problem(batch, *sizes, "bfloat16", "cuda:0", 0.1)

    alone, among = problem(1, 1), problem(batch, heads_kv)
    for asked in (None, "auto", "split", "fused"):
        for monotone in (True, False):
            ways = bound_sm90._ways(alone, asked, monotone)
            assert bound_sm90._ways(among, asked, monotone) == ways
    if launch_sm90._sums_fit(among):
        assert launch_sm90._sum_slots(among) >= group


@pytest.mark.parametrize("head_dim", [*sorted(shapes_sm90.FUSED), 96, 256])
def test_ranges_in_any_order_never_all_go_the_fused_way(head_dim):
    """The card chooses, unless no more than the split way is asked for or serves."""
    both, split = (head_dim in shapes_sm90.FUSED,) * 2, (True, False)
    for keys, auto in ((50_000, both), (400, (False, False))):
        problem = Problem(1, 1, 1, 50_000, keys, head_dim, head_dim, "bfloat16", "cuda:0", 0.1)
        right = {None: auto, "auto": auto, "fused": both, "split": (False, False)}
        assert set(right) == {None, *bound_sm90._asked.words}
        for asked, ways in right.items():
            want = ways if any(ways) else split
            assert bound_sm90._ways(problem, asked, monotone=False) == want


def test_ranges_in_any_order_of_too_many_rows_for_sums_are_split():
    sizes = (1, 1, 400_000, 400_000, 64, 64)
    problem = Problem(1, *sizes, "bfloat16", "cuda:0", 0.1)
    assert bound_sm90._ways(problem, "auto", monotone=False) == (True, False)


@pytest.mark.parametrize("head_dim", sorted(shapes_sm90.FUSED))
def test_who_asks_for_a_way_gets_it(head_dim):
    sizes = (1, 1, 50_000, 50_000, head_dim, head_dim)
    long_ranges = Problem(1, *sizes, "bfloat16", "cuda:0", 0.1)
    assert bound_sm90._ways(long_ranges, "fused") == (False, True)
    assert bound_sm90._ways(long_ranges, "split") == (True, False)
    assert bound_sm90._ways(long_ranges, None) == (head_dim in launch_sm90._LONG_KEYS, True)
