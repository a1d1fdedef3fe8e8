"""Every public function on tensors of every odd kind: it takes them, or says so in its own words.

What torch, NumPy and Numba say of such tensors names their own kernels, and no cure.
"""

import pytest

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")

import scfa_core as scfa  # noqa: E402
from scfa_core import compat, dropping, hashing, nn  # noqa: E402
from scfa_core.decoding import at_end, attention_in_parts  # noqa: E402
from scfa_core.merging import attention_over, merge_attention  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse.* is in beta state:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .*deprecated:UserWarning"),
]
BATCH, HEADS, ROWS, DIM = 1, 2, 4, 16
DRAWN = torch.Generator().manual_seed(0)
Q = torch.randn(BATCH, HEADS, ROWS, DIM, generator=DRAWN)
IDS = torch.zeros(BATCH, HEADS, ROWS, dtype=torch.int64)
KEEP, SCORES, TURNED = IDS == 0, IDS.float(), Q.transpose(1, 2).contiguous()
FLAGS = KEEP.mT.contiguous()  # (batch, seqlen, heads), as compat has it
OUT, LSE = scfa.attention(Q, Q, Q, return_lse=True, backend="numba-cpu")
PLAN = scfa.make_plan(scfa.Causal(), Q, Q, backend="numba-cpu")
RIGHT = scfa.KeyRanges(IDS, IDS + 1)
DIRECTIONS = torch.from_numpy(hashing.random_directions(HEADS, DIM, 8, seed=0))
BUCKETS = IDS[None].int()
SIZES = {"batch": BATCH, "heads": HEADS}


def numbers(dtype):
    return lambda x: torch.ones(x.shape).to(dtype)


def memory(dtype):
    return lambda x: torch.empty(x.shape, dtype=dtype)


def nested(layout):
    return lambda x: torch.nested.nested_tensor([x[0], x[0]], layout=layout)


KINDS = {
    "float8": numbers(torch.float8_e4m3fn),
    "uint16": numbers(torch.uint16),
    "uint32": numbers(torch.uint32),
    "uint64": numbers(torch.uint64),
    "complex": numbers(torch.complex64),
    "bits": memory(torch.bits8),
    "quantized": lambda x: torch._empty_affine_quantized(
        x.shape, scale=0.1, zero_point=0, dtype=torch.quint8
    ),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: torch.ones(x.shape).flatten(0, max(x.ndim - 3, 0)).to_sparse_csr(),
    "nested": nested(torch.strided),
    "jagged": nested(torch.jagged),
}
UNSIGNED = {"uint16", "uint32", "uint64"}
REAL = UNSIGNED | {"float8"}


def attend(pattern, **options):
    return scfa.attention(Q, Q, Q, pattern, **options)


QKV = {"q": Q, "k": Q, "v": Q}
HASHES = {"q_hash": IDS, "k_hash": IDS}
KEEPS = {"q_keep": KEEP, "k_keep": KEEP}
DOCUMENTS = {"q_ids": IDS[:, 0], "k_ids": IDS[:, 0]}
RANGES = {"start": IDS, "end": IDS}
MODULES = {
    "dense": nn.DenseSelfAttention(32, 2),
    "hash": nn.HashSelfAttention(32, 2, 8, seed=0),
    "drop": nn.DropSelfAttention(32, 2, how="top-k"),
}
# name: function, arguments, kinds that one of these may be while the others stay, or all are
CALLS = {
    "attention": (lambda **x: scfa.attention(**x, backend="numba-cpu"), QKV, set()),
    "reference": (lambda **x: scfa.attention(**x, backend="reference"), QKV, set()),
    "with gradients": (
        lambda q, k, v: scfa.attention(q, k, v, PLAN),
        {n: x.clone().requires_grad_() for n, x in QKV.items()},
        set(),
    ),
    "attention_backward": (
        scfa.attention_backward,
        {"dout": Q, **QKV, "out": OUT, "lse": LSE},
        set(),
    ),
    "make_plan": (lambda q, k: scfa.make_plan(scfa.Causal(), q, k), {"q": Q, "k": Q}, set()),
    "validate": (lambda q, k: scfa.validate(scfa.Causal(), q, k), {"q": Q, "k": Q}, set()),
    "hashes": (lambda **x: attend(scfa.HashSparse(**x)), HASHES, UNSIGNED),
    "hashes, reference": (
        lambda **x: attend(scfa.HashSparse(**x), backend="reference"),
        HASHES,
        UNSIGNED,
    ),
    "keeps": (lambda **x: attend(scfa.QKSparse(**x)), KEEPS, UNSIGNED),
    "documents": (lambda **x: attend(scfa.Documents(**x)), DOCUMENTS, UNSIGNED),
    "ranges": (lambda **x: attend(scfa.KeyRanges(**x)), RANGES, UNSIGNED),
    "checked hashes": (lambda **x: scfa.validate(scfa.HashSparse(**x), Q, Q), HASHES, UNSIGNED),
    "checked keeps": (lambda **x: scfa.validate(scfa.QKSparse(**x), Q, Q), KEEPS, UNSIGNED),
    "checked ranges": (lambda **x: scfa.validate(scfa.KeyRanges(**x), Q, Q), RANGES, UNSIGNED),
    "seen hashes": (
        lambda **x: scfa.HashSparse(**x).mask(ROWS, ROWS, **SIZES),
        HASHES,
        UNSIGNED,
    ),
    "seen keeps": (lambda **x: scfa.QKSparse(**x).mask(ROWS, ROWS, **SIZES), KEEPS, UNSIGNED),
    "seen documents": (
        lambda **x: scfa.Documents(**x).mask(ROWS, ROWS, **SIZES),
        DOCUMENTS,
        UNSIGNED,
    ),
    "seen ranges": (lambda **x: scfa.KeyRanges(**x).mask(ROWS, ROWS, **SIZES), RANGES, UNSIGNED),
    "at_end": (
        lambda q, k: at_end(RIGHT, q, k),  # which reads shapes
        {"q": Q, "k": Q},
        KINDS.keys() - {"sparse", "sparse rows", "nested", "jagged"},
    ),
    "attention_in_parts": (lambda q, k, v: attention_in_parts(q, [(k, v, None)]), QKV, set()),
    "attention_over": (lambda **x: attention_over(**x, patterns=[RIGHT, PLAN]), QKV, set()),
    "merge_attention": (
        lambda out, lse: merge_attention([out, OUT], [lse, LSE]),
        {"out": OUT, "lse": LSE},
        set(),
    ),
    "merge_attention of two": (
        lambda out, lse: merge_attention([out, out], [lse, lse]),
        {"out": OUT, "lse": LSE},
        set(),
    ),
    "angular_hash": (
        hashing.angular_hash,
        {"x": Q, "directions": DIRECTIONS, "center": Q[0, :, 0]},
        REAL,
    ),
    "bucket_balance": (lambda bucket: hashing.bucket_balance(bucket, 4), {"bucket": IDS}, UNSIGNED),
    "disjoint_rounds": (
        lambda **x: hashing.disjoint_rounds(**x, buckets=4),
        {"q_bucket": BUCKETS, "k_bucket": BUCKETS},
        UNSIGNED,
    ),
    "top_k_keep": (
        dropping.top_k_keep,
        {"scores": SCORES, "k": IDS, "among": KEEP, "groups": IDS},
        UNSIGNED,
    ),
    "threshold_keep": (
        dropping.threshold_keep,
        {"scores": SCORES, "threshold": SCORES},
        UNSIGNED,
    ),
    "threshold_keep, whole": (
        lambda scores: dropping.threshold_keep(scores, 1),
        {"scores": SCORES},
        UNSIGNED,
    ),
    "straight_through": (
        dropping.straight_through,
        {"keep": KEEP, "scores": SCORES},
        UNSIGNED,
    ),
    "drop_attention": (
        dropping.drop_attention,
        {**QKV, **KEEPS, "q_scores": SCORES, "k_scores": SCORES},
        UNSIGNED,
    ),
    "compat, hash": (
        compat.hash_sparse_attention,
        {"q": TURNED, "k": TURNED, "v": TURNED, "q_hash": FLAGS.long(), "k_hash": FLAGS.long()},
        UNSIGNED,
    ),
    "compat, keep": (
        compat.qk_sparse_attention,
        {"q": TURNED, "k": TURNED, "v": TURNED, "q_keep": FLAGS, "k_keep": FLAGS},
        UNSIGNED,
    ),
    "compat, padded": (
        lambda q, k, v: compat.hash_sparse_attention(q, k, v, FLAGS.long(), FLAGS.long()),
        dict.fromkeys("qkv", TURNED[..., :12]),
        set(),
    ),
    "compact": (
        compat.compact,
        {"keep_tensor": FLAGS, "x": TURNED},
        UNSIGNED | {"complex"},
    ),
    "compact by index": (
        lambda x, index: compat.compact(None, x, index),
        {"x": TURNED, "index": FLAGS.long()},
        {"complex"},
    ),
    "pad_index": (
        compat.pad_index,
        {"index": FLAGS.long(), "indices_per_head": FLAGS[:, 0].long()},
        REAL,
    ),
    "hash_attention_fn": (compat.hash_attention_fn, {"Q": Q, "K": Q, "V": Q}, set()),
    "qk_attention_fn": (compat.qk_attention_fn, dict.fromkeys("qkv", TURNED), set()),
    "AngularHash": (nn.AngularHash(HEADS, DIM, 8, seed=0), {"x": Q}, REAL),
    "AngularHash, past": (nn.AngularHash(HEADS, DIM, 8, seed=0, adapt="past"), {"x": Q}, REAL),
    **{
        f"layer, {name}": (module, {"x": torch.zeros(BATCH, ROWS, 32)}, set())
        for name, module in MODULES.items()
    },
}


def said_by(call, arguments):
    """The error of this package, or None where the call went through."""
    positional = "x" in arguments and len(arguments) == 1
    try:
        call(*arguments.values()) if positional else call(**arguments)
    except scfa.ScfaError as error:
        return error
    return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_odd_tensors_are_taken_or_refused_in_words(name, kind):
    call, arguments, taken = CALLS[name]
    odd = {key: KINDS[kind](x.detach()) for key, x in arguments.items()}
    for key in arguments:
        error = said_by(call, {**arguments, key: odd[key]})
        assert error or kind in taken, key
        assert not error or isinstance(
            error, (scfa.DTypeError, scfa.LayoutError, scfa.PatternError, scfa.ShapeError)
        )
    assert said_by(call, odd) or kind in taken


@pytest.mark.parametrize("kind", sorted(UNSIGNED))
def test_wide_unsigned_scores_compare_as_numbers(kind):
    scores = torch.tensor([1, 2, 3]).to(getattr(torch, kind))
    for threshold in (2, 2.0, scores[1], torch.tensor(2), torch.tensor(2.0)):
        assert dropping.threshold_keep(scores, threshold).tolist() == [False, False, True]
    counts = torch.tensor([[1, 3]]).to(getattr(torch, kind))
    padded = compat.pad_index(torch.zeros(1, 3, 2, dtype=torch.int64), counts)
    assert padded[0].tolist() == [[0, 0], [-1, 0], [-1, 0]]


WORDS = {
    "sparse rows": ("attention", "q", r"dense \(torch.strided\), got torch.sparse_csr; call"),
    "sparse": ("attention_backward", "dout", "dout must be dense .* got torch.sparse_coo"),
    "nested": (
        "attention",
        "k",
        "k must be one array, and nested tensors have no batch axis: pack",
    ),
    "jagged": ("angular_hash", "x", "x must be one array, and nested tensors have no batch axis"),
    "quantized": (
        "qk_attention_fn",
        "k",
        "k must be one of .*'float32', .* got torch.quint8; cast",
    ),
    "float8": ("top_k_keep", "scores", "must be real numbers, got torch.float8_e4m3fn; cast it"),
    "complex": ("seen hashes", "q_hash", "must be an array of integers, got complex64; cast it"),
    "bits": ("layer, dense", "x", "x must be float32 like the layer's weights, got bits8"),
}


@pytest.mark.parametrize("kind", WORDS)
def test_the_words_name_the_argument_and_the_cure(kind):
    name, key, words = WORDS[kind]
    call, arguments, _ = CALLS[name]
    odd = {**arguments, key: KINDS[kind](arguments[key])}
    with pytest.raises(scfa.ScfaError, match=words):
        call(odd["x"]) if name.startswith("layer") else call(**odd)


def test_a_quantized_input_of_a_layer_is_told_the_cure():
    x = KINDS["quantized"](torch.zeros(BATCH, ROWS, 32))
    with pytest.raises(scfa.DTypeError, match=r"got quint8; x.dequantize\(\)"):
        MODULES["dense"](x)


def test_a_mask_of_no_values_says_so():
    with pytest.raises(scfa.DeviceError, match="on the device meta and has no values"):
        scfa.Documents(IDS[:, 0].to("meta")).mask(ROWS, ROWS)


def test_a_sparse_gradient_is_refused_in_words():
    q = Q.clone().requires_grad_()
    out = scfa.attention(q, Q, Q, backend="numba-cpu")
    with pytest.raises(
        scfa.LayoutError, match=r"the gradient of out must be dense .*call .to_dense\(\)"
    ):
        torch.autograd.grad(out, q, torch.ones_like(out).to_sparse())


def test_a_sparse_gradient_of_lse_is_refused_in_words():
    q = Q.clone().requires_grad_()
    _, lse = scfa.attention(q, Q, Q, return_lse=True, backend="numba-cpu")
    with pytest.raises(scfa.LayoutError, match="the gradient of lse must be dense"):
        torch.autograd.grad(lse, q, torch.ones_like(lse).to_sparse())
