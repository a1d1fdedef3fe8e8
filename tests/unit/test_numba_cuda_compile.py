"""numba-cuda's kernels compiled without a GPU: they compile, and their arrays stay in registers."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)
if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
    pytest.skip("the CUDA simulator is on: nothing is compiled", allow_module_level=True)

from scfa_core.arrays import DeviceArray


def tensor_core_kernel(name, dtype="bfloat16", head_dim=64):
    module = importlib.import_module(f"scfa_core.backends.numba_cuda.{name}_mma")
    return getattr(module, f"build_{name}_mma")(dtype, head_dim, head_dim)


def portable_kernel(name, dtype, head_dim):
    from scfa_core.backends.numba_cuda.tiles import choose_shape

    module = importlib.import_module(f"scfa_core.backends.numba_cuda.{name}")
    shape = choose_shape(dtype, (head_dim,) * (2 if name == "fwd" else 4))
    return getattr(module, f"build_{name}")(dtype, head_dim, head_dim, shape)


def planner_kernels():
    from scfa_core.backends.numba_cuda import (
        plan_and,
        plan_causal,
        plan_clip,
        plan_keep,
        plan_narrow,
        plan_ranges,
        plan_rows,
        plan_sort,
    )

    yield plan_causal.build_plan_causal("int32", "int32")
    yield plan_causal.build_plan_causal("int64", "int64")
    yield plan_rows.build_plan_rows()
    yield plan_keep.build_plan_keep()
    yield plan_and.build_plan_and()
    yield plan_sort.build_plan_sort("int32")
    yield plan_sort.build_plan_sort("int64")
    yield plan_narrow.build_plan_narrow("int32", "int64")
    yield plan_clip.build_plan_clip("int64")
    yield plan_ranges.build_plan_ranges("int32", "int64")


@pytest.fixture
def compile_to_ptx(monkeypatch):
    """Compile a kernel for a compute capability that no device here need have."""
    from numba import cuda
    from numba.cuda import dispatcher

    # Device functions ask the current device what to compile for; the kernel decides in the end.
    device = SimpleNamespace(compute_capability=(8, 0))
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: device)

    def compile_to_ptx(kernel, capability):
        options = {"launch_bounds": kernel.bounds} if kernel.bounds else {}
        arguments = kernel.signature.args
        return cuda.compile_ptx(kernel.function, arguments, cc=capability, **options)[0]

    return compile_to_ptx


def assemblers():
    """Every ptxas to be found; an old one refuses the PTX of a newer compiler."""
    found = [shutil.which("ptxas")]
    for package, path in (
        ("triton", "backends/nvidia/bin/ptxas"),
        ("nvidia", "cuda_nvcc/bin/ptxas"),
    ):
        spec = importlib.util.find_spec(package)
        for home in (spec.submodule_search_locations or []) if spec else []:
            found.append(Path(home) / path)
    return [str(x) for x in found if x and Path(x).is_file()]


def assemble(ptx, capability, folder):
    """Registers and spilled bytes by ptxas, or None if no assembler here takes this PTX."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    target = f"-arch=sm_{capability[0]}{capability[1]}"
    for tool in assemblers():
        command = [tool, target, "-v", str(source), "-o", str(folder / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode == 0:
            registers = int(re.search(r"Used (\d+) registers", done.stderr)[1])
            spilled = int(re.search(r"(\d+) bytes spill stores", done.stderr)[1])
            return registers, spilled
        assert re.search(r"Unsupported \.version|not defined for option", done.stderr), done.stderr
    return None


def disassemble(cubin):
    """Machine code as text, or None if no disassembler is here."""
    spec = importlib.util.find_spec("triton")
    homes = (spec.submodule_search_locations or []) if spec else []
    found = [shutil.which("nvdisasm"), *(Path(x) / "backends/nvidia/bin/nvdisasm" for x in homes)]
    for tool in (x for x in found if x and Path(x).is_file()):
        command = [str(tool), "-c", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 0:
            return done.stdout
    return None


# PTX of an older one is taken for the later ones too.
CAPABILITIES = ((8, 0), (9, 0), (10, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("oldest", "name", "dtype"),
    [
        ((8, 0), "fwd", "float16"),
        ((9, 0), "fwd", "bfloat16"),
        ((8, 0), "bwd_dq", "bfloat16"),
        ((8, 0), "bwd_dkdv", "bfloat16"),
        ((8, 0), "bwd_dq", "float16"),
    ],
)
def test_tensor_core_kernels_live_in_registers(
    compile_to_ptx, record_property, tmp_path, oldest, name, dtype
):
    ptx = compile_to_ptx(tensor_core_kernel(name, dtype), oldest)
    assert ".local .align" not in ptx
    # A warp's products of 32 rows by 96 and by 32 keys, by 32 keys, by 32 queries, 16 x 8 x 16
    # each: all loops are unrolled
    assert len(re.findall("mma.sync", ptx)) == {"fwd": 256, "bwd_dq": 96, "bwd_dkdv": 128}[name]
    for capability in (x for x in CAPABILITIES if x >= oldest):
        report = assemble(ptx, capability, tmp_path)
        if report is None:
            pytest.skip("compiled to PTX; no ptxas here takes its version")
        registers, spilled = report
        record_property(f"registers_{capability[0]}{capability[1]}", registers)
        record_property(f"spilled_bytes_{capability[0]}{capability[1]}", spilled)
        assert spilled <= 64


def test_planner_kernels(compile_to_ptx, tmp_path):
    for kernel in planner_kernels():
        ptx = compile_to_ptx(kernel, CAPABILITIES[0])
        assert ".local .align" not in ptx
        for capability in CAPABILITIES:
            report = assemble(ptx, capability, tmp_path)
            assert report is None or report[1] == 0
            code = disassemble(tmp_path / "kernel.cubin") if report else None
            if code and "uint8:3" not in kernel.arguments:
                # Nothing here has 16 bits: ptxas once copied half of a list's length
                # (plan_causal.py).
                assert not re.findall(r"PRMT [^;]* 0x(?:10|32|54|76){2}[,; ]", code)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "head_dim"),
    [("fwd", "float32", 64), ("bwd_dq", "float16", 24), ("bwd_dkdv", "float64", 64)],
)
def test_portable_kernels(compile_to_ptx, tmp_path, name, dtype, head_dim):
    ptx = compile_to_ptx(portable_kernel(name, dtype, head_dim), (8, 0))
    assert ".local .align" not in ptx
    report = assemble(ptx, (8, 0), tmp_path)
    assert report is None or report[1] == 0


def test_packed_arguments_are_numbas_own():
    from numba.cuda.cudadrv.devicearray import DeviceNDArray
    from numba.cuda.cudadrv.driver import MemoryPointer
    from numba.cuda.dispatcher import _Kernel
    from scfa_core.backends.numba_cuda.driver import argument_format, flatten

    kernel = tensor_core_kernel("fwd")
    ours, theirs = [], []
    for place, name in enumerate(kernel.arguments):
        scalar, _, rank = name.partition(":")
        if not rank:
            value = {"bool": True, "float64": 0.125}.get(scalar, 5 + place)
            ours.append(value)
            theirs.append(value)
            continue
        dtype = np.dtype(scalar)
        shape = tuple(range(2, 2 + int(rank)))
        strides = tuple(7 * (axis + place + 1) for axis in range(int(rank)))
        pointer = 0x7F0000000000 + 4096 * place
        ours.append(DeviceArray(pointer, shape, strides, scalar, 0))
        memory = MemoryPointer(None, ctypes.c_void_p(pointer), 1 << 20)
        in_bytes = tuple(stride * dtype.itemsize for stride in strides)
        theirs.append(DeviceNDArray(shape, in_bytes, dtype, gpu_data=memory))
    flat = []
    for kind, value in zip(kernel.signature.args, theirs, strict=True):
        _Kernel._prepare_args(SimpleNamespace(extensions=[]), kind, value, 0, [], flat)
    assert [getattr(value, "value", value) for value in flat] == flatten(tuple(ours))
    assert len(argument_format(kernel.arguments)) == 1 + len(flat)


def test_one_kernel_serves_several_head_dims():
    from scfa_core.backends.numba_cuda import BACKEND, launch

    problems = [
        SimpleNamespace(dtype="bfloat16", head_dim=d, head_dim_v=d_v)
        for d, d_v in ((24, 40), (32, 64), (40, 64))
    ]
    sizes = [("bfloat16", *launch._widths(problem)) for problem in problems]
    assert sizes[0] == sizes[1] != sizes[2]
    assert sizes == [BACKEND.kernel_family(x.dtype, x.head_dim, x.head_dim_v) for x in problems]
    assert all(launch._widths(x)[0] >= x.head_dim for x in problems)


def test_names_in_the_disk_cache_follow_variant_and_sources():
    from scfa_core.backends.numba_cuda.disk import entry_name

    names = {entry_name(tensor_core_kernel("fwd", dtype)) for dtype in ("float16", "bfloat16")}
    assert len(names) == 2
    assert entry_name(tensor_core_kernel("fwd")) == entry_name(tensor_core_kernel("fwd"))


def test_another_module_named_cuda_is_a_reason_not_an_exception(monkeypatch):
    from scfa_core.backends import numba_cuda

    def find_spec(name):
        if name == "cuda.bindings":  # as importlib does where cuda is somebody's cuda.py
            raise ModuleNotFoundError("__path__ attribute not found on 'cuda'")
        return True

    monkeypatch.setattr(numba_cuda, "find_spec", find_spec)
    reason = numba_cuda._find_reason.__wrapped__()
    assert reason.startswith("numba-cuda fails: ModuleNotFoundError: __path__")
