"""Draw the pictures of the README and of the pages beside it: `make images`."""

from pathlib import Path

import numpy as np

import scfa_core as scfa
from scfa_core.plotting import draw_mask, plot_plan, require_matplotlib

HERE = Path(__file__).parent / "img"
ROWS = 48


def example_patterns() -> dict[str, scfa.Pattern]:
    """One small pattern of each kind, and an intersection."""
    rng = np.random.default_rng(3)
    row = np.arange(ROWS)
    q_hash, k_hash = rng.integers(0, 4, (2, 1, 1, ROWS))
    keep = rng.random((2, 1, 1, ROWS)) < 0.6
    ids = np.repeat([0, 1, 2], [20, 9, 19])[None]
    start = (row // 8 * 8)[None, None]
    documents = scfa.Documents(ids)
    return {
        "causal": scfa.Causal(),
        "hash": scfa.HashSparse(q_hash, k_hash),
        "qk": scfa.QKSparse(keep[0], keep[1]),
        "documents": documents,
        "window": scfa.SlidingWindow(12),
        "ranges": scfa.KeyRanges(start // 2, start + 4),
        "and": documents & scfa.SlidingWindow(6),
    }


def main() -> None:
    """Write one small picture a pattern, and one of a plan."""
    figure_type = require_matplotlib()
    HERE.mkdir(exist_ok=True)
    for name, pattern in example_patterns().items():
        figure = figure_type(figsize=(0.9, 0.9))
        axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
        draw_mask(axes, pattern.mask(ROWS, ROWS)[0, 0])
        axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
        figure.savefig(HERE / f"{name}.png", dpi=100, metadata={"Software": None})
    rng = np.random.default_rng(0)
    q_hash, k_hash = rng.integers(0, 6, (2, 1, 1, 768))
    rows = np.zeros((1, 1, 768, 16), np.float32)
    pattern = scfa.HashSparse(q_hash, k_hash)
    plan = scfa.make_plan(pattern, rows, rows, backend="reference")
    plot_plan(plan, block=32).savefig(HERE / "plan.png", dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
