"""The operator ``scfa::angular_hash``: one kernel on a GPU that has it, plain torch elsewhere.

Tracing sees one call with an int32 result, so that compiled graphs, exported programs and captured
CUDA graphs hold it whole. `scfa_core.hashing.angular_hash` has checked the arguments.

And ``scfa::past_hash``, about means of the rows before, which it finds in the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from scfa_core.dispatch import load_backend
from scfa_core.hashing import rows_at_once
from scfa_core.hashing_checks import (
    CENTER_ROWS,
    EVEN_START,
    MOST_SUM,
    PAST_START,
    centers_from,
    even_power,
)
from scfa_core.torch_fakes import register_fake
from scfa_core.torch_framework import TORCH_FRAMEWORK, dtype_name, raw_stream
from scfa_core.torch_ops import batched

__all__ = ["ANGULAR_HASH", "PAST_HASH", "hash_rows", "kernel_reason", "past_mean", "past_rows"]

LIBRARY = torch.library.Library("scfa", "FRAGMENT")
LIBRARY.define("angular_hash(Tensor x, Tensor directions, Tensor? center) -> Tensor")
LIBRARY.define(
    "past_hash(Tensor x, Tensor directions, Tensor start, bool even=False) -> (Tensor, Tensor)"
)
ANGULAR_HASH = torch.ops.scfa.angular_hash.default
PAST_HASH = torch.ops.scfa.past_hash.default


def kernel_reason(x: torch.Tensor, directions: torch.Tensor, *, past: bool = False) -> str | None:
    """None if the kernel hashes `x`, otherwise why plain torch does."""
    backend = load_backend("cupy")
    if isinstance(backend, str):
        return backend
    from scfa_core.backends.cupy_raw.hashing import reason_against

    ordinal = x.device.index if x.device.index is not None else torch.cuda.current_device()
    sizes = x.shape[3], directions.shape[3]
    return reason_against(dtype_name(x.dtype), *sizes, ordinal, past=past)


def hash_rows(
    x: torch.Tensor,
    directions: torch.Tensor,
    center: torch.Tensor | None,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Buckets by plain torch, a stretch of rows at a time; products and sums are float32.

    `factors` (rounds, batch, heads, blocks of CENTER_ROWS, buckets) weigh the products of [y, -y].
    """
    seqlen, rows = x.shape[2], rows_at_once(x.shape, directions.shape)
    if not x.shape[1]:  # no head, whatever the directions have
        return _result(x, directions)
    if seqlen <= rows:
        return _hash_stretch(x, directions, center, factors)
    pieces = [
        _hash_stretch(
            x[:, :, at : at + rows],
            directions,
            centers_from(center, at),
            None if factors is None else factors[:, :, :, at // CENTER_ROWS :],
        )
        for at in range(0, seqlen, rows)
    ]
    return torch.cat(pieces, dim=-1)


def _hash_stretch(
    x: torch.Tensor,
    directions: torch.Tensor,
    center: torch.Tensor | None,
    factors: torch.Tensor | None,
) -> torch.Tensor:
    """Buckets of some rows; autocast would narrow the projection, so it is off.

    All rounds are columns of one product. Where batch and seqlen are one axis to the eye of a
    strided product, heads are its batch; else batch and heads are. A center moves the projections,
    not the rows.
    """
    batch, heads, seqlen, head_dim = x.shape
    rounds, own_heads, _, half = directions.shape
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x, directions = x.detach().float(), directions.detach().float()
        if own_heads < heads:
            directions = directions.repeat_interleave(heads // own_heads, dim=1)
        columns = directions.permute(1, 2, 0, 3).flatten(2)
        if batch == 1 or x.stride(0) == x.stride(2) * seqlen:
            rows = x.transpose(0, 1).reshape(heads, batch * seqlen, head_dim)
            turned = torch.bmm(rows, columns).view(heads, batch, seqlen, rounds, half)
            turned = turned.permute(3, 1, 0, 2, 4)
        else:
            turned = torch.matmul(x, columns).view(batch, heads, seqlen, rounds, half)
            turned = turned.permute(3, 0, 1, 2, 4)
        if center is not None:
            turned = turned - _moved(center.detach().float(), directions, seqlen)
        above = below = turned
        if factors is not None:
            each = factors.repeat_interleave(CENTER_ROWS, dim=3)[:, :, :, :seqlen]
            above, below = turned * each[..., :half], turned * each[..., half:]
        most, up = above.max(dim=-1)
        least, down = below.min(dim=-1)
        return torch.where(most >= -least, up, down + half).to(torch.int32).contiguous()


def _moved(center: torch.Tensor, directions: torch.Tensor, seqlen: int) -> torch.Tensor:
    """Products of centers, to subtract from those of rows (rounds, batch, heads, seqlen, half)."""
    own, heads = center.shape[-3] if center.dim() == 4 else center.shape[0], directions.shape[1]
    if center.dim() == 2:
        center = center.repeat_interleave(heads // own, dim=0)
        return (center[..., None] * directions).sum(dim=2)[:, None, :, None]
    moved = center.repeat_interleave(heads // own, dim=1) @ directions[:, None]
    return moved.repeat_interleave(CENTER_ROWS, dim=3)[:, :, :, :seqlen]


def _on_cpu(x: torch.Tensor, directions: torch.Tensor, center: torch.Tensor | None) -> torch.Tensor:
    return hash_rows(x, directions, center)


def _on_cuda(
    x: torch.Tensor, directions: torch.Tensor, center: torch.Tensor | None
) -> torch.Tensor:
    if kernel_reason(x, directions) is not None:
        return hash_rows(x, directions, center)
    from scfa_core.backends.cupy_raw.hashing import run_angular_hash

    bucket = _result(x, directions)
    held = (_readable(x), _table(x, directions), _table(x, center))  # until the launch
    rows, columns, middle, out = _native(*held, bucket)
    run_angular_hash(rows, columns, middle, out, raw_stream(out.device))
    return bucket


def _readable(x: torch.Tensor) -> torch.Tensor:
    """Rows whose elements lie side by side."""
    return x.detach() if x.stride(3) == 1 or x.shape[3] == 1 else x.detach().contiguous()


def _table(x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor | None:
    """Directions or centers as kernels read them."""
    return None if y is None else y.detach().to(x.device, torch.float32).contiguous()


def _native(*arrays: torch.Tensor | None) -> list[Any]:
    return [None if y is None else TORCH_FRAMEWORK.native(y, "cuda") for y in arrays]


def _result(x: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    return x.new_empty((directions.shape[0], *x.shape[:3]), dtype=torch.int32)


def _fake(x: torch.Tensor, directions: torch.Tensor, center: torch.Tensor | None) -> torch.Tensor:
    return _result(x, directions)


def _batched(
    info: Any, in_dims: Sequence[int | None], *arguments: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """`torch.func.vmap` rule: every slice by itself."""
    (bucket,), _ = batched(lambda *one: (ANGULAR_HASH(*one),))(info, in_dims, *arguments)
    return bucket, 0


def past_mean(x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Mean of the rows before, for every `CENTER_ROWS` rows (batch, heads, seqlen, head_dim).

    (batch, heads, ceil(seqlen / CENTER_ROWS), head_dim), float32: of rows in earlier blocks, and of
    `start` (heads or a divisor, head_dim) as `PAST_START` rows more, so that no row knows a later
    one. A block that holds a NaN, an infinity or a sum beyond 1e30 counts for nothing.
    """
    batch, heads, seqlen, head_dim = x.shape
    if not seqlen or not heads:  # whatever heads `start` has
        shape = (batch, heads, (seqlen - 1) // CENTER_ROWS + 1, head_dim)
        return x.new_empty(shape, dtype=torch.float32)
    x, start = x.detach(), start.detach().float()
    if start.shape[0] < heads:
        start = start.repeat_interleave(heads // start.shape[0], dim=0)
    blocks = (seqlen - 1) // CENTER_ROWS  # that a row comes after
    whole = x[:, :, : blocks * CENTER_ROWS].unflatten(2, (blocks, CENTER_ROWS))
    sums = whole.sum(3, dtype=torch.float32)
    known = (sums.abs() < MOST_SUM).all(-1, keepdim=True)  # no NaN is
    total = _running_sum(sums.where(known, 0.0))
    rows = _running_sum(CENTER_ROWS * known.float())
    total, rows = (pad(y, (0, 0, 1, 0)) for y in (total, rows))
    return (total + PAST_START * start[:, None]) / (rows + PAST_START)


def _running_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums along axis 2 up to each place."""
    if not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(2)
    step = 1  # cumsum raises then, on CUDA
    while step < x.shape[2]:
        x = x + pad(x[:, :, :-step], (0, 0, step, 0))
        step *= 2
    return x


def even_factors(bucket: torch.Tensor, buckets: int) -> torch.Tensor:
    """What the products of full buckets are weighed by, for every `CENTER_ROWS` rows.

    Of (rounds, batch, heads, seqlen) plain buckets: (..., ceil(seqlen / CENTER_ROWS), buckets), by
    the rows of earlier blocks, beside which each bucket has `EVEN_START` rows to begin with.
    """
    lists, seqlen = bucket.shape[:3], bucket.shape[3]
    blocks = max((seqlen - 1) // CENTER_ROWS, 0)  # that a row comes after
    number = torch.arange(buckets, dtype=bucket.dtype, device=bucket.device)
    whole = bucket[..., : blocks * CENTER_ROWS].unflatten(3, (blocks, CENTER_ROWS))
    counts = bucket.new_zeros((*lists, blocks + 1, buckets), dtype=torch.float32)
    for at in range(blocks):  # all at once would take `buckets` bytes a row
        counts[..., at + 1, :] = (whole[..., at, :, None] == number).sum(-2)
    counts = _running_sum(counts.flatten(0, 1)).unflatten(0, lists[:2])  # whole numbers: exact
    rows = CENTER_ROWS * torch.arange(blocks + 1, device=bucket.device)[:, None]
    fill = (counts + EVEN_START) * buckets / (rows + EVEN_START * buckets)
    return fill ** -even_power(buckets)


def past_rows(
    x: torch.Tensor, directions: torch.Tensor, start: torch.Tensor, even: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Buckets about the mean of the rows before, and those means, by plain torch."""
    mean = past_mean(x, start)
    bucket = hash_rows(x, directions, mean)
    if even:
        bucket = hash_rows(x, directions, mean, even_factors(bucket, 2 * directions.shape[3]))
    return bucket, mean


def _past_on_cuda(
    x: torch.Tensor, directions: torch.Tensor, start: torch.Tensor, even: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    # The kernel hashes on its way to the means: without a round it would make none.
    if not directions.shape[0] or kernel_reason(x, directions, past=True) is not None:
        if even:
            return past_rows(x, directions, start, even)
        mean = past_mean(x, start)
        return _on_cuda(x, directions, mean), mean  # that kernel needs less shared memory
    from scfa_core.backends.cupy_raw.hashing import past_room, run_past_hash

    bucket, mean = _past_fake(x, directions, start)
    rounds, _, _, n_directions = directions.shape
    batch, heads, seqlen, head_dim = x.shape
    even_rounds = rounds if even else 0
    words = past_room(batch, heads, seqlen, head_dim, n_directions, even_rounds)
    room = torch.zeros(words, dtype=torch.int32, device=x.device)
    held = (_readable(x), _table(x, directions), _table(x, start))  # until the launch
    rows, columns, begin = _native(*held)
    out, middle, space = _native(bucket, mean, room)
    run_past_hash(rows, columns, begin, out, middle, space, raw_stream(out.device), even=even)
    return bucket, mean


def _past_fake(
    x: torch.Tensor, directions: torch.Tensor, start: torch.Tensor, even: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, seqlen, head_dim = x.shape
    shape = (batch, heads, (seqlen - 1) // CENTER_ROWS + 1, head_dim)
    return _result(x, directions), x.new_empty(shape, dtype=torch.float32)


LIBRARY.impl("past_hash", past_rows, "CPU")
LIBRARY.impl("past_hash", _past_on_cuda, "CUDA")
register_fake("past_hash", _past_fake, LIBRARY)
torch.library.register_vmap(PAST_HASH, batched(PAST_HASH), lib=LIBRARY)
LIBRARY.impl("angular_hash", _on_cpu, "CPU")
LIBRARY.impl("angular_hash", _on_cuda, "CUDA")
register_fake("angular_hash", _fake, LIBRARY)
torch.library.register_vmap(ANGULAR_HASH, _batched, lib=LIBRARY)
