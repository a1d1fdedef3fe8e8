"""DTensor: `attention_over`, sinks too, spread over batch or heads, eager and compiled."""

import sys
from itertools import product

import pytest
from once import made_once
from ranks import run_ranks

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")
dist = pytest.importorskip("torch.distributed", reason="needs torch built with distributed")
if not dist.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: E402

import scfa_core as scfa  # noqa: E402
from scfa_core import distributed, torch_union_ops  # noqa: E402
from scfa_core.merging import attention_over  # noqa: E402

RANKS, SEQLEN, WINDOW = 2, 24, 5
PLACEMENTS = {"batch": Shard(0), "heads": Shard(1), "whole": Replicate()}
OF_SINKS = {"batch": Replicate(), "heads": Shard(0), "whole": Replicate()}
SHARES = {"batch": (1, 4), "heads": (2, 2), "whole": (2, 4)}  # batch and heads of a rank's calls


def problem():
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(2, h, SEQLEN, 16, generator=generator) for h in (4, 2, 2, 4)]
    k_hash = torch.randint(0, 3, (2, 2, SEQLEN), generator=generator)
    far = scfa.HashSparse(k_hash.repeat_interleave(2, 1), k_hash) & scfa.Causal(lag=WINDOW)
    return tensors, [scfa.SlidingWindow(WINDOW), far]


def sinks_of():
    return torch.tensor([0.5, -1.0, 2.0, 0.0])


def gradients(function, tensors, dout):
    """Out and the gradients of q, k, v, and of sinks if they are among the tensors."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, dout)]


def spread(name, traced, with_sinks):
    """Results gathered, and how they lay."""
    placement = PLACEMENTS[name]
    mesh = init_device_mesh("cpu", (RANKS,))
    tensors, patterns = problem()
    *inputs, dout = (distribute_tensor(x, mesh, [placement]) for x in tensors)
    patterns = [distributed.distribute_pattern(p, mesh, (placement,)) for p in patterns]
    if with_sinks:
        inputs.append(distribute_tensor(sinks_of(), mesh, [OF_SINKS[name]]))

    def function(q, k, v, sinks=None):
        return attention_over(q, k, v, patterns, sinks=sinks)

    if traced:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = gradients(function, inputs, dout)
    return [x.full_tensor() for x in results], [str(x.placements) for x in results]


def work(rank, folder):
    """One process; the first writes down what it got and which sizes its backend met."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    sizes = []
    for verb in ("run_forward", "run_backward"):
        plain = getattr(torch_union_ops, verb)

        def run(call, *arguments, plain=plain):
            sizes.append((call.problem.batch, call.problem.heads))
            return plain(call, *arguments)

        setattr(torch_union_ops, verb, run)
    results = {}
    for case in product(PLACEMENTS, (False, True), (False, True)):
        sizes.clear()
        results[case] = (*spread(*case), list(sizes))
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    def run(folder):
        run_ranks(__file__, RANKS, folder)
        return torch.load(folder / "results.pt")

    return made_once(tmp_path_factory, "union_of_ranks", run)


@pytest.mark.slow
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_two_processes_equal_one(results, name, traced, with_sinks):
    mine, lies, sizes = results[name, traced, with_sinks]
    (*tensors, dout), patterns = problem()
    tensors += [sinks_of()] * with_sinks
    right = gradients(
        lambda q, k, v, sinks=None: attention_over(q, k, v, patterns, sinks=sinks), tensors, dout
    )
    for x, true in zip(mine, right, strict=True):
        torch.testing.assert_close(x, true, rtol=0, atol=1e-6)
    assert lies[:4] == [str((PLACEMENTS[name],))] * 4  # nothing was gathered
    assert sizes == [SHARES[name]] * 4  # two parts, forward and backward


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
