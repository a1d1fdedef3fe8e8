"""The planner's CUDA sources on the host: key heads in plenty, each with a list of its own."""

import host_build
import numpy as np
import planner_host
import pytest
from planner_host import assert_equals_reference, plan_on_host

from scfa_core.lowering import Clauses
from scfa_core.problem import Problem

pytestmark = host_build.NEEDS_COMPILER
library = planner_host.compiled


@pytest.mark.parametrize("seqlen_k", [75, 60], ids=["one pass", "sort and search"])
@pytest.mark.parametrize("top", [9, 600], ids=["few groups", "many groups"])
def test_every_query_head_meets_its_own_key_head(library, monkeypatch, seqlen_k, top):
    rng = np.random.default_rng(top)
    problem = Problem(1, 6, 3, 75, seqlen_k, 16, 16, "float32", "cpu", 1.0)
    shapes = (1, 6, 75), (1, 3, seqlen_k)
    q_groups, k_groups = (rng.integers(-4, top, shape).astype(np.int32) for shape in shapes)
    k_groups[..., :40] = q_groups[:, ::2, :40]  # equal ids, also where they are many
    keeps = [(rng.random(shape) < 0.8).astype(np.uint8) for shape in shapes]
    for kept in ([(), ()], [(x,) for x in keeps]):
        clauses = Clauses((q_groups,), (k_groups,), *kept, None, 1)
        arrays = plan_on_host(library, monkeypatch, problem, clauses)
        assert_equals_reference(arrays, problem, clauses)
        without_groups = Clauses((), (), *kept, None, 1)
        arrays = plan_on_host(library, monkeypatch, problem, without_groups)
        assert_equals_reference(arrays, problem, without_groups)
