"""The functions of the paper's released code, under their own names, layouts and defaults.

For code written against epfml/dynamic-sparse-flash-attention: change the import, keep the calls.
Arrays are (batch, seqlen, heads, head_dim) and indices (batch, seqlen, heads), as there. What the
original restricts (bfloat16, head_dim 64, equal head counts, CUDA) is free here.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

from scfa_core.extras import missing

try:
    import torch
    from torch import Tensor
    from torch.nn.functional import normalize, pad
except ModuleNotFoundError as error:
    raise missing("scfa_core.compat", "torch", error) from error

from scfa_core.api import attention
from scfa_core.array_kinds import adopt, check_dense, dtype_name, is_torch_tensor, restore_kind
from scfa_core.arrays import FLOAT_DTYPES
from scfa_core.dropping import drawn_by, random_keep
from scfa_core.errors import OptionError, PatternError, ShapeError
from scfa_core.hashing import angular_hash
from scfa_core.hashing_checks import check_buckets
from scfa_core.merging import namespace
from scfa_core.patterns import HashSparse, Pattern, QKSparse
from scfa_core.problem import HEAD_DIM_STEP, MAX_HEAD_DIM, MIN_HEAD_DIM, check_share
from scfa_core.torch_checks import check_device, check_dtype, check_index, check_tensor

__all__ = [
    "compact",
    "dynamic_sparse_attention",
    "hash_attention_fn",
    "hash_sparse_attention",
    "pad_index",
    "qk_attention_fn",
    "qk_sparse_attention",
]

# What torch gathers: no wider unsigned integers.
_INTEGERS, _COMPLEX = ("uint8", "int8", "int16", "int32", "int64"), ("complex64", "complex128")
_GATHERED = (*FLOAT_DTYPES, "bool", *_INTEGERS, *_COMPLEX)
_MODES = ("hash", "qk")
_HEADS_FIRST = ("batch", "heads", "seqlen", "head_dim")
_ROWS_FIRST = ("batch", "seqlen", "heads", "head_dim")


def dynamic_sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    q_idx: Any,
    k_idx: Any,
    sm_scale: float | None = None,
    sparsity_mode: str = "hash",
) -> Any:
    """Causal attention where each head of each sequence has its own sparsity.

    >>> x = torch.randn(1, 6, 2, 16)
    >>> buckets = torch.tensor([0, 1, 0, 1, 0, 1]).view(1, 6, 1).expand(1, 6, 2)
    >>> dynamic_sparse_attention(x, x, x, buckets, buckets).shape
    torch.Size([1, 6, 2, 16])

    Parameters
    ----------
    q : array, (batch, seqlen_q, heads, head_dim)
        Any dtype and library that `scfa_core.attention` takes, and any head_dim up to 256; other
        than multiples of 8 from 16 on cost a copy with zeros behind.
    k, v : array, (batch, seqlen_k, heads_kv, head_dim)
        As there; v may have its own head_dim.
    q_idx : array, (batch, seqlen_q, heads)
        Mode ``"hash"``: the bucket of each query, any integers. Mode ``"qk"``: 1 where the query
        is kept, 0 where dropped; floats, integers or bools.
    k_idx : array, (batch, seqlen_k, heads_kv)
        The same of each key.
    sm_scale : float, optional
        Multiplies ``q @ k.T``; default ``head_dim ** -0.5``.
    sparsity_mode : "hash" | "qk"
        Which of `hash_sparse_attention` and `qk_sparse_attention` to call.

    Returns
    -------
    out : array, (batch, seqlen_q, heads, head_dim of v)
        Differentiable for torch tensors. 0 where a query sees no key.

    Raises
    ------
    PatternError
        An unknown mode (the original raises KeyError).
    ShapeError, DTypeError, DeviceError, LayoutError, ScaleError, BackendUnavailable
        As `scfa_core.attention`.

    Notes
    -----
    Exact: every visible pair is computed, whatever the sizes of buckets. seqlen_q and seqlen_k may
    differ; positions count from 0 on both sides.
    """
    if sparsity_mode not in _MODES:
        raise PatternError(f"sparsity_mode must be one of {_MODES}, got {sparsity_mode!r}")
    indices = _heads_before_rows(q, k, q_idx=q_idx, k_idx=k_idx)
    pattern = HashSparse(*indices) if sparsity_mode == "hash" else QKSparse(*indices)
    return _attend(q, k, v, pattern, sm_scale)


def hash_sparse_attention(
    q: Any, k: Any, v: Any, q_hash: Any, k_hash: Any, sm_scale: float | None = None
) -> Any:
    """Key j is visible to query i iff ``q_hash[i] == k_hash[j]`` and ``j <= i``.

    Arguments, result and errors are those of `dynamic_sparse_attention`.
    """
    pattern = HashSparse(*_heads_before_rows(q, k, q_hash=q_hash, k_hash=k_hash))
    return _attend(q, k, v, pattern, sm_scale)


def qk_sparse_attention(
    q: Any, k: Any, v: Any, q_keep: Any, k_keep: Any, sm_scale: float | None = None
) -> Any:
    """Key j is visible to query i iff both are kept and ``j <= i``, in original positions.

    Arguments, result and errors are those of `dynamic_sparse_attention`. Dropped queries give 0;
    neither they nor dropped keys and values take gradients.
    """
    pattern = QKSparse(*_heads_before_rows(q, k, q_keep=q_keep, k_keep=k_keep))
    return _attend(q, k, v, pattern, sm_scale)


def _attend(
    q: Any, k: Any, v: Any, pattern: Pattern, sm_scale: float | None, layout: str = "bthd"
) -> Any:
    """Attention with any head_dim: columns of zeros change no score, and are cut off again."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dense(name, x)
    shapes: list[Any] = [getattr(x, "shape", ()) for x in (q, k, v)]
    if any(shape and shape[-1] > MAX_HEAD_DIM for shape in shapes):
        raise ShapeError(
            f"head_dim must be {MAX_HEAD_DIM} at most, got {max(shape[-1] for shape in shapes)}; "
            "no backend takes wider heads"
        )
    if not all(shape and shape[-1] > 0 for shape in shapes):
        return attention(q, k, v, pattern, softmax_scale=sm_scale, layout=layout)  # it says why
    _check_head_dims(q, k)  # the same once padded, perhaps
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    wide_q, wide_k, wide_v = (_widened(adopt(x)) for x in (q, k, v))
    out = attention(wide_q, wide_k, wide_v, pattern, softmax_scale=scale, layout=layout)
    return restore_kind(out if out.shape[-1] == v.shape[-1] else out[..., : v.shape[-1]], v)


def _check_head_dims(q: Any, k: Any) -> None:
    if q.shape[-1] != k.shape[-1]:
        raise ShapeError(
            f"q and k must have one head_dim, got q.shape={tuple(q.shape)} and "
            f"k.shape={tuple(k.shape)}"
        )


def _widened(x: Any) -> Any:
    """`x`, or a copy with zeros up to the next head_dim that is served."""
    head_dim = x.shape[-1]
    if dtype_name(x) not in FLOAT_DTYPES:
        return x  # `attention` says so
    missing = max(MIN_HEAD_DIM, -(-head_dim // HEAD_DIM_STEP) * HEAD_DIM_STEP) - head_dim
    if missing == 0:
        return x
    if is_torch_tensor(x):
        return pad(x, (0, missing))
    return namespace(x).pad(x, [(0, 0)] * (len(x.shape) - 1) + [(0, missing)])


def _heads_before_rows(q: Any, k: Any, **indices: Any) -> tuple[Any, ...]:
    """Views (batch, heads, seqlen) of indices (batch, seqlen, heads) of q and of k."""
    for (name, x), of, array in zip(indices.items(), "qk", (q, k), strict=True):
        check_dense(name, x)
        check_dense(of, array)
        if len(getattr(x, "shape", ())) != 3:
            raise ShapeError(
                f"{name} must be an array (batch, seqlen, heads), got "
                f"{tuple(x.shape) if hasattr(x, 'shape') else type(x).__name__}"
            )
        rows = tuple(getattr(array, "shape", ()))
        # Said here, in the caller's order of axes; the pattern would name them turned.
        pairs = zip(x.shape, rows[:3], strict=True) if len(rows) == 4 else ()
        # Not `in (1, size)`: a traced size of its own is found in no tuple.
        if any(held != 1 and held != size for held, size in pairs):
            raise ShapeError(
                f"{name} must be (batch, seqlen, heads) = {rows[:3]} as {of} is, or 1 where it "
                f"does not differ, got {tuple(x.shape)}"
            )
    return tuple(adopt(x).swapaxes(1, 2) for x in indices.values())


def compact(
    keep_tensor: Tensor, x: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Move the kept rows of each head to the front, in order, and cut after the longest head.

    Attention here needs none of this (kernels read rows where they lie); it serves code that did
    its own work on compacted tensors.

    >>> x = torch.arange(4.0).view(1, 4, 1, 1)
    >>> rows, index, count = compact(torch.tensor([0.0, 1, 0, 1]).view(1, 4, 1), x)
    >>> rows.flatten().tolist(), index.flatten().tolist(), count.tolist()
    ([1.0, 3.0], [1, 3], [[2]])

    Parameters
    ----------
    keep_tensor : Tensor, (batch, seqlen, heads)
        Nonzero where a row is kept.
    x : Tensor, (batch, seqlen, heads, head_dim)
        Differentiable.
    index : Tensor, optional, (batch, rows, heads), int64
        What an earlier call returned, to take the same rows of another tensor; `keep_tensor` is
        not looked at then. Rows of x; one that is named twice is taken twice.

    Returns
    -------
    compacted : Tensor, (batch, rows, heads, head_dim)
        Heads with fewer kept rows are filled up with their first dropped ones.
    index : Tensor, (batch, rows, heads), int64
        Original row of each.
    count : Tensor or None, (batch, heads), int64
        Number of kept rows; None if `index` was given.

    Raises
    ------
    ShapeError, DTypeError, DeviceError
        Arguments that are no tensors of these shapes on one device.
    PatternError
        An index that names rows which x has not.

    Notes
    -----
    Waits for the device, because `rows` is a number on the host. So does the look at the values of
    an `index`, which is left out while a CUDA graph is captured and while torch traces.
    """
    check_dtype("x", check_tensor("x", x, *_ROWS_FIRST), _GATHERED)
    count = None
    if index is None:
        if check_tensor("keep_tensor", keep_tensor, *_ROWS_FIRST[:3]).shape != x.shape[:3]:
            raise ShapeError(
                "keep_tensor must have a flag for each row and head of x, got "
                f"{tuple(keep_tensor.shape)} for x.shape={tuple(x.shape)}"
            )
        check_device("keep_tensor", keep_tensor, "x", x)
        check_dtype("keep_tensor", keep_tensor)
        kept = keep_tensor.detach() != 0
        count = kept.sum(dim=1)
        rows = int(count.max()) if count.numel() else 0
        index = torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)[:, :rows]
    else:
        check_index(index, x)
    return torch.take_along_dim(x, index.unsqueeze(-1), dim=1), index, count


@torch.no_grad()
def pad_index(index: Tensor, indices_per_head: Tensor, pad_idx: float = -1) -> Tensor:
    """Overwrite the entries of `compact`'s index that stand for no kept row.

    Parameters
    ----------
    index : Tensor, (batch, rows, heads)
    indices_per_head : Tensor, (batch, heads)
        Number of kept rows, from `compact`.
    pad_idx : int or float
        What to write; a whole number such as -1 or 1e9.

    Returns
    -------
    padded : Tensor, (batch, rows, heads), int32
        A copy.

    Raises
    ------
    ShapeError, DTypeError
        Arguments that are no tensors of these shapes.
    OptionError
        A `pad_idx` that is no whole number of 32 bits.
    """
    batch, _, heads = check_tensor("index", index, "batch", "rows", "heads").shape
    counts = check_tensor("indices_per_head", indices_per_head, "batch", "heads")
    check_dtype("index", index)
    check_dtype("indices_per_head", counts)
    if counts.shape != (batch, heads):
        raise ShapeError(
            f"indices_per_head must be (batch, heads) = ({batch}, {heads}) for "
            f"index.shape={tuple(index.shape)}, got {tuple(counts.shape)}"
        )
    check_device("indices_per_head", counts, "index", index)
    filler = _as_int32("pad_idx", pad_idx)
    place = torch.arange(index.shape[1], device=index.device).view(1, -1, 1)
    return index.to(torch.int32).masked_fill(place >= counts.long().unsqueeze(1), filler)


def _as_int32(name: str, value: Any) -> int:
    """Read a whole number, which may be a float such as 1e9."""
    number: Any = value if isinstance(value, Real) else 0.5
    if not -(2**31) <= number < 2**31 or number % 1:
        raise OptionError(f"{name} must be a whole number of 32 bits, got {value!r}")
    return int(number)


def hash_attention_fn(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    nb_hash: int = 8,
    hashes_per_head: bool = False,
    attention_dropout: float | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``attention_fn`` of the original's hash language model, (batch, heads, seqlen, head_dim).

    Buckets come from angular hashing with directions drawn anew at every call, and a query sees the
    keys of its bucket *before* its own position: ``j < i``. The scale is ``head_dim ** -0.5``.

    Parameters
    ----------
    Q, K, V : Tensor, (batch, heads, seqlen, head_dim)
        The original passes normalised queries as keys. K and V may have fewer heads.
    nb_hash : int
        Number of buckets, even.
    hashes_per_head : bool
        Whether each head (of K) has its own directions.
    attention_dropout : float, optional
        Ignored, as in the original; dropout of attention weights is not supported.
    generator : torch.Generator, optional
        Source of the directions, on Q's device; torch's own by default.

    Returns
    -------
    out : Tensor, (batch, heads, seqlen, head_dim of V)

    Raises
    ------
    PatternError
        An `nb_hash` that is no even int of at least 2.
    ShapeError, DTypeError, OptionError, DeviceError
        Arguments that are no tensors of these shapes, a generator that is none or elsewhere.
    """
    for name, x in (("Q", Q), ("K", K), ("V", V)):
        check_dtype(name, check_tensor(name, x, *_HEADS_FIRST), FLOAT_DTYPES)
    _check_head_dims(Q, K)
    heads = K.shape[1] if hashes_per_head else 1
    shape = (1, heads, Q.shape[3], check_buckets(nb_hash, "nb_hash") // 2)
    options = {"dtype": torch.float32} | drawn_by(generator, Q.device)  # whatever torch's default
    directions = normalize(torch.randn(shape, device=Q.device, **options), dim=2)
    pattern = HashSparse(
        angular_hash(Q, directions)[0], angular_hash(K, directions)[0], include_self=False
    )
    out: Tensor = _attend(Q, K, V, pattern, None, "bhtd")
    return out


def qk_attention_fn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparsity: float = 0.5,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``attention_fn`` of the original's dropping language model, (batch, seqlen, heads, head_dim).

    Each query and each key of each head is dropped with probability `sparsity`, independently and
    anew at every call; keys are normalised to length 1; ``j <= i``.

    Parameters
    ----------
    q, k, v : Tensor, (batch, seqlen, heads, head_dim)
        The original passes the queries as keys.
    sparsity : float
        Probability of being dropped, 0 to 1.
    generator : torch.Generator, optional
        Source of the choice, on q's device; torch's own by default.

    Returns
    -------
    out : Tensor, (batch, seqlen, heads, head_dim of v)
        In q's dtype; the original always returns bfloat16.

    Raises
    ------
    PatternError
        A `sparsity` that is no number from 0 to 1.
    ShapeError, DTypeError, OptionError, DeviceError
        Arguments that are no tensors of these shapes, a generator that is none or elsewhere.
    """
    check_share("sparsity", sparsity)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dtype(name, check_tensor(name, x, *_ROWS_FIRST), FLOAT_DTYPES)
    q_keep, k_keep = (
        ~random_keep(x.shape[:3], sparsity, device=x.device, generator=generator) for x in (q, k)
    )
    out: Tensor = qk_sparse_attention(q, normalize(k, dim=-1).to(q.dtype), v, q_keep, k_keep)
    return out
