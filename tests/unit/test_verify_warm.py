"""Kernels made before the problems: which kinds the seeds hold, and that no two tasks share one."""

from types import SimpleNamespace

import pytest

from scfa_core import campaign, verify, verify_warm
from scfa_core.errors import ScfaError
from scfa_core.verify_warm import Kind, Task, kind_of, run_task, tasks_for

DRAWN = {"rows": 40, "dtypes": ("float16", "float32"), "deep": True, "long": 0}
KIND = Kind("float32", 16, 24, None, (False,) * 4, True, 1)


def test_a_kind_says_what_chooses_kernels():
    for seed in range(40):
        kind = kind_of(seed, **DRAWN)
        problem = campaign.draw(seed, most_rows=40, dtypes=DRAWN["dtypes"])
        spec = problem.case.spec
        assert kind[:3] == (spec.dtype, spec.head_dim, spec.head_dim_v)
        assert kind.offset == tuple(view == "offset" for view in problem.views)
        assert kind.group * spec.heads_kv == spec.heads
        assert kind.monotone == ("steps-back" not in {part.kind for part in spec.parts})


def test_long_problems_have_no_kind():
    assert kind_of(6, **DRAWN | {"long": 3}) is None
    assert kind_of(7, **DRAWN | {"long": 3}) is not None


@pytest.mark.parametrize("deep", [False, True])
def test_tiny_problems_run_with_the_arrays_of_their_kind(monkeypatch, deep):
    kinds = tuple(kind_of(seed, **DRAWN | {"deep": deep}) for seed in range(12))
    asked = []
    right = campaign.run

    def run(problem, backend):
        spec = problem.case.spec
        asked.append((spec.dtype, spec.head_dim, spec.head_dim_v))
        return right(problem, backend)

    monkeypatch.setattr(campaign, "run", run)
    assert run_task(Task("reference", kinds)) is None
    assert asked == [kind[:3] for kind in kinds]
    assert run_task(Task("reference", ())) is None  # the planner's


def test_what_a_task_raises_is_told():
    told = run_task(Task("reference", (KIND._replace(head_dim=17),)))
    assert told.startswith("reference: ShapeError")


def test_one_family_is_one_task(monkeypatch):
    some = [KIND, KIND._replace(head_dim=24), KIND._replace(head_dim=64), KIND]
    some += [None, KIND._replace(dtype="float16")]
    rounding = SimpleNamespace(
        kernel_family=lambda dtype, *widths: (dtype, *(x // 32 for x in widths))
    )
    backends = {"exact": SimpleNamespace(), "rounding": rounding}
    monkeypatch.setattr(verify_warm, "load_backend", backends.__getitem__)
    tasks = tasks_for(("exact", "rounding"), some)
    assert tasks[:2] == [Task("exact", ()), Task("rounding", ())]  # the planners' kernels
    kinds = {name: [t.kinds for t in tasks[2:] if t.backend == name] for name in backends}
    assert sorted(map(len, kinds["exact"])) == [1, 1, 1, 1]
    assert sorted(map(len, kinds["rounding"])) == [1, 1, 2]
    for found in kinds.values():
        assert sorted(kind for some in found for kind in some) == sorted(set(some) - {None})
    assert [t.kinds[0].dtype for t in tasks[2:]] == ["float16"] * 2 + ["float32"] * 5


def test_findings_are_the_same_after_warming():
    options = {"count": 5, "rows": 40, "dtype": "float32", "deep": True, "workers": 2}
    assert list(verify.verify("reference", warm=True, **options)) == list(
        verify.verify("reference", **options)
    )


def test_one_process_need_not_be_warmed():
    with pytest.raises(ScfaError, match="--warm goes with --workers"):
        next(verify.verify("reference", warm=True))
