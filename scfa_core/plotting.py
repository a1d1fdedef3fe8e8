"""Pictures of patterns and plans; matplotlib (extra ``plot``) is imported when one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scfa_core.errors import ScfaError, ShapeError
from scfa_core.problem import as_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scfa_core.plan import Plan

MOST_PIXELS = 512  # finer masks are averaged down to this many cells a side
INK = "#1f4e79"
SHADES = " ░▒▓█"
TILE_COLOURS = ("#ffffff", "#f2c14e", "#1f4e79")  # nothing, some, all visible


def require_matplotlib() -> Any:
    """Return ``matplotlib.figure.Figure``, or say which extra brings it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ScfaError(
            "drawing needs matplotlib, which is not installed; pip install 'scfa-core[plot]'"
        ) from error
    return Figure


def coarse(mask: NDArray[Any], most: int = MOST_PIXELS) -> NDArray[np.float64]:
    """Share of True in each cell of a grid of at most `most` by `most` cells."""
    mask = np.asarray(mask, np.float64)
    for axis in (0, 1):
        size = mask.shape[axis]
        cells = min(size, most)
        if cells in (0, size):
            continue
        edges = np.arange(cells) * size // cells
        widths = np.diff(np.append(edges, size))
        mask = np.add.reduceat(mask, edges, axis=axis)
        mask = mask / (widths[:, None] if axis == 0 else widths[None, :])
    return mask


def tile_states(mask: NDArray[np.bool_], block: int) -> NDArray[np.int8]:
    """0 where a tile of `block` by `block` has no visible pair, 1 where some, 2 where all."""
    rows, columns = (-(-size // block) for size in mask.shape)
    states = np.zeros((rows, columns), np.int8)
    for i in range(rows):
        for j in range(columns):
            tile = mask[i * block : (i + 1) * block, j * block : (j + 1) * block]
            states[i, j] = 2 if tile.all() else int(tile.any())
    return states


def sorted_mask(plan: Plan, batch: int = 0, head: int = 0) -> NDArray[np.bool_]:
    """The mask of one head with rows and columns in the plan's sorted order: one range a row."""
    key_start, key_end = (x[batch, head] for x in plan._host("key_start", "key_end"))
    place = np.arange(plan.sizes[4])
    visible: NDArray[np.bool_] = (place >= key_start[:, None]) & (place < key_end[:, None])
    return visible


def original_mask(plan: Plan, batch: int = 0, head: int = 0) -> NDArray[np.bool_]:
    """The mask of one head in the caller's order of rows."""
    _, heads, heads_kv, seqlen_q, seqlen_k = plan.sizes
    q_index, k_index = plan._host("q_index", "k_index")
    keys = k_index[batch, head * heads_kv // heads]
    mask = np.zeros((seqlen_q, seqlen_k), bool)
    mask[np.ix_(q_index[batch, head], keys)] = sorted_mask(plan, batch, head)
    return mask


def draw_mask(axes: Any, mask: NDArray[np.bool_], title: str = "") -> None:
    """Draw one mask: ink where visible, queries downwards, keys to the right."""
    from matplotlib.colors import LinearSegmentedColormap

    ink = LinearSegmentedColormap.from_list("ink", ["#ffffff", INK])
    share = coarse(mask)
    # A few visible pairs in a cell of thousands must still show; the root keeps the order.
    top = share.max(initial=0.0)
    shown = np.sqrt(share / top) if top else share
    extent = (0, mask.shape[1], mask.shape[0], 0)
    axes.imshow(shown, cmap=ink, vmin=0, vmax=1, extent=extent, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("key")
    axes.set_ylabel("query")


def _draw_tiles(axes: Any, mask: NDArray[np.bool_], block: int, title: str) -> None:
    from matplotlib.colors import ListedColormap

    states = tile_states(mask, block)
    extent = (0, states.shape[1] * block, states.shape[0] * block, 0)
    colours = ListedColormap(list(TILE_COLOURS))
    axes.imshow(states, cmap=colours, vmin=0, vmax=2, extent=extent, interpolation="nearest")
    axes.set_xlim(0, mask.shape[1])
    axes.set_ylim(mask.shape[0], 0)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("key, in sorted order")
    axes.set_ylabel("query, in sorted order")


def plot_mask(mask: NDArray[np.bool_], *, title: str = "", size: float = 3.0) -> Any:
    """Draw a dense mask.

    Parameters
    ----------
    mask : bool array, (seqlen_q, seqlen_k)
    title : str
    size : float
        Inches of the longer side.

    Returns
    -------
    figure : matplotlib.figure.Figure
        Not known to pyplot: save it with ``figure.savefig(path)``; notebooks show it as it is.

    Raises
    ------
    ScfaError
        matplotlib is not installed.
    ShapeError
        The mask does not have two axes.
    """
    mask = np.asarray(mask, bool)
    if mask.ndim != 2:
        raise ShapeError(f"plot_mask draws one head, (seqlen_q, seqlen_k); got {mask.shape=}")
    figure = require_matplotlib()(figsize=(size, size), layout="constrained")
    draw_mask(figure.subplots(), mask, title)
    return figure


def plot_plan(plan: Plan, batch: int = 0, head: int = 0, *, block: int = 64) -> Any:
    """Draw one head of a plan: the mask as the caller knows it, and the tiles that a kernel visits.

    Parameters
    ----------
    plan : Plan
    batch, head : int
        Which one.
    block : int
        Side of the tiles drawn, in rows. Kernels choose their own.

    Returns
    -------
    figure : matplotlib.figure.Figure
        Not known to pyplot: save it with ``figure.savefig(path)``.

    Raises
    ------
    ScfaError
        matplotlib is not installed.
    ShapeError
        No such batch or head, tiles without a row, or what is no int.
    """
    batch, head = as_size("plot: batch", batch), as_size("plot: head", head)
    block = as_size("plot: block", block, 1)
    batches, heads, *_ = plan.sizes
    if not batches * heads:
        raise ShapeError(
            f"the plan has no head to draw: it was made for batch={batches}, {heads=}; make one "
            "for arrays that are not empty"
        )
    if not (batch < batches and head < heads):
        raise ShapeError(
            f"the plan has batch 0..{batches - 1} and head 0..{heads - 1}, got {batch=}, {head=}"
        )
    figure = require_matplotlib()(figsize=(8.4, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    mask, ordered = original_mask(plan, batch, head), sorted_mask(plan, batch, head)
    draw_mask(left, mask, f"visible pairs: {mask.mean() if mask.size else 0.0:.1%} of all")
    states = tile_states(ordered, block)
    touched = float((states > 0).mean()) if states.size else 0.0
    title = f"sorted, in tiles of {block}: {touched:.1%} hold a visible pair"
    _draw_tiles(right, ordered, block, title)
    return figure


def text_mask(mask: NDArray[np.bool_], width: int = 64) -> str:
    """Draw a mask in characters: exactly where it fits into `width`, else in shades."""
    if max(mask.shape) > width:
        share = np.sqrt(_halve_rows(coarse(mask, width)))
        top = share.max(initial=0.0) or 1.0
        levels = np.ceil(share / top * (len(SHADES) - 1)).astype(int)
        return "\n".join("".join(SHADES[i] for i in row).rstrip() for row in levels)
    seen = np.vstack([mask, np.zeros((mask.shape[0] % 2, mask.shape[1]), bool)])
    glyphs = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
    return "\n".join(
        "".join(glyphs[bool(a), bool(b)] for a, b in zip(upper, lower, strict=True)).rstrip()
        for upper, lower in zip(seen[::2], seen[1::2], strict=True)
    )


def _halve_rows(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average pairs of rows: a character is twice as tall as wide."""
    padded = np.vstack([share, share[-1:]]) if share.shape[0] % 2 else share
    halved: NDArray[np.float64] = (padded[::2] + padded[1::2]) / 2
    return halved
