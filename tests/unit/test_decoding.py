"""Decoding row by row, or in pieces, gives what one call over the whole sequence gives."""

import doctest

import numpy as np
import pytest

import scfa_core as scfa
from scfa_core import decoding
from scfa_core.decoding import at_end, attention_in_parts

BATCH, HEADS, HEADS_KV, SEQLEN = 2, 4, 2, 23
RNG = np.random.default_rng(0)
Q_HASH, K_HASH = (RNG.integers(0, 3, (BATCH, h, SEQLEN)) for h in (HEADS, HEADS_KV))
ENDS = RNG.integers(0, SEQLEN + 1, (BATCH, HEADS, SEQLEN))
IDS = np.repeat([[0, 1, 2]], [5, 11, 7], axis=1).repeat(BATCH, axis=0)


def last(x, rows):
    """The last rows of a pattern's array of queries; one for all stays."""
    return x if x.shape[-1] == 1 else x[..., x.shape[-1] - rows :]


# From the number of queries to the pattern whose arrays are theirs and all keys'.
PATTERNS = {
    "causal": lambda n: scfa.Causal(),
    "strict": lambda n: scfa.Causal(include_self=False),
    "far": lambda n: scfa.Causal(lag=3),
    "hash": lambda n: scfa.HashSparse(last(Q_HASH, n), K_HASH),
    "hash, strict": lambda n: scfa.HashSparse(last(Q_HASH, n), K_HASH, include_self=False),
    "hash, not causal": lambda n: scfa.HashSparse(last(Q_HASH, n), K_HASH, causal=False),
    "drop": lambda n: scfa.QKSparse(last(Q_HASH, n) > 0, K_HASH > 0),
    "drop, not causal": lambda n: scfa.QKSparse(last(Q_HASH, n) > 0, K_HASH > 0, causal=False),
    "documents": lambda n: scfa.Documents(last(IDS, n), IDS),
    "documents, not causal": lambda n: scfa.Documents(last(IDS, n), IDS, causal=False),
    "window": lambda n: scfa.SlidingWindow(5),
    "window of none": lambda n: scfa.SlidingWindow(0),
    "window of all": lambda n: scfa.SlidingWindow(10**12),
    "window both ways": lambda n: scfa.SlidingWindow(4, causal=False),
    "ranges": lambda n: scfa.KeyRanges(last(ENDS // 2, n), last(ENDS, n)),
    "many": lambda n: (
        scfa.HashSparse(last(Q_HASH, n), K_HASH, include_self=False)
        & scfa.SlidingWindow(9)
        & scfa.Documents(last(IDS, n), IDS)
    ),
}


def draw():
    rng = np.random.default_rng(1)
    return [rng.standard_normal((BATCH, h, SEQLEN, 16)) for h in (HEADS, HEADS_KV, HEADS_KV)]


@pytest.mark.parametrize("rows", [1, 6, SEQLEN])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_last_queries_see_what_they_saw(name, rows):
    sizes = {"batch": BATCH, "heads": HEADS, "heads_kv": HEADS_KV}
    q, k, _ = draw()
    whole = PATTERNS[name](SEQLEN).mask(SEQLEN, SEQLEN, **sizes)[:, :, SEQLEN - rows :]
    own = PATTERNS[name](rows)
    mine = at_end(own, last(q.swapaxes(2, 3), rows).swapaxes(2, 3), k).mask(rows, SEQLEN, **sizes)
    np.testing.assert_array_equal(mine, whole)
    swapped = at_end(own, q.swapaxes(1, 2)[:, SEQLEN - rows :], k.swapaxes(1, 2), layout="bthd")
    np.testing.assert_array_equal(swapped.mask(rows, SEQLEN, **sizes), whole)


@pytest.mark.parametrize("name", PATTERNS)
def test_row_by_row_equals_one_call(name):
    q, k, v = draw()
    whole = scfa.attention(q, k, v, PATTERNS[name](SEQLEN), backend="reference")
    if name in ("hash", "many", "window"):
        for row in range(SEQLEN):  # keys of later rows are not there yet
            own = PATTERNS[name](SEQLEN)
            cut = own.parts
            keys = {"k": k[:, :, : row + 1], "v": v[:, :, : row + 1]}
            pattern = scfa.Intersection(*(cut_at(part, row) for part in cut))
            new = q[:, :, row : row + 1]
            out = scfa.attention(
                new, *keys.values(), at_end(pattern, new, keys["k"]), backend="reference"
            )
            np.testing.assert_allclose(out, whole[:, :, row : row + 1], atol=1e-12)
    for rows in (1, 6):
        new = q[:, :, SEQLEN - rows :]
        pattern = at_end(PATTERNS[name](rows), new, k)
        out = scfa.attention(new, k, v, pattern, backend="reference")
        np.testing.assert_allclose(out, whole[:, :, SEQLEN - rows :], atol=1e-12)


def cut_at(part, row):
    """A part with the arrays of one query and of the keys up to it."""
    if isinstance(part, scfa.HashSparse):
        hashes = part.q_hash[..., row : row + 1], part.k_hash[..., : row + 1]
        return scfa.HashSparse(*hashes, include_self=part.include_self)
    if isinstance(part, scfa.Documents):
        return scfa.Documents(part.q_ids[:, row : row + 1], part.k_ids[:, : row + 1])
    return part


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("cuts", [(), (9,), (1, 22), (0, 7)])
def test_pieces_equal_the_whole(cuts, layout):
    q, k, v = draw()
    new = q[:, :, 19:]
    right, right_lse = scfa.attention(
        new, k, v, scfa.Causal(align="bottom-right"), return_lse=True, backend="reference"
    )
    pieces = []
    for start, stop in zip((0, *cuts), (*cuts, SEQLEN), strict=True):
        end = np.arange(20, 24)[None, None] - start  # what each of the four queries sees of it
        pattern = None if stop <= 20 else scfa.KeyRanges(0 * end, end)
        if stop == SEQLEN and stop - start >= 4:
            pattern = scfa.Causal(align="bottom-right")
        pieces.append((k[:, :, start:stop], v[:, :, start:stop], pattern))
    if layout == "bthd":
        new, right = new.swapaxes(1, 2), right.swapaxes(1, 2)
        pieces = [(a.swapaxes(1, 2), b.swapaxes(1, 2), p) for a, b, p in pieces]
    out, lse = attention_in_parts(new, pieces, layout=layout, return_lse=True, backend="reference")
    np.testing.assert_allclose(out, right, atol=1e-12 if len(pieces) == 1 else 1e-6)
    np.testing.assert_allclose(lse, right_lse, rtol=1e-6)


def test_a_prefix_that_all_share_takes_the_gradients_of_all():
    torch = pytest.importorskip("torch", reason="about gradients")
    q, k, v = (torch.from_numpy(x) for x in draw())
    q = q[:, :, -3:].requires_grad_()
    prompt = np.random.default_rng(2).standard_normal((1, HEADS_KV, 7, 16))
    prompt = torch.from_numpy(prompt).requires_grad_()
    shared = prompt.expand(BATCH, -1, -1, -1)
    k, v = k.requires_grad_(), v.requires_grad_()
    below = scfa.Causal(align="bottom-right")
    pieces = [(shared, shared, None), (k, v, below)]
    mine = attention_in_parts(q, pieces, backend="reference")
    joined = torch.cat([shared, k], dim=2), torch.cat([shared, v], dim=2)
    right = scfa.attention(q, *joined, below, backend="reference")
    torch.testing.assert_close(mine, right, rtol=0, atol=1e-6)  # weights of float32 lses
    leaves = (q, k, v, prompt)
    torch.testing.assert_close(
        torch.autograd.grad(mine.square().sum(), leaves),
        torch.autograd.grad(right.square().sum(), leaves),
        rtol=0,
        atol=1e-5,  # float64 gradients through a float32 lse
    )


@pytest.mark.parametrize("name", ["window", "many"])
def test_decoding_compiles_whole(name):
    torch = pytest.importorskip("torch", reason="about torch.compile")
    q, k, v = (torch.from_numpy(x).float() for x in draw())
    q = q[:, :, -2:]
    pattern = scfa.Intersection(
        *(
            type(part)(torch.from_numpy(part.q_hash.copy()), torch.from_numpy(part.k_hash))
            if isinstance(part, scfa.HashSparse)
            else part
            for part in PATTERNS[name](2).parts
            if not isinstance(part, scfa.Documents)
        )
    )

    def decode(q, k, v):
        below = at_end(pattern, q, k)
        return attention_in_parts(q, [(k, v, below), (k[:, :, :4], v[:, :, :4], None)])

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), decode(q, k, v))


def test_mistakes_say_what_to_do():
    q, k, v = draw()
    plan = scfa.make_plan(scfa.Causal(), q, k, backend="reference")
    for wrong, words in ((plan, "make the plan of what it returns"), (None, "got NoneType")):
        with pytest.raises(scfa.PatternError, match=words):
            at_end(wrong, q, k)
    with pytest.raises(scfa.LayoutError, match="layout"):
        at_end(scfa.Causal(), q, k, layout="btd")
    with pytest.raises(scfa.PatternError, match="at least one part"):
        attention_in_parts(q, [])
    for wrong in ([(k, v)], [k], [scfa.Causal()]):
        with pytest.raises(scfa.PatternError, match=r"must be \(k, v, pattern\).*got a \w+"):
            attention_in_parts(q, wrong)

    with pytest.raises(scfa.PatternError, match="parts must be a list, got NoneType"):
        attention_in_parts(q, None)
    for rows, error, words in (
        (None, scfa.DTypeError, "q must be an array, got NoneType"),
        (q[0], scfa.ShapeError, "q must have 4 axes"),
    ):
        with pytest.raises(error, match=words):
            at_end(scfa.SlidingWindow(3), rows, k)
        with pytest.raises(error, match=words):
            attention_in_parts(rows, [(k, v, None)])
    with pytest.raises(scfa.ShapeError, match="k must have 4 axes"):
        at_end(scfa.SlidingWindow(3), q, k[0])

    class Odd(scfa.Pattern):
        """No pattern that is known."""

    with pytest.raises(scfa.PatternError, match="at_end knows the patterns"):
        at_end(Odd(), q[:, :, :3], k)


def test_examples_run():
    result = doctest.testmod(decoding)
    assert result.attempted > 0
    assert result.failed == 0
