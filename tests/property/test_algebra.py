"""``a & b`` sees exactly the pairs that both see, before and after lowering."""

import numpy as np
from hypothesis import given

import scfa_core as scfa
from scfa_core.strategies import specs
from scfa_core.testing import Spec, build


def plan_of(case, backend):
    return scfa.make_plan(case.pattern, case.q, case.k, backend=backend)


@given(spec=specs(most_rows=70, most_parts=4))
def test_intersection_is_the_and_of_masks(spec: Spec):
    case = build(spec)
    sizes = {"batch": spec.batch, "heads": spec.heads, "heads_kv": spec.heads_kv}
    masks = [p.mask(spec.seqlen_q, spec.seqlen_k, **sizes) for p in case.pattern.parts]
    expected = np.logical_and.reduce(masks)
    np.testing.assert_array_equal(case.mask, expected)
    np.testing.assert_array_equal(plan_of(case, "reference").to_dense(), expected)


@given(spec=specs(most_rows=140, most_parts=4))
def test_every_backend_makes_the_same_plan(spec: Spec):
    case = build(spec)
    right, mine = plan_of(case, "reference"), plan_of(case, "numba-cpu")
    for name in ("q_index", "q_count", "k_index", "k_count", "key_start", "key_end"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(right, name), err_msg=name)
    if right.monotone:
        for ranges in (right.key_start, right.key_end):
            assert (np.diff(ranges, axis=-1) >= 0).all()
