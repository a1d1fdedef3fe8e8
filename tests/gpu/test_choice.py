"""The two ways of the Hopper backward: at head_dim 128 each key head goes its own."""

import pytest

import scfa_core as scfa

LENGTH = 9001  # causal ranges of 4500 keys on average: beyond what the split kernels are chosen for
HEADS, HEADS_KV = 4, 2


@pytest.fixture
def gradients(torch, backend, monkeypatch):
    """Gradients of chosen query and key heads, by a way of the backward."""
    if backend != "cupy" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only cupy on a Hopper card has two ways")
    generator = torch.Generator("cuda").manual_seed(3)

    def rows(heads):
        shape = (2, heads, LENGTH, 128)
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator)

    q, dout, k, v = rows(HEADS), rows(HEADS), rows(HEADS_KV), rows(HEADS_KV)

    def run(way, buckets, batch=slice(None), group=slice(None)):
        """`buckets` (2, HEADS_KV): how many each key head and its query heads hash into."""
        monkeypatch.setenv("SCFA_CUPY_BACKWARD", way)
        draws = torch.Generator("cuda").manual_seed(4)
        ids = torch.randint(0, 2**20, (2, HEADS, LENGTH), device="cuda", generator=draws)
        limit = torch.tensor(buckets, device="cuda").repeat_interleave(HEADS // HEADS_KV, dim=1)
        q_hash = (ids % limit[..., None]).int()
        k_hash = q_hash[:, :: HEADS // HEADS_KV]
        each = HEADS // HEADS_KV
        heads = (
            slice(None) if group == slice(None) else slice(group.start * each, group.stop * each)
        )
        mine = [x[batch, heads] for x in (q, dout, q_hash)]
        keys = [x[batch, group] for x in (k, v, k_hash)]
        pattern = scfa.HashSparse(mine[2], keys[2])
        call = {"backend": "cupy"}
        plan = scfa.make_plan(pattern, mine[0], keys[0], **call)
        out, lse = scfa.attention(mine[0], keys[0], keys[1], plan, return_lse=True, **call)
        arguments = (mine[1], mine[0], keys[0], keys[1], out, lse, plan)
        return scfa.attention_backward(*arguments, **call)

    return run


def same(torch, got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("buckets", "way"), [([[1, 1], [1, 1]], "fused"), ([[32, 32], [32, 32]], "split")]
)
def test_long_ranges_are_fused_and_short_ones_split(torch, gradients, buckets, way):
    chosen = gradients("auto", buckets)
    same(torch, chosen, gradients(way, buckets))
    other = gradients("fused" if way == "split" else "split", buckets)
    assert not torch.equal(chosen[0], other[0]), "the ways round alike: this test sees nothing"


def test_heads_of_one_call_go_different_ways(torch, gradients):
    buckets = [[1, 32], [32, 1]]
    together = gradients("auto", buckets)
    ways = {name: gradients(name, buckets) for name in ("split", "fused")}
    for b in range(2):
        for g in range(2):
            way = "fused" if buckets[b][g] == 1 else "split"
            own = slice(2 * g, 2 * g + 2)
            for got, want in zip(together, ways[way], strict=True):
                part = own if got.shape[1] == HEADS else slice(g, g + 1)
                assert torch.equal(got[b, part], want[b, part])


def test_a_head_does_not_depend_on_the_others_of_its_batch(torch, gradients):
    buckets = [[1, 32], [32, 1]]
    together = gradients("auto", buckets)
    for b in range(2):
        for g in range(2):
            alone = gradients("auto", buckets, slice(b, b + 1), slice(g, g + 1))
            for got, want in zip(together, alone, strict=True):
                part = slice(2 * g, 2 * g + 2) if got.shape[1] == HEADS else slice(g, g + 1)
                assert torch.equal(got[b : b + 1, part], want)
