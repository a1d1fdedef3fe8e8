"""CuPy arrays on a card that is not the current one: every conversion is done where they live."""

import dataclasses
import types

import numpy as np
import pytest

from scfa_core import arrays
from scfa_core.api import _dense_rows
from scfa_core.errors import LayoutError, ShapeError
from scfa_core.lowering import lower
from scfa_core.patterns import Documents, HashSparse, KeyRanges, QKSparse
from scfa_core.plan import Plan, plan_shapes
from scfa_core.problem import Problem
from scfa_core.runner import run_backward, run_forward


class Device:
    """Stands in for cupy.cuda.Device."""

    current = 0

    def __init__(self, ordinal):
        self.id = ordinal

    def __enter__(self):
        self.before, Device.current = Device.current, self.id

    def __exit__(self, *_):
        Device.current = self.before


def _here(name):
    """A NumPy method that refuses to work on another card's memory, as CuPy does."""

    def method(self, *arguments, **options):
        assert Device.current == self.ordinal, f"{name} on cuda:{Device.current}"
        return getattr(np.ndarray, name)(self, *arguments, **options)

    return method


class Array(np.ndarray):
    """Stands in for cupy.ndarray: remembers the card that was current when it was made."""

    def __array_finalize__(self, source):
        self.ordinal = getattr(source, "ordinal", Device.current)

    @property
    def device(self):
        return Device(self.ordinal)

    astype, copy, __ne__ = _here("astype"), _here("copy"), _here("__ne__")
    __xor__, __setitem__ = _here("__xor__"), _here("__setitem__")


class Memory:
    """Address of an array, as cupy.ndarray.data has it."""

    def __init__(self, array):
        self.ptr = array.__array_interface__["data"][0]


Array.data = property(Memory)


@pytest.fixture
def cupy():
    """A framework over the stand-ins; the current card is 0."""
    framework = object.__new__(arrays.CupyFramework)
    framework.xp = types.SimpleNamespace(
        ndarray=Array,
        uint64=np.uint64,
        empty=lambda shape, dtype: np.empty(shape, dtype).view(Array),
        broadcast_to=lambda x, shape: np.broadcast_to(x, shape, subok=True),
        cuda=types.SimpleNamespace(
            Device=Device, get_current_stream=lambda: types.SimpleNamespace(ptr=Device.current)
        ),
    )
    assert Device.current == 0
    yield framework
    assert Device.current == 0


def on_card_1(x):
    with Device(1):
        return np.asarray(x).view(Array)


def problem(seqlen_k=6):
    return Problem(1, 2, 2, 6, seqlen_k, 16, 16, "float32", "cuda:1", 1.0)


@pytest.mark.parametrize("dtype", ["int8", "uint32", "uint64", "int64"])
def test_integers_are_widened_where_they_live(cupy, dtype):
    ids = on_card_1(np.arange(6, dtype=dtype)[None])
    bounds = on_card_1(np.ones((1, 2, 6), np.uint16))
    clauses = lower(Documents(ids) & KeyRanges(bounds, bounds), problem(), cupy)
    assert {x.ordinal for x in (*clauses.q_groups, *clauses.starts)} == {1}
    (hashes,) = lower(HashSparse(ids[:, None], ids[:, None]), problem(), cupy).k_groups
    assert (np.diff(np.asarray(hashes)) > 0).all()


@pytest.mark.parametrize("dtype", ["bool", "uint8", "float32"])
def test_flags_are_read_where_they_live(cupy, dtype):
    keep = on_card_1(np.array([[[1, 0, 1, 1, 0, 1]]], dtype))
    clauses = lower(QKSparse(keep, keep), problem(), cupy)
    assert clauses.q_keeps[0].ordinal == 1
    assert np.asarray(clauses.k_keeps[0][0, 1]).tolist() == [1, 0, 1, 1, 0, 1]


def test_results_without_a_kernel_are_filled_where_they_live(cupy):
    q, k = (on_card_1(np.zeros((1, 2, rows, 16), np.float32)) for rows in (6, 0))
    backend = types.SimpleNamespace(memory="cuda")
    out, lse = run_forward(backend, problem(0), None, q, k, k, cupy)
    grads = run_backward(backend, problem(0), None, out, q, k, k, out, lse, cupy)
    assert {x.ordinal for x in (out, lse, *grads)} == {1}
    assert (np.asarray(out) == 0).all()
    assert np.isneginf(np.asarray(lse)).all()


def test_gradients_are_made_dense_where_they_live(cupy):
    strided = on_card_1(np.arange(24.0, dtype=np.float32).reshape(1, 2, 3, 4)).swapaxes(2, 3)
    dense = _dense_rows(cupy, strided)
    assert dense.ordinal == 1
    assert dense.flags.c_contiguous
    assert np.array_equal(np.asarray(dense), np.asarray(strided))
    assert _dense_rows(cupy, dense) is dense


@pytest.mark.parametrize("padding", ["V2", "V4"])
def test_strides_that_are_no_whole_elements_are_refused(cupy, padding):
    records = np.zeros((1, 2, 7), np.dtype([("row", "f4", (16,)), ("more", padding)]))
    field = on_card_1(records["row"])
    if padding == "V4":
        assert cupy.info(field).strides == (238, 119, 17, 1)
        return
    with pytest.raises(LayoutError, match=r"whole elements of 4 bytes, got \(924, 462, 66, 4\)"):
        cupy.info(field)


def test_workspace_is_of_the_arrays_card(cupy):
    context = cupy.context("cuda:1")
    assert (context.device, context.stream) == (1, 1)
    array = context.empty((3, 2), "bfloat16")
    assert (array.device, array.dtype, array.strides) == (1, "bfloat16", (2, 1))


@pytest.mark.parametrize("entries", [0, 30, 10**4])
def test_a_work_list_that_kernels_would_read_beyond_is_refused(cupy, entries):
    given = problem()
    arrays = [on_card_1(np.zeros(shape, np.int32)) for shape in plan_shapes(given, "cuda")]
    plan = Plan.of(tuple(arrays), True, "cupy", given.device)
    plan.check_fits(given, cupy)
    other = dataclasses.replace(plan, work=on_card_1(np.zeros(entries, np.int32)))
    with pytest.raises(ShapeError, match=r"plan.work must have shape"):
        other.check_fits(given, cupy)
