"""Which arrays kernels may read 16 bytes at a time, and which lists one pass may plan."""

import pytest
from scfa_core.backends.cupy_raw import hashing, launch, launch_sm90, planner
from scfa_core.backends.cupy_raw.shapes_sm90 import FORWARD

from scfa_core.arrays import DeviceArray
from scfa_core.lowering import Clauses
from scfa_core.problem import Problem

SHAPE = (2, 3, 8, 64)
DENSE = (3 * 8 * 64, 8 * 64, 64, 1)
LONG = 2**31  # elements of 2 bytes: 4 GiB
PROBLEM = Problem(2, 3, 3, 8, 8, 64, 64, "bfloat16", "cuda:0", 0.125)


def array(strides=DENSE, shape=SHAPE, pointer=1 << 20, dtype="bfloat16"):
    return DeviceArray(pointer, shape, strides, dtype, 0)


@pytest.mark.parametrize(
    ("changed", "aligned"),
    [
        ({}, True),
        ({"pointer": (1 << 20) + 8}, False),
        ({"strides": (DENSE[0] + 4, *DENSE[1:])}, False),
        ({"strides": (DENSE[0], DENSE[1] + 4, 64, 1)}, False),
        ({"strides": (*DENSE[:2], 68, 1)}, False),
        ({"strides": (*DENSE[:2], 72, 1)}, True),
        ({"strides": (DENSE[0] + 4, *DENSE[1:]), "shape": (1, 3, 8, 64)}, True),  # no step there
        ({"strides": (*DENSE[:2], LONG, 1)}, False),
        ({"strides": (*DENSE[:2], LONG - 8, 1)}, True),
        ({"strides": (*DENSE[:2], LONG // 2, 1), "dtype": "float32"}, False),
        ({"strides": (*DENSE[:2], LONG // 2, 1)}, True),
        ({"strides": (*DENSE[:2], -64, 1)}, False),
        ({"strides": (-DENSE[0], *DENSE[1:])}, True),
    ],
)
def test_rows_of_portable_kernels(changed, aligned):
    one = array(**changed)
    assert launch._aligned((one,)) is aligned
    assert launch._aligned((array(dtype=one.dtype), one)) is aligned


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (64, None),
        (68, "rows not 16-byte aligned"),
        (-64, "2 GiB"),
        (2**30, "2 GiB"),
        (2**30 - 8, None),
    ],
)
def test_rows_of_hopper_kernels(monkeypatch, row, reason):
    monkeypatch.setattr(launch_sm90, "compute_capability", lambda device: (9, 0))
    told = launch_sm90._unserved(FORWARD, PROBLEM, array(strides=(*DENSE[:2], row, 1)))
    assert (told is None) if reason is None else (reason in told)


def test_hashed_rows():
    assert hashing.is_aligned(array())
    wide = array(strides=(3 * 8 * 24, 8 * 24, 24, 1), shape=(2, 3, 8, 20))
    assert not hashing.is_aligned(wide)  # a row's last eight elements would be read beyond it


@pytest.mark.parametrize(
    ("hi", "served"), [(1, True), (0, True), (None, True), (-1, False), (2, False)]
)
def test_lists_of_one_pass(hi, served):
    assert planner.fits_one_pass(PROBLEM, Clauses(hi_offset=hi)) is served
