"""A well-behaved guest: streams, graphs, threads, no waiting, no hidden memory, the same bits."""

import threading

import pytest
from gpu_calls import assert_same, everything, inputs

import scfa_core as scfa


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_same_bits_every_time(kernels, torch, backend, dtype):
    tensors, hashes = inputs(torch, (2, 8, 900, 64), 2, getattr(torch, dtype))
    pattern = scfa.HashSparse(*hashes)
    first = everything(backend, tensors, pattern)
    for _ in range(5):
        assert_same(torch, first, everything(backend, tensors, pattern))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_same_bits_hundreds_of_times(kernels, torch, backend, head_dim, dtype):
    """A read of shared memory that a copy overtakes once in fifty calls is not seen in five."""
    tensors, hashes = inputs(
        torch, (1, 4, 2500, head_dim), dtype=getattr(torch, dtype), buckets=4, seed=head_dim
    )
    pattern = scfa.HashSparse(*hashes)
    first = everything(backend, tensors, pattern)
    differ = torch.zeros(len(first), device="cuda")
    for _ in range(300 if backend == "cupy" else 100):
        again = everything(backend, tensors, pattern)
        differ += torch.stack([(x != y).any() for x, y in zip(first, again, strict=True)])
    names = ("out", "lse", "dq", "dk", "dv")
    assert not any(differ), dict(zip(names, differ.tolist(), strict=True))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("pattern", ["hash", "causal"])
def test_same_bits_of_a_full_card(kernels, torch, backend, head_dim, pattern):
    """Sums in memory are passed from block to block: on every multiprocessor, in long queues."""
    tensors, hashes = inputs(torch, (2, 24, 4000, head_dim), buckets=2, seed=head_dim)
    pattern = scfa.HashSparse(*hashes) if pattern == "hash" else scfa.Causal()
    first = everything(backend, tensors, pattern)
    differ = torch.zeros(len(first), device="cuda")
    for _ in range(40 if backend == "cupy" else 10):
        again = everything(backend, tensors, pattern)
        differ += torch.stack([(x != y).any() for x, y in zip(first, again, strict=True)])
    assert not any(differ), differ.tolist()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch says it is a prototype
def test_a_call_does_not_wait(torch, backend):
    tensors, hashes = inputs(torch)
    pattern = scfa.HashSparse(*hashes)
    everything(backend, tensors, pattern)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = everything(backend, tensors, pattern)
        everything(backend, tensors, scfa.Causal())
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(bool(x.isfinite().all()) for x in results[2:])


def test_work_stays_on_the_callers_stream(torch, backend):
    """Inputs that are still being made on the current stream are waited for."""
    tensors, hashes = inputs(torch)
    right = everything(backend, tensors, scfa.HashSparse(*hashes))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    staged = [torch.zeros_like(x) for x in (*tensors, *hashes)]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # about 30 ms: the copies below come late
        for target, source in zip(staged, (*tensors, *hashes), strict=True):
            target.copy_(source)
        results = everything(backend, staged[:4], scfa.HashSparse(*staged[4:]))
    stream.synchronize()
    assert_same(torch, right, results)


def test_graph_replay_with_new_hashes(kernels, torch, backend):
    tensors, hashes = inputs(torch)
    held = [x.clone() for x in hashes]
    everything(backend, tensors, scfa.HashSparse(*held))  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(backend, tensors, scfa.HashSparse(*held))
    for seed in (1, 2):
        (*fresh, _), new_hashes = inputs(torch, seed=seed, buckets=3 + seed)
        for target, source in zip((*tensors[:3], *held), (*fresh, *new_hashes), strict=True):
            target.copy_(source)
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        right = everything(backend, tensors, scfa.HashSparse(*new_hashes))
        assert_same(torch, right, captured)


def test_autograd_runs_on_its_own_thread(torch, backend):
    (q, k, v, dout), hashes = inputs(torch)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    pattern = scfa.HashSparse(*hashes)
    out = scfa.attention(*leaves, pattern, backend=backend)
    out.backward(dout)
    _, _, *grads = everything(backend, (q, k, v, dout), pattern)
    assert_same(torch, grads, [x.grad for x in leaves])


def test_threads_at_once(torch, backend):
    tensors, hashes = inputs(torch)
    pattern = scfa.HashSparse(*hashes)
    right = everything(backend, tensors, pattern)
    torch.cuda.synchronize()
    wrong = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                results = everything(backend, tensors, pattern)
                torch.cuda.current_stream().synchronize()
                if not all(torch.equal(a, b) for a, b in zip(right, results, strict=True)):
                    wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["hash", "causal", "keep"])
def test_memory_beyond_results(kernels, torch, backend, name, head_dim):
    """At most 32 bytes per query row; room for sums of dq 8 and 32 MB (head_dim 128: 64) more."""
    shape = (2, 8, 8192, head_dim)
    (q, k, v, dout), hashes = inputs(torch, shape, buckets=16)
    keeps = [torch.rand(shape[:3], device="cuda") < 0.5 for _ in range(2)]
    pattern = {
        "hash": scfa.HashSparse(*hashes),
        "causal": scfa.Causal(),
        "keep": scfa.QKSparse(*keeps),
    }[name]
    everything(backend, (q, k, v, dout), pattern)  # compiles
    rows = shape[0] * shape[1] * shape[2]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plan = scfa.make_plan(pattern, q, k, backend=backend)
    out, lse = scfa.attention(q, k, v, plan, return_lse=True, backend=backend)
    grads = scfa.attention_backward(dout, q, k, v, out, lse, plan, backend=backend)
    torch.cuda.synchronize()
    results = sum(x.numel() * x.element_size() for x in (out, lse, *grads))
    extra = torch.cuda.max_memory_allocated() - before - results
    allowed = 32 * rows + 2**20 + (8 * rows + head_dim * 2**19 if kernels != "sm80" else 0)
    assert extra <= allowed, f"{extra / rows:.1f} bytes per query row"


def test_workspace_of_a_backward_with_its_plan_given(kernels, torch, backend):
    """8 bytes a query row (lse in base 2, delta); sums of dq may take 8 and 32 MiB more."""
    shape = (2, 8, 32768, 64)
    (q, k, v, dout), hashes = inputs(torch, shape, buckets=16)
    plan = scfa.make_plan(scfa.HashSparse(*hashes), q, k, backend=backend)
    out, lse = scfa.attention(q, k, v, plan, return_lse=True, backend=backend)

    def backward():
        return scfa.attention_backward(dout, q, k, v, out, lse, plan, backend=backend)

    backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = backward()
    torch.cuda.synchronize()
    results = sum(x.numel() * x.element_size() for x in grads)
    extra = torch.cuda.max_memory_allocated() - before - results
    rows = shape[0] * shape[1] * shape[2]
    allowed = 8 * rows + 2**20
    if backend == "cupy" and kernels != "sm80":
        allowed += 8 * rows + 2**25
    assert extra <= allowed, f"{extra / rows:.1f} bytes per query row"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["hash", "causal", "keep"])
def test_a_head_has_the_same_bits_alone(kernels, torch, backend, name, head_dim, dtype):
    """Nothing of a call but its own kv head of its own sequence decides a result."""
    shape = (2, 4, 1100, head_dim)
    tensors, hashes = inputs(torch, shape, 2, getattr(torch, dtype), buckets=4)
    hashes[0][0, :2] = hashes[1][0, :1] = 3  # all in one bucket: work unlike that of the others

    def pattern(batch, queries, keys):
        q_hash, k_hash = hashes[0][batch, queries], hashes[1][batch, keys]
        if name == "causal":
            return scfa.Causal()
        if name == "keep":
            return scfa.QKSparse(q_hash > 0, k_hash > 0)
        return scfa.HashSparse(q_hash, k_hash)

    whole = slice(None)
    together = everything(backend, tensors, pattern(whole, whole, whole))
    for b in range(2):
        for g in range(2):
            batch, queries, keys = slice(b, b + 1), slice(2 * g, 2 * g + 2), slice(g, g + 1)
            places = (queries, keys, keys, queries)
            mine = [x[batch, heads] for x, heads in zip(tensors, places, strict=True)]
            alone = everything(backend, mine, pattern(batch, queries, keys))
            places = (queries, queries, queries, keys, keys)
            others = [x[batch, heads] for x, heads in zip(together, places, strict=True)]
            assert_same(torch, alone, others)


def test_float32_stays_float32_where_torch_may_use_tf32(kernels, torch, backend):
    tensors, hashes = inputs(torch, dtype=torch.float32)
    pattern = scfa.HashSparse(*hashes)
    right = everything(backend, tensors, pattern)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        again = everything(backend, tensors, pattern)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same(torch, right, again)


@pytest.mark.alone
def test_tensors_beyond_two_to_the_31_elements(kernels, torch, backend):
    """The last heads begin beyond 2^31 elements: every offset must be 64 bits wide."""
    free, _ = torch.cuda.mem_get_info()
    rows, width = 2**15, 64
    heads = 2**31 // (rows * width) + 2  # the last heads lie beyond 2^31
    need = heads * rows * width * 2 * 5 + 2**31
    if free < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    q = torch.randn((1, heads, rows, width), device="cuda", dtype=torch.bfloat16)
    pattern = scfa.SlidingWindow(100)
    out, lse = scfa.attention(q, q, q, pattern, return_lse=True, backend=backend)
    last = q[:, -1:]
    alone, alone_lse = scfa.attention(last, last, last, pattern, return_lse=True, backend=backend)
    assert torch.equal(out[:, -1:], alone)
    assert torch.equal(lse[:, -1:], alone_lse)
    grads = scfa.attention_backward(q, q, q, q, out, lse, pattern, backend=backend)
    small = (last, last, last, last, alone, alone_lse, pattern)
    for whole, part in zip(grads, scfa.attention_backward(*small, backend=backend), strict=True):
        assert torch.equal(whole[:, -1:], part)


def test_out_of_memory_is_told_and_survived(torch, backend):
    tensors, hashes = inputs(torch)
    pattern = scfa.HashSparse(*hashes)
    right = everything(backend, tensors, pattern)
    huge = torch.zeros((64,), device="cuda", dtype=torch.bfloat16).expand(1, 2**20, 2**20, 64)
    with pytest.raises((MemoryError, torch.OutOfMemoryError)):
        scfa.attention(huge, huge, huge, scfa.Causal(), backend=backend)
    assert_same(torch, right, everything(backend, tensors, pattern))


def test_expanded_keys_and_values(torch, backend):
    """Heads that share memory by stride 0 are read in place."""
    (q, k, v, _), hashes = inputs(torch)
    shared_k, shared_v = (x[:, :1].expand_as(x) for x in (k, v))
    pattern = scfa.HashSparse(*hashes)
    got = scfa.attention(q, shared_k, shared_v, pattern, backend=backend)
    right = scfa.attention(
        q, shared_k.contiguous(), shared_v.contiguous(), pattern, backend=backend
    )
    assert torch.equal(got, right)


def test_cupy_arrays(torch, backend):
    cupy = pytest.importorskip("cupy")
    (q, k, v, _), hashes = inputs(torch, dtype=torch.float16)
    right = scfa.attention(q, k, v, scfa.HashSparse(*hashes), backend=backend)
    pattern = scfa.HashSparse(*map(cupy.from_dlpack, hashes))
    got = scfa.attention(*(cupy.from_dlpack(x) for x in (q, k, v)), pattern, backend=backend)
    assert isinstance(got, cupy.ndarray)
    assert torch.equal(torch.from_dlpack(got), right)


def test_hashes_of_another_stream_once_it_is_waited_for(torch, backend):
    """torch does not know on which stream a tensor is made: waiting is the caller's."""
    tensors, hashes = inputs(torch)
    right = everything(backend, tensors, scfa.HashSparse(*hashes))
    late = [torch.zeros_like(x) for x in hashes]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, hashes, strict=True):
            target.copy_(source)
    torch.cuda.current_stream().wait_stream(side)
    assert_same(torch, right, everything(backend, tensors, scfa.HashSparse(*late)))


class Foreign:
    """An array of a library that works on a stream of its own, and speaks DLPack alone."""

    def __init__(self, torch, tensor, stream):
        self.torch, self.tensor, self.stream = torch, tensor, stream
        self.shape, self.dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **options):
        with self.torch.cuda.stream(self.stream):
            return self.tensor.__dlpack__(**options)


def test_hashes_of_a_library_with_another_stream_are_waited_for(torch, backend):
    """Where the protocol knows the stream, nobody else has to."""
    cupy = pytest.importorskip("cupy", reason="DLPack arrays on a GPU are read through CuPy")
    (q, k, v, _), hashes = inputs(torch, dtype=torch.float16)
    right = scfa.attention(q, k, v, scfa.HashSparse(*hashes), backend=backend)
    late = [torch.zeros_like(x) for x in hashes]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    arrays = [cupy.from_dlpack(x) for x in (q, k, v)]
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, hashes, strict=True):
            target.copy_(source)
    pattern = scfa.HashSparse(*(Foreign(torch, x, side) for x in late))
    got = scfa.attention(*arrays, pattern, backend=backend)
    assert torch.equal(torch.from_dlpack(got), right)


def test_numba_arrays(torch, backend):
    cuda = pytest.importorskip("numba.cuda", reason="about Numba's device arrays")
    pytest.importorskip("cupy", reason="they are read through CuPy")
    (q, k, v, _), hashes = inputs(torch, dtype=torch.float16)
    right = scfa.attention(q, k, v, scfa.HashSparse(*hashes), backend=backend)
    torch.cuda.synchronize()
    pattern = scfa.HashSparse(*map(cuda.as_cuda_array, hashes))
    got = scfa.attention(*map(cuda.as_cuda_array, (q, k, v)), pattern, backend=backend)
    assert cuda.is_cuda_array(got)
    assert type(got).__module__.startswith("numba")
    torch.cuda.synchronize()
    assert torch.equal(torch.as_tensor(got, device="cuda"), right)


def test_host_tensors_are_refused_by_name(torch, backend):
    q = torch.zeros(1, 1, 8, 64)
    with pytest.raises(scfa.BackendUnavailable, match="cuda"):
        scfa.attention(q, q, q, scfa.Causal(), backend=backend)
