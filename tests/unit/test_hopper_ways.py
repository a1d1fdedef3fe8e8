"""Ranges that the host does not know to be in order: the card finds out which key heads have them.

Those go the fused way, the others the split way, on fibers (hopper_host.py) and against the truth.
"""

import dataclasses

import hopper_host
import host_build
import numpy as np
import pytest
from hopper_host import described
from scfa_core.backends.cupy_raw import launch_sm90, shapes_sm90

import scfa_core as scfa
from scfa_core import testing, testing_problems
from scfa_core.plan import PlanArrays
from scfa_core.problem import Problem
from scfa_core.testing import Part, Spec

pytestmark = host_build.NEEDS_COMPILER
kernels = hopper_host.kernels
SPLIT, FUSED = 0, 1
HEADS_AT = 8  # kChoiceHeads
HEAD_DIMS = pytest.mark.parametrize("head_dim", sorted(shapes_sm90.FUSED))
ROWS, KEYS = 210, 277


@pytest.fixture
def any_length(monkeypatch):
    """At head_dim 128, too, nothing but order decides."""
    monkeypatch.setitem(launch_sm90._LONG_KEYS, 128, 0)


def order_of(kernels, start, end, counts, group=1):
    """Words of the kernel that makes envelopes, ends and starts of each list (heads, rows)."""
    heads, rows = start.shape
    key_heads = heads // group
    problem = Problem(1, heads, key_heads, rows, 8, 64, 64, "bfloat16", "cpu", 0.1)
    counts, start, end = (np.ascontiguousarray(x, np.int32) for x in (counts, start, end))
    lists = [described(x, "int32") for x in (start, counts, start, start, start, end)]
    envelopes = np.empty((2, heads, rows), np.int32)
    choice = np.full(HEADS_AT + key_heads + 2 * heads + 1, -7, np.int32)
    params = launch_sm90._params(
        *(problem, PlanArrays.of([*lists, None], False), (None,) * 8, None, (0, 0), 0),
        *((1, heads), heads),
        choice=choice.ctypes.data,
        envelopes=tuple(x.ctypes.data for x in envelopes),
    )
    run = kernels.kernel("bwd_envelope_sm90", "bfloat16", 64, None).result()
    assert run(params, 2 * heads, 1024, 0, rows % 3) == 0
    assert (choice[: HEADS_AT + key_heads] == -7).all()
    assert choice[-1] == -7
    return choice[HEADS_AT + key_heads : -1].reshape(heads, 2)


def steps_back(rows):
    """Whether some row is less than the one before it."""
    return bool((np.diff(rows) < 0).any())


# Rows of one thread and of its neighbours in the warp, of the next warp, of the next step.
PLACES = (1, 3, 4, 5, 127, 128, 4095, 4096, 4100, 5000)


@pytest.mark.parametrize("what", ["ends", "starts", "empty rows"])
def test_a_step_back_is_found_anywhere(kernels, what):
    """One list for each place of the only row that breaks the order, and one in order."""
    row = np.arange(5001)
    start = np.tile(row // 2, (len(PLACES) + 1, 1))
    end = start + 9
    for list_, place in enumerate(PLACES):
        if what == "ends":
            end[list_, place] = end[list_, place - 1] - 1
        elif what == "starts":
            start[list_, place:] += 1
            start[list_, place] = start[list_, place - 1] - (place > 1)
            start[list_, place - 1] += place == 1
        else:
            start[list_, place] = end[list_, place] = start[list_, place - 1]
    order = order_of(kernels, start, end, np.full(len(start), row.size))
    right = [[not steps_back(x) for x in both] for both in zip(end, start, strict=True)]
    assert order.tolist() == right
    of_all = np.array([what == "starts", what != "starts"])
    np.testing.assert_array_equal(order, [of_all] * len(PLACES) + [[1, 1]])


@pytest.mark.parametrize("rows", [1, 5, 129, 4097])
def test_rows_that_are_dropped_do_not_count(kernels, rows):
    """Whatever stands in their place, and be it all rows; grouped query heads."""
    rng = np.random.default_rng(rows)
    counts = np.array([0, 1, rows // 2, rows // 2, rows - 1, rows])
    start, end = np.sort(rng.integers(0, 900, (2, 6, rows)))
    for list_, count in enumerate(counts):
        start[list_, count:] = rng.integers(0, 900, rows - count)
        end[list_, count:] = rng.integers(0, 900, rows - count)
    middle = rows // 2
    start[3, : middle // 2] += 1000  # the step back lies among those that are kept
    order = order_of(kernels, start, end, counts, group=2)
    assert order[:3].tolist() == [[1, 1]] * 3
    assert order[4:].tolist() == [[1, 1]] * 2
    assert order[3].tolist() == [1, int(middle < 2)]


def case_of(sizes, pattern, dtype="bfloat16", seed=4, poison=False):
    """A case of the pattern; where it says so, rows that take no part hold NaN and Inf."""
    spec = Spec(*sizes, dtype, parts=(Part("ranges", "random"),), poison=poison, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing_problems, "build_part", lambda *_: pattern)
        return testing.build(spec)


def bits(x):
    return np.asarray(x).view(np.uint16)


def run_chosen(kernels, case, **how):
    """Results, and the ways of key heads; every head goes one way, none goes both."""
    before, ways = {}, []

    def watch(kernel, ways_now, gradients):
        now = [bits(x).reshape(len(ways_now), -1).copy() for x in gradients]
        if kernel == "bwd_envelope_sm90":
            before["split"] = now
        elif kernel == "bwd_dkdv_sm90":
            before["fused"] = now
            ways[:] = ways_now
            check_who_wrote(before["split"], now, ways, SPLIT)
        elif kernel == shapes_sm90.FUSED_KERNELS[case.spec.head_dim]:
            assert ways == ways_now
            check_who_wrote(before["fused"], now, ways, FUSED)

    got = hopper_host.run(kernels, case, watch=watch, **how)
    bad = [verdict for verdict in testing.judge(case, got) if not verdict.ok]
    assert not bad, f"{case.spec}: {bad}"
    return got, ways


def check_who_wrote(before, after, ways, way):
    """All of the key heads that go this way, nothing of the others."""
    for old, new in zip(before, after, strict=True):
        for head, its_way in enumerate(ways):
            assert (old[head] != new[head]).any() == (its_way == way), (head, its_way, way)


def run_in_order(kernels, case, **how):
    """Results of the fused way by a plan that the host knows to be in order."""
    make_plan = scfa.make_plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            scfa,
            "make_plan",
            lambda *x, **y: dataclasses.replace(make_plan(*x, **y), monotone=True),
        )
        return hopper_host.run(kernels, case, fused=True, **how)


def same_heads(got, want, key_heads, which=slice(None)):
    """Compare bits of the gradients of key heads `which` and their query heads."""
    for x in ("dq", "dk", "dv"):
        a, b = (getattr(y, x) for y in (got, want))
        a, b = (y.reshape(key_heads, -1) for y in (a, b))
        np.testing.assert_array_equal(a[which], b[which], x)


def ranges_in_order(name, rows, keys):
    """Ranges (1, 1, rows), not all of which are in order before they are sorted."""
    row = np.arange(rows)
    if name == "window":
        start, end = row + keys - rows - 70, row + keys - rows + 1
    elif name == "prefix":
        start, end = 0 * row, np.random.default_rng(3).integers(0, keys + 1, rows)
    else:  # sequences, packed
        edges = np.array([0, 10, 75, 76, 200, keys])
        sequence = np.searchsorted(edges, row * keys // rows, "right")
        start, end = edges[sequence - 1], edges[sequence]
    return np.clip(start, 0, keys)[None, None], np.clip(end, 0, keys)[None, None]


@HEAD_DIMS
@pytest.mark.parametrize("name", ["window", "prefix", "sequences"])
def test_ranges_in_order_get_the_bits_of_the_fused_way(kernels, any_length, head_dim, name):
    """Those of the same plan, had the host known; tiles of heads in turn too."""
    sizes = (1, 4, 2, ROWS, KEYS, head_dim, head_dim)
    case = case_of(sizes, scfa.KeyRanges(*ranges_in_order(name, ROWS, KEYS)), poison=True)
    turns = int(head_dim == 64)
    got, ways = run_chosen(kernels, case, blocks=2, order=2, slots=4, in_turn=turns)
    assert ways == [FUSED, FUSED]
    same_heads(got, run_in_order(kernels, case), 2)


def out_of_order(start, end, which):
    """Ranges of several lists, of which those in `which` step back, and back again."""
    start, end = start.copy(), end.copy()
    for list_ in which:
        start[0, list_, 1::2] = np.maximum(start[0, list_, 1::2] - 40 - list_, 0)
    return start, end


@HEAD_DIMS
@pytest.mark.parametrize("which", [(3,), (0, 4), (1, 2, 5), ()])
def test_a_key_head_is_fused_where_all_its_lists_are_in_order(kernels, any_length, head_dim, which):
    """Of two query heads to a key head one is enough to have it split; bits are those of old."""
    sizes = (1, 6, 3, ROWS, KEYS, head_dim, head_dim)
    ranges = [np.repeat(x, 6, 1) for x in ranges_in_order("window", ROWS, KEYS)]
    case = case_of(sizes, scfa.KeyRanges(*out_of_order(*ranges, which)), "float16")
    got, ways = run_chosen(kernels, case, blocks=2, order=len(which) % 3, in_turn=1)
    assert ways == [SPLIT if {2 * z, 2 * z + 1} & set(which) else FUSED for z in range(3)]
    in_order = case_of(sizes, scfa.KeyRanges(*ranges), "float16")
    fused = [z for z in range(3) if ways[z] == FUSED]
    same_heads(got, run_in_order(kernels, in_order), 3, fused)
    if which:
        split = [z for z in range(3) if ways[z] == SPLIT]
        same_heads(got, hopper_host.run(kernels, case), 3, split)


@pytest.mark.parametrize("what", ["ends", "starts"])
def test_either_bound_out_of_order_is_split(kernels, any_length, what):
    """Ends step back where starts are a sorting step apart (docs/plan.md): only that is found."""
    start = np.where(np.arange(130) < 60, 0, 1024)
    end = np.where(start == 0, 1300, 1100) + np.arange(130) // 4
    if what == "starts":
        start, end = start + np.arange(130) % 2, np.sort(end)
    sizes = (1, 2, 2, 130, 1400, 64, 64)
    start, end = (np.repeat(x[None, None], 2, 1) for x in (start, end))
    start[0, 1], end[0, 1] = 1000, 1100  # the other head sees the same keys in every row
    _, ways = run_chosen(kernels, case_of(sizes, scfa.KeyRanges(start, end)), order=1)
    assert ways == [SPLIT, FUSED]


@HEAD_DIMS
@pytest.mark.parametrize("empty_at", [0, 250])
def test_dropped_rows_and_rows_that_see_nothing(kernels, any_length, head_dim, empty_at):
    """Empty ranges at the first key sort before all others; elsewhere they break the order."""
    rng = np.random.default_rng(empty_at)
    start, end = (np.repeat(x, 4, 1) for x in ranges_in_order("window", ROWS, KEYS))
    empty = rng.random((1, 2, ROWS)) < 0.3
    start[:, 2:][empty], end[:, 2:][empty] = empty_at, min(empty_at, 100)
    q_keep, k_keep = rng.random((1, 4, ROWS)) < 0.8, rng.random((1, 2, KEYS)) < 0.8
    pattern = scfa.KeyRanges(start, end) & scfa.QKSparse(q_keep, k_keep, causal=False)
    sizes = (1, 4, 2, ROWS, KEYS, head_dim, head_dim)
    _, ways = run_chosen(kernels, case_of(sizes, pattern, poison=True), blocks=2)
    assert ways == [FUSED, FUSED if empty_at == 0 else SPLIT]


@HEAD_DIMS
def test_ranges_of_which_some_heads_see_nothing(kernels, any_length, head_dim):
    """Nothing is in order, and the gradients are 0; the other head is not."""
    start, end = np.zeros((2, 1, 2, 100), int)
    end[0, 1] = np.random.default_rng(5).integers(0, 90, 100)
    start[0, 1] = end[0, 1, ::-1] // 2
    sizes = (1, 2, 2, 100, 90, head_dim, head_dim)
    _, ways = run_chosen(kernels, case_of(sizes, scfa.KeyRanges(start, end), poison=True))
    assert ways == [FUSED, SPLIT]


def test_long_ranges_in_order_are_fused_at_head_dim_128(kernels, monkeypatch):
    """Neither short ones, as of plans that are known to be in order, nor long ones that are not."""
    monkeypatch.setitem(launch_sm90._LONG_KEYS, 128, 190)
    row = np.arange(ROWS)
    start, end = np.zeros((2, 1, 3, ROWS), int)
    start[0, 0], end[0, 0] = row, row + 30
    start[0, 1:], end[0, 1:] = row // 4, 200 + row // 4
    case = case_of((1, 3, 3, ROWS, KEYS, 128, 128), scfa.KeyRanges(*out_of_order(start, end, (2,))))
    _, ways = run_chosen(kernels, case, blocks=2, order=1)
    assert ways == [SPLIT, FUSED, SPLIT]


def test_groups_and_ranges_together_in_the_build_for_the_sanitizer(kernels):
    """Windows within buckets are in order, as buckets are; one of the heads has another pattern."""
    rng = np.random.default_rng(2)
    start, end = (np.repeat(x, 2, 1) for x in ranges_in_order("window", ROWS, KEYS))
    start[0, 1] = rng.integers(0, 40, ROWS)
    q_hash, k_hash = (rng.integers(0, 3, (1, 2, n)) for n in (ROWS, KEYS))
    pattern = scfa.KeyRanges(start, end) & scfa.HashSparse(q_hash, k_hash, causal=False)
    case = case_of((1, 2, 2, ROWS, KEYS, 64, 64), pattern, poison=True)
    _, ways = run_chosen(kernels, case, order=1, slots=1, sanitize=True)
    assert ways == [FUSED, SPLIT]
