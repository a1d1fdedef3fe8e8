"""Faults on a card: each ends in a right answer or a clear error, and the next call is right."""

import hashlib

import numpy as np
import pytest
from gpu_calls import assert_same, everything
from scfa_core.reference.backend import narrow
from scripts import python

import scfa_core as scfa
from scfa_core import testing
from scfa_core.testing import Part, Spec

MIB = 2**20


def inputs(torch, shape=(2, 4, 700, 64), dtype="bfloat16"):
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [
        torch.randn(shape, device="cuda", generator=generator).to(getattr(torch, dtype))
        for _ in range(4)
    ]
    hashes = [torch.randint(0, 5, shape[:3], device="cuda", generator=generator) for _ in range(2)]
    return tensors, hashes


# Memory -------------------------------------------------------------------------------------


def test_out_of_memory_in_the_middle_of_a_step(kernels, torch, backend):
    """More and more room, so that one allocation of a step after the other is the first to fail."""
    tensors, hashes = inputs(torch, (1, 8, 32768, 64))
    pattern = scfa.HashSparse(*hashes)
    right = everything(backend, tensors, pattern)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held, total = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
    failures = 0
    try:
        for room in range(0, 1024, 16):
            torch.cuda.set_per_process_memory_fraction((held + room * MIB) / total)
            try:
                everything(backend, tensors, pattern)
                break
            except torch.OutOfMemoryError:
                failures += 1
            torch.cuda.set_per_process_memory_fraction(1.0)
            assert_same(torch, right, everything(backend, tensors, pattern))
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        else:
            pytest.fail("it never had enough")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert failures  # how many depends on what the allocator holds from before


@pytest.mark.alone
def test_a_card_without_memory_for_code(torch, monkeypatch):
    """The driver's own memory: loading a kernel says so, or works; later it works."""
    pytest.importorskip("cupy", reason="about the loader of the cupy backend")
    from scfa_core.backends.cupy_raw import loader

    request = ("scfa_plan_identity", "plan_identity.cu", (), 0)
    loader.get_kernel(*request)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    filled, size = [], torch.cuda.mem_get_info()[0]
    while size >= MIB:
        try:
            filled.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    for _ in range(20):  # each copy of the code needs memory of its own
        monkeypatch.setattr(loader, "_kernels", {})
        try:
            loader.get_kernel(*request)
        except MemoryError as error:
            told = str(error)
            break
    else:
        told = "the GPU has no memory left"  # but for these small pieces of code
    filled.clear()
    torch.cuda.empty_cache()
    assert "the GPU has no memory left" in told
    monkeypatch.setattr(loader, "_kernels", {})
    assert loader.get_kernel(*request).name == request[0]
    tensors, hashes = inputs(torch)
    out = scfa.attention(*tensors[:3], scfa.HashSparse(*hashes), backend="cupy")
    assert bool(out.isfinite().all())


def test_the_margins_of_these_tests_see_a_write(torch, arena):
    plain = arena.words((3, 5), torch.int32)
    rows = arena.tensor((1, 2, 3, 16), "bfloat16", gap=8)
    arena.check()
    room, size = arena.rooms[0]
    for at in (len(room) - 1, 1023, size + 1024):
        before = int(room[at])
        room[at] = 7
        with pytest.raises(AssertionError, match="beside a tensor"):
            arena.check()
        room[at] = before
    plain.fill_(0)
    arena.check()
    rows.as_strided((1,), (1,), rows.storage_offset() + 16).fill_(0)  # the gap of the first row
    with pytest.raises(AssertionError, match="outside of a"):
        arena.check()


# Values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_seen_reaches_those_who_see_it_alone(
    kernels, torch, backend, call, dtype, name, value
):
    """A bad row: who sees it knows, who does not is finite, and the next call is as before.

    Hopper's own kernels keep it within the head group: others in its tiles may get it as well.
    """
    own = backend == "cupy" and kernels != "sm80" and torch.cuda.get_device_capability() == (9, 0)
    by_tiles = own and dtype == "bfloat16"
    case = testing.build(Spec(1, 4, 2, 300, 300, 64, 64, dtype, parts=(Part("hash", number=3),)))
    before, _, _ = call(case)
    x, row = getattr(case, name), 150
    kept = x.copy()
    heads = x.shape[1] // 2 if by_tiles else x.shape[1]  # those of the first key head, or all
    x[:, :heads, row] = narrow(np.full((x.shape[0], heads, x.shape[3]), value), dtype)
    bad, _, _ = call(case)
    x[...] = kept
    after, _, _ = call(case)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)

    queries = np.zeros(case.mask.shape[:3], bool)
    if name in ("k", "v"):
        queries = case.mask[..., row].copy()
    else:
        queries[:, :, row] = case.mask[:, :, row].any(-1)
    if by_tiles:
        queries[:, 2:] = False
    assert 0 < queries.sum() < queries.size
    keys = (case.mask & queries[..., None]).reshape(1, 2, 2, 300, 300).any(axis=(2, 3))
    if name == "dout":
        assert np.isfinite(bad.out).all()
    else:
        assert not np.isfinite(bad.out[queries]).all(-1).any()
    assert not np.isfinite(bad.dq[queries]).all(-1).any()
    assert not np.isfinite(bad.dk[keys]).all(-1).any()
    if by_tiles:
        queries[:, :2], keys[:, :1] = True, True
    assert np.isfinite(bad.out[~queries]).all()
    assert np.isfinite(bad.dq[~queries]).all()
    assert np.isfinite(bad.dk[~keys]).all()
    assert np.isfinite(bad.dv[~keys]).all()


def test_mistakes_name_the_device_and_the_next_call_is_right(torch, backend):
    tensors, hashes = inputs(torch)
    pattern = scfa.HashSparse(*hashes)
    right = everything(backend, tensors, pattern)
    q = tensors[0]
    host = torch.zeros(q.shape, dtype=q.dtype)
    numpy = np.zeros((1, 1, 8, 64), np.float32)
    host_ids = scfa.HashSparse(*(x.cpu() for x in hashes))
    mistakes = {
        "host tensors": (scfa.BackendUnavailable, "cuda", (host, host, host, scfa.Causal())),
        "NumPy": (scfa.BackendUnavailable, "cuda", (numpy, numpy, numpy, scfa.Causal())),
        "keys": (scfa.DeviceError, "k on cpu", (q, host, q, scfa.Causal())),
        "hashes": (scfa.DeviceError, "q_hash must be on cuda:0", (q, q, q, host_ids)),
    }
    for error, words, arguments in mistakes.values():
        with pytest.raises(error, match=words):
            scfa.attention(*arguments, backend=backend)
        assert_same(torch, right, everything(backend, tensors, pattern))


# Processes ----------------------------------------------------------------------------------


SCRIPT = """if True:
    import os
    import numpy as np
    import torch
    import scfa_core as scfa
    torch.manual_seed(0)
    q = torch.randn(1, 2, 200, 64, device="cuda").bfloat16()
    def call():
        out = scfa.attention(q, q, q, backend={backend!r})
        torch.cuda.synchronize()
        return out
    def tried():
        try:
            call()
        except Exception as error:
            return f"{{type(error).__name__}}: {{error}}"
        return "no error"
    x = np.ones((1, 1, 4, 16), np.float32)
    def on_the_host():
        return bool((scfa.attention(x, x, x, backend="reference") == 1).all())
    right = call()
"""


def digest(torch, backend):
    """Hash of all results of one problem, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, 900, 64)
    tensors = [torch.randn(shape, generator=generator).bfloat16().cuda() for _ in range(4)]
    hashes = [torch.randint(0, 5, shape[:3], generator=generator).cuda() for _ in range(2)]
    results = everything(backend, tensors, scfa.HashSparse(*hashes))
    bits = (x.float().cpu().numpy().tobytes() for x in results)
    return hashlib.sha256(b"".join(bits)).hexdigest()


def test_another_process_finds_the_same_bits(torch, backend):
    """Another context and other hashes of strings, kernels read from the disk."""
    code = f"""if True:
        import importlib.util
        import torch
        spec = importlib.util.spec_from_file_location("faults_cuda", {__file__!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        print(module.digest(torch, {backend!r}))
    """
    assert python(code, PYTHONHASHSEED="7").split() == [digest(torch, backend)]


def test_a_forked_child_is_told_and_the_parent_goes_on(torch, backend):
    """CUDA cannot be used in a child of a process that used it; the host backends can."""
    code = (
        SCRIPT.format(backend=backend)
        + """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, f"{tried()}|{on_the_host()}".encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        print(told.read().replace(chr(10), " "))
    os.waitpid(child, 0)
    print(torch.equal(call(), right))
    """
    )
    child, parent = python(code, PYTHONWARNINGS="ignore").splitlines()
    words, on_the_host = child.rsplit("|", 1)
    assert "CUDA" in words, words
    assert (on_the_host, parent) == ("True", "True")


def test_a_lost_device_is_told_by_every_later_call(torch, backend):
    """A fault of another library's kernel: no call afterwards gives an answer, none hangs."""
    code = (
        SCRIPT.format(backend=backend)
        + """
    torch.arange(3, device="cuda")[torch.tensor([10**6], device="cuda")]
    try:
        torch.cuda.synchronize()
        print("no fault")
    except RuntimeError:
        print("lost")
    for _ in range(2):
        print(tried().splitlines()[0])
    print(on_the_host(), flush=True)
    os._exit(0)  # what holds memory of a lost device may complain at its end
    """
    )
    state, *told, on_the_host = python(code).splitlines()
    assert (state, len(told), on_the_host) == ("lost", 2, "True")
    for words in told:
        assert "CUDA" in words, words
