"""A few small calls of every kernel, for compute-sanitizer: `run_sanitizer.py` runs it.

    python tests/gpu/sanitize.py [--compile] [family ...]

Without a name, every family that $SCFA_GPU_BACKENDS can run. The tools make an access to shared
memory a hundred times slower and more: sizes are the smallest that pass through every kernel and
path. Inputs are made on the host, and results are read, so that initcheck sees an element that
nobody wrote. tests/unit/test_sanitize.py holds the list against the variants.
"""

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from scfa_core.backends.cupy_raw import planner_shapes

import scfa_core as scfa
from scfa_core.dispatch import load_backend
from scfa_core.merging import attention_over

ROWS = 150  # two tiles of 128, the last one ragged


class Call(NamedTuple):
    """One problem: forward and backward."""

    dtype: str
    head_dim: int
    head_dim_v: int = 0  # 0: head_dim
    pattern: str = "hash"
    heads: int = 2
    heads_kv: int = 1
    rows: int = ROWS
    aligned: bool = True
    poison: bool = False  # NaN in a key that nobody sees: tensor cores leave its tile to others
    keys: int = 0  # 0: as many as rows


PORTABLE = (
    Call("bfloat16", 64),
    Call("bfloat16", 128),
    Call("bfloat16", 256),
    Call("bfloat16", 72, 40),
    Call("float16", 64, pattern="keep"),
    Call("bfloat16", 64, aligned=False),
    Call("bfloat16", 64, pattern="ranges"),
    Call("bfloat16", 128, pattern="ranges"),
    Call("bfloat16", 256, pattern="ranges"),
    Call("float16", 64, poison=True),
    Call("bfloat16", 64, pattern="window", heads=17, heads_kv=1, rows=40),
)
FEW = (  # fewer than 16 queries a tile, many keys, in one chunk or in several
    Call("bfloat16", 64, heads=4, rows=1, keys=520),
    Call("float16", 64, 40, pattern="keep", heads=8, heads_kv=2, rows=5, keys=1100, poison=True),
    Call("bfloat16", 128, pattern="ranges", heads=3, rows=3, keys=2100),
    Call("bfloat16", 72, heads=2, rows=2, keys=1030, aligned=False),
    Call("float16", 256, pattern="window", heads=2, rows=1, keys=1030),
    Call("bfloat16", 192, heads=2, rows=7, keys=600, poison=True),
)
FLOAT32 = (
    Call("float32", 64),
    Call("float32", 64, pattern="ranges", aligned=False),
    Call("float32", 256, rows=70),
    Call("float32", 256, pattern="ranges", rows=70),
)
TF32 = (  # $SCFA_CUPY_FP32=tf32
    Call("float32", 64),
    Call("float32", 64, pattern="ranges", aligned=False),
    Call("float32", 72, 40, pattern="keep", poison=True),
    Call("float32", 128, pattern="ranges", rows=70),
)
HOPPER = (
    Call("bfloat16", 64),
    Call("bfloat16", 128),
    Call("float16", 64, pattern="keep"),
    Call("float16", 128, pattern="causal"),
    Call("bfloat16", 64, pattern="window", heads=16, heads_kv=1),
    Call("bfloat16", 128, pattern="nothing"),
    Call("bfloat16", 64, poison=True),
    # more steps than a tile has buffers: the first ones are filled again
    Call("bfloat16", 64, pattern="causal", heads=1, rows=770),
    Call("bfloat16", 128, pattern="causal", heads=1, rows=390),
    # more tiles than the card has multiprocessors: blocks take a second one
    Call("bfloat16", 64, heads=134, heads_kv=134, rows=33),
    Call("bfloat16", 128, heads=134, heads_kv=134, rows=33),
    # ranges in any order have kernels of their own
    Call("bfloat16", 64, pattern="ranges", heads=1, rows=390),
    Call("float16", 128, pattern="ranges", heads=1, rows=390),
    Call("bfloat16", 256, pattern="ranges"),
    # rows narrower than their tiles, and the widest
    Call("bfloat16", 40, pattern="keep", poison=True),
    Call("float16", 96, pattern="causal", heads=1, rows=390),
    Call("bfloat16", 192, pattern="causal", heads=1, rows=330),
    Call("float16", 192, heads=134, heads_kv=134, rows=33),
    Call("bfloat16", 256, heads=134, heads_kv=134, rows=33),
    Call("float16", 256, pattern="causal", heads=1, rows=330),
)


class Lists(NamedTuple):
    """One plan: `groups` names the ids of each group clause, see `ids`."""

    seqlen_q: int
    seqlen_k: int
    groups: tuple[str, ...] = ()
    keeps: int = 0
    ranges: str = ""  # integer type of start and end
    causal: bool = True
    shared: bool = True  # cupy may let several blocks share a list


class Union(NamedTuple):
    """Attention over several patterns, and a sink; forward and backward."""

    dtype: str
    head_dim: int
    parts: int
    sinks: bool = False
    rows: int = ROWS


PARTS = (
    Union("bfloat16", 64, 1, sinks=True),
    Union("float16", 72, 3),
    Union("bfloat16", 64, 6, sinks=True, rows=70),  # gradients are added in two launches
    Union("float32", 16, 5, sinks=True, rows=300),
)
PLANNER = (
    Lists(ROWS, ROWS),
    Lists(4100, 70, causal=False),
    Lists(ROWS, 90, ranges="int32"),
    Lists(ROWS, ROWS, keeps=1),
    Lists(1030, 1030, keeps=2),
    Lists(1030, 900, keeps=1, causal=False),
    *(Lists(rows, rows, ("few",)) for rows in (ROWS, 1030, 2050)),
    *(Lists(rows, rows - 9, ("few",)) for rows in (ROWS, 1040, 2060)),
    Lists(ROWS, ROWS, ("wide",)),  # more bits than one pass has
    Lists(1030, 1020, ("wide",), keeps=1),
    Lists(ROWS, ROWS, ("far",)),  # all 64 bits
    Lists(1030, 1020, ("far", "few")),
    Lists(1030, 1030, ("few", "bytes"), keeps=1),
    Lists(1030, 1030, ("few",), ranges="int64"),
    Lists(900, 1030, ("far",), keeps=1, ranges="int32", causal=False),
    *(Lists(2, rows, ("few",), keeps=1) for rows in (ROWS, 1040, 4100)),
    Lists(1030, 1030, ("few",), keeps=1, causal=False),
)
LONG_LISTS = (  # blocks of 1024 threads; several blocks a list; orders that 16 bits cannot hold
    Lists(4100, 4100, ("bytes",), keeps=1),
    Lists(65_537, 65_537, ("few",), shared=False),
    Lists(16_390, 16_390, ("few",), keeps=1),
    Lists(65_540, 65_538, ("few",)),
    Lists(3, 16_390, ("bytes",), keeps=1),
    Lists(16_390, 16_390, ("few",), causal=False),
)


def ids(kind, shape):
    """Group ids: "few" and "bytes" take 4 and 8 bits of an int32, "wide" 20, "far" 64."""
    if kind == "far":
        extremes = torch.iinfo(torch.int64)
        choice = torch.tensor([extremes.min, -1, 0, 2**40, extremes.max])
        return choice[torch.randint(0, 5, shape)]
    most = {"few": 16, "bytes": 256, "wide": 1 << 20}[kind]
    return torch.randint(0, most, shape, dtype=torch.int32)


def read(*tensors):
    """Read every element, on the device."""
    for x in tensors:
        x.sum()


def pattern_of(call, device):
    """The pattern of a call; a poisoned key is one that the ids show to nobody."""
    keys = call.keys or call.rows
    q_shape, k_shape = (1, call.heads, call.rows), (1, call.heads_kv, keys)
    if call.pattern == "hash":
        q_hash, k_hash = (
            torch.randint(0, 3, shape, dtype=torch.int32) for shape in (q_shape, k_shape)
        )
        if call.poison:
            k_hash[..., 5] = 9
        causal = not call.keys
        return scfa.HashSparse(q_hash.to(device), k_hash.to(device), causal=causal)
    if call.pattern == "keep":
        keeps = ((torch.rand(s) < 0.6).to(device) for s in (q_shape, k_shape))
        return scfa.QKSparse(*keeps, causal=not call.keys)
    if call.pattern == "ranges":
        start = torch.randint(0, keys, q_shape)
        return scfa.KeyRanges(start.to(device), (start + keys // 3).to(device))
    return {"causal": scfa.Causal(), "window": scfa.SlidingWindow(20)}.get(
        call.pattern, scfa.SlidingWindow(0)
    )


def run_call(backend, device, call):
    """Plan, forward and backward once."""
    head_dim_v = call.head_dim_v or call.head_dim

    def tensor(heads, width, poison=False, rows=call.rows):
        wide = torch.randn((1, heads, rows, width + 16)).to(getattr(torch, call.dtype))
        if poison:
            wide[..., 5, :] = float("nan")
        first = 0 if call.aligned else 1
        return wide.to(device)[..., first : first + width]

    q, dout = (tensor(call.heads, width) for width in (call.head_dim, head_dim_v))
    keys = call.keys or call.rows
    k, v = (tensor(call.heads_kv, x, call.poison, keys) for x in (call.head_dim, head_dim_v))
    pattern = pattern_of(call, device)
    plan = scfa.make_plan(pattern, q, k, backend=backend)
    out, lse = scfa.attention(q, k, v, plan, return_lse=True, backend=backend)
    grads = scfa.attention_backward(dout, q, k, v, out, lse, plan, backend=backend)
    read(out, lse, *grads)


def run_union(backend, device, union):
    """Windows one behind the other, each a pattern of its own."""
    shape, dtype = (1, 2, union.rows, union.head_dim), getattr(torch, union.dtype)
    q, k, v = (torch.randn(shape).to(dtype).to(device).requires_grad_() for _ in range(3))
    sinks = torch.randn(2).to(device).requires_grad_() if union.sinks else None
    row = torch.arange(union.rows, device=device).view(1, 1, -1)
    patterns = [scfa.KeyRanges(row - 9 * at - 8, row - 9 * at + 1) for at in range(union.parts)]
    out = attention_over(q, k, v, patterns, sinks=sinks, backend=backend)
    leaves = [x for x in (q, k, v, sinks) if x is not None]
    read(out, *torch.autograd.grad(out, leaves, torch.randn(shape).to(dtype).to(device)))


def run_lists(backend, device, lists):
    """Plan once."""
    heads, heads_kv = (1, 1) if max(lists.seqlen_q, lists.seqlen_k) > 4096 else (2, 1)
    q_shape, k_shape = (1, heads, lists.seqlen_q), (1, heads_kv, lists.seqlen_k)
    pattern = scfa.Causal() if lists.causal else scfa.SlidingWindow(10**6, causal=False)
    for kind in lists.groups:
        groups = (ids(kind, shape).to(device) for shape in (q_shape, k_shape))
        pattern = pattern & scfa.HashSparse(*groups, causal=False)
    for _ in range(lists.keeps):
        keeps = ((torch.rand(shape) < 0.7).to(device) for shape in (q_shape, k_shape))
        pattern = pattern & scfa.QKSparse(*keeps, causal=False)
    if lists.ranges:
        dtype = getattr(torch, lists.ranges)
        start = torch.randint(-5, lists.seqlen_k, q_shape, dtype=dtype)
        pattern = pattern & scfa.KeyRanges(start.to(device), (start + 100).to(device))
    q, k = (torch.zeros((*shape, 16)).to(device) for shape in (q_shape, k_shape))
    least = planner_shapes._LEAST_ROWS if lists.shared else 1 << 31
    with mock.patch.object(planner_shapes, "_LEAST_ROWS", least):
        plan = scfa.make_plan(pattern, q, k, backend=backend)
    read(plan.q_index, plan.q_count, plan.k_index, plan.k_count, plan.key_start, plan.key_end)


def is_hopper(device):
    return device == "cuda" and torch.cuda.get_device_capability() == (9, 0)


def families_of(backend, device):
    """Name -> $SCFA_CUPY_KERNELS, $SCFA_CUPY_BACKWARD, function and cases of each family."""
    families = {
        "planner": ("auto", "auto", run_lists, PLANNER),
        "long-lists": ("auto", "auto", run_lists, LONG_LISTS),
        "portable": ("sm80", "auto", run_call, PORTABLE),
        "float32": ("sm80", "auto", run_call, FLOAT32),
    }
    if backend == "cupy" and is_hopper(device):
        families["hopper"] = ("auto", "split", run_call, HOPPER)
        families["fused"] = ("auto", "fused", run_call, HOPPER)
    if backend == "cupy":
        families["tf32"] = ("sm80", "auto", run_call, TF32)
        families["parts"] = ("sm80", "auto", run_union, PARTS)
        families["few"] = ("sm80", "auto", run_call, FEW)
    return families


def compile_kernels(families):
    """Compile what cupy's families use on all cores, into the cache on disk; run nothing."""
    sys.path.insert(0, str(Path(__file__).parent))
    import precompile

    precompile.compile_portable(
        {
            (
                "tf32" if name == "tf32" else call.dtype,
                *(call.head_dim, call.head_dim_v or call.head_dim),
                *(call.aligned, call.pattern != "ranges", call.heads // call.heads_kv),
            )
            for name, (*_, run, cases) in families.items()
            if run is run_call
            for call in cases
        }
        | {
            (union.dtype, union.head_dim, union.head_dim, True, False, 1)
            for *_, run, cases in families.values()
            if run is run_union
            for union in cases
        }
    )
    if "hopper" in families or "fused" in families:
        precompile.compile_hopper()


def run_family(backend, device, name, family):
    """Run the calls of a family in turn, telling which one has begun."""
    kernels, backward, run, cases = family
    os.environ["SCFA_CUPY_KERNELS"] = kernels
    os.environ["SCFA_CUPY_BACKWARD"] = backward
    os.environ["SCFA_CUPY_FP32"] = "tf32" if name == "tf32" else "exact"
    begin = time.perf_counter()
    for number, case in enumerate(cases, 1):
        print(f"call {number} of {len(cases)}: {case}", flush=True)
        run(backend, device, case)
        if device == "cuda":
            torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    print(f"{backend} {name}: {len(cases)} calls in {seconds:.1f} s", flush=True)


def main(arguments):
    """Run the named families, or all."""
    torch.manual_seed(0)
    names = [name for name in arguments if name != "--compile"]
    for backend in os.environ.get("SCFA_GPU_BACKENDS", "cupy").split(","):
        device = "cpu" if load_backend(backend).memory == "host" else "cuda"
        families = {
            name: family
            for name, family in families_of(backend, device).items()
            if not names or name in names
        }
        if "--compile" in arguments and backend == "cupy":
            compile_kernels(families)
            continue
        for name, family in families.items():
            run_family(backend, device, name, family)
    print("all calls done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
