"""The operator ``scfa::angular_hash``, and the module that adapts to the rows it hashes."""

import copy

import numpy as np
import pytest
from scripts import python

torch = pytest.importorskip("torch", reason="about torch tensors")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import scfa_core as scfa  # noqa: E402
from scfa_core import hashing, hashing_checks, nn  # noqa: E402
from scfa_core.nn.past import less_past  # noqa: E402
from scfa_core.torch_hashing import ANGULAR_HASH, kernel_reason, past_mean  # noqa: E402

BUCKETS, DIM = 8, 16


def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def skewed(seed, batch=2, heads=4, seqlen=400):
    """Rows with a common part and two axes of most of the variance."""
    scale = torch.full((DIM,), 0.3)
    scale[:2] = 6
    return rows(seed, batch, heads, seqlen, DIM) * scale + 5


def directions(heads=4, rounds=1, seed=0):
    drawn = hashing.random_directions(heads, DIM, BUCKETS, rounds=rounds, seed=seed)
    return torch.from_numpy(drawn)


@pytest.mark.parametrize("middle", [None, (2, DIM), (2, 2, 1, DIM)])
def test_opcheck_and_strides(middle):
    center = None if middle is None else rows(1, *middle)
    for x in (rows(0, 2, 4, 7, DIM), rows(0, 2, 7, 4, DIM).transpose(1, 2)):
        torch.library.opcheck(ANGULAR_HASH, (x, directions(2, 3), center))
        bucket = hashing.angular_hash(x, directions(2, 3), center)
        assert bucket.shape == (3, 2, 4, 7)
        assert bucket.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 4, 7, DIM), (2, 4, 0, DIM)])
def test_nothing_to_hash(shape):
    bucket = hashing.angular_hash(torch.zeros(shape), directions())
    assert bucket.shape == (1, *shape[:3])
    assert bucket.dtype == torch.int32


def test_ties_take_the_lowest_bucket_and_bad_rows_a_valid_one():
    table = torch.zeros(1, 1, DIM, 4)
    table[0, 0, 3, 1:3] = 1
    x = torch.zeros(1, 1, 5, DIM)
    x[0, 0, 0, 3], x[0, 0, 1, 3], x[0, 0, 2], x[0, 0, 3, 4] = 1, -1, torch.nan, torch.inf
    for y, own in ((x, table), (x.numpy(), table.numpy())):
        with np.errstate(invalid="ignore"):
            bucket = np.asarray(hashing.angular_hash(y, own))[0, 0, 0]
        assert (bucket[0], bucket[1], bucket[4]) == (1, 5, 0)
        assert ((bucket >= 0) & (bucket < BUCKETS)).all()


def test_compiled_exported_and_mapped():
    x, table = rows(0, 2, 4, 9, DIM), directions()
    right = hashing.angular_hash(x, table)
    compiled = torch.compile(hashing.angular_hash, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, table), right)
    mapped = torch.func.vmap(lambda y: hashing.angular_hash(y, table))(x[:, None])
    assert torch.equal(mapped, right.permute(1, 0, 2, 3)[:, :, None])

    class Hash(torch.nn.Module):
        def forward(self, x):
            return hashing.angular_hash(x, table)

    program = torch.export.export(Hash(), (x,))
    assert torch.equal(program.module()(x), right)
    assert "scfa.angular_hash" in str(program.graph)


def test_compiles_in_a_process_that_has_hashed_nothing_before():
    code = (
        "import torch, scfa_core.hashing as h\n"
        "t = torch.from_numpy(h.random_directions(1, 8, 4, seed=0)); x = torch.ones(1, 1, 3, 8)\n"
        "f = torch.compile(h.angular_hash, fullgraph=True, backend='eager')\n"
        "assert torch.equal(f(x, t), h.angular_hash(x, t))\n"
    )
    python(code)


def test_a_tensor_that_no_kernel_takes_has_a_reason(monkeypatch):
    monkeypatch.setattr("scfa_core.torch_hashing.load_backend", lambda name: "cannot be imported")
    assert "imported" in kernel_reason(torch.zeros(1, 1, 1, DIM), directions())


def cost(bucket):
    """Same-bucket pairs over those of even buckets: 1 is even."""
    return BUCKETS / hashing.bucket_balance(bucket, BUCKETS).effective_buckets


@pytest.mark.parametrize("heads_kv", [4, 2])
def test_whitening_makes_buckets_even_where_a_center_does_not(heads_kv):
    costs = {}
    for adapt in nn.hashing.ADAPTS:
        own = nn.AngularHash(heads_kv, DIM, BUCKETS, seed=3, query_heads=4, adapt=adapt)
        for seed in range(3):
            own(skewed(seed), 0.01 * skewed(seed + 50, heads=heads_kv))
            if adapt != "none":
                own.move_centers()
        own.eval()
        buckets = own(skewed(9), 0.01 * skewed(59, heads=heads_kv))
        costs[adapt] = [cost(bucket) for bucket in buckets]
    for plain, center, whiten, past, even in zip(*costs.values(), strict=True):
        assert max(whiten, past) < 1.3 < 1.5 < center < plain
        assert even < past


@pytest.mark.parametrize("adapt", nn.hashing.ADAPTS[1:])
def test_a_bucket_depends_on_no_later_row_of_its_call(adapt):
    own = nn.AngularHash(4, DIM, BUCKETS, seed=3, adapt=adapt)
    for seed in range(2):
        own(skewed(seed))
        own.move_centers()
    x = skewed(7)
    later = x.clone()
    later[:, :, 200:] = skewed(8)[:, :, 200:] - 9
    (whole,), (other,) = own(x), own(later)  # in training, where both are noted
    assert torch.equal(whole[..., :200], other[..., :200])
    assert not torch.equal(whole[..., 200:], other[..., 200:])
    own.eval()
    assert torch.equal(own(x)[0], whole)  # evaluation hashes as training does
    if adapt in ("past", "even"):  # of whole sequences, or of what they begin with
        assert torch.equal(own(x[:, :, :70])[0], whole[..., :70])
        return
    parts = torch.cat([own(x[:, :, at : at + 40])[0] for at in range(0, 400, 40)], dim=-1)
    assert (parts == whole).float().mean() > 0.999  # products of other shapes sum in other orders


@pytest.fixture(params=[False, True])
def deterministic(request):
    """Whether torch is told to raise on what differs from run to run, as cumsum on CUDA."""
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


class Seen(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_past_is_known_where_only_deterministic_sums_are(deterministic):
    x, start = rows(0, 2, 3, 700, 4), rows(1, 3, 4)
    with Seen() as seen:
        past_mean(x, start)
    assert ("cumsum" in seen.names) is not deterministic


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("seqlen", [0, 1, 40, 64, 200, 700])
def test_rows_less_the_mean_of_those_before(seqlen):
    x, start = rows(0, 2, 3, seqlen, 4) + 5, rows(1, 3, 4)
    less = less_past(x, past_mean(x, start))
    assert less.shape == x.shape
    assert not less.requires_grad
    for row in range(seqlen):
        known = row - row % hashing.CENTER_ROWS  # rows of earlier blocks
        total = x[:, :, :known].sum(2) + hashing_checks.PAST_START * start
        mean = total / (known + hashing_checks.PAST_START)
        torch.testing.assert_close(less[:, :, row], x[:, :, row] - mean, rtol=1e-4, atol=1e-4)


def test_buckets_stay_even_when_rows_move_at_once():
    costs = {}
    for adapt in ("whiten", "past", "even"):
        own = nn.AngularHash(2, DIM, BUCKETS, seed=3, adapt=adapt)
        own(rows(0, 1, 2, 2000, DIM))
        own.move_centers()
        moved = rows(1, 1, 2, 2000, DIM) + 4 * rows(2, 1, 2, 1, DIM)  # a mean none knew before
        costs[adapt] = cost(own(moved)[0])
    assert max(costs["even"], costs["past"]) < 1.2 < 2 < costs["whiten"]


def test_whitening_travels_with_the_state_and_is_told_of_mistakes():
    own = nn.AngularHash(2, DIM, BUCKETS, seed=3, adapt="whiten", momentum=0.5)
    own.move_centers()  # nothing was noted: no turn
    torch.testing.assert_close(own.turn[0] / own.turn[0, 0, 0], torch.eye(DIM))
    x = skewed(1, heads=2)
    own(x)
    own.move_centers()
    copy = nn.AngularHash(2, DIM, BUCKETS, seed=4, adapt="whiten")
    copy.load_state_dict(own.state_dict())
    assert torch.equal(copy(x)[0], own(x)[0])
    assert set(nn.AngularHash(2, DIM, BUCKETS).state_dict()) == {"directions"}
    assert "adapt='whiten'" in repr(own)
    for wrong in (
        {"adapt": "both"},
        {"adapt": "whiten", "center": True},
        {"adapt": "past", "center": True},
        {"adapt": "even", "center": True},
    ):
        with pytest.raises(scfa.PatternError, match="adapt must be"):
            nn.AngularHash(2, DIM, BUCKETS, **wrong)


@pytest.mark.parametrize("adapt", nn.hashing.ADAPTS)
def test_a_hash_is_made_where_torch_makes_tensors_and_gets_its_values_there(adapt):
    with torch.device("meta"):
        own = nn.AngularHash(2, DIM, BUCKETS, seed=3, adapt=adapt)
    assert all(buffer.is_meta for buffer in own.buffers())
    own.to_empty(device="cpu").apply(lambda module: getattr(module, "reset_parameters", list)())
    right = nn.AngularHash(2, DIM, BUCKETS, seed=3, adapt=adapt)
    torch.testing.assert_close(own.state_dict(), right.state_dict(), rtol=0, atol=0)
    own(skewed(0, heads=2))
    if adapt != "none":
        own.move_centers()
    own.reset_parameters()
    torch.testing.assert_close(own.state_dict(), right.state_dict(), rtol=0, atol=0)


def test_without_a_seed_other_directions_are_drawn():
    own = nn.AngularHash(2, DIM, BUCKETS)
    before = own.directions.clone()
    own.reset_parameters()
    assert not torch.equal(own.directions, before)
    torch.testing.assert_close(own.directions.norm(dim=2), torch.ones(1, 2, BUCKETS // 2))


@pytest.mark.parametrize("adapt", ["whiten", "past", "even"])
@pytest.mark.parametrize("redraw", [True, False])
def test_a_layer_adapts_and_compiles_whole(redraw, adapt):
    torch._dynamo.reset()
    layer = nn.HashSelfAttention(
        32, 2, BUCKETS, shared_qk=True, include_self=False, adapt=adapt, redraw=redraw
    )
    x = rows(0, 2, 40, 32) + 3
    layer(x).sum().backward()
    layer.hash.move_centers()
    assert not torch.equal(layer.hash.turn[0], torch.eye(DIM))
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.isfinite(step(x)).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("adapt", nn.hashing.ADAPTS)
def test_shapes_alone_need_no_rows(adapt, training):
    layer = nn.HashSelfAttention(32, 2, BUCKETS, adapt=adapt).to("meta").train(training)
    assert layer(torch.empty(1, 80, 32, device="meta")).shape == (1, 80, 32)


@pytest.mark.parametrize("adapt", nn.hashing.ADAPTS[1:])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_in_half_precision_adapts(dtype, adapt):
    layer = nn.HashSelfAttention(32, 2, BUCKETS, seed=3, adapt=adapt).to(dtype)
    x = rows(0, 2, 200, 32).to(dtype) + 3
    for training in (True, False):
        out = layer.train(training)(x)
        assert out.dtype == dtype
        assert torch.isfinite(out).all()
        layer.hash.move_centers()


def test_all_hashes_of_a_model_move_at_once():
    def make(adapt):
        return nn.HashSelfAttention(32, 2, BUCKETS, seed=3, adapt=adapt, shared_qk=True)

    torch.manual_seed(0)
    model = torch.nn.Sequential(make("center"), make("none"), make("even"))
    model.append(model[0])  # a layer in two places moves once
    alone = copy.deepcopy(model)
    x = rows(0, 2, 200, 32) + 3
    assert torch.equal(model(x), alone(x))
    assert nn.move_centers(torch.nn.Sequential(model), share=0.5) == 2
    for at in (0, 2):
        alone[at].hash.move_centers(0.5)
    state = alone.state_dict()
    assert all(torch.equal(y, state[name]) for name, y in model.state_dict().items())
    assert not torch.equal(model[0].hash.centers[0].place, torch.zeros_like(x[0, :2, :16]))

    with pytest.raises(scfa.PatternError, match="no adapting hash in HashSelfAttention: make its"):
        nn.move_centers(make("none"))
    with pytest.raises(scfa.PatternError, match="takes a module, got list; nn"):
        nn.move_centers([model])
    with pytest.raises(scfa.PatternError, match="share"):
        nn.move_centers(model, share=2)


@pytest.mark.parametrize("adapt", nn.hashing.ADAPTS[1:])
def test_accumulated_batches_count_alike_and_recomputed_ones_once(adapt):
    first, second = rows(0, 1, 2, 200, DIM) + 3, rows(1, 1, 2, 200, DIM) - 1
    layers = [nn.AngularHash(2, DIM, BUCKETS, seed=3, adapt=adapt) for _ in range(4)]
    apart, twice, alone, joint = layers
    for given in (first, second):
        apart(given)
        twice(given)
        twice(given)
    alone(second)
    joint(torch.cat((first, second)))  # whitening, about their common mean: another covariance
    for one in layers:
        one.move_centers()
    assert all(
        torch.allclose(x, y, rtol=0, atol=1e-5)
        for x, y in zip(apart.buffers(), twice.buffers(), strict=True)
    )
    places = [one.centers[0].place for one in (apart, joint, alone)]
    torch.testing.assert_close(places[0], places[1], rtol=0, atol=1e-5)
    assert (places[0] - places[2]).abs().max() > 1
    for given in (first, second):  # the next step begins anew
        apart.centers[0].notes.fill_(0)
        apart(given)
    apart.move_centers(share=1)
    torch.testing.assert_close(apart.centers[0].place, places[2], rtol=0, atol=1e-5)
    assert not apart.centers[0].notes.any()


def test_a_batch_that_a_head_cannot_learn_from_does_not_count_in_it():
    first, second = rows(0, 1, 2, 200, DIM) + 3, rows(1, 1, 2, 200, DIM) - 1
    own, right = (nn.AngularHash(2, DIM, BUCKETS, seed=3, adapt="whiten") for _ in range(2))
    bad = first.clone()
    bad[0, 1, 7] = torch.nan
    for given in (bad, first, second):
        own(given)
    for given in (first, first, second):
        right(given)
    assert own.centers[0].notes.tolist() == [3, 2]
    torch.testing.assert_close(own.centers[0].mean[0], right.centers[0].mean[0])
    torch.testing.assert_close(own.centers[0].mean[1], (first + second)[0, 1].mean(0) / 2)


def test_a_seed_of_directions_that_are_redrawn_would_say_nothing():
    with pytest.raises(scfa.PatternError, match=r"seed=3 would say nothing: leave it out, and see"):
        nn.AngularHash(2, DIM, BUCKETS, seed=3, redraw=True)


def test_covariances_beyond_half_precision_leave_no_infinity():
    own = nn.AngularHash(2, DIM, BUCKETS, seed=3, adapt="whiten").half()
    own(1000 * rows(0, 1, 2, 100, DIM).half())
    own.move_centers()
    assert all(torch.isfinite(buffer).all() for buffer in own.buffers())


def test_running_means_are_float32_whatever_torch_s_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = nn.AngularHash(2, 16, 4, adapt="whiten")
    finally:
        torch.set_default_dtype(before)
    floats = [x.dtype for x in layer.buffers() if x.is_floating_point()]
    assert set(floats) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_second_moments_sum_in_float32_whatever_the_rows_are(dtype):
    from scfa_core.nn.centers import second_moments

    generator = torch.Generator().manual_seed(4)
    x = (30 + torch.randn(3, 4, 501, 16, generator=generator)).to(dtype)
    want = torch.einsum("bhtd,bhte->hde", x.double(), x.double())
    found = second_moments(x)
    assert found.dtype == torch.float32
    assert ((found - want) / want).abs().max() < 1e-5
    assert not second_moments(x[:, :, :0]).any()


@pytest.mark.parametrize("adapt", nn.hashing.ADAPTS[1:])
def test_an_adapting_hash_tells_rows_of_other_sizes(adapt):
    own = nn.AngularHash(2, 16, 4, adapt=adapt)
    keys = torch.randn(1, 2, 9, 16)
    with pytest.raises(scfa.PatternError, match="query_heads=3 must be a multiple of heads=2"):
        nn.AngularHash(2, 16, 4, adapt=adapt, query_heads=3)
    for wrong in (0, -2, "4", 2.0):
        with pytest.raises(scfa.PatternError, match="query_heads"):
            nn.AngularHash(2, 16, 4, adapt=adapt, query_heads=wrong)
    for queries in (torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 8)):
        with pytest.raises(scfa.ShapeError, match=r"of \(2, 16\) \(heads, head_dim\) got rows"):
            own(queries, keys)
    assert nn.AngularHash(2, 16, 4, adapt=adapt, query_heads=4)(torch.randn(1, 4, 9, 16), keys)
