"""The way of GPU tensors, walked with host memory: what lives how long, and how much is kept."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")

import pretended_gpu  # noqa: E402
from pretended_gpu import (  # noqa: E402
    BATCH,
    HEADS,
    ROWS,
    assert_right,
    hashes,
    tensors,
    truth,
)

import scfa_core as scfa  # noqa: E402
from scfa_core import torch_calls, torch_plans  # noqa: E402

allocated, device = pretended_gpu.allocated, pretended_gpu.device


@pytest.mark.parametrize("tracked", [False, True])
def test_a_plan_lives_until_kernels_are_enqueued(device, allocated, tracked):
    """Bare addresses keep nothing alive; the allocator must not have given the memory away."""
    checked = []

    def before_forward(plan):
        living = [x for x in (reference() for reference in allocated) if x is not None]
        for array in plan[:-1]:
            homes = [
                x
                for x in living
                if x.data_ptr() <= array.pointer < x.data_ptr() + x.untyped_storage().nbytes()
            ]
            assert homes, "the plan's memory is gone"
        checked.append(True)

    device.before_forward = before_forward
    q, k, v = tensors(requires_grad=tracked)
    pattern = scfa.HashSparse(*hashes())
    out, lse = scfa.attention(q, k, v, pattern, return_lse=True)
    assert checked
    if tracked:
        return
    grads = scfa.attention_backward(torch.ones_like(out), q, k, v, out, lse, pattern)
    for mine, true in zip(grads, truth(q, k, v, pattern)[1], strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-3, atol=1e-4)


def test_workspace_and_plan_are_freed(device, allocated):
    """Nothing but what the caller holds outlives a call."""
    q, k, v = tensors(requires_grad=False)
    out = scfa.attention(q, k, v, scfa.HashSparse(*hashes()))
    assert [x() for x in allocated if x() is not None] == [out]
    assert len(allocated) == 5  # plan, out, lse and workspace of two verbs


def test_saved_plans_may_travel(device):
    """Hooks that offload saved tensors give back other memory; one that spoils a plan is told."""
    q, k, v = tensors()
    pattern = scfa.HashSparse(*hashes())
    right = torch.autograd.grad(scfa.attention(q, k, v, pattern).sum(), (q, k, v))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        out = scfa.attention(q, k, v, pattern)
    for mine, true in zip(torch.autograd.grad(out.sum(), (q, k, v)), right, strict=True):
        assert torch.equal(mine, true)

    def spoil(x):
        return x.long() if x.dtype is torch.int32 else x

    with torch.autograd.graph.saved_tensors_hooks(torch.clone, spoil):
        out = scfa.attention(q, k, v, pattern)
    with pytest.raises(scfa.ShapeError, match="must give a plan back as it was"):
        out.sum().backward()


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("planned", [False, True])
def test_saved_tensors_may_come_back_in_other_strides(device, layout, planned):
    """`torch.autograd.graph.save_on_cpu` lays out anew what was not contiguous."""
    leaves = [x.detach().transpose(1, 2).contiguous() for x in tensors(layout=layout)]
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in leaves)
    pattern = scfa.HashSparse(*hashes())
    given = scfa.make_plan(pattern, q, k, layout=layout) if planned else pattern
    right = torch.autograd.grad(
        scfa.attention(q, k, v, given, layout=layout, softmax_scale=0.7).sum(), (q, k, v)
    )
    for back in (lambda x: x, lambda x: x.mT.contiguous().mT if x.ndim == 4 else x):
        with torch.autograd.graph.saved_tensors_hooks(packed, back):
            out = scfa.attention(q, k, v, given, layout=layout, softmax_scale=0.7)
        for mine, true in zip(torch.autograd.grad(out.sum(), (q, k, v)), right, strict=True):
            torch.testing.assert_close(mine, true, rtol=0, atol=1e-6)


def packed(x):
    """As `torch.autograd.graph.save_on_cpu` packs: without the strides."""
    return torch.empty(x.size(), dtype=x.dtype).copy_(x)


@pytest.mark.parametrize(
    "spoil", [lambda x: x.half(), lambda x: x[:, :, 1:]], ids=["dtype", "shape"]
)
@pytest.mark.parametrize(("which", "words"), [("v", "must give q, k and v back"), ("out", "^out")])
def test_hooks_that_spoil_what_was_saved_are_told(device, spoil, which, words):
    q, k, v = tensors()
    spoiled = v.shape[1:] if which == "v" else (HEADS, ROWS, v.shape[3])

    def back(x):
        return spoil(x) if x.shape[1:] == spoiled else x

    with torch.autograd.graph.saved_tensors_hooks(torch.clone, back):
        out = scfa.attention(q, k, v, scfa.HashSparse(*hashes()))
    with pytest.raises(scfa.ScfaError, match=words):
        out.sum().backward()


def test_a_call_on_another_card_makes_it_current(device, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def current(ordinal):
        entered.append(ordinal)
        pretend(ordinal)
        yield
        pretend(1)

    def pretend(ordinal):
        for module in (torch_calls, torch_plans):
            monkeypatch.setattr(module, "current_device", lambda: ordinal)

    monkeypatch.setattr(torch.cuda, "device", current)
    pretend(1)
    q, k, v = tensors()
    pattern = scfa.HashSparse(*hashes())
    assert_right(q, k, v, pattern)
    assert entered == [0, 0, 0]  # plan, forward, backward
    scfa.make_plan(pattern, q, k)
    assert entered == [0] * 4


def test_threads_at_once(device):
    """Threads that find out and remember the same things at once get their own answers."""
    q, k, v = tensors(requires_grad=False)
    cases = [scfa.HashSparse(*hashes(seed=seed)) for seed in range(6)]
    right = [truth(q, k, v, pattern)[0] for pattern in cases]

    def work(first):
        for at in range(first, first + 12):
            pattern, want = cases[at % 6], right[at % 6]
            out = scfa.attention(q, k, v, pattern)
            torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_memory_of_structures_is_bounded(device, monkeypatch):
    for module in (torch_calls, torch_plans):
        monkeypatch.setattr(module, "MAX_REMEMBERED_CALLS", 4)
    q, k, v = tensors(requires_grad=False)
    for window in range(12):
        assert_right(q, k, v, scfa.SlidingWindow(window))
        assert len(torch_plans._recipes) <= 4
        assert len(torch_plans._bound) <= 4


def test_bound_verbs_of_a_call_are_bounded(device, monkeypatch):
    monkeypatch.setattr(torch_calls, "MAX_BOUND_VERBS", 2)
    q, k, v = tensors(seed=3)
    out = scfa.attention(q, k, v)
    for step in range(24, 30):
        dout = torch.ones(BATCH, HEADS, ROWS, step)[..., :24]
        torch.autograd.grad(out, q, dout, retain_graph=True)
    call = torch_calls.find_call(q, k, v, None, "bhtd", True, "auto")
    assert 1 <= len(call.bound) <= 2
