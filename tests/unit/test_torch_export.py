"""torch.export: layers with their patterns become programs that can be stored."""

import io

import pytest

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")

import scfa_core as scfa  # noqa: E402
from scfa_core.nn import HashSelfAttention, SparseSelfAttention, WindowSelfAttention  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


class Block(torch.nn.Module):
    """Two layers; the window's pattern is narrowed by documents that come as an input."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(64)
        self.hashed = HashSelfAttention(64, heads=4, buckets=4)
        self.near = WindowSelfAttention(64, heads=4, window=5)
        self.query = torch.nn.Linear(64, 64)

    def forward(self, x, documents):
        x = self.near(x + self.hashed(self.norm(x)))
        y = self.query(x).unflatten(-1, (4, 16))
        return scfa.attention(y, y, y, scfa.Documents(documents), layout="bthd").flatten(2)


def example(batch, seqlen, seed=0):
    generator = torch.Generator().manual_seed(seed)
    documents = torch.arange(seqlen).div(7, rounding_mode="floor").expand(batch, -1).contiguous()
    return torch.randn(batch, seqlen, 64, generator=generator), documents


@pytest.fixture(scope="module")
def exported():
    torch.manual_seed(0)
    block = Block()
    batch = torch.export.Dim("batch", min=1, max=64)
    seqlen = torch.export.Dim("seqlen", min=2, max=65536)
    sizes = {0: batch, 1: seqlen}
    return block, torch.export.export(block, example(2, 20), dynamic_shapes=(sizes, sizes))


def test_other_sizes_give_the_layers_results(exported):
    block, program = exported
    for batch, seqlen in ((2, 20), (3, 37), (1, 130)):
        inputs = example(batch, seqlen, seed=seqlen)
        torch.testing.assert_close(program.module()(*inputs), block(*inputs))


def test_the_program_holds_our_operators_and_no_dense_mask(exported):
    _, program = exported
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names.count("scfa.forward.default") == names.count("scfa.make_plan.default") == 3
    assert not [name for name in names if "softmax" in name or "scaled_dot_product" in name]


def test_stored_and_loaded(exported):
    block, program = exported
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    inputs = example(3, 29, seed=1)
    loaded(*inputs).square().sum().backward()
    block.zero_grad()
    block(*inputs).square().sum().backward()
    mine, right = dict(loaded.named_parameters()), dict(block.named_parameters())
    assert mine.keys() == right.keys()
    for name, parameter in right.items():
        torch.testing.assert_close(mine[name].grad, parameter.grad, msg=name)


def test_a_hash_about_the_past_has_an_open_length():
    layer = HashSelfAttention(64, 4, 4, shared_qk=True, include_self=False, adapt="past").eval()
    seqlen = torch.export.Dim("seqlen", min=129, max=65536)  # two blocks of 64 rows and a row
    program = torch.export.export(layer, (example(2, 200)[0],), dynamic_shapes=({1: seqlen},))
    for length in (129, 192, 193, 700):
        x = example(2, length, seed=length)[0]
        torch.testing.assert_close(program.module()(x), layer(x))


def test_a_pattern_made_from_queries_and_keys():
    def signs(q, k):
        return scfa.HashSparse((q[..., 0] > 0).long(), (k[..., 0] > 0).long())

    layer = SparseSelfAttention(64, heads=4, pattern=signs)
    x, _ = example(2, 20)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(-x), layer(-x))


class OfLength(torch.nn.Module):
    """A window and a lag that depend on the length."""

    def forward(self, q):
        n = q.shape[2]
        pattern = scfa.SlidingWindow(n // 2 + 1) & scfa.Causal(lag=n // 8)
        return scfa.attention(q, q, q, pattern)


@pytest.mark.parametrize("strict", [False, True])
def test_windows_of_the_length_stay_open(strict):
    length = {2: torch.export.Dim("length", min=4, max=4096)}
    program = torch.export.export(
        OfLength(), (torch.randn(1, 2, 24, 16),), dynamic_shapes=(length,), strict=strict
    )
    for seqlen in (20, 33, 64):
        q = torch.randn(1, 2, seqlen, 16)
        torch.testing.assert_close(program.module()(q), OfLength()(q))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_lengths_of_documents_and_padding_stay_open_by_names_of_their_own(strict):
    """A check that compares them would tie them to those of x, and export would refuse."""

    class Packed(WindowSelfAttention):
        def forward(self, x, documents, keep):
            return super().forward(x, documents=documents, keep=keep)

    layer, named = Packed(64, heads=4, window=5), torch.export.Dim
    sizes = [{0: named(f"batch_{i}"), 1: named(f"rows_{i}")} for i in range(3)]
    x, documents = torch.randn(3, 9, 64), torch.zeros(3, 9, dtype=torch.long)
    program = torch.export.export(
        layer, (x, documents, documents == 0), dynamic_shapes=sizes, strict=strict
    )
    x, documents = torch.randn(1, 12, 64), torch.arange(12)[None] // 5
    keep = torch.arange(12)[None] < 10
    right = layer(x, documents, keep)
    torch.testing.assert_close(program.module()(x, documents, keep), right)


@pytest.mark.parametrize("options", [{"near_heads": 2, "near_block": 16}, {"adapt": "even"}])
def test_hashes_beside_neighbours_and_about_the_past(options):
    """Where a hash follows earlier rows by blocks of 64, from a second block on."""
    layer = HashSelfAttention(64, heads=4, buckets=8, seed=0, **options).eval()
    least = 65 if "adapt" in options else 2
    seqlen = torch.export.Dim("seqlen", min=least, max=65536)
    x, _ = example(2, 200)
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: seqlen},))
    for rows in (least, 128, 300):
        x, _ = example(2, rows, seed=rows)
        torch.testing.assert_close(program.module()(x), layer(x))
