"""From a problem to kernels on a stream: which variant, which grid, which arguments.

What depends on shapes and strides alone is prepared once and remembered, so that a call packs its
pointers and launches. Hopper cards have kernels of their own in `launch_sm90`, asked first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from scfa_core.backends.cupy_raw import bound_sm90, few_queries, launch_sm90
from scfa_core.backends.cupy_raw.loader import (
    compute_capability,
    get_kernel,
    shared_limit,
    side_by_side,
)
from scfa_core.backends.cupy_raw.params import POINTERS, pack_sizes, pack_strides
from scfa_core.backends.cupy_raw.variants import WIDEST_TF32, Variant, choose

from scfa_core.arrays import ITEMSIZE, DeviceArray
from scfa_core.environment import Choice
from scfa_core.errors import BackendUnavailable
from scfa_core.plan import PlanAddresses, PlanArrays

if TYPE_CHECKING:
    from scfa_core.arrays import CallContext
    from scfa_core.dispatch import Bound
    from scfa_core.problem import Problem

__all__ = ["bind_backward", "bind_forward", "multiplies_tf32", "run_backward", "run_forward"]

_ALIGNMENT = 16  # bytes one copy moves
_ROW_REACH = 1 << 32  # bytes from row to row that one 32-bit multiply can span
_MOST_REMEMBERED = 4096  # calls; dropped all at once, as shapes rarely vary more
_asked = Choice("SCFA_CUPY_KERNELS", "auto", "sm80", "sm90")
_asked_products = Choice("SCFA_CUPY_FP32", "exact", "tf32")
_remembered: dict[tuple[object, ...], Bound] = {}


def _hopper(device: int) -> bool:
    """Whether the Hopper kernels are to be asked, by $SCFA_CUPY_KERNELS and the card."""
    name = _asked.word(_asked.get())
    found = compute_capability(device)
    if name == "sm90" and found != (9, 0):
        raise BackendUnavailable(
            f"$SCFA_CUPY_KERNELS=sm90 asks for the Hopper kernels, cuda:{device} has compute "
            f"capability {found[0]}.{found[1]}: unset it"
        )
    return name != "sm80" and found == (9, 0)


def _tf32(asked: str | None) -> bool:
    """Whether products of float32 arrays may be TF32, with $SCFA_CUPY_FP32 `asked`."""
    return _asked_products.word(asked) == "tf32"


def multiplies_tf32(dtype: str, head_dim: int, head_dim_v: int) -> bool:
    """Whether products of such arrays are TF32 now."""
    narrow = max(head_dim, head_dim_v) <= WIDEST_TF32
    return dtype == "float32" and _tf32(_asked_products.get()) and narrow


def _aligned(arrays: tuple[DeviceArray, ...]) -> bool:
    """Whether every row of every array starts at a multiple of 16 bytes, less than 4 GiB apart."""
    itemsize = ITEMSIZE[arrays[0].dtype]
    for array in arrays:
        if array.pointer % _ALIGNMENT:
            return False
        for size, stride in zip(array.shape[:3], array.strides[:3], strict=True):
            if size > 1 and stride * itemsize % _ALIGNMENT:
                return False
        if not 0 <= array.strides[2] * itemsize < _ROW_REACH:
            return False
    return True


def _prepare(
    kernel: str,
    problem: Problem,
    device: int,
    aligned: bool,
    monotone: bool,
    tf32: bool,
    strides: bytes,
) -> Callable[[int, bytes], None]:
    """Choose and load the variant of one kernel; what comes back wants a stream and pointers."""
    variant: Variant = choose(
        kernel,
        "tf32" if tf32 else problem.dtype,
        problem.head_dim,
        problem.head_dim_v,
        aligned=aligned,
        monotone=monotone or kernel != "bwd_dkdv",
        group_size=problem.group_size,
        shared_limit=shared_limit(device),
    )
    if kernel == "bwd_dkdv":
        tiles = problem.batch * problem.heads_kv * -(-problem.seqlen_k // variant.shape.block_n)
    else:
        tiles = problem.batch * problem.heads * -(-problem.seqlen_q // variant.shape.block_m)
    loaded = get_kernel(variant.name, variant.source, variant.constants, device)
    shared_bytes = variant.shared(problem.group_size)
    enqueue = loaded.bind((tiles, 1 + variant.shape.split, 1), variant.threads, shared_bytes)
    tail = strides + pack_sizes(problem)
    return lambda stream, pointers: enqueue(stream, pointers + tail)


class _BoundForward:
    """The forward of one problem at one set of strides; which kernel, addresses decide too."""

    def __init__(self, problem: Problem, *arrays: DeviceArray) -> None:
        self._problem, self._arrays = problem, arrays
        self._float32 = problem.dtype == "float32"
        self._chosen: dict[object, Bound] = {}

    def __call__(self, plan: PlanAddresses, arrays: tuple[int, ...], ctx: CallContext) -> None:
        q, k, v, out, _ = arrays
        products = _asked_products.get() if self._float32 else None
        key = (_asked.get(), products, plan.monotone, (q | k | v | out) % _ALIGNMENT == 0)
        run = self._chosen.get(key)
        if run is None:
            run = self._chosen[key] = self._choose(plan, arrays, _tf32(products))
        run(plan, arrays, ctx)

    def _choose(self, plan: PlanAddresses, addresses: tuple[int, ...], tf32: bool) -> Bound:
        """Take the kernel for few queries, the Hopper kernel where it serves, or a portable one."""
        problem = self._problem
        arrays = _at(self._arrays, addresses)
        q, k, v, out, _ = arrays
        device, lists = q.device, _lists(plan, q.device)
        few = few_queries.serves(problem) and _asked.get() != "sm90"
        hopper = not few and _hopper(device)
        if hopper and launch_sm90.supports_forward(problem, q, k, v, lists):
            return bound_sm90.bind_forward(problem, plan.monotone, *self._arrays)
        aligned = _aligned((q, k, v, out))
        strides = pack_strides((*(x.strides for x in arrays), None, None, None, None))
        if few:
            return few_queries.bind_forward(problem, device, aligned, strides)
        launch = _prepare("fwd", problem, device, aligned, True, tf32, strides)

        def run(plan: PlanAddresses, arrays: tuple[int, ...], ctx: CallContext) -> None:
            launch(ctx.stream, POINTERS.pack(*arrays, 0, 0, 0, 0, 0, 0, *_read_lists(plan)))

        return run


class _BoundBackward:
    """The backward of one problem at one set of strides, likewise."""

    def __init__(self, problem: Problem, *arrays: DeviceArray) -> None:
        self._problem, self._arrays = problem, arrays
        self._float32 = problem.dtype == "float32"
        self._chosen: dict[object, Bound] = {}

    def __call__(self, plan: PlanAddresses, arrays: tuple[int, ...], ctx: CallContext) -> None:
        dout, q, k, v, out, _, dq, dk, dv = arrays
        read = (q | k | v | out | dout) % _ALIGNMENT == 0
        written = (dq | dk | dv) % _ALIGNMENT == 0
        products = _asked_products.get() if self._float32 else None
        key = (_asked.get(), products, plan.monotone, read, written)
        run = self._chosen.get(key)
        if run is None:
            run = self._chosen[key] = self._choose(plan, arrays, _tf32(products))
        run(plan, arrays, ctx)

    def _choose(self, plan: PlanAddresses, addresses: tuple[int, ...], tf32: bool) -> Bound:
        """Take the Hopper kernels where they serve, else portable ones."""
        problem = self._problem
        dout, q, k, v, out, lse, dq, dk, dv = _at(self._arrays, addresses)
        device, lists = q.device, _lists(plan, q.device)
        if _hopper(device) and launch_sm90.supports_backward(problem, dout, q, k, v, out, lists):
            return bound_sm90.bind_backward(problem, plan.monotone, *self._arrays)
        aligned = _aligned((q, k, v, out, dout, dq, dk, dv))
        strides = pack_strides([x.strides for x in (q, k, v, out, lse, dout, dq, dk, dv)])
        how = (problem, device, aligned, plan.monotone, tf32, strides)
        kernels = ("bwd_dq", "bwd_dkdv")
        which = (problem.dtype, problem.head_dim, problem.head_dim_v, problem.group_size)
        side_by_side(
            (*kernels, *which, device, aligned, plan.monotone, tf32),
            [partial(_prepare, kernel, *how) for kernel in kernels],
        )
        launches = [_prepare(kernel, *how) for kernel in kernels]
        rows = problem.batch * problem.heads * problem.seqlen_q

        def run(plan: PlanAddresses, arrays: tuple[int, ...], ctx: CallContext) -> None:
            dout, q, k, v, out, lse, *grads = arrays
            statistics = ctx.empty((2 * rows,), "float32").pointer
            pointers = POINTERS.pack(
                *(q, k, v, out, lse, dout, *grads),
                *(statistics, statistics + 4 * rows),
                *_read_lists(plan),
            )
            for launch in launches:
                launch(ctx.stream, pointers)

        return run


bind_forward, bind_backward = _BoundForward, _BoundBackward


def run_forward(problem: Problem, plan: PlanArrays, *arrays_and_ctx: Any) -> None:
    """Enqueue the forward kernel: every element of `out` and `lse` is written.

    Arguments are those of the backend's verb.
    """
    _run(bind_forward, problem, plan, *arrays_and_ctx)


def run_backward(problem: Problem, plan: PlanArrays, *arrays_and_ctx: Any) -> None:
    """Enqueue the dq, then the dk/dv kernel: every element is written, deterministic bit for bit.

    Notes
    -----
    Arguments are those of the backend's verb. Workspace: 8 bytes a query row (lse and delta, in
    sorted order); on Hopper more where ranges lie in any order or are long
    (`bound_sm90.bind_backward`).
    """
    _run(bind_backward, problem, plan, *arrays_and_ctx)


def _run(
    bind: Callable[..., Bound], problem: Problem, plan: PlanArrays, *arrays_and_ctx: Any
) -> None:
    """Bind to described arrays, or remember having done so, and run."""
    *arrays, ctx = arrays_and_ctx
    key = (bind, problem, *(x.strides for x in arrays), arrays[0].device)
    bound = _remembered.get(key)
    if bound is None:
        if len(_remembered) >= _MOST_REMEMBERED:
            _remembered.clear()
        bound = _remembered[key] = bind(problem, *arrays)
    addresses = PlanAddresses.of((x.pointer for x in plan[:-1]), plan.monotone)
    bound(addresses, tuple(x.pointer for x in arrays), ctx)


def _at(arrays: tuple[DeviceArray, ...], addresses: tuple[int, ...]) -> tuple[DeviceArray, ...]:
    return tuple(x._replace(pointer=at) for x, at in zip(arrays, addresses, strict=True))


def _lists(plan: PlanAddresses, device: int) -> PlanArrays:
    """The plan for those who look at pointers only."""
    arrays = (DeviceArray(at, (), (), "int32", device) for at in plan[:-1])
    return PlanArrays.of(arrays, plan.monotone)


def _read_lists(plan: PlanAddresses) -> tuple[int, int, int, int, int]:
    """Addresses in the order of Params."""
    return plan.q_index, plan.k_index, plan.k_count, plan.key_start, plan.key_end
