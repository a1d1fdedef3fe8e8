"""Compile what the GPU suite uses on all cores, so that its tests find it on disk."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

RANDOM_HEAD_DIMS = (16, 64, 128)
PARTIAL = (16, 32, 40, 80, 96, 112)  # head_dims that fill Hopper's tiles in part


def compile_side_by_side():
    """Compile most of what the suite uses on all cores; the rest compiles when it is called."""
    from scfa_core.backends.cupy_raw import loader

    widths = {
        "bfloat16": (16, 32, 40, 64, 80, 96, 112, 128, 136, 192, 256),
        "float16": (16, 40, 64, 96, 128, 192, 256),
        "float32": (16, 64, 128, 256),
        "tf32": (16, 24, 32, 64, 80, 128),
    }
    cases = [(dtype, dim, dim, True, True) for dtype, dims in widths.items() for dim in dims]
    cases += [
        (dtype, *pair, True, monotone)
        for dtype in widths
        for pair in itertools.product(RANDOM_HEAD_DIMS, repeat=2)
        for monotone in (True, False)
    ]
    cases += [(dtype, 64, 64, False, True) for dtype in widths]
    cases += [
        (dtype, 64, 32, aligned, True)
        for dtype in ("bfloat16", "float32")
        for aligned in (True, False)
    ]
    cases += [
        ("bfloat16", *pair, True, monotone)
        for pair in ((24, 256), (192, 128))
        for monotone in (True, False)
    ]
    compile_portable({(*case, group_size) for case in cases for group_size in (1, 2, 3, 8)})
    if loader.compute_capability(0) == (9, 0):
        compile_hopper()


def compile_portable(problems):
    """Compile the planner, and for each (dtype, head_dim, head_dim_v, aligned, monotone, group).

    The dtype may be "tf32": float32 under $SCFA_CUPY_FP32=tf32.
    """
    from scfa_core.backends.cupy_raw import few_queries, loader, planner, variants

    chosen = {
        variants.choose(
            kernel,
            dtype,
            head_dim,
            head_dim_v,
            aligned=aligned,
            monotone=monotone or kernel != "bwd_dkdv",
            group_size=group_size,
            shared_limit=227 * 1024,
        )
        for dtype, head_dim, head_dim_v, aligned, monotone, group_size in problems
        for kernel in ("fwd", "fwd_few", "bwd_dq", "bwd_dkdv")
        if kernel != "fwd_few" or dtype in ("float16", "bfloat16")
    }
    requests = {(v.name, v.source, v.constants, "") for v in chosen}
    requests |= {
        ("scfa_fwd_few_merge", "fwd_few_merge.cu", few_queries.merge_constants(v), "")
        for v in chosen
        if v.source == "fwd_few.cu"
    }
    requests |= {(f"scfa_{name}", f"{name}.cu", (), "") for name in planner.KERNEL_NAMES}
    loader.preload(sorted(requests), 0, threads=os.cpu_count() or 4)


def compile_hopper():
    """Compile every kernel of Hopper's own, in both 16-bit types."""
    from scfa_core.backends.cupy_raw import launch_sm90, shapes_sm90

    tables = shapes_sm90.TABLES
    jobs = [
        (name, 0, dtype, head_dim, shape)
        for name, table in tables.items()
        for head_dim, shape in table.items()
        for dtype in ("bfloat16", "float16")
    ]
    widths = {
        name: table for name, table in tables.items() if isinstance(table, shapes_sm90.Shapes)
    }
    jobs += [
        (name, 0, "bfloat16", head_dim, table[head_dim])
        for name, table in widths.items()
        for head_dim in PARTIAL
    ]
    jobs += [
        (name, 0, dtype, head_dim, shapes_sm90.shape_of(table, head_dim, False), False)
        for name, table in tables.items()
        for dtype in ("bfloat16", "float16")
        for head_dim in (*table, *(PARTIAL if name in widths and dtype == "bfloat16" else ()))
    ]
    with ThreadPoolExecutor(len(jobs) + 1) as pool:
        pool.submit(launch_sm90._envelope_kernel, 0)
        list(pool.map(lambda job: launch_sm90._kernel(*job), jobs))
