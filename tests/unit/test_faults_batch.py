"""The result of one (batch, head) does not depend on what else is in the call, to the bit."""

import copy
import dataclasses

import numpy as np
import pytest

from scfa_core.testing import Case, Part, Results, Spec, build, run_numpy


def alone(case, b, g):
    """One kv head of one sequence, with its query heads, as a problem of its own."""
    each = case.spec.heads // case.spec.heads_kv
    heads = slice(g * each, (g + 1) * each)
    pattern = copy.copy(case.pattern)
    for name in pattern.__slots__:
        x = getattr(pattern, name)
        if hasattr(x, "shape"):
            x = x[b : b + 1]
            own = heads if name.startswith("q_") or name in ("start", "end") else slice(g, g + 1)
            setattr(pattern, name, x if x.shape[1] == 1 else x[:, own])
    return Case(
        dataclasses.replace(case.spec, batch=1, heads=each, heads_kv=1),
        case.q[b : b + 1, heads],
        case.k[b : b + 1, g : g + 1],
        case.v[b : b + 1, g : g + 1],
        case.dout[b : b + 1, heads],
        pattern,
        case.mask[b : b + 1, heads],
    ), heads


@pytest.mark.parametrize("backend", ["numba-cpu", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "part", [Part("hash", "zipf", 5), Part("keep", "one-head", 30), Part("ranges", "random")]
)
def test_a_head_has_the_same_bits_alone_and_among_others(backend, dtype, part):
    """Out, lse and all gradients; others of very different density beside it."""
    case = build(Spec(2, 4, 2, 150, 170, 24, 40, dtype, parts=(part,)))
    together, _ = run_numpy(case, backend)
    for b, g in np.ndindex(case.spec.batch, case.spec.heads_kv):
        one, heads = alone(case, b, g)
        own, _ = run_numpy(one, backend)
        for name, mine, whole in zip(Results._fields, own, together, strict=True):
            part_of_whole = whole[b, g : g + 1] if name in ("dk", "dv") else whole[b, heads]
            np.testing.assert_array_equal(mine[0], part_of_whole, err_msg=name)
