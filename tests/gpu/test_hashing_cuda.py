"""Angular hashing on the card: the kernel against float64, and what torch builds around it."""

import pytest

from scfa_core import hashing


@pytest.fixture(scope="module")
def served(torch, backend):
    """The kernel does run: nothing below may pass by plain torch."""
    from scfa_core.torch_hashing import kernel_reason

    if backend != "cupy":
        pytest.skip("only cupy has a hashing kernel")
    x = torch.zeros(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
    assert kernel_reason(x, torch.zeros(1, 1, 64, 8, device="cuda")) is None


pytestmark = pytest.mark.usefixtures("served")


def table(torch, heads, head_dim, buckets, rounds=1):
    drawn = hashing.random_directions(heads, head_dim, buckets, rounds=rounds, seed=1)
    return torch.from_numpy(drawn).cuda()


def drawn(torch, *shape, dtype="bfloat16", seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(getattr(torch, dtype))


def loss_of_buckets(torch, bucket, x, directions, center=None):
    """By how much the product of each row's bucket misses the best, in float64."""
    heads, seqlen = x.shape[1:3]
    x = x.double()
    if center is not None:
        if center.dim() == 2:
            center = center[None, :, None].expand(-1, -1, -(-seqlen // hashing.CENTER_ROWS), -1)
        each = center.double().repeat_interleave(heads // center.shape[1], 1)
        x = x - each.repeat_interleave(hashing.CENTER_ROWS, 2)[:, :, :seqlen]
    directions = directions.double().repeat_interleave(heads // directions.shape[1], 1)
    y = x[None] @ directions[:, None]
    y = torch.cat([y, -y], dim=-1)
    assert int(bucket.min()) >= 0
    assert int(bucket.max()) < y.shape[-1]
    return y.amax(-1) - y.gather(-1, bucket.long()[..., None])[..., 0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("head_dim", "buckets", "own", "centers", "rounds"),
    [
        (64, 16, 4, 0, 1),
        (64, 16, 2, 4, 2),
        (128, 32, 1, 2, 1),
        (20, 6, 4, 1, 1),
        (33, 2, 2, 0, 3),
        (256, 64, 4, 0, 1),
        (200, 128, 2, 1, 1),
    ],
)
def test_buckets_are_those_of_float64_but_for_near_ties(
    torch, dtype, head_dim, buckets, own, centers, rounds
):
    x = drawn(torch, 2, 4, 1100, head_dim, dtype=dtype)
    center = drawn(torch, centers, head_dim, dtype="float32", seed=1) if centers else None
    directions = table(torch, own, head_dim, buckets, rounds)
    bucket = hashing.angular_hash(x, directions, center)
    lost = loss_of_buckets(torch, bucket, x, directions, center)
    assert float(lost.max()) < 3e-5  # of products of a few units
    assert float((lost == 0).double().mean()) > 0.999


@pytest.mark.parametrize("head_dim", [20, 64, 256])
@pytest.mark.parametrize("seqlen", [1, 64, 65, 1100, 8192])
def test_a_center_for_every_64_rows(torch, head_dim, seqlen):
    x = drawn(torch, 2, 4, seqlen, head_dim)
    center = 2 * drawn(torch, 2, 2, -(-seqlen // 64), head_dim, dtype="float32", seed=1)
    directions = table(torch, 4, head_dim, 128, 2)
    bucket = hashing.angular_hash(x, directions, center)
    lost = loss_of_buckets(torch, bucket, x, directions, center)
    assert float(lost.max()) < 1e-4
    assert float((lost == 0).double().mean()) > 0.999


def mean_before(torch, x, start):
    """Mean of the rows before each block of 64, and of 16 times `start`, in float64."""
    blocks = -(-x.shape[2] // 64)
    padded = torch.nn.functional.pad(x.double(), (0, 0, 0, 64 * blocks - x.shape[2]))
    sums = padded.unflatten(2, (blocks, 64)).sum(3)
    before = torch.nn.functional.pad(sums.cumsum(2), (0, 0, 1, 0))[:, :, :-1]
    each = start.double().repeat_interleave(x.shape[1] // start.shape[0], 0)
    rows = 64 * torch.arange(blocks, device=x.device)[:, None]
    return (before + 16 * each[:, None]) / (rows + 16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("head_dim", "buckets", "own", "starts", "rounds", "seqlen"),
    [
        (64, 16, 4, 4, 1, 8192),
        (64, 16, 2, 1, 2, 700),
        (64, 8, 1, 2, 1, 100_000),  # several groups of tiles
        (128, 32, 4, 4, 1, 1100),
        (20, 6, 4, 1, 1, 65),
        (33, 2, 2, 4, 3, 1),
        (256, 64, 4, 4, 1, 1025),
        (200, 128, 2, 1, 1, 512),
    ],
)
def test_rows_are_hashed_about_the_mean_of_those_before(
    torch, dtype, head_dim, buckets, own, starts, rounds, seqlen
):
    from scfa_core.nn.past import past_hash
    from scfa_core.torch_hashing import kernel_reason

    x = (3 + drawn(torch, 2, 4, seqlen, head_dim)).to(getattr(torch, dtype))
    start = drawn(torch, starts, head_dim, dtype="float32", seed=1)
    directions = table(torch, own, head_dim, buckets, rounds)
    assert kernel_reason(x, directions, past=True) is None
    bucket, mean = past_hash(x, directions, start)
    right = mean_before(torch, x, start)
    assert float((mean - right).abs().max()) < 1e-5
    lost = loss_of_buckets(torch, bucket, x, directions, right)
    assert float(lost.max()) < 1e-4
    assert float((lost == 0).double().mean()) > 0.998
    for _ in range(20):  # whoever comes first
        again = past_hash(x, directions, start)
        assert torch.equal(again[0], bucket)
        assert torch.equal(again[1], mean)
    alone = past_hash(x[1:], directions, start)
    assert torch.equal(alone[0], bucket[:, 1:])
    assert torch.equal(alone[1], mean[1:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("head_dim", "buckets", "own", "rounds", "seqlen"),
    [
        (64, 16, 4, 1, 8192),
        (64, 16, 2, 2, 700),
        (64, 8, 1, 1, 100_000),  # several groups of tiles
        (128, 32, 4, 2, 4500),
        (20, 6, 4, 1, 65),
        (256, 64, 4, 1, 5000),
        (200, 128, 2, 1, 512),
    ],
)
def test_full_buckets_are_given_less(torch, dtype, head_dim, buckets, own, rounds, seqlen):
    from scfa_core.hashing_checks import CENTER_ROWS
    from scfa_core.nn.past import past_hash
    from scfa_core.torch_hashing import even_factors, kernel_reason

    spread = torch.linspace(0.3, 2, head_dim, device="cuda")
    x = (1 + spread * drawn(torch, 2, 4, seqlen, head_dim)).to(getattr(torch, dtype))
    start = torch.ones(4, head_dim, device="cuda")
    directions = table(torch, own, head_dim, buckets, rounds)
    assert kernel_reason(x, directions, past=True) is None
    plain, mean = past_hash(x, directions, start)
    bucket, same = past_hash(x, directions, start, even=True)
    assert torch.equal(mean, same)
    factors = even_factors(plain, buckets).double()
    factors = factors.repeat_interleave(CENTER_ROWS, 3)[:, :, :, :seqlen]
    each = mean.double().repeat_interleave(CENTER_ROWS, 2)[:, :, :seqlen]
    turned = directions.double().repeat_interleave(4 // own, 1)
    y = (x.double() - each)[None] @ turned[:, None]
    y = torch.cat([y, -y], dim=-1) * factors
    lost = y.amax(-1) - y.gather(-1, bucket.long()[..., None])[..., 0]
    assert float(lost.max()) < 3e-4
    assert float((lost == 0).double().mean()) > 0.998
    if seqlen > 64 * buckets:
        fills = [hashing.bucket_balance(z, buckets).effective_buckets for z in (plain, bucket)]
        assert fills[0] < fills[1]
    for _ in range(20):  # whoever comes first
        assert torch.equal(past_hash(x, directions, start, even=True)[0], bucket)
    assert torch.equal(past_hash(x[1:], directions, start, even=True)[0], bucket[:, 1:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its compiler imports torch.jit
@pytest.mark.parametrize("even", [False, True])
def test_the_past_by_layer_by_graph_and_compiled(torch, even):
    from scfa_core import nn
    from scfa_core.nn.past import past_hash

    x, start = 3 + drawn(torch, 2, 700, 4, 64).transpose(1, 2), drawn(torch, 4, 64, dtype="float32")
    own = nn.AngularHash(4, 64, 16, seed=0, adapt="even" if even else "past").cuda()
    own.centers[0].place.copy_(start)
    bucket = own.eval()(x)[0]
    found, mean = past_hash(x, own.directions, start, even)
    assert torch.equal(bucket, found)
    compiled = torch.compile(past_hash, fullgraph=True)(x, own.directions, start, even)
    assert torch.equal(compiled[0], found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = past_hash(x, own.directions, start, even)
    for _ in range(3):  # flags are zeroed at every replay
        captured[0].fill_(-1)
        graph.replay()
        assert torch.equal(captured[0], found)
        assert torch.equal(captured[1], mean)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 4e36])
def test_blocks_with_bad_rows_count_for_nothing(torch, bad):
    from scfa_core.nn.past import past_hash

    x = drawn(torch, 1, 2, 3000, 64)
    x[0, 1, 70, 3] = bad
    directions, start = table(torch, 2, 64, 16), torch.ones(2, 64, device="cuda")
    bucket, mean = past_hash(x, directions, start)
    assert bool(((bucket >= 0) & (bucket < 16)).all())
    known = [block for block in range(40) if block != 1]
    rows = torch.cat([x[0, 1, 64 * block : 64 * block + 64] for block in known]).double()
    right = (rows.sum(0) + 16) / (len(rows) + 16)
    assert float((mean[0, 1, 40] - right).abs().max()) < 1e-5


def test_strides_and_odd_starts(torch):
    x = drawn(torch, 2, 3, 500, 64)
    directions = table(torch, 3, 64, 16)
    right = hashing.angular_hash(x, directions)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.empty(2, 3, 500, 67, device="cuda", dtype=x.dtype)[..., 3:].copy_(x)
    last = x.transpose(2, 3).contiguous().transpose(2, 3)
    for y in (turned, odd, last):
        assert torch.equal(hashing.angular_hash(y, directions), right)
    spread = hashing.angular_hash(x[:, :1].expand(2, 3, 500, 64), directions)
    assert torch.equal(spread[:, :, 0], right[:, :, 0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_ties_take_the_lowest_and_bad_rows_a_valid_bucket(torch, dtype):
    directions = torch.zeros(1, 1, 64, 12, device="cuda")
    directions[0, 0, 3, 2:6] = 1
    x = torch.zeros(1, 1, 6, 64, device="cuda", dtype=getattr(torch, dtype))
    x[0, 0, 0, 3], x[0, 0, 1, 3], x[0, 0, 2], x[0, 0, 3, 4] = 2, -2, torch.nan, torch.inf
    bucket = hashing.angular_hash(x, directions)[0, 0, 0].tolist()
    assert (bucket[0], bucket[1], bucket[4]) == (2, 14, 0)
    assert all(0 <= one < 24 for one in bucket)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("adapt", ["none", "center", "whiten", "past", "even"])
def test_a_bad_row_does_not_reach_other_rows(torch, adapt, value):
    """Nor stay in the buffers; tests/unit/test_faults_torch.py says what is left of the past."""
    from scfa_core import nn

    own = nn.AngularHash(4, 64, 16, seed=0, adapt=adapt).cuda()
    x = drawn(torch, 2, 4, 300, 64)
    (right,) = own(x)
    bad = x.clone()
    bad[0, 1, 100, 3] = value
    (bucket,) = own(bad)
    same = bucket == right
    same[0, 0, 1, 100] = True
    if adapt in ("past", "even"):
        assert float(same[0, 0, 1, 128:].float().mean()) > 0.5
        same[0, 0, 1, 128:] = True
    assert bool(same.all())
    if adapt != "none":
        own.move_centers()
        assert all(bool(y.isfinite().all()) for y in own.buffers())


@pytest.mark.parametrize("shape", [(0, 4, 7, 64), (2, 4, 0, 64)])
def test_nothing_to_hash(torch, shape):
    x = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    assert hashing.angular_hash(x, table(torch, 4, 64, 16)).shape == (1, *shape[:3])


def test_long_lists_and_the_same_every_time(torch):
    x = drawn(torch, 4, 48, 16384, 64)
    directions = table(torch, 48, 64, 16)
    first = hashing.angular_hash(x, directions)
    for _ in range(5):
        assert torch.equal(hashing.angular_hash(x, directions), first)
    part = x[:1, :2]
    lost = loss_of_buckets(torch, first[:, :1, :2], part, directions[:, :2])
    assert float(lost.max()) < 3e-5


def test_nothing_but_buckets_is_allocated(torch):
    x, directions = drawn(torch, 2, 8, 8192, 64), table(torch, 8, 64, 16)
    hashing.angular_hash(x, directions)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    bucket = hashing.angular_hash(x, directions)
    assert torch.cuda.max_memory_allocated() - before <= bucket.numel() * 4 + 512


def test_runs_on_the_current_stream_and_in_a_graph(torch):
    x, directions = drawn(torch, 2, 4, 3000, 64), table(torch, 4, 64, 16)
    other = drawn(torch, 2, 4, 3000, 64, seed=5)
    right, right_other = (hashing.angular_hash(y, directions) for y in (x, other))
    assert not torch.equal(right, right_other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bucket = hashing.angular_hash(x, directions)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(bucket, right)
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(bucket, right_other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its compiler imports torch.jit
def test_compiled_whole(torch):
    x, directions = drawn(torch, 2, 4, 300, 64), table(torch, 4, 64, 16)
    compiled = torch.compile(hashing.angular_hash, fullgraph=True)
    assert torch.equal(compiled(x, directions), hashing.angular_hash(x, directions))


def test_cupy_arrays(torch):
    cupy = pytest.importorskip("cupy", reason="about CuPy arrays")
    x, directions = drawn(torch, 2, 4, 300, 64, dtype="float16"), table(torch, 2, 64, 16)
    right = hashing.angular_hash(x, directions)
    torch.cuda.synchronize()
    bucket = hashing.angular_hash(*(cupy.from_dlpack(y) for y in (x, directions)))
    assert (bucket.get() == right.cpu().numpy()).all()


def test_numba_device_arrays(torch):
    cuda = pytest.importorskip("numba.cuda", reason="about numba's device arrays")
    x, directions = drawn(torch, 2, 4, 300, 64, dtype="float16"), table(torch, 2, 64, 16, rounds=2)
    center = drawn(torch, 4, 64, dtype="float32", seed=1)
    right = hashing.angular_hash(x, directions, center).cpu().numpy()
    arrays = [cuda.to_device(y.cpu().numpy()) for y in (x, directions, center)]
    bucket = hashing.angular_hash(*arrays)
    assert type(bucket) is type(arrays[0])
    assert (bucket.copy_to_host() == right).all()
    balance = hashing.bucket_balance(bucket, 16)
    assert (balance.counts == hashing.bucket_balance(right, 16).counts).all()
    rounds = zip(
        hashing.disjoint_rounds(bucket, bucket, 16),
        hashing.disjoint_rounds(right, right, 16),
        strict=True,
    )
    assert all((mine.q_hash.get() == other.q_hash).all() for mine, other in rounds)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its compiler imports torch.jit
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # which would not be exact
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_second_moments_sum_in_float32_whatever_the_rows_are(torch, dtype):
    from scfa_core.nn.centers import second_moments

    x = 30 + drawn(torch, 3, 4, 1001, 64, dtype=dtype)  # sums of 16 bits would be far off
    want = torch.einsum("bhtd,bhte->hde", x.double(), x.double())
    for run in (second_moments, torch.compile(second_moments, fullgraph=True)):
        found = run(x)
        assert found.dtype == torch.float32
        assert ((found - want) / want).abs().max() < 1e-4
