"""Several GPUs in one process: a call runs where its tensors are, whichever device is current."""

import threading

import pytest

import scfa_core as scfa

SHAPE = (2, 4, 700, 64)


@pytest.fixture(scope="module")
def other(torch):
    """A card that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert torch.cuda.current_device() == 0
    return torch.device("cuda:1")


@pytest.fixture(scope="module")
def same_card(torch, other):
    """Whether both cards run the same kernels, so that results are the same bits."""
    names = {torch.cuda.get_device_name(device) for device in (0, other)}
    return len(names) == 1


def inputs(torch, device, seed=0):
    """q, k, v, dout and hashes for queries and keys; the same values on every device."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(SHAPE, generator=generator).bfloat16() for _ in range(4)]
    hashes = [torch.randint(0, 5, SHAPE[:3], generator=generator) for _ in range(2)]
    return [x.to(device) for x in tensors], [x.to(device) for x in hashes]


def everything(backend, tensors, pattern):
    q, k, v, dout = tensors
    plan = scfa.make_plan(pattern, q, k, backend=backend)
    out, lse = scfa.attention(q, k, v, plan, return_lse=True, backend=backend)
    return out, lse, *scfa.attention_backward(dout, q, k, v, out, lse, plan, backend=backend)


def assert_close(torch, left, right, *, exactly):
    for mine, theirs in zip(left, right, strict=True):
        mine, theirs = mine.cpu(), theirs.cpu()
        if exactly:
            assert torch.equal(mine, theirs)
        else:
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=2e-2, atol=2e-2)


def test_a_call_runs_where_its_tensors_are(torch, backend, other, same_card):
    tensors, hashes = inputs(torch, "cuda:0")
    right = everything(backend, tensors, scfa.HashSparse(*hashes))
    tensors, hashes = inputs(torch, other)
    torch.cuda.synchronize(0)
    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.memory_allocated(0)
    got = everything(backend, tensors, scfa.HashSparse(*hashes))
    torch.cuda.synchronize(other)
    assert torch.cuda.current_device() == 0
    assert all(x.device == other for x in got)
    assert torch.cuda.max_memory_allocated(0) == before
    assert_close(torch, got, right, exactly=same_card)


def test_gradients_flow_there(torch, backend, other):
    tensors, hashes = inputs(torch, other)
    pattern = scfa.HashSparse(*hashes)
    _, _, *right = everything(backend, tensors, pattern)
    *leaves, dout = (x.clone() for x in tensors)
    for x in leaves:
        x.requires_grad_()
    scfa.attention(*leaves, pattern, backend=backend).backward(dout)
    assert torch.cuda.current_device() == 0
    assert_close(torch, [x.grad for x in leaves], right, exactly=True)


MIXED = {
    "keys": lambda q, far, hashes, far_hashes: (q, far, q, scfa.HashSparse(*hashes)),
    "values": lambda q, far, hashes, far_hashes: (q, q, far, scfa.HashSparse(*hashes)),
    "hashes": lambda q, far, hashes, far_hashes: (q, q, q, scfa.HashSparse(*far_hashes)),
    "hashes of keys": lambda q, far, hashes, far_hashes: (
        q,
        q,
        q,
        scfa.HashSparse(hashes[0], far_hashes[1]),
    ),
    "plan": lambda q, far, hashes, far_hashes: (q, q, q, scfa.make_plan(scfa.Causal(), far, far)),
}


@pytest.mark.parametrize("what", MIXED)
def test_arrays_of_two_cards_are_refused_by_name(torch, backend, other, what):
    tensors, hashes = inputs(torch, "cuda:0")
    far, far_hashes = inputs(torch, other)
    right = everything(backend, tensors, scfa.HashSparse(*hashes))
    *arrays, pattern = MIXED[what](tensors[0], far[0], hashes, far_hashes)
    with pytest.raises(scfa.DeviceError, match="cuda:1"):
        scfa.attention(*arrays, pattern, backend=backend)
    again = everything(backend, tensors, scfa.HashSparse(*hashes))
    assert_close(torch, again, right, exactly=True)


def test_threads_on_different_cards_at_once(torch, backend, other):
    devices = (torch.device("cuda:0"), other)
    problems = {device: inputs(torch, device) for device in devices}
    right = {
        device: everything(backend, tensors, scfa.HashSparse(*hashes))
        for device, (tensors, hashes) in problems.items()
    }
    for device in devices:
        torch.cuda.synchronize(device)
    wrong, done = [], []

    def work(first):
        for turn in range(first, first + 12):
            device = devices[turn % 2]
            tensors, hashes = problems[device]
            with torch.cuda.stream(torch.cuda.Stream(device)):
                got = everything(backend, tensors, scfa.HashSparse(*hashes))
                torch.cuda.current_stream(device).synchronize()
            same = (torch.equal(a, b) for a, b in zip(got, right[device], strict=True))
            (done if all(same) else wrong).append(turn)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(done) == 48  # none ended in an exception


def test_work_stays_on_the_stream_of_its_card(torch, backend, other):
    """Inputs that are still being made on the other card's current stream are waited for."""
    tensors, hashes = inputs(torch, other)
    right = everything(backend, tensors, scfa.HashSparse(*hashes))
    staged = [torch.zeros_like(x) for x in (*tensors, *hashes)]
    torch.cuda.synchronize(other)
    stream = torch.cuda.Stream(other)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(staged, (*tensors, *hashes), strict=True):
            target.copy_(source)
    previous = torch.cuda.current_stream(other)
    torch.cuda.set_stream(stream)  # makes its device current, too
    torch.cuda.set_device(0)
    try:
        assert torch.cuda.current_stream(other) == stream
        got = everything(backend, staged[:4], scfa.HashSparse(*staged[4:]))
        stream.synchronize()
    finally:
        torch.cuda.set_stream(previous)
        torch.cuda.set_device(0)
    assert_close(torch, got, right, exactly=True)


def test_a_graph_of_the_other_card(torch, backend, other):
    with torch.cuda.device(other):
        tensors, hashes = inputs(torch, other)
        held = [x.clone() for x in hashes]
        everything(backend, tensors, scfa.HashSparse(*held))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(other)):
            captured = everything(backend, tensors, scfa.HashSparse(*held))
        _, new_hashes = inputs(torch, other, seed=1)
        for target, source in zip(held, new_hashes, strict=True):
            target.copy_(source)
    graph.replay()  # with the first card current
    torch.cuda.synchronize(other)
    right = everything(backend, tensors, scfa.HashSparse(*new_hashes))
    assert_close(torch, captured, right, exactly=True)


def test_cupy_arrays_of_the_other_card(torch, backend, other):
    cupy = pytest.importorskip("cupy", reason="about CuPy arrays")
    (q, k, v, _), hashes = inputs(torch, other)
    q, k, v = (x.half() for x in (q, k, v))
    right = scfa.attention(q, k, v, scfa.HashSparse(*hashes), backend=backend)
    torch.cuda.synchronize(other)
    with torch.cuda.device(other):  # torch exports tensors of the current device alone
        q, k, v, *ids = (cupy.from_dlpack(x) for x in (q, k, v, *hashes))
    assert cupy.cuda.runtime.getDevice() == 0
    got = scfa.attention(q, k, v, scfa.HashSparse(*ids), backend=backend)
    assert cupy.cuda.runtime.getDevice() == 0
    assert got.device.id == 1
    with torch.cuda.device(other):
        torch.cuda.synchronize()
        assert torch.equal(torch.from_dlpack(got), right)


def test_rows_are_hashed_where_they_are(torch, backend, other, same_card):
    from scfa_core import hashing

    drawn = torch.from_numpy(hashing.random_directions(4, 64, 16, seed=0))
    buckets = []
    for device in ("cuda:0", other):
        x = inputs(torch, device)[0][0]
        buckets.append(hashing.angular_hash(x, drawn.to(device)))
        assert buckets[-1].device == x.device
    assert torch.cuda.current_device() == 0
    same = (buckets[0].cpu() == buckets[1].cpu()).float().mean()
    assert same == 1 if same_card else same > 0.999
