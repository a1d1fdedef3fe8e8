"""Forward of few queries over many keys, as when decoding: which calls, in how many chunks.

Mirrors cuda/few.cuh. A tile holds the rows of all query heads that share a key head, and its keys
are shared out among blocks, whose results a second kernel makes one. The number of chunks follows
from seqlen_k alone, so that what else is in a batch changes no bit.
"""

from __future__ import annotations

import struct
from functools import cache, partial
from typing import TYPE_CHECKING

from scfa_core.backends.cupy_raw.loader import (
    Kernel,
    get_kernel,
    multiprocessors,
    shared_limit,
    side_by_side,
)
from scfa_core.backends.cupy_raw.params import POINTERS, pack_sizes
from scfa_core.backends.cupy_raw.variants import Constants, Variant, choose

if TYPE_CHECKING:
    from scfa_core.arrays import CallContext
    from scfa_core.dispatch import Bound
    from scfa_core.plan import PlanAddresses
    from scfa_core.problem import Problem

__all__ = ["bind_forward", "serves"]

ROWS = 16  # kFewRows: of a tile
MOST_TILES = (
    4  # of one key head, whose keys are fetched for each; two where heads do not share keys
)
LEAST_KEYS = 512
KEYS_OF_A_CHUNK = 512
MOST_CHUNKS = 32  # kMostSplits
MERGE_THREADS = 128  # kThreads of fwd_few_merge
_ROUNDS = 4  # blocks for every place on the card, or more: the last round leaves places empty
_TAIL = struct.Struct("<2Q2i")  # after Params


def serves(problem: Problem) -> bool:
    """Whether these kernels are the faster ones; of what else they need all calls have."""
    tiles = -(-problem.group_size * problem.seqlen_q // ROWS)
    few = 0 < tiles <= min(MOST_TILES, problem.group_size)
    return few and problem.seqlen_k >= LEAST_KEYS and problem.dtype in ("float16", "bfloat16")


def chunks(seqlen_k: int) -> int:
    """Into how many parts at most the keys of a tile are cut."""
    return max(1, min(seqlen_k // KEYS_OF_A_CHUNK, MOST_CHUNKS))


def sharing_blocks(variant: Variant, blocks: int, device: int) -> int:
    """How many blocks share the chunks of a tile, of which there are `blocks`."""
    places = multiprocessors(device) * variant.shape.min_blocks
    return max(1, -(-_ROUNDS * places // blocks))


def merge_constants(variant: Variant) -> Constants:
    """What fwd_few_merge is compiled with beside a variant of fwd_few."""
    names = ("HEAD_DIM", "HEAD_DIM_V", "ELEMENT", "ALIGNED")
    return tuple((name, value) for name, value in variant.constants if name in names)


@cache
def _merge_kernel(constants: Constants, device: int) -> Kernel:
    return get_kernel("scfa_fwd_few_merge", "fwd_few_merge.cu", constants, device)


def variant_of(problem: Problem, *, aligned: bool, limit: int) -> Variant:
    """The variant of fwd_few for a card with `limit` bytes of shared memory a block."""
    return choose(
        *("fwd_few", problem.dtype, problem.head_dim, problem.head_dim_v),
        aligned=aligned,
        monotone=True,
        group_size=1,
        shared_limit=limit,
    )


def bind_forward(problem: Problem, device: int, aligned: bool, strides: bytes) -> Bound:
    """Settle all of the forward but addresses: every element of `out` and `lse` is written.

    Workspace, where there is more than one chunk: 4 * (head_dim_v + 1) bytes a query row and chunk.
    """
    variant = variant_of(problem, aligned=aligned, limit=shared_limit(device))
    kernel = partial(get_kernel, variant.name, variant.source, variant.constants, device)
    splits = chunks(problem.seqlen_k)
    rows = problem.batch * problem.heads * problem.seqlen_q
    tiles = -(-problem.group_size * problem.seqlen_q // ROWS)
    if splits > 1:
        merge_kernel = partial(_merge_kernel, merge_constants(variant), device)
        side_by_side(("fwd_few", variant, device), [kernel, merge_kernel])
        merge = merge_kernel().bind((rows, 1, 1), MERGE_THREADS, 0)
    blocks = problem.batch * problem.heads_kv * tiles
    sharing = min(splits, sharing_blocks(variant, blocks, device))
    few = kernel().bind((blocks, sharing, 1), variant.threads, variant.shared_bytes)
    tail = strides + pack_sizes(problem)
    outs = splits * rows * problem.head_dim_v

    def run(plan: PlanAddresses, arrays: tuple[int, ...], ctx: CallContext) -> None:
        part_out = part_lse = 0
        if splits > 1:
            part_out = ctx.empty((outs + splits * rows,), "float32").pointer
            part_lse = part_out + 4 * outs
        lists = (plan.q_index, plan.k_index, plan.k_count, plan.key_start, plan.key_end)
        params = POINTERS.pack(*arrays, 0, 0, 0, 0, 0, 0, *lists) + tail
        params += _TAIL.pack(part_out, part_lse, splits, 0)
        few(ctx.stream, params)
        if splits > 1:
            merge(ctx.stream, params)

    return run
