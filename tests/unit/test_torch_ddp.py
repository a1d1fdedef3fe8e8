"""Data parallel over processes: gradients of two halves, averaged, are those of the whole."""

import os
import sys

import pytest
from ranks import run_ranks

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")

import scfa_core as scfa  # noqa: E402


class Layer(torch.nn.Module):
    """One attention layer over hashes made from its own input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.mix(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        hashes = (x[:, None, :, 0] > 0).long()
        return scfa.attention(q, k, v, scfa.HashSparse(hashes, hashes), backend="reference")


def data():
    return torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(1))


def work(rank, folder):
    """One process; the first writes the gradients it holds after the reduction."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        layer = torch.nn.parallel.DistributedDataParallel(Layer())
        layer(data()[rank * 2 : rank * 2 + 2]).square().mean().backward()
        if rank == 0:
            torch.save([p.grad for p in layer.parameters()], f"{folder}/gradients.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    run_ranks(__file__, 2, tmp_path, timeout=120)
    layer = Layer()
    layer(data()).square().mean().backward()
    gradients = torch.load(tmp_path / "gradients.pt")
    for mine, p in zip(gradients, layer.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad)


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
    os._exit(0)  # a thread of gloo that wants the GIL while Python finalizes aborts the process
