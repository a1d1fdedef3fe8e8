"""A plan made by hand is refused where a backend would misread its arrays."""

import dataclasses

import numpy as np
import pytest

import scfa_core as scfa

NAMES = ("q_index", "q_count", "k_index", "k_count", "key_start", "key_end", "work")


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 40, 16)).astype(np.float32) for _ in range(3))
    groups = rng.integers(0, 3, (1, 2, 40))
    plan = scfa.make_plan(scfa.HashSparse(groups, groups), q, k, backend="numba-cpu")
    return (q, k, v), plan


def test_a_plan_of_another_device():
    torch = pytest.importorskip("torch", reason="devices are torch's")
    here, nowhere = (torch.zeros(1, 1, 5, 16, device=device) for device in ("cpu", "meta"))
    for of, other in ((here, nowhere), (nowhere, here)):
        plan = scfa.make_plan(scfa.Causal(), of, of)
        with pytest.raises(scfa.DeviceError, match="the plan lives on"):
            scfa.attention(other, other, other, plan)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x.astype(np.int64), scfa.DTypeError, "must be int32, got int64"),
        (lambda x: x.astype(np.int16), scfa.DTypeError, "must be int32, got int16"),
        (lambda x: x.astype(np.float32), scfa.DTypeError, "must be int32, got float32"),
        (lambda x: x.tolist(), scfa.DeviceError, "must be a numpy array like q, got list"),
        (lambda x: x.astype(">i4"), scfa.DTypeError, "must be int32, got byte-swapped int32"),
        (lambda x: x[..., :1], scfa.ShapeError, "must have shape"),
        (lambda x: np.repeat(x, 2, axis=-1)[..., ::2], scfa.LayoutError, "must be contiguous"),
    ],
    ids=["int64", "int16", "float32", "list", "swapped", "short", "strided"],
)
def test_every_array_of_a_plan_is_checked(problem, name, change, error, message):
    arrays, plan = problem
    if name == "work" and error in (scfa.ShapeError, scfa.LayoutError):
        pytest.skip("a work list on the host is empty: neither short nor strided")
    changed = dataclasses.replace(plan, **{name: change(getattr(plan, name))})
    if message.endswith("shape") and name in ("q_index", "k_index"):
        message = "the plan was made for"
    if message.endswith("list") and name in ("q_index", "k_index"):
        message = "the plan holds arrays of builtins"
    with pytest.raises(error, match=message):
        scfa.attention(*arrays, changed, backend="numba-cpu")


def test_a_copied_plan_is_taken(problem):
    arrays, plan = problem
    copied = dataclasses.replace(plan, **{name: getattr(plan, name).copy() for name in NAMES})
    right = scfa.attention(*arrays, plan, backend="numba-cpu")
    np.testing.assert_array_equal(scfa.attention(*arrays, copied, backend="numba-cpu"), right)


def test_one_row_one_head_may_have_any_strides_there():
    x = np.ones((1, 1, 1, 16), np.float32)
    plan = scfa.make_plan(scfa.Causal(), x, x, backend="numba-cpu")
    odd = dataclasses.replace(plan, q_index=np.zeros((1, 1, 2), np.int32)[:, :, ::2])
    assert (scfa.attention(x, x, x, odd, backend="numba-cpu") == x).all()
