"""A plan made for one call lives until that call has been enqueued.

On a GPU a backend gets bare addresses: where the plan's tensors were dropped before the results
were allocated, torch's allocator gave their memory to the results, and the kernels read
half-written gradients as indices. Host views keep memory alive, so they are swapped for addresses.
"""

import weakref

import pytest

import scfa_core as scfa

torch = pytest.importorskip("torch")


@pytest.fixture
def watched(monkeypatch):
    """Names of the verbs that ran while every tensor of their plan was alive, or was not."""
    from scfa_core import torch_bridge, torch_calls

    made, seen = [], []

    def watch(module, name):
        plain = getattr(module, name)

        def run(call, arrays, *tensors):
            assert made, "no plan was made"
            seen.append((name, all(x() is not None for x in made)))
            with monkeypatch.context() as patch:
                patch.setattr(torch_calls, "host_view", real_view)
                arrays = type(arrays)(*(made_views.pop(0) for _ in range(7)), arrays.monotone)
                return plain(call, arrays, *tensors)

        monkeypatch.setattr(module, name, run)

    real_view, made_views = torch_calls.host_view, []

    def address(x):
        made.append(weakref.ref(x))
        made_views.append(real_view(x).copy())
        return x.data_ptr()

    monkeypatch.setattr(torch_calls, "host_view", address)
    for name in ("run_forward", "run_backward"):
        watch(torch_bridge, name)
    return made, seen


def test_plans_outlive_the_calls_they_are_made_for(watched):
    made, seen = watched
    q, k, v, dout = (torch.randn(1, 2, 40, 16) for _ in range(4))
    pattern = scfa.HashSparse(*(torch.randint(0, 3, (1, 2, 40)) for _ in range(2)))
    out, lse = scfa.attention(q, k, v, pattern, return_lse=True)
    made.clear()
    grads = scfa.attention_backward(dout, q, k, v, out, lse, pattern)
    assert seen == [("run_forward", True), ("run_backward", True)]
    assert all(bool(x.isfinite().all()) for x in grads)
