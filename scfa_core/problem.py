"""The door: what is asked, in sizes, and every check that needs no look at values."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from numbers import Real
from typing import Any

from scfa_core.array_kinds import framework_of
from scfa_core.arrays import FLOAT_DTYPES, ArrayInfo, Framework
from scfa_core.errors import (
    DeviceError,
    DTypeError,
    LayoutError,
    OptionError,
    PatternError,
    ScaleError,
    ScfaError,
    ShapeError,
)

LAYOUTS = ("bhtd", "bthd")
_AXES = {
    "bhtd": "(batch, heads, seqlen, head_dim)",
    "bthd": "(batch, seqlen, heads, head_dim)",
}
MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 16, 256, 8
HEAD_DIMS = range(MIN_HEAD_DIM, MAX_HEAD_DIM + 1, HEAD_DIM_STEP)
MOST_ROWS = 2**31 - 1  # of queries and keys together: plans hold rows and offsets as int32
LARGEST_SCALE = 2e38  # times log2(e), as kernels take it, still a finite float32


@dataclass(frozen=True)
class Problem:
    """Sizes, element type, place and scale of one attention call; hashable, no arrays."""

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: str
    device: str
    softmax_scale: float
    deterministic: bool = True

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.heads_kv

    @property
    def is_empty(self) -> bool:
        """Whether there is no query row at all."""
        return self.batch * self.heads * self.seqlen_q == 0


def check_layout(layout: str) -> bool:
    """Return whether heads and seqlen are swapped; raise `LayoutError` on unknown names."""
    if layout not in LAYOUTS:
        raise LayoutError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    return layout == "bthd"


def check_flag(name: str, value: Any) -> bool:
    """Refuse flags that are not flags: "no" would count as yes."""
    if type(value) is not bool:
        raise OptionError(f"{name} must be True or False, got {told(value)}")
    return value


def _is_number(value: Any) -> bool:
    """Whether `value` is a real number of Python or NumPy, and not a flag."""
    return type(value) is not bool and isinstance(value, Real)


def check_share(name: str, value: Any) -> float:
    """Refuse what is no number from 0 to 1."""
    if not _is_number(value) or not 0 <= value <= 1:
        raise PatternError(f"{name} must be a number from 0 to 1, got {told(value)}")
    return float(value)


def check_scale(softmax_scale: Any, head_dim: int, dtype: str) -> float:
    """Return the scale in force; None means ``head_dim ** -0.5`` and 0.0 is kept."""
    if softmax_scale is None:
        return head_dim**-0.5 if head_dim else 1.0
    if not _is_number(softmax_scale):
        raise ScaleError(
            "softmax_scale must be a finite number or None (multiply q by a scale that is learned "
            f"or lies on a device), got {softmax_scale!r}"
        )
    try:
        value = float(softmax_scale)
    except OverflowError:  # an int of Python's beyond any float
        value = math.inf
    if not math.isfinite(value):
        raise ScaleError(f"softmax_scale must be finite, got {softmax_scale!r}")
    if dtype != "float64" and abs(value) > LARGEST_SCALE:
        raise ScaleError(
            f"softmax_scale must be at most {LARGEST_SCALE} in size for {dtype}, whose scores are "
            f"float32, got {softmax_scale!r}"
        )
    return value


def _check_tensor(name: str, info: ArrayInfo, layout: str) -> None:
    if len(info.shape) != 4:
        raise ShapeError(
            f"{name} must have 4 axes {_AXES[layout]} for layout={layout!r}, "
            f"got {name}.shape={info.shape}"
        )
    if info.dtype not in FLOAT_DTYPES:
        raise DTypeError(
            f"{name} must be one of {FLOAT_DTYPES}, got {info.dtype}; "
            "cast it (.to(torch.bfloat16), .astype('float32'))"
        )
    if 0 not in info.shape and info.shape[-1] > 1 and info.strides[-1] != 1:
        raise LayoutError(
            f"the last axis of {name} (head_dim) must be contiguous, got strides {info.strides} "
            f"in elements; call .contiguous() (torch) or ascontiguousarray (NumPy, CuPy)"
        )


def _check_head_dim(name: str, size: int) -> None:
    if not MIN_HEAD_DIM <= size <= MAX_HEAD_DIM or size % HEAD_DIM_STEP:
        cure = "pad the last axis with zeros and pass softmax_scale explicitly"
        raise ShapeError(
            f"{name} must be a multiple of {HEAD_DIM_STEP} from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, "
            f"got {size}; {cure if size < MAX_HEAD_DIM else 'no backend takes wider heads'}"
        )


def _same_place(q: ArrayInfo, **others: ArrayInfo) -> None:
    for name, info in others.items():
        if info.device != q.device:
            raise DeviceError(
                f"all arrays must be on one device, got q on {q.device}, {name} on {info.device}; "
                "move them to one"
            )
        if info.dtype != q.dtype:
            raise DTypeError(
                f"q, k and v must share a dtype, got q {q.dtype} and {name} {info.dtype}; cast one "
                "to the other's"
            )


def build_problem(
    q: ArrayInfo,
    k: ArrayInfo,
    v: ArrayInfo | None,
    *,
    layout: str,
    softmax_scale: float | None = None,
    deterministic: bool = True,
) -> Problem:
    """Check shapes, dtypes, devices and scale of one call, and name its sizes.

    `v` may be None where only planning is asked for; head_dim_v is then head_dim. Infos describe
    the arrays as the caller gave them (`layout` not yet normalised).
    """
    swap = check_layout(layout)
    infos = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, info in infos.items():
        _check_tensor(name, info, layout)
    _same_place(q, **{name: info for name, info in infos.items() if name != "q"})
    head_axis, seq_axis = (2, 1) if swap else (1, 2)
    batch, heads, seqlen_q, head_dim = (
        q.shape[0],
        q.shape[head_axis],
        q.shape[seq_axis],
        q.shape[3],
    )
    heads_kv, seqlen_k = k.shape[head_axis], k.shape[seq_axis]
    if k.shape[0] != batch:
        cure = "; .expand the one of 1, without a copy" if 1 in (batch, k.shape[0]) else ""
        raise ShapeError(f"q and k must have the same batch, got {q.shape=}, {k.shape=}{cure}")
    if k.shape[3] != head_dim:
        raise ShapeError(f"q and k must have the same head_dim, got {q.shape=}, {k.shape=}")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ShapeError(f"k and v must agree in all but the last axis, got {k.shape=}, {v.shape=}")
    if heads and (heads_kv == 0 or heads % heads_kv):
        raise ShapeError(
            f"heads_kv must divide heads, got {heads} query heads and {heads_kv} key/value heads "
            f"({q.shape=}, {k.shape=}, layout={layout!r}); is layout the one you mean?"
        )
    if type(seqlen_q) is type(seqlen_k) is int and seqlen_q + seqlen_k > MOST_ROWS:
        raise ShapeError(
            f"seqlen_q + seqlen_k must be at most {MOST_ROWS}, got {seqlen_q} + {seqlen_k}; split "
            "the keys (scfa_core.decoding.attention_in_parts)"
        )
    head_dim_v = head_dim if v is None else v.shape[3]
    _check_head_dim("head_dim", head_dim)
    _check_head_dim("head_dim_v", head_dim_v)
    return Problem(
        batch,
        heads,
        heads_kv,
        seqlen_q,
        seqlen_k,
        head_dim,
        head_dim_v,
        q.dtype,
        q.device,
        check_scale(softmax_scale, head_dim, q.dtype),
        check_flag("deterministic", deterministic),
    )


def check_like(name: str, got: ArrayInfo, shape: tuple[int, ...], dtype: str, device: str) -> None:
    """Refuse a companion array (out, lse, dout) that does not fit the call."""
    if got.shape != shape:
        raise ShapeError(f"{name} must have shape {shape}, got {got.shape}")
    if got.dtype != dtype:
        raise DTypeError(f"{name} must be {dtype}, got {got.dtype}")
    if got.device != device:
        raise DeviceError(f"{name} must be on {device} like q, got {got.device}")


def one_framework(q: Any, **others: Any) -> Framework:
    """Return the framework of `q` and refuse arrays of another library beside it."""
    framework = framework_of("q", q)
    for name, x in others.items():
        if framework_of(name, x) is not framework:
            raise DeviceError(
                f"all arrays must come from one library, got q from {framework.name} and "
                f"{name} of type {type(x).__module__}.{type(x).__name__}; convert one of them "
                "(torch.from_numpy, .numpy(), cupy.asarray)"
            )
    return framework


def is_symbolic(value: Any) -> bool:
    """Whether this is a torch.SymInt, a length left open; torch.compile shows its own as ints."""
    return type(value).__module__ == "torch" and type(value).__name__ == "SymInt"


def is_flag(value: Any) -> bool:
    """Whether this is a bool, of Python, NumPy or torch, all of which count as ints somewhere."""
    if isinstance(value, int):  # among them the symbolic ones of a compiler, which lack a dtype
        return isinstance(value, bool)
    return str(getattr(value, "dtype", "")).endswith("bool")


def told(value: Any) -> str:
    """What an option was given as, in a message: an array by its shape, not by its values."""
    shape = getattr(value, "shape", ())
    return f"an array of shape {tuple(shape)}" if shape else repr(value)


def as_size(name: str, value: Any, least: int = 0, error: type[ScfaError] = ShapeError) -> int:
    """Read an integer size, refusing floats and flags of any library."""
    try:
        size = None if is_flag(value) else operator.index(value)
    except TypeError:
        size = None
    if size is None:
        raise error(f"{name} must be an int, got {told(value)}")
    if size < least:
        raise error(f"{name} must be at least {least}, got {size}")
    return size
