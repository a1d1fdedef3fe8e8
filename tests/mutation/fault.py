"""What a planted fault is, and the tests that look at each layer."""

from typing import NamedTuple

ATTENTION = "tests/property/test_numba_cpu_attention.py"

# Tests that look at a layer, in stages: the next one runs only if nothing failed so far.
SUITES = {
    "lowering": (
        ("tests/unit/test_patterns.py", "tests/unit/test_errors.py", "tests/unit/test_faults.py"),
        ("tests/property/test_algebra.py",),
    ),
    "cpu-plan": (("tests/property/test_numba_cpu_plan.py", "tests/unit/test_faults.py"),),
    "cpu-ranges": (("tests/unit/test_ranges_order.py",),),
    "cpu": (
        tuple(f"{ATTENTION}::{name}" for name in ("test_lengths", "test_ranges_in_any_order")),
        (f"{ATTENTION}::test_head_dims", "tests/unit/test_faults.py"),
        (ATTENTION, "tests/property/test_exact.py"),
    ),
    "cpu-few": (("tests/unit/test_numba_cpu_few_queries.py",),),
    "cpu-convert": (
        ("tests/unit/test_numba_cpu_convert.py",),
        ("tests/unit/test_faults.py", ATTENTION),
    ),
    "cpu-runtime": (
        ("tests/unit/test_faults_machine.py",),
        ("tests/unit/test_numba_cpu_runtime.py",),
    ),
    "torch": (
        ("tests/unit/test_torch_autograd.py", "tests/unit/test_torch_bridge.py"),
        ("tests/unit/test_faults.py", "tests/property/test_torch_exact.py"),
    ),
    "torch-half": (("tests/unit/test_torch_lse_float16.py",),),
    "torch-union": (("tests/unit/test_torch_union.py",),),
    "choosing": (("tests/unit/test_top_blocks.py",), ("tests/unit/test_choosing.py",)),
    "sinks": (("tests/unit/test_sinks.py",),),
    "torch-hash": (("tests/unit/test_hashing_torch.py", "tests/unit/test_hashing_past.py"),),
    "dropping": (("tests/unit/test_dropping.py",), ("tests/unit/test_dropping_layers.py",)),
    "cached": (("tests/unit/test_nn_cached.py",),),
    "merging": (("tests/unit/test_merging.py",),),
    "cuda-plan": (
        ("tests/unit/test_cuda_host_heads.py",),
        tuple(f"tests/unit/test_cuda_host_{name}.py" for name in ("logic", "one_pass", "parts")),
        ("tests/unit/test_ranges_order.py",),
    ),
    "cuda": (("tests/unit/test_kernels_on_host.py",),),
    "cuda-few": (("tests/unit/test_few_queries_on_host.py",),),
    "cuda-hash": (("tests/unit/test_hashing_on_host.py",),),
    "cuda-parts": (("tests/unit/test_parts_on_host.py",),),
    "cuda-tf32": (("tests/unit/test_tf32_on_host.py",),),
}


class Fault(NamedTuple):
    """One edit of one file and the tests that should notice."""

    name: str
    file: str  # from the root of the repository
    old: str
    new: str
    breaks: str
    suite: str
