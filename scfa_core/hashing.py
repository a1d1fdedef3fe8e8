"""Locality-sensitive hashing of queries and keys, one round or several, for `HashSparse`.

Angular hashing (arXiv 2306.01160, section 3.2): the bucket of x is ``argmax [xR, -xR]`` for random
directions R, so vectors that point the same way tend to share a bucket. Works on torch tensors,
NumPy, CuPy and Numba device arrays; imports none of them but NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from scfa_core.array_kinds import adopt, framework_of, is_torch_tensor, restore_kind
from scfa_core.arrays import cuda_ordinal
from scfa_core.dispatch import load_backend
from scfa_core.errors import PatternError, ShapeError
from scfa_core.hashing_checks import (
    CENTER_ROWS,
    centers_from,
    check_buckets,
    check_integers,
    check_real,
    check_shapes,
    of_one_library,
)
from scfa_core.merging import namespace
from scfa_core.patterns import HashSparse
from scfa_core.problem import as_size, check_flag

__all__ = [
    "Balance",
    "angular_hash",
    "bucket_balance",
    "disjoint_rounds",
    "random_directions",
]

_WORKSPACE = 1 << 24  # projections of arrays held at once: 64 MiB of float32
_PACKED_BITS = 62
MOST_PARTS = 1024  # patterns of `disjoint_rounds`; each is an attention call


def random_directions(
    heads: int, head_dim: int, buckets: int, *, rounds: int = 1, seed: int | None = None
) -> np.ndarray:
    """Draw the directions of `angular_hash`: independent normal columns of length 1.

    >>> random_directions(heads=4, head_dim=32, buckets=16, seed=0).shape
    (1, 4, 32, 8)

    Parameters
    ----------
    heads : int
        Heads with directions of their own; 1 shares them among all. With grouped queries: heads_kv.
    head_dim : int
        Length of the vectors to hash.
    buckets : int
        Even, at least 2.
    rounds : int
        Independent hashes.
    seed : int, optional
        The same seed gives the same directions everywhere; None draws fresh ones.

    Returns
    -------
    directions : numpy float32 array, (rounds, heads, head_dim, buckets // 2)
        Store them with the model: buckets mean nothing without them.

    Raises
    ------
    PatternError
        Buckets that are no even int of at least 2, another count that is no int of at least 1, or a
        seed that is no int of at least 0.
    """
    check_buckets(buckets)
    heads, head_dim, rounds = (
        as_size(name, size, 1, PatternError)
        for name, size in (("heads", heads), ("head_dim", head_dim), ("rounds", rounds))
    )
    if seed is not None:
        seed = as_size("seed (None draws a fresh one)", seed, 0, PatternError)
    shape = (rounds, heads, head_dim, buckets // 2)
    directions = np.random.default_rng(seed).standard_normal(shape, np.float32)
    length = np.linalg.norm(directions, axis=2, keepdims=True)
    return directions / np.maximum(length, np.finfo(np.float32).tiny)


def angular_hash(x: Any, directions: Any, center: Any = None) -> Any:
    """Bucket of each row of `x`, in every round: ``argmax [x @ R, -(x @ R)]``.

    >>> x = np.eye(4, 16, dtype=np.float32)[None, None]
    >>> angular_hash(x, random_directions(1, 16, 8, seed=1)).shape
    (1, 1, 1, 4)

    Parameters
    ----------
    x : array, (batch, heads, seqlen, head_dim)
        Torch, NumPy, CuPy, Numba on a GPU, or DLPack. Not the length of a row matters, only where
        it points.
    directions : array of the same library and device, (rounds, heads or a divisor, head_dim, n)
        From `random_directions`. Where it has fewer heads than `x`, consecutive heads of `x` share
        them, as grouped queries share keys.
    center : array, (heads or a divisor, head_dim), optional
        Subtracted from every row first. Rows of a deep layer have much in common, so that few
        buckets hold most of them; about their mean they spread. In a causal model take a mean of
        other batches: one of this batch knows later rows. Or (batch, heads or a divisor,
        ceil(seqlen / 64), head_dim): a center for every 64 rows of each sequence, such as a mean of
        those before them.

    Returns
    -------
    bucket : int32 array, (rounds, batch, heads, seqlen)
        Of the library of `x`, from 0 to 2 n - 1. Not differentiable.

    Raises
    ------
    DTypeError
        What is no array, or one of complex numbers.
    DeviceError
        Arrays of several libraries or devices.
    ShapeError
        Axes that do not fit.

    Notes
    -----
    Products are summed in float32 whatever the dtype of `x`; of equal products the lowest bucket
    wins. Backends sum in different orders: where a row's two best products differ by less than the
    rounding of such a sum, its bucket may differ between backends, and between a hash of all rows
    and one of some. Where torch multiplies on a GPU, its own switch to TF32 for float32 products
    (off unless set) holds here as well. A row with NaN or infinities gets some valid bucket.

    On a GPU that the backend ``cupy`` serves, one kernel does it all for float16, bfloat16 and
    float32 rows of head_dim up to 256 and up to 128 buckets, and writes nothing but buckets.
    Elsewhere products are made for a stretch of rows at a time, so that memory stays bounded (64
    MiB) whatever the length. Either way rows of a (batch, seqlen, heads, head_dim) array seen
    through a transpose are not copied. For torch tensors it is the operator ``scfa::angular_hash``,
    which `torch.compile`, `torch.export` and CUDA graphs keep whole.
    """
    given = x
    x, directions, *rest = of_one_library(x=x, directions=directions, center=center)
    center = rest[0] if rest else None
    check_real(x=x, directions=directions, center=center)
    check_shapes(x, directions, center)
    if is_torch_tensor(x):
        from scfa_core.torch_hashing import ANGULAR_HASH, hash_rows

        center = None if center is None else center.detach()
        if hasattr(x, "placements"):  # a DTensor
            import scfa_core.distributed_rules  # noqa: F401  (registers them)
        # another kind of device finds its way through torch's own operators
        hashed = ANGULAR_HASH if x.device.type in ("cpu", "cuda", "meta") else hash_rows
        return hashed(x.detach(), directions.detach(), center)
    if type(x).__module__.startswith("cupy"):
        bucket = _hash_by_kernel(x, directions, center)
        if bucket is not None:
            return restore_kind(bucket, given)
    seqlen, stretches = x.shape[2], rows_at_once(x.shape, directions.shape)
    if seqlen <= stretches:
        return restore_kind(_hash_array(x, directions, center), given)
    pieces = [
        _hash_array(x[:, :, at : at + stretches], directions, centers_from(center, at))
        for at in range(0, seqlen, stretches)
    ]
    return restore_kind(namespace(x).concatenate(pieces, axis=-1), given)


def rows_at_once(x: Sequence[int], directions: Sequence[int]) -> int:
    """How many rows of a list to hash at once, whole stretches that share a center."""
    products = max(1, directions[0] * x[0] * x[1] * directions[3])  # of a row
    return max(_WORKSPACE // products // CENTER_ROWS, 1) * CENTER_ROWS


def _hash_by_kernel(x: Any, directions: Any, center: Any) -> Any:
    """Buckets of CuPy rows by the kernel, or None where it does not serve."""
    framework = framework_of("x", x)
    info = framework.info(x)
    if isinstance(load_backend("cupy"), str):
        return None
    from scfa_core.backends.cupy_raw.hashing import reason_against, run_angular_hash

    ordinal = cuda_ordinal(info.device)
    if reason_against(info.dtype, x.shape[3], directions.shape[3], ordinal) is not None:
        return None
    context = framework.context(info.device)
    with x.device:
        xp = namespace(x)
        x = x if info.strides[3] == 1 or x.shape[3] == 1 else xp.ascontiguousarray(x)
        tables = [
            None if y is None else xp.ascontiguousarray(y, dtype=np.float32)
            for y in (directions, center)
        ]
        bucket = xp.empty((directions.shape[0], *x.shape[:3]), np.int32)
    arrays = (x, *tables, bucket)
    native: list[Any] = [None if y is None else framework.native(y, "cuda") for y in arrays]
    rows, columns, middle, out = native
    run_angular_hash(rows, columns, middle, out, context.stream)
    return bucket


def _hash_array(x: Any, directions: Any, center: Any) -> Any:
    """Buckets of some rows, NumPy or CuPy."""
    heads, seqlen = x.shape[1:3]
    directions = directions.astype(np.float32).repeat(heads // directions.shape[1], axis=1)
    turned = x.astype(np.float32) @ directions[:, None]
    if center is not None:
        axis = 1 if len(center.shape) == 4 else 0
        center = center.astype(np.float32).repeat(heads // center.shape[axis], axis=axis)
        if axis:
            turned -= (center @ directions[:, None]).repeat(CENTER_ROWS, axis=3)[:, :, :, :seqlen]
        else:
            turned -= (center[:, None] @ directions)[:, None]
    up, down = turned.argmax(axis=-1), turned.argmin(axis=-1)
    is_up = turned.max(axis=-1) >= -turned.min(axis=-1)
    return (up * is_up + (down + turned.shape[-1]) * ~is_up).astype(np.int32)


class Balance(NamedTuple):
    """How evenly rows spread over buckets; floats and NumPy arrays on the host."""

    counts: np.ndarray  # (..., buckets): rows in each bucket
    largest: float  # rows in the largest bucket of all
    imbalance: float  # largest over the even share; 1 is perfect
    effective_buckets: float  # 1 / sum(share**2), averaged: as many even buckets cost the same
    empty: float  # fraction of buckets without a row


def bucket_balance(bucket: Any, buckets: int) -> Balance:
    """Count rows per bucket, to judge a hash.

    The pairs that attention computes grow with the sum of squared bucket sizes; skewed buckets cost
    time, never exactness.

    >>> bucket_balance(np.array([0, 0, 1, 2]), 4).imbalance
    2.0

    Parameters
    ----------
    bucket : integer array, (..., seqlen)
        From `angular_hash`, any library.
    buckets : int
        How many there are.

    Returns
    -------
    balance : Balance

    Raises
    ------
    DTypeError
        What is no array of integers.
    ShapeError
        No axis of rows.
    PatternError
        A bucket outside ``range(buckets)``, or buckets that are no int of at least 1.

    Notes
    -----
    Copies to the host and so waits for the device.
    """
    from scfa_core.reference.masks import to_host

    buckets = as_size("buckets", buckets, 1, PatternError)
    bucket = adopt(bucket)
    framework_of("bucket", bucket)  # or it says what is wrong
    check_integers("bucket", bucket)
    if not len(bucket.shape):
        raise ShapeError("bucket must be (..., seqlen), got an array without axes; bucket[None]?")
    ids = to_host(bucket)
    if ids.size and (ids.min() < 0 or ids.max() >= buckets):
        raise PatternError(
            f"buckets must lie in [0, {buckets}), got values from {ids.min()} to {ids.max()}"
        )
    flat = ids.reshape(math.prod(ids.shape[:-1]), ids.shape[-1]).astype(np.int64)
    counts = np.zeros((flat.shape[0], buckets), np.int64)
    np.add.at(counts, (np.arange(flat.shape[0])[:, None], flat), 1)
    seqlen = max(ids.shape[-1], 1)
    share = counts / seqlen
    largest = float(counts.max(initial=0))
    squares = (share**2).sum(axis=-1)
    return Balance(
        counts.reshape(*ids.shape[:-1], buckets),
        largest,
        largest * buckets / seqlen,
        float(np.mean(1 / np.maximum(squares, np.finfo(np.float64).tiny))) if ids.size else 0.0,
        float((counts == 0).mean()) if counts.size else 0.0,
    )


def disjoint_rounds(
    q_bucket: Any, k_bucket: Any, buckets: int, *, causal: bool = True, include_self: bool = True
) -> list[HashSparse]:
    """Patterns that together see each pair sharing a bucket in *any* round, exactly once.

    Give them to `scfa_core.merging.attention_over`.

    Parameters
    ----------
    q_bucket : integer array, (rounds, batch, heads, seqlen_q)
        Values from 0 to buckets - 1; others are not noticed and give wrong pairs.
    k_bucket : integer array, (rounds, batch, heads_kv, seqlen_k)
    buckets : int
        How many there are.
    causal, include_self : bool
        As for `HashSparse`.

    Returns
    -------
    patterns : list of HashSparse
        Pairwise disjoint. ``1 + L + L**2 + ...`` of them, one power per round, where L is the
        number of bits of a bucket: with 16 buckets 5 for 2 rounds, 21 for 3.

    Raises
    ------
    DTypeError, DeviceError
        What is no array of integers; arrays of several libraries or devices.
    ShapeError
        Other axes than these four.
    PatternError
        Buckets that are no int of at least 1, different numbers of rounds, none, or so many that
        more than 1,024 patterns come of them.

    Notes
    -----
    Round r must see the pairs that are equal in r and unequal in every earlier round. Two buckets
    are unequal iff they differ first (from the top) in some bit t, for exactly one t; that is again
    an equality, ``(q >> t) ^ 1 == k >> t``. So "unequal" is a disjoint union of L hash patterns and
    everything stays a sum of positive terms. Inclusion-exclusion would need ``2**rounds - 1`` calls
    but subtracts: a pair that agrees in all rounds, such as a query's nearest key, would be summed
    up to ``2**rounds - 1`` times over and cancelled again, losing as many times the precision.
    """
    buckets = as_size("buckets", buckets, 1, PatternError)
    check_flag("causal", causal)
    check_flag("include_self", include_self)
    q_bucket, k_bucket = of_one_library(q_bucket=q_bucket, k_bucket=k_bucket)
    for name, x in (("q_bucket", q_bucket), ("k_bucket", k_bucket)):
        if len(x.shape) != 4:
            raise ShapeError(
                f"{name} must be (rounds, batch, heads, seqlen), as angular_hash returns it, got "
                f"{name}.shape={tuple(x.shape)}"
            )
        check_integers(name, x)
    rounds = q_bucket.shape[0]
    bits = bits_of(buckets)
    if k_bucket.shape[0] != rounds:
        raise PatternError(f"q has {rounds} rounds of buckets, k has {k_bucket.shape[0]}")
    if not rounds:
        raise PatternError("q_bucket and k_bucket must hold at least one round, got none")
    check_rounds(rounds, buckets)
    q, k = _as_int64(q_bucket), _as_int64(k_bucket)
    patterns = []
    for r in range(rounds):
        prefixes = [(q[r], k[r])]  # one pair of ids per choice of first differing bits
        for earlier in range(r):
            prefixes = [
                (
                    _joined(a, bits, _from_bit(q[earlier], t) ^ 1),
                    _joined(b, bits, _from_bit(k[earlier], t)),
                )
                for a, b in prefixes
                for t in range(bits)
            ]
        patterns += [
            HashSparse(a, b, causal=causal, include_self=include_self) for a, b in prefixes
        ]
    return patterns


def bits_of(buckets: int) -> int:
    """Bits that tell so many buckets apart."""
    return max((buckets - 1).bit_length(), 1)


def check_rounds(rounds: int, buckets: int) -> None:
    """Refuse rounds of which `disjoint_rounds` would make too many patterns."""
    bits = bits_of(buckets)
    parts = sum(bits**r for r in range(rounds))
    if parts > MOST_PARTS or rounds * bits > _PACKED_BITS:
        raise PatternError(
            f"{rounds} rounds of {buckets} buckets are {parts:,} patterns, each an attention call "
            f"(1 + {bits} + {bits}**2 + ...); at most {MOST_PARTS:,} are made: use 2 or 3 rounds"
        )


# No shift operators: those of DTensors (torch 2.13) give back what they were to shift.
def _from_bit(x: Any, bit: int) -> Any:
    """Buckets without their lowest bits."""
    return x // (1 << bit)


def _joined(high: Any, bits: int, low: Any) -> Any:
    """One id of two, `low` of so many bits."""
    return high * (1 << bits) + low


def _as_int64(x: Any) -> Any:
    return x.long() if is_torch_tensor(x) else x.astype(np.int64)
