"""The operator ``scfa::angular_hash``: one kernel on a GPU that has it, plain torch elsewhere.

Tracing sees one call with an int32 result, so that compiled graphs, exported programs and captured
CUDA graphs hold it whole. `scfa_core.hashing.angular_hash` has checked the arguments.

And ``scfa::block_sums``, for means of the rows before: torch's own sum, which takes half the time
of the kernel that torch.compile (2.11) would write for it where rows of heads lie side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from scfa_core.dispatch import load_backend
from scfa_core.hashing import rows_at_once
from scfa_core.hashing_checks import CENTER_ROWS, centers_from
from scfa_core.torch_fakes import register_fake
from scfa_core.torch_framework import TORCH_FRAMEWORK, dtype_name, raw_stream
from scfa_core.torch_ops import batched

__all__ = ["ANGULAR_HASH", "BLOCK_SUMS", "hash_rows", "kernel_reason"]

LIBRARY = torch.library.Library("scfa", "FRAGMENT")
LIBRARY.define("angular_hash(Tensor x, Tensor directions, Tensor? center) -> Tensor")
LIBRARY.define("block_sums(Tensor x, SymInt rows) -> Tensor")
ANGULAR_HASH = torch.ops.scfa.angular_hash.default
BLOCK_SUMS = torch.ops.scfa.block_sums.default


def kernel_reason(x: torch.Tensor, directions: torch.Tensor) -> str | None:
    """None if the kernel hashes `x`, otherwise why plain torch does."""
    backend = load_backend("cupy")
    if isinstance(backend, str):
        return backend
    from scfa_core.backends.cupy_raw.hashing import reason_against

    ordinal = x.device.index if x.device.index is not None else torch.cuda.current_device()
    return reason_against(dtype_name(x.dtype), x.shape[3], directions.shape[3], ordinal)


def hash_rows(
    x: torch.Tensor, directions: torch.Tensor, center: torch.Tensor | None
) -> torch.Tensor:
    """Buckets by plain torch, a stretch of rows at a time; products and sums are float32."""
    seqlen, rows = x.shape[2], rows_at_once(x.shape, directions.shape)
    if not x.shape[1]:  # no head, whatever the directions have
        return _result(x, directions)
    if seqlen <= rows:
        return _hash_stretch(x, directions, center)
    pieces = [
        _hash_stretch(x[:, :, at : at + rows], directions, centers_from(center, at))
        for at in range(0, seqlen, rows)
    ]
    return torch.cat(pieces, dim=-1)


def _hash_stretch(
    x: torch.Tensor, directions: torch.Tensor, center: torch.Tensor | None
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
        most, up = turned.max(dim=-1)
        least, down = turned.min(dim=-1)
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

    x = x.detach() if x.stride(3) == 1 or x.shape[3] == 1 else x.detach().contiguous()
    tables = [
        None if y is None else y.detach().to(x.device, torch.float32).contiguous()
        for y in (directions, center)
    ]
    bucket = _result(x, directions)
    arrays = (x, *tables, bucket)
    native: list[Any] = [None if y is None else TORCH_FRAMEWORK.native(y, "cuda") for y in arrays]
    rows, columns, middle, out = native
    run_angular_hash(rows, columns, middle, out, raw_stream(out.device))
    return bucket


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


def _block_sums(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Sums of each `rows` rows, whole blocks alone, in float32.

    x (batch, heads, seqlen, head_dim); result (batch, heads, seqlen // rows, head_dim).
    """
    blocks = x.shape[2] // rows
    return x[:, :, : blocks * rows].unflatten(2, (blocks, rows)).sum(3, dtype=torch.float32)


def _fake_block_sums(x: torch.Tensor, rows: int) -> torch.Tensor:
    batch, heads, seqlen, head_dim = x.shape
    return x.new_empty((batch, heads, seqlen // rows, head_dim), dtype=torch.float32)


def _batched_block_sums(
    info: Any, in_dims: Sequence[int | None], x: torch.Tensor, rows: int
) -> tuple[torch.Tensor, int]:
    """`torch.func.vmap` rule: slices are sequences more."""
    slices = x.movedim(in_dims[0] or 0, 0)
    return BLOCK_SUMS(slices.flatten(0, 1), rows).unflatten(0, slices.shape[:2]), 0


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("block_sums", _block_sums, _device)
register_fake("block_sums", _fake_block_sums, LIBRARY)
torch.library.register_vmap(BLOCK_SUMS, _batched_block_sums, lib=LIBRARY)
LIBRARY.impl("angular_hash", _on_cpu, "CPU")
LIBRARY.impl("angular_hash", _on_cuda, "CUDA")
register_fake("angular_hash", _fake, LIBRARY)
torch.library.register_vmap(ANGULAR_HASH, _batched, lib=LIBRARY)
