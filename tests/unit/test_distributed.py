"""Two processes equal one: sharded batches, heads and sequences, results and gradients."""

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="distributed attention needs torch")
if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

import torch.distributed as dist  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: E402

import scfa_core as scfa  # noqa: E402
from scfa_core import distributed  # noqa: E402

RANKS = 2
SEQLEN = 24


def draw(heads_kv=2, seed=0):
    """Q, k, v and the gradient of out, in float64."""
    generator = torch.Generator().manual_seed(seed)
    heads = (4, heads_kv, heads_kv, 4)
    return [torch.randn((2, h, SEQLEN, 16), generator=generator).double() for h in heads]


def patterns(heads_kv=2):
    """Each kind, arrays for every head or one for all."""
    generator = torch.Generator().manual_seed(7)

    def ints(*shape, most=3):
        return torch.randint(0, most, shape, generator=generator)

    ends = ints(2, 4, SEQLEN, most=SEQLEN + 1)
    return {
        "causal": scfa.Causal(),
        "strict": scfa.Causal(include_self=False),
        "hash": scfa.HashSparse(ints(2, 4, SEQLEN), ints(2, heads_kv, SEQLEN), include_self=False),
        "one hash for all": scfa.HashSparse(ints(1, 1, SEQLEN), ints(1, 1, SEQLEN), causal=False),
        "drop": scfa.QKSparse(ints(2, 4, SEQLEN), ints(2, heads_kv, SEQLEN)),
        "documents": scfa.Documents(torch.arange(SEQLEN).expand(2, -1) // 7),
        "window": scfa.SlidingWindow(5),
        "window both ways": scfa.SlidingWindow(3, causal=False),
        "ranges": scfa.KeyRanges(ends // 2, ends),
        "mixed": scfa.Documents(torch.arange(SEQLEN)[None] // 9)
        & scfa.SlidingWindow(6)
        & scfa.HashSparse(ints(2, 4, SEQLEN, most=2), ints(2, 1, SEQLEN, most=2), causal=False),
    }


def gradients(attend, tensors, dout):
    """Out and the gradients of q, k, v."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = attend(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, dout)]


def whole(pattern, heads_kv=2):
    *tensors, dout = draw(heads_kv)
    return gradients(lambda q, k, v: scfa.attention(q, k, v, pattern), tensors, dout)


def through_dtensor(pattern, mesh, placement):
    *tensors, dout = (distribute_tensor(x, mesh, [placement]) for x in draw())
    pattern = distributed.distribute_pattern(pattern, mesh, placement)
    results = gradients(lambda q, k, v: scfa.attention(q, k, v, pattern), tensors, dout)
    assert all(x.placements == (placement,) for x in results)
    return [x.full_tensor() for x in results]


def through_sequence(attend, rows, heads_kv=2):
    """Each rank works on its rows; all results in original order."""
    *tensors, dout = (x.index_select(2, rows) for x in draw(heads_kv))
    results = gradients(attend, tensors, dout)
    order = torch.argsort(distributed._gather(rows, 0, None))
    return [distributed._gather(x, 2, None).index_select(2, order) for x in results]


def work(rank, folder):
    """One process: every case of the tests below; the first writes down what it got."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    results = {}
    mine = torch.arange(SEQLEN).view(RANKS, -1)[rank]
    zigzag = distributed.zigzag_rows(SEQLEN)
    for name, pattern in patterns().items():
        for placement in (Shard(0), Shard(1), Replicate()):
            results[name, str(placement)] = through_dtensor(pattern, mesh, placement)
        results[name, "ulysses"] = through_sequence(
            lambda q, k, v, p=pattern: distributed.ulysses_attention(q, k, v, p), mine
        )
        for kind, rows in (("consecutive", None), ("zigzag", zigzag)):
            results[name, kind] = through_sequence(
                lambda q, k, v, p=pattern, r=rows: distributed.gathered_attention(
                    q, k, v, p, rows=r
                ),
                mine if rows is None else rows,
            )
    results["called"] = through_sequence(
        lambda q, k, v: distributed.ulysses_attention(
            q, k, v, lambda q, k: scfa.HashSparse(*((x[..., 0] > 0).long() for x in (q, k)))
        ),
        mine,
    )
    results["one key head"] = through_sequence(
        lambda q, k, v: distributed.gathered_attention(q, k, v, patterns(1)["hash"]), mine, 1
    )
    *tensors, _ = (x.index_select(2, mine) for x in draw(1))
    try:
        distributed.ulysses_attention(*tensors, scfa.Causal())
    except scfa.ShapeError as error:
        results["refused"] = str(error)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()  # all ranks are done with each other
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    workers = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)])
        for rank in range(RANKS)
    ]
    try:
        codes = [worker.wait(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert codes == [0] * RANKS
    return torch.load(folder / "results.pt")


WAYS = [str(Shard(0)), str(Shard(1)), str(Replicate()), "ulysses", "consecutive", "zigzag"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", patterns())
def test_every_way_of_sharding_equals_one_process(results, name, way):
    for mine, right in zip(results[name, way], whole(patterns()[name]), strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_hashes_made_after_the_exchange(results):
    q, k, *_ = draw()
    pattern = scfa.HashSparse(*((x[..., 0] > 0).long() for x in (q, k)))
    torch.testing.assert_close(results["called"], whole(pattern), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_fewer_key_heads_than_ranks(results):
    right = whole(patterns(1)["hash"], heads_kv=1)
    torch.testing.assert_close(results["one key head"], right, rtol=0, atol=1e-6)
    assert "gathered_attention" in results["refused"]


@pytest.mark.parametrize("name", patterns())
def test_some_queries_see_what_they_saw(name):
    pattern = patterns()[name]
    sizes = {"batch": 2, "heads": 4, "heads_kv": 2}
    rows = torch.tensor([23, 0, 5, 6, 11])
    mine = distributed.queries_of(pattern, rows, SEQLEN, SEQLEN).mask(5, SEQLEN, **sizes)
    assert (mine == pattern.mask(SEQLEN, SEQLEN, **sizes)[:, :, rows]).all()


def test_bottom_right_queries():
    pattern = scfa.Causal(align="bottom-right")
    mine = distributed.queries_of(pattern, torch.tensor([2, 0]), 4, 9).mask(2, 9)
    assert (mine == pattern.mask(4, 9)[:, :, [2, 0]]).all()


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
    os._exit(0)  # a thread of gloo that wants the GIL while Python finalizes aborts the process
