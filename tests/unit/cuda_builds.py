"""Every variant of the CUDA sources that is shipped, and what ptxas may say of it."""

import re
from typing import NamedTuple

import pytest
from scfa_core.backends.cupy_raw import (
    choosing,
    few_queries,
    hashing,
    launch_sm90,
    parts,
    planner,
    shapes_sm90,
)
from scfa_core.backends.cupy_raw.variants import ELEMENTS, SMALLEST_SHARED, shipped_variants

ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
HOPPER = "90a"
ANY_ORDER = ", ranges in any order"
WIDE_VALUES = ", head_dim_v 256"
# (source, arch) -> bytes of stack frame at most, and why they are accepted.
ACCEPTED_SPILLS: dict[tuple[str, str], tuple[int, str]] = {
    ("fwd_sm90.cu", HOPPER): (48, "the gathering warpgroup, 32 registers, in two forms"),
    ("bwd_dq_sm90.cu", HOPPER): (48, "the gathering warpgroup, 40 registers: values of a tile"),
    ("bwd_dkdv_sm90.cu", HOPPER): (80, "the same, 32 or 40 registers: values of a tile"),
    ("bwd_dkdv_sm90.cu", HOPPER + ANY_ORDER): (100, "both kinds of warpgroup: values of a tile"),
    ("bwd_fused128_sm90.cu", HOPPER): (24, "the gathering warps, 40 registers: values of a tile"),
    ("bwd_dkdv.cu", "120" + WIDE_VALUES): (24, "no more registers; 237 do for sm_89"),
    ("hash_past.cu", "80"): (32, "168 registers keep three blocks; none from sm_86 on"),
    ("hash_past.cu", "100"): (8, "even, float32: 128 registers keep two blocks; none elsewhere"),
    ("plan_ranges.cu", "120"): (8, "64 registers keep four blocks on a multiprocessor"),
}
# Notices of ptxas that are no fault, and why.
ACCEPTED_NOTICES = {
    "C7519": "a wgmma fence is added where registers change hands: it orders, it does not wait",
}
PARTIAL = range(16, 257, 8)  # head_dims of Hopper's kernels, most of which fill tiles in part


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
    def for_sanitizer(self) -> bool:
        """Whether it is what $SCFA_CUPY_SANITIZE=1 asks for."""
        return bool(dict(self.constants).get("SANITIZE"))

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


def hopper_builds(partial=PARTIAL, any_order=None) -> list[Build]:
    """What launch_sm90 asks the loader for, overheard; the two types of a kernel side by side.

    At every head_dim of a table of its own, and at those of `partial`, which have the tiles of a
    wider one; for ranges in any order at those of `any_order` (default: the same).
    """
    asked: list[Build] = []

    def overhear(name, source, constants, device, *, arch_suffix=""):
        assert arch_suffix == "a"
        asked.append(Build(source, constants, HOPPER))

    def ask(*arguments):
        for dtype in ("bfloat16", "float16"):
            name, head_dim, shape, *rest = arguments
            launch_sm90._kernel.__wrapped__(name, 0, dtype, head_dim, shape, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_sm90, "get_kernel", overhear)
        for name, table in shapes_sm90.TABLES.items():
            several = isinstance(table, shapes_sm90.Shapes)

            def filled_in_part(head_dims, table=table, several=several):
                return [x for x in head_dims if several and x not in table and table.width(x)]

            for head_dim in [*table, *filled_in_part(partial)]:
                ask(name, head_dim, table[head_dim])
            for head_dim in table:  # of arrays that have no maps
                if shapes_sm90.may_run(name, table[head_dim]):
                    ask(name, head_dim, table[head_dim], True, False)
            if several:
                for head_dim in [*table, *filled_in_part(partial if any_order is None
                                                         else any_order)]:  # fmt: skip
                    ask(name, head_dim, shapes_sm90.shape_of(table, head_dim, False), False)
            for head_dim in [] if several else table:  # for those of such ranges that are in order
                ask(name, head_dim, table[head_dim], False)
                ask(name, head_dim, table[head_dim], False, False)
        for head_dim in launch_sm90._LONG_KEYS:
            launch_sm90._choose_kernel.__wrapped__(0, head_dim)
        for head_dim in shapes_sm90.FUSED:
            launch_sm90._choose_kernel.__wrapped__(0, head_dim, False)
        launch_sm90._envelope_kernel.__wrapped__(0)
    return asked


def portable_builds() -> list[Build]:
    """Planner, hashing, parts and kernels for every card."""
    builds = [
        Build(f"{name}.cu", (), arch) for name in planner.KERNEL_NAMES for arch in ARCHITECTURES
    ]
    for arch in ARCHITECTURES:
        builds += [Build(hashing.SOURCE, v, arch) for v in hashing.shipped_constants()]
        past = hashing.shipped_constants(past=True)
        builds += [Build(hashing.PAST_SOURCE, v, arch) for v in past]
        builds += [Build(choosing.SOURCE, v, arch) for v in choosing.shipped_constants()]
        own = parts.shipped_constants()
        builds += [Build(f"{name}.cu", v, arch) for name in parts.NAMES for v in own]
        limit = SMALLEST_SHARED if arch in ("86", "89", "120") else 160 * 1024
        shipped = shipped_variants(limit)
        builds += [Build(v.source, v.constants, arch) for v in shipped]
        few = [few_queries.merge_constants(v) for v in shipped if v.source == "fwd_few.cu"]
        builds += [Build("fwd_few_merge.cu", v, arch) for v in few]
    return builds


def for_the_sanitizer(builds: list[Build]) -> list[Build]:
    """Builds of Hopper's kernels as $SCFA_CUPY_SANITIZE=1 asks for them."""
    return [build._replace(constants=(*build.constants, ("SANITIZE", 1))) for build in builds]


def every_build() -> list[Build]:
    """All that a user's machine can ask for, each once."""
    hopper = hopper_builds()
    return list(dict.fromkeys([*portable_builds(), *hopper, *for_the_sanitizer(hopper)]))


def stack_of(log: str) -> int:
    """Bytes of stack frame or of spills, whichever is more, by ptxas."""
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    return max((int(size) for sizes in found for size in sizes), default=0)


def complaints(log: str, *, stack_accepted: int = 0) -> list[str]:
    """Lines of an NVRTC log that mean slower or doubtful code."""
    found = []
    for line in log.splitlines():
        if stack_of(line) > stack_accepted:
            found.append(line.strip())
        if any(f"({code})" in line for code in ACCEPTED_NOTICES):
            continue
        if re.search(r"C75\d\d|serializ|warning|error", line, re.IGNORECASE):
            found.append(line.strip())
    return found


def faults_of(build: Build, made) -> list[str]:
    """What is wrong with a compilation; empty where it is clean."""
    if not made.cubin.startswith(b"\x7fELF"):
        return ["no cubin"]
    if build.for_sanitizer:
        # It may spill. But where one setmaxnreg is not heeded, the others wait for ever.
        return [line for line in made.log.splitlines() if "setmaxnreg" in line]
    found = complaints(made.log, stack_accepted=build.stack_accepted)
    return found if re.search(r"Used \d+ registers", made.log) else [*found, "ptxas said nothing"]
