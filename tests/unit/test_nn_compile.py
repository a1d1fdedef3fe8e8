"""Layers and whole models under torch.compile: one graph each, and the eager numbers."""

import pytest

torch = pytest.importorskip("torch", reason="these are torch modules")

from torch import nn as torch_nn  # noqa: E402 - needs torch
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

from scfa_core import nn  # noqa: E402

WIDTH, HEADS, SEQLEN = 64, 4, 45
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")]


@pytest.mark.parametrize("kind", ["hash", "drop", "window"])
def test_layers_compile_to_one_graph(kind):
    torch._dynamo.reset()
    layer = {
        "hash": lambda: nn.HashSelfAttention(WIDTH, HEADS, 8, shared_qk=True, include_self=False),
        "drop": lambda: nn.DropSelfAttention(WIDTH, HEADS, how="threshold"),
        "window": lambda: nn.WindowSelfAttention(WIDTH, HEADS, 9),
    }[kind]()
    torch.manual_seed(0)
    x = torch.randn(2, SEQLEN, WIDTH)
    mine = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(mine, layer(x))
    mine.square().sum().backward()
    assert layer.query.weight.grad.any()


LAYERS = {
    "dense": lambda: nn.DenseSelfAttention(WIDTH, HEADS),
    "hash": lambda: nn.HashSelfAttention(WIDTH, HEADS, 8, rounds=2, seed=0),
    "past": lambda: nn.HashSelfAttention(WIDTH, HEADS, 8, seed=0, adapt="past"),
    "even": lambda: nn.HashSelfAttention(WIDTH, HEADS, 8, seed=0, adapt="even"),
    "top-k": lambda: nn.DropSelfAttention(WIDTH, HEADS, how="top-k"),
    "lots": lambda: nn.DropSelfAttention(WIDTH, HEADS, keep=1.0),  # all of them win
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_compile_for_any_length(kind):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, seqlen in ((2, SEQLEN), (3, 130), (2, 200)):
        x = torch.randn(batch, seqlen, WIDTH)
        torch.testing.assert_close(compiled(x), layer(x))


class Model(torch_nn.Module):
    """A language model of layers of each kind."""

    def __init__(self):
        super().__init__()
        self.embed = torch_nn.Embedding(50, WIDTH)
        self.layers = torch_nn.ModuleList(
            [
                nn.HashSelfAttention(WIDTH, HEADS, 8, rounds=2, heads_kv=2, seed=0),
                nn.WindowSelfAttention(WIDTH, HEADS, 9),
                nn.DropSelfAttention(WIDTH, HEADS, how="threshold"),
                nn.DenseSelfAttention(WIDTH, HEADS, heads_kv=1),
            ]
        )
        self.head = torch_nn.Linear(WIDTH, 50)

    def forward(self, text, documents):
        x = self.embed(text[:, :-1])
        for layer in self.layers:
            x = x + layer(torch_nn.functional.rms_norm(x, (WIDTH,)), documents=documents)
        return torch_nn.functional.cross_entropy(self.head(x).flatten(0, 1), text[:, 1:].flatten())


def test_a_whole_model_compiles_to_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(2):
        text = torch.randint(0, 50, (2, SEQLEN), generator=torch.Generator().manual_seed(seed))
        documents = (torch.arange(SEQLEN - 1) // (10 + seed)).expand(2, -1)
        losses = [f(text, documents) for f in (compiled, model)]
        torch.testing.assert_close(*losses)
        grads = (torch.autograd.grad(loss, model.parameters()) for loss in losses)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
