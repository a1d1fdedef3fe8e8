"""What compute-sanitizer is shown: calls that run, and among them every kernel and special case."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="needs the extra torch")

import torch
from scfa_core.backends.cupy_raw import bound_sm90, planner, shapes_sm90, variants

import scfa_core as scfa
from scfa_core import torch_parts
from scfa_core.array_kinds import framework_of
from scfa_core.lowering import lower
from scfa_core.plan import PlanArrays
from scfa_core.problem import Problem

SOURCE = Path(__file__).resolve().parents[1] / "gpu" / "sanitize.py"
H100 = 227 * 1024


@pytest.fixture(scope="module")
def sanitize():
    spec = importlib.util.spec_from_file_location("sanitize", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chosen(call, kernel, dtype=None):
    return variants.choose(
        kernel,
        dtype or call.dtype,
        call.head_dim,
        call.head_dim_v or call.head_dim,
        aligned=call.aligned,
        monotone=call.pattern != "ranges" or kernel != "bwd_dkdv",
        group_size=call.heads // call.heads_kv,
        shared_limit=H100,
    )


def test_every_shape_of_the_portable_kernels(sanitize):
    """Those that an H100 gets at some head_dim, in float32 and in a 16-bit type."""
    mine, every = set(), set()
    for kernel in ("fwd", "bwd_dq", "bwd_dkdv"):
        found = [chosen(call, kernel) for call in (*sanitize.PORTABLE, *sanitize.FLOAT32)]
        mine |= {(x.source, x.shape) for x in found}
        for dtype in ("float32", "bfloat16"):
            for head_dim in range(16, 257, 8):
                call = sanitize.Call(dtype, head_dim)
                every |= {(x.source, x.shape) for x in [chosen(call, kernel)]}
        switches = {
            (x.source, name, value)
            for x in found
            for name, value in x.constants
            if name in ("ALIGNED", "MONOTONE", "ELEMENT")
        }
        for source in {x.source for x in found}:
            names = ("ALIGNED",) if kernel != "bwd_dkdv" else ("ALIGNED", "MONOTONE")
            assert {(source, name, value) for name in names for value in (0, 1)} <= switches
    assert every <= mine
    assert {call.dtype for call in sanitize.PORTABLE} == {"bfloat16", "float16"}
    assert {call.dtype for call in sanitize.FLOAT32} == {"float32"}


def test_every_shape_of_tf32(sanitize):
    """The same sources once more, for float32 under $SCFA_CUPY_FP32=tf32."""
    assert {call.dtype for call in sanitize.TF32} == {"float32"}
    for kernel in ("fwd", "bwd_dq", "bwd_dkdv"):
        mine = {chosen(call, kernel, "tf32") for call in sanitize.TF32}
        assert {dict(x.constants)["ELEMENT"] for x in mine} == {variants.ELEMENTS["tf32"]}
        every = {
            chosen(sanitize.Call("float32", head_dim), kernel, "tf32").shape
            for head_dim in range(16, variants.WIDEST_TF32 + 1, 8)
        }
        assert every <= {x.shape for x in mine}
        names = ("ALIGNED",) if kernel != "bwd_dkdv" else ("ALIGNED", "MONOTONE")
        for name in names:
            assert {dict(x.constants)[name] for x in mine} == {0, 1}


def test_every_hopper_kernel(sanitize):
    calls = sanitize.HOPPER
    tables = [getattr(shapes_sm90, name) for name in ("FORWARD", "DQ", "DKDV", "FUSED")]
    for table in tables:
        for head_dim, shape in table.items():
            mine = [call for call in calls if call.head_dim == head_dim]
            assert {call.dtype for call in mine} == {"bfloat16", "float16"}
            tiles = [call.heads_kv * -(-call.rows // (64 * shape.warpgroups)) for call in mine]
            assert max(tiles) > 132, "no block of an H100 takes a second tile"
            rows = max(call.rows for call in mine if call.pattern == "causal")
            assert rows > shape.stages * shape.block_n, "no buffer is filled a second time"
    assert {call.head_dim for call in calls if call.pattern == "ranges"} == {64, 128, 256}
    assert all(call.aligned for call in calls)
    assert max(call.heads // call.heads_kv for call in calls) == shapes_sm90.MAX_GROUP


def test_every_planner_kernel_and_block(sanitize, monkeypatch):
    """Overhear the launches of cupy's planner."""
    seen = set()
    staged, capacities = set(), set()
    one_pass, capacity = planner.choose_one_pass, planner.sort_capacity

    def noted_pass(*arguments):
        found = one_pass(*arguments)
        staged.add(found.staged)
        return found

    def noted_capacity(*arguments):
        found = capacity(*arguments)
        capacities.add(found > 0)
        return found

    monkeypatch.setattr(planner, "choose_one_pass", noted_pass)
    monkeypatch.setattr(planner, "sort_capacity", noted_capacity)
    monkeypatch.setattr(
        planner,
        "_kernel",
        lambda name, device: SimpleNamespace(
            launch=lambda grid, threads, *rest: seen.add((name, threads))
        ),
    )
    monkeypatch.setattr(planner, "shared_limit", lambda device: H100)
    monkeypatch.setattr(planner, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(scfa, "make_plan", make_plan_on_paper)
    for lists in (*sanitize.PLANNER, *sanitize.LONG_LISTS):
        sanitize.run_lists("cupy", "cpu", lists)
    names = {name for name, _ in seen}
    assert names == set(planner.KERNEL_NAMES)
    assert {threads for name, threads in seen if name == "plan_sort"} == {128, 256, 512}
    assert {threads for name, threads in seen if name == "plan_causal"} == {128, 256, 512, 1024}
    assert {threads for name, threads in seen if name in planner.PART_KERNELS} == {512}
    assert staged == capacities == {True, False}


def make_plan_on_paper(pattern, q, k, backend):
    """Let the door make the clauses on the host, and show them to cupy's planner."""
    problem = Problem(1, q.shape[1], 1, q.shape[2], k.shape[2], 16, 16, "float32", "cpu", 1.0)
    clauses = lower(pattern, problem, framework_of("q", q))

    def native(x):
        dtype = str(x.dtype).removeprefix("torch.")
        return SimpleNamespace(pointer=0, strides=x.stride(), dtype=dtype)

    clauses = clauses.with_arrays(map(native, clauses.arrays))
    nowhere = SimpleNamespace(pointer=0, strides=(0, 0, 0))
    plan = SimpleNamespace(**dict.fromkeys(PlanArrays._fields[:6], nowhere))
    context = SimpleNamespace(device=0, stream=0, empty=lambda shape, dtype: nowhere)
    planner.run_make_plan(problem, clauses, plan, context)
    return SimpleNamespace(**dict.fromkeys(PlanArrays._fields[:6], torch.zeros(1)))


def test_ids_differ_in_the_bits_they_say(sanitize):
    for kind, bits in (("few", 4), ("bytes", 8), ("wide", 20)):
        found = sanitize.ids(kind, (1, 1, 60_000))
        assert found.dtype == torch.int32
        assert 2 ** (bits - 1) <= int(found.max()) < 2**bits
    far = sanitize.ids("far", (1, 1, 100))
    assert far.dtype == torch.int64
    assert int(far.max()) - int(far.min()) == 2**64 - 1


def test_both_backwards_of_hopper(sanitize, monkeypatch):
    monkeypatch.setattr(sanitize, "is_hopper", lambda device: True)
    found = sanitize.families_of("cupy", "cuda")
    assert {backward for _, backward, *_ in found.values()} == set(bound_sm90._asked.words)
    assert {kernels for kernels, *_ in found.values()} == {"auto", "sm80"}
    portable = {"planner", "long-lists", "portable", "float32"}
    assert set(sanitize.families_of("numba-cuda", "cuda")) == portable
    assert set(found) == portable | {"hopper", "fused", "tf32", "parts", "few"}


def test_the_calls_run_on_the_host(sanitize, monkeypatch, capsys):
    monkeypatch.setenv("SCFA_GPU_BACKENDS", "numba-cpu")
    monkeypatch.setenv("SCFA_CUPY_KERNELS", "auto")
    monkeypatch.setenv("SCFA_CUPY_BACKWARD", "auto")
    monkeypatch.setenv("SCFA_CUPY_FP32", "exact")
    monkeypatch.setattr(sanitize, "PLANNER", sanitize.PLANNER[::3])
    monkeypatch.setattr(sanitize, "is_hopper", lambda device: True)
    sanitize.main(["planner", "portable", "float32"])
    printed = capsys.readouterr().out
    assert "numba-cpu portable: 11 calls" in printed
    assert "numba-cpu float32: 4 calls" in printed
    assert "numba-cpu planner: 8 calls" in printed
    assert "long-lists" not in printed
    assert printed.endswith("all calls done\n")
    for union in sanitize.PARTS:
        sanitize.run_union("numba-cpu", "cpu", union)
    assert max(union.parts for union in sanitize.PARTS) > torch_parts._MOST_HELD
    for call in sanitize.HOPPER[:9]:
        sanitize.run_call("numba-cpu", "cpu", call)
