"""Every shipped CUDA source compiles, without a GPU, to a cubin that does not spill.

A subset by default; all variants for all architectures with SCFA_COMPILE=all. ptxas reports spills,
local memory and serialised tensor-core code in its log; exceptions are listed with their reason.
"""

import os
import re
from typing import NamedTuple

import pytest
from scfa_core.backends.cupy_raw import nvrtc, planner

from scfa_core.errors import BackendUnavailable

ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
HOPPER = "90a"
EVERYTHING = os.environ.get("SCFA_COMPILE") == "all"
# (source, arch) -> why a few bytes of spill are accepted; "*" stands for every architecture.
ACCEPTED_SPILLS: dict[tuple[str, str], str] = {}
DEFAULT_CASES = 34  # variants compiled by default, spread over sources and architectures


class Build(NamedTuple):
    """One compilation."""

    source: str
    constants: tuple[tuple[str, int], ...]
    arch: str

    @property
    def label(self) -> str:
        values = "-".join(str(value) for _, value in self.constants[:3])
        return f"{self.source}-{values}-sm_{self.arch}"


def all_builds() -> list[Build]:
    """Planner, portable and Hopper kernels, each for the architectures it ships to."""
    from scfa_core.backends.cupy_raw.variants import SMALLEST_SHARED, shipped_variants

    builds = [
        Build(f"{name}.cu", (), arch) for name in planner.KERNEL_NAMES for arch in ARCHITECTURES
    ]
    for arch in ARCHITECTURES:
        limit = SMALLEST_SHARED if arch in ("86", "89", "120") else 160 * 1024
        builds += [Build(v.source, v.constants, arch) for v in shipped_variants(limit)]
    return builds


def chosen_builds() -> list[Build]:
    """All of them, or a fixed sample that holds every source and every architecture."""
    builds = all_builds()
    if EVERYTHING:
        return builds
    first: dict[tuple[str, str], Build] = {}
    for number, build in enumerate(builds):
        first.setdefault((build.source, ARCHITECTURES[number % len(ARCHITECTURES)]), build)
    step = max(len(first) // DEFAULT_CASES, 1)
    return list(dict.fromkeys([*list(first.values())[::step]]))


BUILDS = chosen_builds()


@pytest.fixture(scope="module")
def compiler():
    try:
        return nvrtc.wheel_compiler()
    except BackendUnavailable as error:
        pytest.skip(str(error))


def complaints(log: str, *, spills_accepted: bool) -> list[str]:
    """Lines of an NVRTC log that mean slower or doubtful code."""
    found = []
    for line in log.splitlines():
        spill = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line)
        if spill and not spills_accepted:
            stack, stores = map(int, spill.groups())
            if stores or stack:
                found.append(line.strip())
        if re.search(r"C75\d\d|serializ|warning|error", line, re.IGNORECASE):
            found.append(line.strip())
    return found


@pytest.mark.parametrize("build", BUILDS, ids=[build.label for build in BUILDS])
def test_compiles_clean(compiler, build):
    arch = int(build.arch.rstrip("a"))
    if arch not in compiler.architectures():
        pytest.skip(f"NVRTC {compiler.version()} does not know sm_{arch}")
    compiled = nvrtc.compile_to_cubin(build.source, build.constants, build.arch, compiler)
    assert compiled.cubin.startswith(b"\x7fELF")
    accepted = any((build.source, key) in ACCEPTED_SPILLS for key in (build.arch, "*"))
    assert complaints(compiled.log, spills_accepted=accepted) == []
    assert re.search(r"Used \d+ registers", compiled.log), "ptxas reported nothing"


def test_the_sample_holds_every_source_and_architecture():
    builds = all_builds()
    assert {build.source for build in BUILDS} == {build.source for build in builds}
    assert {build.arch for build in BUILDS} == set(ARCHITECTURES)


def test_every_kernel_source_is_shipped():
    """A .cu file that no variant compiles would never be tested; Hopper's have their own test."""
    shipped = {build.source for build in all_builds()}
    present = {name for name in nvrtc.read_sources() if name.endswith(".cu")}
    assert {name for name in present - shipped if not name.endswith("_sm90.cu")} == set()


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("ptxas . 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", False),
        ("ptxas . 16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads", True),
        ("ptxas . 16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", True),
        ("ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async", True),
        ('fwd.cu(3): warning #177-D: variable "x" was declared but never referenced', True),
        ("ptxas info : Used 64 registers, used 1 barriers", False),
    ],
)
def test_bad_lines_are_seen(line, bad):
    assert bool(complaints(line, spills_accepted=False)) is bad


def test_a_source_that_does_not_compile_is_told_with_its_log(compiler):
    from scfa_core.backends.cupy_raw.nvrtc import CompileError

    with pytest.raises(CompileError, match="SCFA_HEAD_DIM"):
        nvrtc.compile_to_cubin("fwd.cu", (), "80", compiler)
