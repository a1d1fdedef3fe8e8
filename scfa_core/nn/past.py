"""Rows hashed about the mean of those before them in their sequence."""

from __future__ import annotations

from torch import Tensor

from scfa_core.errors import ShapeError
from scfa_core.hashing_checks import CENTER_ROWS, check_real, check_shapes, of_one_library
from scfa_core.problem import check_flag
from scfa_core.torch_checks import check_tensor
from scfa_core.torch_hashing import PAST_HASH, past_rows


def past_hash(
    x: Tensor, directions: Tensor, start: Tensor, even: bool = False
) -> tuple[Tensor, Tensor]:
    """`angular_hash` about the mean of the rows before, and that mean, in one pass over the rows.

    Parameters
    ----------
    x : Tensor, (batch, heads, seqlen, head_dim)
        Whole sequences.
    directions : Tensor, (rounds, heads or a divisor, head_dim, n)
        See `angular_hash`.
    start : Tensor, (heads or a divisor, head_dim)
        What a sequence begins with; counts for 16 rows.
    even : bool
        Give full buckets less. Of each 64 rows, the products with a bucket are divided by a power
        of how full it was before them, among the earlier rows of the sequence by their plain
        buckets: for n buckets, ``(n * (rows + 2) / (all rows + 2 * n)) ** (0.75 / (log2(n) -
        1.5))``. Of two buckets none changes.

    Returns
    -------
    bucket : int32 Tensor, (rounds, batch, heads, seqlen)
    mean : float32 Tensor, (batch, heads, ceil(seqlen / 64), head_dim)
        Of all rows before each block of 64, and of `start`. A block that holds a NaN, an infinity
        or a sum beyond 1e30 counts for nothing.

    Raises
    ------
    DeviceError, DTypeError, ShapeError
        As `angular_hash`.
    OptionError
        `even` is no bool.

    Notes
    -----
    On a GPU that ``cupy`` serves, one kernel. It adds sums in an order that dtype, head_dim and the
    number of buckets decide, so that a sequence's buckets do not depend on what else is in the
    batch.
    """
    check_flag("even", even)
    check_tensor("x", x, "batch", "heads", "seqlen", "head_dim")
    check_tensor("start", start, "heads", "head_dim")
    of_one_library(x=x, directions=directions, start=start)
    check_real(x=x, directions=directions, start=start)
    check_shapes(x, directions, None)
    own, head_dim = start.shape
    if head_dim != x.shape[3] or not own or x.shape[1] % own:
        raise ShapeError(
            f"start must be (heads or a divisor, head_dim) for x.shape={tuple(x.shape)}, got "
            f"{tuple(start.shape)}"
        )
    if hasattr(x, "placements"):  # a DTensor
        import scfa_core.distributed_rules  # noqa: F401  (registers them)
    hashed = PAST_HASH if x.device.type in ("cpu", "cuda", "meta") else past_rows
    found: tuple[Tensor, Tensor] = hashed(x.detach(), directions.detach(), start.detach(), even)
    return found


def less_past(x: Tensor, mean: Tensor) -> Tensor:
    """Rows (batch, heads, seqlen, head_dim) less the mean that `past_hash` says of them."""
    of_row = mean.unsqueeze(3).expand(-1, -1, -1, CENTER_ROWS, -1).flatten(2, 3)
    return (x.detach().float() - of_row[:, :, : x.shape[2]]).to(x.dtype)
