"""Every shipped CUDA source compiles, without a GPU, to a cubin that does not spill.

A spread of the variants is compiled here, and each that compile_ledger.py has not recorded as clean
of these very sources. ptxas reports spills, local memory and serialised tensor-core code in its
log; exceptions are listed with their reason in cuda_builds.py.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import compile_ledger
import cuda_builds
import pytest
from cuda_builds import ARCHITECTURES, HOPPER, Build, complaints, faults_of, is_tf32, stack_of
from once import made_once
from scfa_core.backends.cupy_raw import nvrtc

from scfa_core.errors import BackendUnavailable

PARTIAL = (40, 96, 136)  # one a kind of tile that is filled in part
DEFAULT_CASES = 20  # variants compiled here, spread over sources and architectures
TF32_STEP = 22  # of those with TF32 products, that many to one: one an architecture


def some_of_hopper() -> list[Build]:
    return cuda_builds.hopper_builds(PARTIAL, PARTIAL[:2])


def chosen_builds() -> list[Build]:
    """A fixed sample that holds every source and every architecture."""
    hopper = some_of_hopper()
    builds = [*cuda_builds.portable_builds(), *hopper]
    first: dict[tuple[str, str], Build] = {}
    for number, build in enumerate(builds):
        first.setdefault((build.source, ARCHITECTURES[number % len(ARCHITECTURES)]), build)
    step = max(len(first) // DEFAULT_CASES, 1)
    tf32 = [build for build in builds if is_tf32(build)]
    portable = [build for build in list(first.values())[::step] if build.arch != HOPPER]
    for build in first.values():  # one at least of every source and of every architecture
        if build.arch != HOPPER and (
            all(build.arch != chosen.arch for chosen in portable)
            or all(build.source != chosen.source for chosen in portable)
        ):
            portable.append(build)
    # float16 differs from bfloat16 in conversions only; what has no types is there once
    halves = [build for build in hopper if dict(build.constants).get("BFLOAT16") != 0]
    # Every third one, and one of each source: compiled.json was made of all, in the same way.
    some = [*halves[::3], *{build.source: build for build in halves[::-1]}.values()]
    return list(dict.fromkeys([*portable, *tf32[::TF32_STEP], *some]))


BUILDS = chosen_builds()
SANITIZED = cuda_builds.for_the_sanitizer(
    list({build.source: build for build in some_of_hopper()[::-1]}.values())
)


@pytest.fixture(scope="module")
def compiler():
    try:
        return nvrtc.wheel_compiler()
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def compiled(request, compiler, tmp_path_factory):
    """Return build -> what it compiles to; the other cores compile what is asked for next."""

    def compile_once(build):
        how = (build.source, build.constants, build.arch, compiler)
        name = f"cubin_{compile_ledger.key_of(build, compiler.version())}"
        return made_once(tmp_path_factory, name, lambda _: nvrtc.compile_to_cubin(*how))

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
                promises[some] = pool.submit(compile_once, some)
        return promises[build].result()

    yield compiled
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("build", BUILDS, ids=[build.label for build in BUILDS])
def test_compiles_clean(compiler, compiled, build):
    arch = int(build.arch.rstrip("a"))
    if arch not in compiler.architectures():
        pytest.skip(f"NVRTC {compiler.version()} does not know sm_{arch}")
    made = compiled(build)
    assert faults_of(build, made) == []
    recorded = compile_ledger.load().get(compile_ledger.key_of(build, compiler.version()))
    assert recorded in (None, stack_of(made.log)), "compiled.json says otherwise: renew it, --again"


@pytest.mark.parametrize("build", SANITIZED, ids=lambda build: build.label)
def test_the_build_for_the_sanitizer_compiles(compiled, build):
    assert faults_of(build, compiled(build)) == []


def test_every_variant_was_compiled_from_these_sources(compiler):
    """Those that are not recorded are compiled now: minutes, unless compile_ledger.py was run."""
    recorded = compile_ledger.load()
    for build in cuda_builds.every_build():
        stack = recorded.get(compile_ledger.key_of(build, compiler.version()), 0)
        assert build.for_sanitizer or stack <= build.stack_accepted, build.label
    clean, faults = compile_ledger.renew(recorded, compiler, lambda missing, found: found)
    assert not faults
    assert len(clean) == len(cuda_builds.every_build())


def test_what_is_not_recorded_is_compiled(monkeypatch):
    """And recorded if it is clean, and told if it is not; what is no longer shipped is dropped."""
    fine, spills = (Build("plan_sort.cu", (("N", number),), "80") for number in (1, 2))
    logs = {
        1: "Used 8 registers",
        2: "16 bytes stack frame, 0 bytes spill stores\nUsed 8 registers",
    }
    asked = []

    def compile_to_cubin(source, constants, arch, compiler):
        asked.append(constants)
        return nvrtc.Compiled(b"\x7fELF", logs[dict(constants)["N"]])

    class Played:
        def version(self):
            return (12, 9)

    monkeypatch.setattr(compile_ledger, "every_build", lambda: [fine, spills])
    monkeypatch.setattr(nvrtc, "compile_to_cubin", compile_to_cubin)
    clean, faults = compile_ledger.renew({"gone": 0}, Played(), lambda missing, found: found)
    assert clean == {compile_ledger.key_of(fine, (12, 9)): 0}
    assert [fault.split(":")[0] for fault in faults] == [spills.label]
    assert len(asked) == 2
    compile_ledger.renew(clean, Played(), lambda missing, found: found)
    assert asked[2:] == [spills.constants]


def test_a_record_is_of_sources_headers_options_and_compiler(monkeypatch):
    build = Build("fwd.cu", (("HEAD_DIM", 64),), "80")
    others = [build._replace(arch="86"), build._replace(constants=(("HEAD_DIM", 72),)),
              build._replace(source="bwd_dq.cu")]  # fmt: skip
    key = compile_ledger.key_of(build, (12, 9))
    assert key not in [compile_ledger.key_of(other, (12, 9)) for other in others]
    assert key != compile_ledger.key_of(build, (12, 8))
    sources = nvrtc.read_sources()
    for name, concerned in (("mma.cuh", True), ("ptx.cuh", True), ("wgmma.cuh", False)):
        changed = sources | {name: sources[name] + "\n"}
        monkeypatch.setattr(nvrtc, "read_sources", lambda changed=changed: changed)
        compile_ledger._text_of.cache_clear()
        assert (compile_ledger.key_of(build, (12, 9)) != key) is concerned
    monkeypatch.undo()
    compile_ledger._text_of.cache_clear()


def test_the_sample_holds_every_source_and_architecture():
    builds = cuda_builds.every_build()
    assert {build.source for build in BUILDS} == {build.source for build in builds}
    assert {build.arch for build in BUILDS} == {*ARCHITECTURES, HOPPER}
    assert set(BUILDS) | set(SANITIZED) <= set(builds)
    tf32 = [build for build in BUILDS if is_tf32(build)]
    assert {build.arch for build in tf32} == set(ARCHITECTURES)
    assert {build.source for build in tf32} == {"fwd.cu", "bwd_dq.cu", "bwd_dkdv.cu"}


def test_every_kernel_source_is_shipped():
    """A .cu file that no variant compiles would never be tested."""
    shipped = {build.source for build in cuda_builds.every_build()}
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
