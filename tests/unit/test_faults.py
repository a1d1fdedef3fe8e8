"""What must not go wrong, made to go wrong: each ends in a right answer or a clear error, and the
call after it is right. No GPU needed."""

import mmap
import pickle
import sys
import warnings

import numba
import numpy as np
import pytest
from scfa_core.backends.numba_cpu.convert import narrow
from scripts import python

import scfa_core as scfa
from scfa_core.arrays import HostContext, NumpyFramework
from scfa_core.testing import Part, Spec, build, judge, run_numpy

HOSTS = ("numba-cpu", "reference")
I64 = np.iinfo(np.int64)


def case_of(*parts, seed=0, **sizes):
    sizes = {"heads": 4, "heads_kv": 2, "seqlen_q": 100, "seqlen_k": 130} | sizes
    return build(Spec(parts=parts or (Part("hash", number=3),), seed=seed, **sizes))


def assert_right(case, backend="numba-cpu"):
    got, plan = run_numpy(case, backend)
    np.testing.assert_array_equal(plan.to_dense(), case.mask)
    assert not [verdict for verdict in judge(case, got) if not verdict.ok]


# Garbage in patterns ------------------------------------------------------------------------


def plan_is_mask(pattern, heads=2, heads_kv=1, seqlen_q=40, seqlen_k=50):
    q = np.zeros((1, heads, seqlen_q, 16), np.float32)
    k = np.zeros((1, heads_kv, seqlen_k, 16), np.float32)
    mask = pattern.mask(seqlen_q, seqlen_k, heads=heads, heads_kv=heads_kv)
    for backend in HOSTS:
        plan = scfa.make_plan(pattern, q, k, backend=backend)
        np.testing.assert_array_equal(plan.to_dense(), mask, err_msg=backend)
    return mask


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "uint32", "int64", "uint64"])
def test_hashes_of_random_bytes(dtype):
    """Any bits are valid hashes; a few values twice, so that something is visible."""
    rng = np.random.default_rng(1)
    pool = np.frombuffer(rng.bytes(12 * np.dtype(dtype).itemsize), dtype)
    q_hash, k_hash = rng.choice(pool, (1, 2, 40)), rng.choice(pool, (1, 1, 50))
    assert plan_is_mask(scfa.HashSparse(q_hash, k_hash, causal=False)).any()


def test_hashes_of_different_integer_types_compare_as_numbers():
    """4294967295 is not -1."""
    q_hash = np.full((1, 2, 40), 2**32 - 1, np.uint32)
    for dtype, value in (("int32", -1), ("int64", -1), ("int64", 2**32 - 1), ("int8", -1)):
        k_hash = np.full((1, 1, 50), value, dtype)
        mask = plan_is_mask(scfa.HashSparse(q_hash, k_hash, causal=False))
        assert mask.all() == (value != -1)


def test_unsigned_ranges_do_not_turn_negative():
    start = np.full((1, 2, 40), 2**32 - 5, np.uint32)
    assert not plan_is_mask(scfa.KeyRanges(start, start + np.uint32(4))).any()
    assert plan_is_mask(scfa.KeyRanges(np.zeros_like(start), start)).all()


def test_ranges_far_beyond_the_tensor():
    rng = np.random.default_rng(2)
    far = [I64.min, I64.min + 1, -(2**40), -1, 0, 20, 50, 51, 2**31, 2**40, I64.max - 1, I64.max]
    start, end = rng.choice(np.array(far), (2, 1, 2, 40))
    pattern = scfa.KeyRanges(start, end)
    plan_is_mask(pattern)
    plan_is_mask(pattern & scfa.SlidingWindow(2**62, causal=False) & scfa.Causal())


@pytest.mark.parametrize("dtype", ["int8", "int64", "float32", "float64", "float16"])
def test_keep_flags_count_where_nonzero(dtype):
    flags = np.array([-1, 0, 1, -128, 2, 0, 127, -0.0]).astype(dtype)
    mask = plan_is_mask(scfa.QKSparse(np.resize(flags, (1, 2, 40)), np.resize(flags, (1, 1, 50))))
    kept = np.resize(flags, 40) != 0
    np.testing.assert_array_equal(mask.any(axis=-1)[0, 0], kept)
    if np.dtype(dtype).kind == "f":
        strange = np.resize(np.array([np.nan, 0, np.inf, -np.inf], dtype), 50)
        keep = scfa.QKSparse(np.resize(strange, (1, 2, 40)), np.resize(strange, (1, 1, 50)))
        assert plan_is_mask(keep)[0, 0, 0, 0]


def test_two_clauses_on_the_same_key_hashes():
    """They are two clauses: the hashes of the queries differ."""
    rng = np.random.default_rng(3)
    k_hash = rng.integers(0, 2, (1, 1, 50))
    first, second = rng.integers(0, 2, (2, 1, 2, 40))
    both = scfa.HashSparse(first, k_hash) & scfa.HashSparse(second, k_hash)
    mask = plan_is_mask(both)
    alone = scfa.HashSparse(first, k_hash).mask(40, 50, heads=2, heads_kv=1)
    assert (mask != alone).any()
    # ... and with another array of keys the other way round
    plan_is_mask(scfa.HashSparse(first, k_hash) & scfa.HashSparse(first, 1 - k_hash))


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_lower_bounds_the_stronger_holds(order):
    parts = [scfa.SlidingWindow(3, causal=False), scfa.SlidingWindow(9)][::order]
    plan_is_mask(parts[0] & parts[1])
    starts = np.arange(40)[None, None] // 2
    ranges = [scfa.KeyRanges(starts + shift, starts + 30 - shift) for shift in (0, 7)][::order]
    plan_is_mask(ranges[0] & ranges[1])


@pytest.mark.parametrize("change", [{"heads": 2}, {"heads_kv": 4}, {"batch": 2}, {"seqlen_q": 99}])
def test_a_plan_for_other_sizes_is_refused(change):
    one, other = case_of(), case_of(**change)
    plan = scfa.make_plan(one.pattern, one.q, one.k)
    with pytest.raises(scfa.ShapeError, match="the plan was made for"):
        scfa.attention(other.q, other.k, other.v, plan)


# Garbage in tensors -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", HOSTS)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_pass_through_and_leave_nothing_behind(backend, name, value):
    case = case_of(Part("causal"), seqlen_k=100)
    before, _ = run_numpy(case, backend)
    x = getattr(case, name)
    kept = x[:, :, 30].copy()
    x[:, :, 30] = value
    with np.errstate(all="ignore"):
        bad, _ = run_numpy(case, backend)
    assert np.isfinite(bad.out[:, :, :30]).all()
    assert not np.isfinite(bad.dv if name == "dout" else bad.out).all()
    x[:, :, 30] = kept
    after, _ = run_numpy(case, backend)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("stored", "infinity"), [(np.int16, 0x7C00), (np.uint16, 0x7F80)])
def test_no_nan_is_rounded_to_a_number(stored, infinity):
    """Every kind of float32 NaN stays one in float16 and bfloat16, whatever bits it carries."""

    @numba.njit
    def narrow_all(x, y):
        for i in range(x.size):
            y[i] = narrow(x[i], y[i])

    payloads = [1, 0x1000, 0x7FFF, 0x8000, 0x3FFFFF, 0x400000, 0x400001, 0x7F8000, 0x7FFFFF]
    bits = np.array([sign | 0x7F800000 | x for x in payloads for sign in (0, 2**31)], np.uint32)
    got = np.zeros(bits.size, stored)
    narrow_all(bits.view(np.float32), got)
    assert ((got & 0x7FFF) > infinity).all()


def test_inputs_may_be_read_only_and_are_not_changed():
    case = case_of(Part("hash", number=3), Part("ranges"), Part("keep", number=80))
    arrays = [case.q, case.k, case.v, case.dout]
    for part in case.pattern.parts:
        arrays += [x for x in (getattr(part, n) for n in part.__slots__) if hasattr(x, "shape")]
    before = [x.copy() for x in arrays]
    for x in arrays:
        x.flags.writeable = False
    assert_right(case)
    for x, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, old)


def strided(x, how):
    """The values of `x`, or for "broadcast" of its first column, with another last stride."""
    if how == "columns":
        return np.repeat(x, 2, axis=-1)[..., ::2]
    if how == "transposed":
        return np.ascontiguousarray(x.swapaxes(2, 3)).swapaxes(2, 3)
    if how == "reversed":
        return np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    return np.broadcast_to(x[..., :1], x.shape)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("how", ["columns", "transposed", "reversed", "broadcast"])
def test_incoming_gradients_and_out_of_any_last_stride(library, layout, how):
    """Losses send gradients of any strides; they once were read as if contiguous."""
    case = case_of(Part("causal"))
    q, k, v, dout = case.q, case.k, case.v, case.dout
    if layout == "bthd":
        q, k, v, dout = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v, dout))
    convert = np.asarray
    if library == "torch":
        torch = pytest.importorskip("torch", reason="needs the extra torch")
        if how == "reversed":
            pytest.skip("torch has no negative strides")
        convert = torch.as_tensor
    options = {"layout": layout, "backend": "numba-cpu"}
    out, lse = scfa.attention(q, k, v, scfa.Causal(), return_lse=True, **options)
    dout = strided(dout, how)
    again = out if how == "broadcast" else strided(out, how)
    want = scfa.attention_backward(
        np.ascontiguousarray(dout), q, k, v, out, lse, scfa.Causal(), **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: a broadcast array is not writeable
        arrays = [convert(x) for x in (dout, q, k, v, again, lse)]
    got = scfa.attention_backward(*arrays, scfa.Causal(), **options)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


# Memory -------------------------------------------------------------------------------------

MARGIN = 256  # bytes before and behind each array


class Fenced:
    """Arrays whose bytes are all 0xFF (NaN, -1) at first, between margins of 0xA5."""

    def __init__(self):
        self.rooms = []

    def empty(self, shape, dtype, *_):
        dtype = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        room = np.full(size + 2 * MARGIN, 0xA5, np.uint8)
        room[MARGIN : MARGIN + size] = 0xFF
        self.rooms.append((room, size))
        return room[MARGIN : MARGIN + size].view(dtype).reshape(shape)

    def untouched(self):
        return all(
            (room[:MARGIN] == 0xA5).all() and (room[MARGIN + size :] == 0xA5).all()
            for room, size in self.rooms
        )


@pytest.mark.parametrize("backend", HOSTS)
@pytest.mark.parametrize("seed", range(6))
def test_every_element_is_written_and_nothing_else(backend, seed, monkeypatch):
    """Results, plans and workspace begin as NaN and -1, between margins that must stay."""
    shapes = [(100, 130), (1, 65), (64, 1), (193, 127), (65, 64), (33, 257)]
    parts = [("hash", "disjoint"), ("keep", "none"), ("ranges", "outside"), ("hash", "zipf")]
    kind, style = parts[seed % 4]
    spec = Spec(2, 4, 2, *shapes[seed], 24, 40, parts=(Part(kind, style, 3),), seed=seed)
    case = build(spec)
    fence = Fenced()
    monkeypatch.setattr(NumpyFramework, "empty", lambda self, *what: fence.empty(*what))
    monkeypatch.setattr(
        NumpyFramework, "empty_like_order", lambda self, x, shape: fence.empty(shape, x.dtype)
    )
    monkeypatch.setattr(HostContext, "empty", lambda self, *what: fence.empty(*what))
    assert_right(case, backend)
    assert len(fence.rooms) >= 12
    assert fence.untouched()


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through libc")
def test_no_read_beyond_the_ends_of_the_inputs():
    """Every input ends where an unreadable page begins, or begins where one ends."""
    code = f"""if True:
        import ctypes, mmap
        import numpy as np
        import scfa_core as scfa
        from scfa_core.testing import Part, Spec, build, run_numpy
        PAGE = {mmap.PAGESIZE}
        libc = ctypes.CDLL(None, use_errno=True)
        def fenced(x, at_end):
            pages = -(-x.nbytes // PAGE)
            room = mmap.mmap(-1, (pages + 2) * PAGE)
            base = ctypes.addressof(ctypes.c_char.from_buffer(room))
            for page in (0, pages + 1):
                assert libc.mprotect(ctypes.c_void_p(base + page * PAGE), PAGE, 0) == 0
            start = (pages + 1) * PAGE - x.nbytes if at_end else PAGE
            y = np.frombuffer(room, x.dtype, x.size, start).reshape(x.shape)
            y[...] = x
            return y
        for at_end in (True, False):
            for kind, style in (("hash", "zipf"), ("ranges", "random"), ("keep", "uniform")):
                for rows in (1, 63, 100):
                    spec = Spec(2, 4, 2, rows, rows + 3, 24, 40, parts=(Part(kind, style, 5),))
                    case = build(spec)
                    right = run_numpy(case, "numba-cpu")[0]
                    for name in ("q", "k", "v", "dout"):
                        object.__setattr__(case, name, fenced(getattr(case, name), at_end))
                    for name in case.pattern.__slots__:
                        x = getattr(case.pattern, name)
                        if hasattr(x, "shape"):
                            setattr(case.pattern, name, fenced(x, at_end))
                    for a, b in zip(run_numpy(case, "numba-cpu")[0], right):
                        assert np.array_equal(a, b)
        print("fine", flush=True)
        import os
        os._exit(0)  # unmapping rooms that arrays still look at is not the point
    """
    assert python(code) == "fine\n"


def test_out_of_memory_in_the_middle_of_a_step(monkeypatch):
    case = case_of()
    before, _ = run_numpy(case, "numba-cpu")
    failures = 0
    while True:
        count = iter(range(100))
        with monkeypatch.context() as patch:
            for home in (NumpyFramework, HostContext):
                plain = home.empty

                def empty(self, *what, plain=plain, count=count, last=failures):
                    if next(count) == last:
                        raise MemoryError("on purpose")
                    return plain(self, *what)

                patch.setattr(home, "empty", empty)
            try:
                run_numpy(case, "numba-cpu")
            except MemoryError:
                failures += 1
            else:
                break  # it asks for memory no more often than that
        after, _ = run_numpy(case, "numba-cpu")
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)
    assert failures >= 10  # seven arrays of the plan, lse, workspace


# torch --------------------------------------------------------------------------------------


def test_remembered_calls_tell_strides_apart():
    """Same shapes, other strides of v: dv has those of this call's v, not of the last one's."""
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    x = torch.randn(1, 2, 40, 16)
    plain = torch.randn(1, 2, 40, 16)
    swapped = plain.transpose(1, 2).contiguous().transpose(1, 2)
    grads = []
    for v in (plain, swapped, plain):
        v = v.detach().requires_grad_()
        scfa.attention(x, x, v, backend="reference").sum().backward()
        (grad,) = torch.autograd.grad(scfa.attention(x, x, v, backend="reference").sum(), v)
        assert grad.stride() == v.stride()
        grads.append(grad)
    assert torch.equal(grads[0], grads[1])


def test_a_remembered_plan_is_checked_for_every_call():
    """Known for one call, given to another that is known too, by a plan of its own."""
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    long, short = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 30, 16)
    plans = [scfa.make_plan(scfa.Causal(), x, x) for x in (long, short)]
    for x, plan in zip((long, short), plans, strict=True):
        scfa.attention(x, x, x, plan)
    for x, plan in zip((short, long), plans, strict=True):
        with pytest.raises(scfa.ShapeError, match="the plan was made for"):
            scfa.attention(x, x, x, plan)


def test_patterns_and_plans_survive_pickling():
    """As checkpoints and data loaders send them from process to process."""
    case = case_of(Part("hash", number=3), Part("window", number=40))
    pattern = pickle.loads(pickle.dumps(case.pattern))
    plan = pickle.loads(pickle.dumps(scfa.make_plan(case.pattern, case.q, case.k)))
    want = scfa.attention(case.q, case.k, case.v, case.pattern)
    np.testing.assert_array_equal(scfa.attention(case.q, case.k, case.v, pattern), want)
    np.testing.assert_array_equal(scfa.attention(case.q, case.k, case.v, plan), want)
