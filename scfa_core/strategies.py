"""Hypothesis strategies over `testing.Spec`: problems that shrink to the smallest that fails.

Needs hypothesis (extra ``test``). For your own backend: ``@given(specs())``, then `testing.build`
and `testing.judge`.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from scfa_core.testing import GROUP_STYLES, KEEP_STYLES, RANGE_STYLES, Part, Spec

_EDGES = (1, 2, 7, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129)


def lengths(most: int) -> st.SearchStrategy[int]:
    """Lengths up to `most`, mostly beside the edges of tiles."""
    edges = [length for length in _EDGES if length <= most]
    return st.one_of(st.sampled_from(edges), st.integers(1, most))


def parts() -> st.SearchStrategy[Part]:
    """Recipes of atomic patterns."""
    causal = st.booleans()
    numbers = st.sampled_from([0, 1, 2, 3, 5, 16, 70])
    groups = st.sampled_from(GROUP_STYLES)
    return st.one_of(
        st.builds(Part, st.just("causal"), number=numbers, causal=causal),
        st.builds(Part, st.just("hash"), groups, numbers, causal),
        st.builds(Part, st.just("documents"), groups, numbers, causal),
        st.builds(
            Part, st.just("keep"), st.sampled_from(KEEP_STYLES), st.sampled_from([20, 80]), causal
        ),
        st.builds(Part, st.just("window"), number=numbers, causal=causal),
        st.builds(Part, st.just("ranges"), st.sampled_from(RANGE_STYLES)),
    )


@st.composite
def specs(
    draw: Any,
    *,
    most_rows: int = 140,
    dtypes: tuple[str, ...] = ("float32",),
    head_dims: tuple[int, ...] = (16, 24, 64, 72),
    most_parts: int = 3,
) -> Spec:
    """Recipes of whole problems."""
    heads_kv = draw(st.integers(1, 2))
    seqlen_q = draw(lengths(most_rows))
    return Spec(
        batch=draw(st.integers(1, 2)),
        heads=heads_kv * draw(st.sampled_from([1, 2, 3])),
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=draw(st.one_of(st.just(seqlen_q), lengths(most_rows))),
        head_dim=draw(st.sampled_from(head_dims)),
        head_dim_v=draw(st.sampled_from(head_dims)),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(["bhtd", "bthd"])),
        softmax_scale=draw(st.sampled_from([None, 0.0, 0.3, -0.2])),
        parts=tuple(draw(st.lists(parts(), min_size=1, max_size=most_parts))),
        poison=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )
