"""Mistakes with tensors: each is refused at the door, and the message says what to do."""

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")

import scfa_core as scfa  # noqa: E402
from scfa_core.merging import attention_over  # noqa: E402

Q, K, V = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 24)
IDS = torch.zeros(2, 4, 8, dtype=torch.long)
K_IDS = torch.zeros(2, 2, 8, dtype=torch.long)
MISTAKES = {
    "rank": (scfa.ShapeError, "4 axes", lambda **o: scfa.attention(Q[0], K, V, **o)),
    "heads": (scfa.ShapeError, "divide heads", lambda **o: scfa.attention(Q[:, :3], K, V, **o)),
    "layout mixed up": (
        scfa.ShapeError,
        "is layout the one you mean",
        lambda **o: scfa.attention(Q[:, :, :3], K[:, :, :2], V[:, :, :2], layout="bthd", **o),
    ),
    "dtype": (scfa.DTypeError, "must be one of", lambda **o: scfa.attention(Q.int(), K, V, **o)),
    "mixed": (scfa.DTypeError, "share a dtype", lambda **o: scfa.attention(Q, K.double(), V, **o)),
    "library": (scfa.DeviceError, "one library", lambda **o: scfa.attention(Q, K.numpy(), V, **o)),
    "device": (
        scfa.DeviceError,
        "one device, got q on cpu, k on meta",
        lambda **o: scfa.attention(Q, K.to("meta"), V, **o),
    ),
    "last axis": (
        scfa.LayoutError,
        "must be contiguous",
        lambda **o: scfa.attention(Q.mT.contiguous().mT, K, V, **o),
    ),
    "sparse": (scfa.LayoutError, "to_dense", lambda **o: scfa.attention(Q.to_sparse(), K, V, **o)),
    "layout": (
        scfa.LayoutError,
        "must be one of",
        lambda **o: scfa.attention(Q, K, V, layout="x", **o),
    ),
    "scale": (
        scfa.ScaleError,
        "finite",
        lambda **o: scfa.attention(Q, K, V, softmax_scale=float("nan"), **o),
    ),
    "text scale": (
        scfa.ScaleError,
        "finite number",
        lambda **o: scfa.attention(Q, K, V, softmax_scale="a", **o),
    ),
    "pattern": (
        scfa.PatternError,
        "scfa_core pattern",
        lambda **o: scfa.attention(Q, K, V, "causal", **o),
    ),
    "plan of a plan": (
        scfa.PatternError,
        "scfa_core pattern",
        lambda **o: scfa.make_plan(scfa.make_plan(scfa.Causal(), Q, K, **o), Q, K, **o),
    ),
    "NumPy hashes": (
        scfa.DeviceError,
        "must be a torch array like q",
        lambda **o: scfa.attention(Q, K, V, scfa.HashSparse(IDS.numpy(), K_IDS), **o),
    ),
    "hashes elsewhere": (
        scfa.DeviceError,
        "must be on cpu like q, got meta",
        lambda **o: scfa.attention(Q, K, V, scfa.HashSparse(IDS.to("meta"), K_IDS), **o),
    ),
    "float hashes": (
        scfa.DTypeError,
        "integer array",
        lambda **o: scfa.attention(Q, K, V, scfa.HashSparse(IDS.float(), K_IDS), **o),
    ),
    "plan of other sizes": (
        scfa.ShapeError,
        "the plan was made for",
        lambda **o: scfa.attention(
            Q[:1], K[:1], V[:1], scfa.make_plan(scfa.Causal(), Q, K, **o), **o
        ),
    ),
    "dout": (
        scfa.ShapeError,
        "dout must have shape",
        lambda **o: scfa.attention_backward(Q, Q, K, V, Q, IDS.float(), scfa.Causal(), **o),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_say_what_to_do(mistake):
    error, text, call = MISTAKES[mistake]
    for _ in range(2):  # nothing wrong is remembered
        with pytest.raises(error, match=text):
            call(backend="reference")


def test_plans_do_not_cross_libraries():
    arrays = Q.numpy(), K.numpy(), V.numpy()
    theirs = scfa.make_plan(scfa.Causal(), *arrays[:2])
    ours = scfa.make_plan(scfa.Causal(), Q, K)
    for inputs, plan in ((arrays, ours), ((Q, K, V), theirs)):
        with pytest.raises(scfa.DeviceError, match="make a plan with arrays of that library"):
            scfa.attention(*inputs, plan)


def functorch_gradient(q, k, v, plan):
    return torch.func.grad(lambda x: scfa.attention(x, k, v, plan).sum())(q)


def compiled(q, k, v, plan):
    torch._dynamo.reset()
    return torch.compile(scfa.attention, backend="eager")(q, k, v, plan)


WAYS = {
    "forward": scfa.attention,
    "recorded": lambda q, k, v, plan: scfa.attention(q.clone().requires_grad_(), k, v, plan),
    "backward": lambda q, k, v, plan: scfa.attention_backward(
        *(V.new_zeros(2, 4, 8, 24), q, k, v, V.new_zeros(2, 4, 8, 24), Q[..., 0], plan)
    ),
    "union": lambda q, k, v, plan: attention_over(q, k, v, [plan]),
    "functorch": functorch_gradient,
    "compiled": compiled,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_of_another_library_is_refused_after_a_like_call(way):
    """What is remembered of a call says nothing of the next plan: this reached its addresses."""
    theirs = scfa.make_plan(scfa.Causal(), Q.numpy(), K.numpy())
    scfa.attention(Q, K, V, scfa.make_plan(scfa.Causal(), Q, K))
    with pytest.raises(scfa.DeviceError, match="the plan holds arrays of numpy, q is a torch"):
        WAYS[way](Q, K, V, theirs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["key_end", "work", "k_count"])
def test_a_plan_that_lacks_an_array_is_refused_after_a_like_call(name, way):
    plan = scfa.make_plan(scfa.Causal(), Q, K)
    scfa.attention(Q, K, V, plan)
    for value, got in ((None, "NoneType"), ([1], "list")):
        broken = dataclasses.replace(plan, **{name: value})
        with pytest.raises(scfa.DeviceError, match=f"plan.{name} must be a torch array.*got {got}"):
            WAYS[way](Q, K, V, broken)


META_Q, META_K, META_V, META_IDS = (x.to("meta") for x in (Q, K, V, IDS))
ON_META = {
    "heads": (scfa.ShapeError, "divide heads", lambda: (META_Q[:, :3], META_K, META_V)),
    "head_dim": (scfa.ShapeError, "multiple of 8", lambda: [META_Q[..., :12]] * 3),
    "rank": (scfa.ShapeError, "4 axes", lambda: (META_Q[0], META_K, META_V)),
    "rows": (scfa.ShapeError, "must agree", lambda: (META_Q, META_K, META_V[:, :, :7])),
    "dtype": (scfa.DTypeError, "share a dtype", lambda: (META_Q, META_K.half(), META_V)),
    "k elsewhere": (scfa.DeviceError, "q on meta, k on cpu", lambda: (META_Q, K, META_V)),
    "hashes elsewhere": (
        scfa.DeviceError,
        "must be on meta like q, got cpu",
        lambda: (META_Q, META_K, META_V, scfa.HashSparse(IDS, K_IDS)),
    ),
    "hash shape": (
        scfa.ShapeError,
        "k_hash must broadcast",
        lambda: (META_Q, META_K, META_V, scfa.HashSparse(META_IDS, META_IDS)),
    ),
    "plan": (
        scfa.ShapeError,
        "the plan was made for",
        lambda: (
            *(META_Q[:1], META_K[:1], META_V[:1]),
            scfa.make_plan(scfa.Causal(), META_Q, META_K),
        ),
    ),
}


@pytest.mark.parametrize("mistake", ON_META)
def test_a_dry_run_on_meta_meets_the_checks(mistake):
    """Results had the shapes of operators that check nothing, some of them no attention gives."""
    error, text, arguments = ON_META[mistake]
    q, k, v, *rest = arguments()
    pattern = rest[0] if rest else scfa.Causal()
    with pytest.raises(error, match=text):
        scfa.attention(q, k, v, pattern)
    with pytest.raises(error, match=text):
        attention_over(q, k, v, [pattern])
    assert scfa.attention(META_Q, META_K, META_V).shape == (2, 4, 8, 24)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1j, 1e39])
def test_a_dry_run_on_meta_meets_the_scale(scale):
    with pytest.raises(scfa.ScaleError):
        scfa.attention(META_Q, META_K, META_V, softmax_scale=scale)
    with pytest.raises(scfa.ScaleError):
        attention_over(META_Q, META_K, META_V, [scfa.Causal()], softmax_scale=scale)


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize(
    ("name", "bad", "error", "text"),
    [
        ("dout", lambda x: x[:, :1], scfa.ShapeError, "dout must have shape"),
        ("out", lambda x: x.half(), scfa.DTypeError, "out must be float32, got float16"),
        ("lse", lambda x: x[:, :, :3], scfa.ShapeError, r"lse must have shape \(2, 4, 8\)"),
        ("lse", lambda x: torch.empty(x.shape), scfa.DeviceError, "lse must be on meta like q"),
    ],
)
def test_a_backward_on_meta_meets_the_checks(layout, name, bad, error, text):
    def turned(x):
        return x if layout == "bhtd" else x.transpose(1, 2)

    q, k, v, out = (
        turned(x) for x in (META_Q, META_K, META_V, META_Q[..., :1].expand(2, 4, 8, 24))
    )
    given = {"dout": out, "out": out, "lse": torch.empty(2, 4, 8, device="meta")}

    def backward(dout, out, lse):
        return scfa.attention_backward(dout, q, k, v, out, lse, layout=layout)

    assert [x.shape for x in backward(**given)] == [q.shape, k.shape, v.shape]
    with pytest.raises(error, match=text):
        backward(**(given | {name: bad(given[name])}))


def test_a_dry_run_on_meta_passes_what_is_right():
    plan = scfa.make_plan(scfa.HashSparse(META_IDS, META_IDS[:, :2]), META_Q, META_K)
    query = torch.nn.Parameter(META_Q)
    scfa.attention(query, META_K, META_V, plan).sum().backward()
    assert query.grad.shape == Q.shape
    merged = attention_over(query, META_K, META_V, [plan, scfa.Documents(META_IDS[:, 0])])
    assert merged.shape == (2, 4, 8, 24)
