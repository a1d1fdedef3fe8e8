"""Every shipped CUDA source compiles, without a GPU, to a cubin that does not spill.

A subset by default; all variants for all architectures with SCFA_COMPILE=all. ptxas reports spills,
local memory and serialised tensor-core code in its log; exceptions are listed with their reason.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from scfa_core.backends.cupy_raw import hashing, nvrtc, planner
from scfa_core.backends.cupy_raw.variants import ELEMENTS

from scfa_core.errors import BackendUnavailable

ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
HOPPER = "90a"
ANY_ORDER = ", ranges in any order"
WIDE_VALUES = ", head_dim_v 256"
EVERYTHING = os.environ.get("SCFA_COMPILE") == "all"
# (source, arch) -> bytes of stack frame at most, and why they are accepted.
ACCEPTED_SPILLS: dict[tuple[str, str], tuple[int, str]] = {
    ("fwd_sm90.cu", HOPPER): (48, "the gathering warpgroup, 32 registers, in two forms"),
    ("bwd_dq_sm90.cu", HOPPER): (48, "the gathering warpgroup, 40 registers: values of a tile"),
    ("bwd_dkdv_sm90.cu", HOPPER): (80, "the same, 32 or 40 registers: values of a tile"),
    ("bwd_dkdv_sm90.cu", HOPPER + ANY_ORDER): (100, "both kinds of warpgroup: values of a tile"),
    ("bwd_fused128_sm90.cu", HOPPER): (24, "the gathering warps, 40 registers: values of a tile"),
    ("bwd_dkdv.cu", "120" + WIDE_VALUES): (24, "no more registers; 237 do for sm_89"),
    ("plan_ranges.cu", "120"): (8, "64 registers keep four blocks on a multiprocessor"),
}
# Notices of ptxas that are no fault, and why.
ACCEPTED_NOTICES = {
    "C7519": "a wgmma fence is added where registers change hands: it orders, it does not wait",
}
# head_dims that fill their tiles in part: what differs between all others is compiled alike
PARTIAL = range(16, 257, 8) if EVERYTHING else (16, 40, 96, 120, 136)
DEFAULT_CASES = 34  # variants compiled by default, spread over sources and architectures
TF32_STEP = 11  # of those with TF32 products, that many to one: two an architecture


class Build(NamedTuple):
    """One compilation."""

    source: str
    constants: tuple[tuple[str, int], ...]
    arch: str

    @property
    def label(self) -> str:
        values = "-".join(str(value) for _, value in self.constants[:3])
        return f"{self.source}-{values}-sm_{self.arch}{'-any-order' * self.any_order}"

    @property
    def any_order(self) -> bool:
        """Whether it is one of Hopper's kernels for ranges in any order."""
        return self.arch == HOPPER and dict(self.constants).get("MONOTONE") == 0

    @property
    def stack_accepted(self) -> int:
        """Bytes of stack frame at most."""
        wide = dict(self.constants).get("HEAD_DIM_V") == 256
        kinds = [HOPPER + ANY_ORDER] * self.any_order + [self.arch + WIDE_VALUES] * wide
        kinds += [self.arch]
        return next((ACCEPTED_SPILLS[self.source, kind][0] for kind in kinds
                     if (self.source, kind) in ACCEPTED_SPILLS), 0)  # fmt: skip


def is_tf32(build: Build) -> bool:
    """Whether float32 is multiplied as TF32, by the sources of the 16-bit kernels."""
    return build.source in ("fwd.cu", "bwd_dq.cu", "bwd_dkdv.cu") and (
        dict(build.constants)["ELEMENT"] == ELEMENTS["tf32"]
    )


def hopper_builds() -> list[Build]:
    """What launch_sm90 asks the loader for, overheard."""
    from scfa_core.backends.cupy_raw import launch_sm90, shapes_sm90

    asked: list[Build] = []  # the two types of a kernel side by side

    def overhear(name, source, constants, device, *, arch_suffix=""):
        assert arch_suffix == "a"
        asked.append(Build(source, constants, HOPPER))

    loaded, launch_sm90.get_kernel = launch_sm90.get_kernel, overhear
    try:
        for name, table in shapes_sm90.TABLES.items():
            several = isinstance(table, shapes_sm90.Shapes)
            partial = [
                head_dim
                for head_dim in PARTIAL
                if several and head_dim not in table and table.width(head_dim)
            ]
            for head_dim in [*table, *partial]:
                for dtype in ("bfloat16", "float16"):
                    launch_sm90._kernel.__wrapped__(name, 0, dtype, head_dim, table[head_dim])
            for head_dim in table:  # of arrays that have no maps
                for dtype in ("bfloat16", "float16"):
                    shape = table[head_dim]
                    if shapes_sm90.may_run(name, shape):
                        launch_sm90._kernel.__wrapped__(
                            name, 0, dtype, head_dim, shape, True, False
                        )
            in_any_order = [*table, *(partial if EVERYTHING else partial[1:3])] if several else ()
            for head_dim in in_any_order:
                for dtype in ("bfloat16", "float16"):
                    shape = shapes_sm90.shape_of(table, head_dim, False)
                    launch_sm90._kernel.__wrapped__(name, 0, dtype, head_dim, shape, False)
        for head_dim in (64, 64):  # side by side, though they have no types
            launch_sm90._choose_kernel.__wrapped__(0, head_dim)
        for kernel in (launch_sm90._envelope_kernel, launch_sm90._key_tiles_kernel):
            for device in (0, 0):
                kernel.__wrapped__(device)
    finally:
        launch_sm90.get_kernel = loaded
    return asked


def all_builds() -> list[Build]:
    """Planner, portable and Hopper kernels, each for the architectures it ships to."""
    from scfa_core.backends.cupy_raw.variants import SMALLEST_SHARED, shipped_variants

    builds = [
        Build(f"{name}.cu", (), arch) for name in planner.KERNEL_NAMES for arch in ARCHITECTURES
    ]
    for arch in ARCHITECTURES:
        builds += [Build(hashing.SOURCE, v, arch) for v in hashing.shipped_constants()]
        limit = SMALLEST_SHARED if arch in ("86", "89", "120") else 160 * 1024
        builds += [Build(v.source, v.constants, arch) for v in shipped_variants(limit)]
    return builds + hopper_builds()


def chosen_builds() -> list[Build]:
    """All of them, or a fixed sample that holds every source and every architecture."""
    builds = all_builds()
    if EVERYTHING:
        return builds
    first: dict[tuple[str, str], Build] = {}
    for number, build in enumerate(builds):
        first.setdefault((build.source, ARCHITECTURES[number % len(ARCHITECTURES)]), build)
    step = max(len(first) // DEFAULT_CASES, 1)
    hopper = [build for build in builds if build.arch == HOPPER]
    tf32 = [build for build in builds if is_tf32(build)]
    portable = [build for build in list(first.values())[::step] if build.arch != HOPPER]
    for build in first.values():  # one at least of every source and of every architecture
        if build.arch != HOPPER and (
            all(build.arch != chosen.arch for chosen in portable)
            or all(build.source != chosen.source for chosen in portable)
        ):
            portable.append(build)
    # float16 differs from bfloat16 in conversions only
    return list(dict.fromkeys([*portable, *tf32[::TF32_STEP], *hopper[::2]]))


BUILDS = chosen_builds()


@pytest.fixture(scope="module")
def compiler():
    try:
        return nvrtc.wheel_compiler()
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def compiled(request, compiler):
    """Return build -> what it compiles to; the other cores compile what is asked for next."""
    wanted = [
        item.callspec.params["build"]
        for item in request.session.items
        if item.path == request.path and "build" in item.fixturenames
    ]
    cores, promises = os.cpu_count() or 1, {}
    pool = ThreadPoolExecutor(cores)

    def compiled(build):
        at = wanted.index(build)
        for some in wanted[at : at + cores]:
            if some not in promises:
                how = (some.source, some.constants, some.arch, compiler)
                promises[some] = pool.submit(nvrtc.compile_to_cubin, *how)
        return promises[build].result()

    yield compiled
    pool.shutdown(cancel_futures=True)


def complaints(log: str, *, stack_accepted: int = 0) -> list[str]:
    """Lines of an NVRTC log that mean slower or doubtful code."""
    found = []
    for line in log.splitlines():
        spill = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line)
        if spill and max(map(int, spill.groups())) > stack_accepted:
            found.append(line.strip())
        if any(f"({code})" in line for code in ACCEPTED_NOTICES):
            continue
        if re.search(r"C75\d\d|serializ|warning|error", line, re.IGNORECASE):
            found.append(line.strip())
    return found


@pytest.mark.parametrize("build", BUILDS, ids=[build.label for build in BUILDS])
def test_compiles_clean(compiler, compiled, build):
    arch = int(build.arch.rstrip("a"))
    if arch not in compiler.architectures():
        pytest.skip(f"NVRTC {compiler.version()} does not know sm_{arch}")
    made = compiled(build)
    assert made.cubin.startswith(b"\x7fELF")
    assert complaints(made.log, stack_accepted=build.stack_accepted) == []
    assert re.search(r"Used \d+ registers", made.log), "ptxas reported nothing"


def builds_for_the_sanitizer() -> list[Build]:
    """One of each Hopper kernel, or all, as $SCFA_CUPY_SANITIZE=1 asks for them."""
    builds = hopper_builds()
    chosen = builds if EVERYTHING else {build.source: build for build in builds[::-1]}.values()
    return [build._replace(constants=(*build.constants, ("SANITIZE", 1))) for build in chosen]


@pytest.mark.parametrize("build", builds_for_the_sanitizer(), ids=lambda build: build.label)
def test_the_build_for_the_sanitizer_compiles(compiled, build):
    made = compiled(build)
    assert made.cubin.startswith(b"\x7fELF")
    # It may spill. But where one setmaxnreg is not heeded, the others wait for ever.
    assert "setmaxnreg" not in made.log


def test_the_sample_holds_every_source_and_architecture():
    builds = all_builds()
    assert {build.source for build in BUILDS} == {build.source for build in builds}
    assert {build.arch for build in BUILDS} == {*ARCHITECTURES, HOPPER}
    tf32 = [build for build in BUILDS if is_tf32(build)]
    assert {build.arch for build in tf32} == set(ARCHITECTURES)
    assert {build.source for build in tf32} == {"fwd.cu", "bwd_dq.cu", "bwd_dkdv.cu"}


def test_every_kernel_source_is_shipped():
    """A .cu file that no variant compiles would never be tested."""
    shipped = {build.source for build in all_builds()}
    present = {name for name in nvrtc.read_sources() if name.endswith(".cu")}
    assert present - shipped == set()


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("ptxas . 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", False),
        ("ptxas . 16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads", True),
        ("ptxas . 16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", True),
        ("ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async", True),
        ('fwd.cu(3): warning #177-D: variable "x" was declared but never referenced', True),
        ("ptxas info : (C7519) warpgroup.arrive is injected in around line 1963", False),
        ("ptxas info : Used 64 registers, used 1 barriers", False),
    ],
)
def test_bad_lines_are_seen(line, bad):
    assert bool(complaints(line)) is bad


def test_a_source_that_does_not_compile_is_told_with_its_log(compiler):
    from scfa_core.backends.cupy_raw.nvrtc import CompileError

    with pytest.raises(CompileError, match="SCFA_HEAD_DIM"):
        nvrtc.compile_to_cubin("fwd.cu", (), "80", compiler)
