"""Results beside those of other libraries, on the same inputs: each pattern said in their words.

With ``SCFA_REQUIRE=peers`` a torch without one of these fails the test instead of skipping it. What
has kernels for GPUs alone (flash-attn, xformers) is compared with where it is installed.
"""

import importlib
import os
from typing import NamedTuple

import pytest

import scfa_core as scfa

pytestmark = pytest.mark.peers

BATCH, HEADS, HEADS_KV, SEQLEN, HEAD_DIM = 2, 4, 2, 150, 32
ON_A_GPU = {
    "flash_attn": "flash_attn_func",
    "flash_attn_interface": "flash_attn_func",
    "flash_attn.cute": "flash_attn_func",
    "xformers.ops": "memory_efficient_attention",
}


def peer(name):
    """The module of a library, or a skip, which `SCFA_REQUIRE` makes a failure."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if "peers" in os.environ.get("SCFA_REQUIRE", "").split(","):
            pytest.fail(f"SCFA_REQUIRE=peers, but {name} does not import: {error}")
        pytest.skip(f"{name} does not import: {error}")


@pytest.fixture
def torch():
    return peer("torch")


class Inputs(NamedTuple):
    q: object
    k: object
    v: object
    dout: object


def draw(torch, dtype="float32", device="cpu", heads_kv=HEADS_KV):
    generator = torch.Generator().manual_seed(0)

    def normal(heads):
        x = torch.randn((BATCH, heads, SEQLEN, HEAD_DIM), generator=generator)
        return x.to(device, getattr(torch, dtype))

    return Inputs(normal(HEADS), normal(heads_kv), normal(heads_kv), normal(HEADS))


def results(torch, inputs, attend):
    """out, dq, dk and dv of a function, in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    out = attend(*leaves)
    grads = torch.autograd.grad(out, leaves, inputs.dout)
    return [x.detach().double().cpu() for x in (out, *grads)]


def dense(torch, q, k, v):
    """Causal attention of torch, key heads repeated."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def held(torch, inputs, mine, theirs):
    """Neither is further from float64 than twice the other, and rounding of the dtype."""
    right = Inputs(*(x.double().cpu() for x in inputs))
    truth = results(torch, right, lambda *x: dense(torch, *x))
    rounding = torch.finfo(inputs.q.dtype).eps
    for got, other, true in zip(mine, theirs, truth, strict=True):
        allowed = 2 * (other - true).norm() + rounding * true.norm()
        assert (got - true).norm() <= allowed
        assert (other - true).norm() <= 20 * rounding * true.norm(), "the peer is right as well"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["MATH", "FLASH_ATTENTION"])
def test_dense_causal_beside_torch(torch, dtype, kernel):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    inputs = draw(torch, dtype)

    def theirs(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            return dense(torch, q, k, v)

    mine = results(torch, inputs, lambda *x: scfa.attention(*x))
    held(torch, inputs, mine, results(torch, inputs, theirs))


def patterns(torch):
    """Name: our pattern, and the mask_mod that a user of FlexAttention has."""
    generator = torch.Generator().manual_seed(1)

    def ids(heads, most):
        return torch.randint(0, most, (BATCH, heads, SEQLEN), generator=generator)

    q_hash, k_hash = ids(HEADS, 5), ids(HEADS_KV, 5)
    q_keep, k_keep = ids(HEADS, 3) > 0, ids(HEADS_KV, 3) > 0
    document = torch.arange(SEQLEN).expand(BATCH, -1) // torch.tensor([[40], [55]])
    start = ids(HEADS, SEQLEN)
    end = start + ids(HEADS, 60)
    group = HEADS // HEADS_KV
    return {
        "causal": (scfa.Causal(), lambda b, h, i, j: i >= j),
        "strict": (scfa.Causal(include_self=False), lambda b, h, i, j: i > j),
        "window": (scfa.SlidingWindow(17), lambda b, h, i, j: (i >= j) & (i - j < 17)),
        "documents": (
            scfa.Documents(document),
            lambda b, h, i, j: (i >= j) & (document[b, i] == document[b, j]),
        ),
        "hash": (
            scfa.HashSparse(q_hash, k_hash),
            lambda b, h, i, j: (i >= j) & (q_hash[b, h, i] == k_hash[b, h // group, j]),
        ),
        "drop": (
            scfa.QKSparse(q_keep, k_keep),
            lambda b, h, i, j: (i >= j) & q_keep[b, h, i] & k_keep[b, h // group, j],
        ),
        "ranges": (
            scfa.KeyRanges(start, end),
            lambda b, h, i, j: (start[b, h, i] <= j) & (j < end[b, h, i]),
        ),
        "hash in a window of a document": (
            scfa.HashSparse(q_hash, k_hash) & scfa.SlidingWindow(60) & scfa.Documents(document),
            lambda b, h, i, j: (
                (i >= j)
                & (i - j < 60)
                & (document[b, i] == document[b, j])
                & (q_hash[b, h, i] == k_hash[b, h // group, j])
            ),
        ),
    }


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "name",
    [
        "causal",
        "strict",
        "window",
        "documents",
        "hash",
        "drop",
        "ranges",
        "hash in a window of a document",
    ],
)
def test_patterns_beside_flex_attention(torch, name):
    flex = peer("torch.nn.attention.flex_attention")
    pattern, mask_mod = patterns(torch)[name]
    q, k, v, _ = draw(torch)
    block_mask = flex.create_block_mask(mask_mod, BATCH, HEADS, SEQLEN, SEQLEN, device="cpu")
    theirs = flex.flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    mine, lse = scfa.attention(q, k, v, pattern, return_lse=True)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    seen = flex.create_mask(mask_mod, BATCH, HEADS, SEQLEN, SEQLEN, device="cpu")
    scores = (q @ k.repeat_interleave(HEADS // HEADS_KV, 1).mT) * HEAD_DIM**-0.5
    right = scores.masked_fill(~seen, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse, right, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("module", ON_A_GPU)
def test_dense_causal_beside_kernels_for_gpus(torch, module):
    if not torch.cuda.is_available():
        pytest.skip("its kernels need a GPU, and torch sees none")
    library = pytest.importorskip(module, exc_type=ImportError)
    function = getattr(library, ON_A_GPU[module], None)
    if function is None:
        pytest.skip(f"{module} is the folder of another generation, and has no function")
    inputs = draw(torch, "bfloat16", "cuda", heads_kv=HEADS)

    def theirs(*tensors):
        rows = (x.transpose(1, 2) for x in tensors)
        if module == "xformers.ops":
            out = function(*rows, attn_bias=library.LowerTriangularMask())
        else:
            out = function(*rows, causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    mine = results(torch, inputs, lambda *x: scfa.attention(*x))
    held(torch, inputs, mine, results(torch, inputs, theirs))
