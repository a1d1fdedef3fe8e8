"""The kernel that chooses blocks, beside plain torch."""

import pytest

from scfa_core.choosing import chosen_blocks


@pytest.fixture
def op(torch, backend):
    """The operator, where it runs the kernel."""
    if backend != "cupy":
        pytest.skip("only cupy has this kernel")
    from scfa_core import torch_choosing

    assert torch_choosing.kernel_reason(torch.zeros(1, 1, 1, 1, device="cuda"), 1) is None
    return torch_choosing.TOP_BLOCKS


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "keys", "block", "top"),
    [(1, 1, 1, 1), (300, 300, 7, 3), (1, 4000, 64, 16), (2050, 2050, 512, 3), (513, 700, 16, 8)],
)
def test_choices(torch, op, rows, keys, block, top, dtype):
    torch.manual_seed(rows)
    scores = torch.randn(2, 3, keys // block, rows).to(getattr(torch, dtype))
    scores[torch.rand(scores.shape) < 0.2] = -torch.inf
    scores[torch.rand(scores.shape) < 0.05] = torch.nan
    sizes = (block, keys - rows, (keys - 1) // block, rows == keys, top)
    right = op(scores, *sizes)
    assert torch.equal(op(scores.cuda(), *sizes).cpu(), right)
    strided = torch.stack([scores, scores], -1).cuda()[..., 0]
    assert torch.equal(op(strided, *sizes).cpu(), right)


def test_in_a_graph_and_compiled(torch, op):
    torch.manual_seed(0)
    q, k = (torch.randn(1, h, 900, 32, device="cuda", dtype=torch.bfloat16) for h in (4, 2))

    def ids():
        return torch.stack([p.q_hash for p in chosen_blocks(q, k, block=64, top=3)[1:]])

    right = ids()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ids()
    graph.replay()
    assert torch.equal(captured, right)
    compiled = torch.compile(ids, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), right)
