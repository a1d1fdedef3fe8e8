"""Two and four processes equal one: sharded batches, heads and sequences, results and gradients."""

import os
import sys

import pytest
from once import made_once
from ranks import run_ranks

torch = pytest.importorskip("torch", reason="distributed attention needs torch")
if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

import torch.distributed as dist  # noqa: E402
from sharded import SEQLEN, draw, patterns  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import (  # noqa: E402
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (  # noqa: E402
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import scfa_core as scfa  # noqa: E402
from scfa_core import distributed, hashing, nn  # noqa: E402
from scfa_core.distributed_exchange import gather  # noqa: E402


def gradients(attend, tensors, dout):
    """Out and the gradients of q, k, v."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = attend(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, dout)]


def whole(pattern, heads_kv=2):
    *tensors, dout = draw(heads_kv)
    return gradients(lambda q, k, v: scfa.attention(q, k, v, pattern), tensors, dout)


def through_dtensor(pattern, mesh, placement, stays=True):
    """Results whole; they lie as the inputs do where nothing had to be gathered."""
    placement = placement if isinstance(placement, tuple) else (placement,)
    *tensors, dout = (distribute_tensor(x, mesh, placement) for x in draw())
    pattern = distributed.distribute_pattern(pattern, mesh, placement)
    results = gradients(lambda q, k, v: scfa.attention(q, k, v, pattern), tensors, dout)
    assert not stays or all(x.placements == placement for x in results)
    return [x.full_tensor() for x in results]


HASHES = {  # heads of the rows, the directions, the center; axes of whose shares none is gathered
    "tables of each head": (4, 4, 4, (0, 1, 2)),
    "tables shared by two heads": (4, 2, None, (0, 1, 2)),
    "one table for all": (4, 1, 2, (0, 1, 2)),
    "tables shared across ranks": (6, 3, None, (0, 2)),
    "a center for every 64 rows": (4, 2, (2, 4, -(-SEQLEN // 64)), (0, 1)),
}


def rows_to_hash(name):
    """Rows, directions and center of a case."""
    heads, own, middle, _ = HASHES[name]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, heads, SEQLEN, 16, generator=generator)
    table = torch.from_numpy(hashing.random_directions(own, 16, 8, rounds=3, seed=4))
    sizes = middle if isinstance(middle, tuple) else (middle,)
    return x, table, None if middle is None else torch.randn(*sizes, 16, generator=generator)


def hash_through_dtensor(name, mesh, placement):
    """Buckets, and how they lie."""
    placement = placement if isinstance(placement, tuple) else (placement,)
    everywhere = [Replicate()] * mesh.ndim
    x, *tables = rows_to_hash(name)
    x = distribute_tensor(x, mesh, placement)
    tables = [None if y is None else distribute_tensor(y, mesh, everywhere) for y in tables]
    bucket = hashing.angular_hash(x, *tables)
    return bucket.full_tensor(), str(bucket.placements)


def whitened(x, place, adapt):
    """Buckets of an adapting hash that saw the same rows twice; `place` puts tensors on a mesh."""
    own = place(nn.AngularHash(4, 16, 8, seed=3, adapt=adapt))
    own(x)
    own.move_centers()
    return own(x)[0]


LAYERS = {
    "dense": lambda: nn.DenseSelfAttention(64, 4, heads_kv=2),
    "window": lambda: nn.WindowSelfAttention(64, 4, 5),
    "hash": lambda: nn.HashSelfAttention(64, 4, 8, heads_kv=2, seed=0),
    "rounds": lambda: nn.HashSelfAttention(64, 4, 8, seed=0, rounds=2),
    "whitened": lambda: nn.HashSelfAttention(
        64, 4, 8, seed=0, shared_qk=True, include_self=False, adapt="whiten"
    ),
    "redrawn": lambda: nn.HashSelfAttention(64, 4, 8, redraw=True),
    "learned drop": lambda: nn.DropSelfAttention(64, 4, how="threshold"),
}


def layer_of(name):
    """A layer, its out and the gradients of its weights by a function that may spread it."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    x = torch.randn(2, SEQLEN, 64, generator=torch.Generator().manual_seed(6))

    def run():
        out = layer(x)
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in layer.parameters())]

    return layer, run


def through_tensor_parallelism(name, mesh):
    """Heads of a layer spread by the styles of torch, activations as DTensors."""
    layer, run = layer_of(name)
    inward = [part for part, _ in layer.named_children() if part not in ("output", "hash")]
    styles = {part: ColwiseParallel(use_local_output=False) for part in inward}
    parallelize_module(layer, mesh, {**styles, "output": RowwiseParallel()})
    if hasattr(layer, "hash"):
        distribute_module(layer.hash, mesh)
    torch.rand(dist.get_rank())  # generators of ranks need not agree
    out, *grads = run()  # out may be waited for yet; grads are DTensors
    return [out + 0, *(x.full_tensor() for x in grads)]


def adapting_rows():
    """Long enough for `adapt="past"` to have a past."""
    return draw()[0].float().repeat(1, 1, 4, 1) + 2


def whiten_through_dtensor(mesh, placement, adapt):
    x = distribute_tensor(adapting_rows(), mesh, [placement])
    return whitened(x, lambda module: distribute_module(module, mesh), adapt).full_tensor()


SINKS = (0.5, -1.0, 2.0, 0.0)


def through_sequence(attend, rows, heads_kv=2):
    """Each rank works on its rows; all results in original order."""
    *tensors, dout = (x.index_select(2, rows) for x in draw(heads_kv))
    results = gradients(attend, tensors, dout)
    order = torch.argsort(gather(rows, 0, None))
    return [gather(x, 2, None).index_select(2, order) for x in results]


def work(rank, ranks, folder):
    """One process: every case of the tests below; the first writes down what it got."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    results = in_a_line(rank, ranks) if ranks == 2 else in_a_square(rank, ranks)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()  # all ranks are done with each other
    dist.destroy_process_group()


def in_a_square(rank, ranks):
    """Batches along one side of the mesh, heads along the other; sequences over all ranks."""
    mesh, sides = init_device_mesh("cpu", (2, 2)), (Shard(0), Shard(1))
    mine = torch.arange(SEQLEN).view(ranks, -1)[rank]
    zigzag = distributed.zigzag_rows(SEQLEN)
    results = {}
    for name in ("hash", "mixed"):
        pattern = patterns()[name]
        results[name, "square"] = through_dtensor(pattern, mesh, sides)
        results[name, "zigzag"] = through_sequence(
            lambda q, k, v, p=pattern: distributed.gathered_attention(q, k, v, p, rows=zigzag),
            zigzag,
        )
        pattern = patterns(4)[name]
        results[name, "ulysses"] = through_sequence(
            lambda q, k, v, p=pattern: distributed.ulysses_attention(q, k, v, p), mine, 4
        )
    results["bucket"] = hash_through_dtensor("tables shared by two heads", mesh, sides)
    line = init_device_mesh("cpu", (ranks,))  # two key heads are fewer than its ranks
    for name in patterns():
        results[name, "more ranks than key heads"] = through_dtensor(
            patterns()[name], line, Shard(1), stays=False
        )
    return results


def in_a_line(rank, ranks):
    """Every way of sharding along one dimension."""
    mesh = init_device_mesh("cpu", (ranks,))
    results = {}
    mine = torch.arange(SEQLEN).view(ranks, -1)[rank]
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
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        for name in HASHES:
            results[name, str(placement)] = hash_through_dtensor(name, mesh, placement)
        for adapt in ("whiten", "past", "even"):
            results[adapt, str(placement)] = whiten_through_dtensor(mesh, placement, adapt)
    for name in LAYERS:
        results["layer", name] = through_tensor_parallelism(name, mesh)
    results["called"] = through_sequence(
        lambda q, k, v: distributed.ulysses_attention(
            q, k, v, lambda q, k: scfa.HashSparse(*((x[..., 0] > 0).long() for x in (q, k)))
        ),
        mine,
    )
    results["one key head"] = through_sequence(
        lambda q, k, v: distributed.gathered_attention(q, k, v, patterns(1)["hash"]), mine, 1
    )
    for attend in (distributed.ulysses_attention, distributed.gathered_attention):
        sinks = torch.tensor(SINKS, requires_grad=True)
        name = "sinks", attend.__name__
        results[name] = through_sequence(
            lambda q, k, v, a=attend, s=sinks: a(q, k, v, scfa.SlidingWindow(5), sinks=s), mine
        )
        *tensors, dout = (x.index_select(2, mine) for x in draw())
        out = attend(*tensors, scfa.SlidingWindow(5), sinks=sinks)
        (dsinks,) = torch.autograd.grad(out, sinks, dout)
        dist.all_reduce(dsinks)  # as of any parameter that all ranks hold
        results[name].append(dsinks)
    *tensors, _ = (x.index_select(2, mine) for x in draw(1))
    try:
        distributed.ulysses_attention(*tensors, scfa.Causal())
    except scfa.ShapeError as error:
        results["refused"] = str(error)
    return results


def first_of(folder, ranks):
    """What the first of `ranks` processes wrote down."""
    run_ranks(__file__, ranks, ranks, folder)
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return made_once(tmp_path_factory, "line", lambda folder: first_of(folder, 2))


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    return made_once(tmp_path_factory, "square", lambda folder: first_of(folder, 4))


WAYS = [str(Shard(0)), str(Shard(1)), str(Replicate()), "ulysses", "consecutive", "zigzag"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", patterns())
def test_every_way_of_sharding_equals_one_process(results, name, way):
    for mine, right in zip(results[name, way], whole(patterns()[name]), strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["square", "zigzag", "ulysses"])
@pytest.mark.parametrize("name", ["hash", "mixed"])
def test_four_processes_equal_one(square, name, way):
    heads_kv = 4 if way == "ulysses" else 2
    right = whole(patterns(heads_kv)[name], heads_kv)
    for mine, one in zip(square[name, way], right, strict=True):
        torch.testing.assert_close(mine, one, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", patterns())
def test_more_ranks_than_key_heads(square, name):
    """Four ranks share four query heads and two key heads: DTensor has to gather them."""
    for mine, one in zip(
        square[name, "more ranks than key heads"], whole(patterns()[name]), strict=True
    ):
        torch.testing.assert_close(mine, one, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Shard(2), Replicate()], ids=str)
@pytest.mark.parametrize("name", HASHES)
def test_sharded_rows_hash_as_whole_ones(results, name, placement):
    bucket, lies = results[name, str(placement)]
    assert torch.equal(bucket, hashing.angular_hash(*rows_to_hash(name)))
    if isinstance(placement, Replicate):
        assert lies == str((placement,))
    elif placement.dim in HASHES[name][-1]:
        assert lies == str((Shard(placement.dim + 1),))


@pytest.mark.slow
def test_rows_hash_on_a_square(square):
    bucket, lies = square["bucket"]
    assert torch.equal(bucket, hashing.angular_hash(*rows_to_hash("tables shared by two heads")))
    assert lies == str((Shard(1), Shard(2)))


@pytest.mark.slow
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Shard(2), Replicate()], ids=str)
@pytest.mark.parametrize("adapt", ["whiten", "past", "even"])
def test_a_hash_adapts_to_sharded_rows(results, placement, adapt):
    right = whitened(adapting_rows(), lambda module: module, adapt)
    same = results[adapt, str(placement)] == right
    assert same.float().mean() > 0.99  # means of shares sum in another order


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_layers_under_tensor_parallelism(results, name):
    right = layer_of(name)[1]()
    for mine, one in zip(results["layer", name], right, strict=True):
        torch.testing.assert_close(mine, one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_hashes_made_after_the_exchange(results):
    q, k, *_ = draw()
    pattern = scfa.HashSparse(*((x[..., 0] > 0).long() for x in (q, k)))
    torch.testing.assert_close(results["called"], whole(pattern), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ulysses_attention", "gathered_attention"])
def test_sinks_of_all_heads(results, name):
    *tensors, dout = draw()
    inputs = [x.requires_grad_() for x in (*tensors, torch.tensor(SINKS))]
    out = scfa.attention(*inputs[:3], scfa.SlidingWindow(5), sinks=inputs[3])
    right = [out.detach(), *torch.autograd.grad(out, inputs, dout)]
    torch.testing.assert_close(results["sinks", name], right, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_fewer_key_heads_than_ranks(results):
    right = whole(patterns(1)["hash"], heads_kv=1)
    torch.testing.assert_close(results["one key head"], right, rtol=0, atol=1e-6)
    assert "gathered_attention" in results["refused"]


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    os._exit(0)  # a thread of gloo that wants the GIL while Python finalizes aborts the process
