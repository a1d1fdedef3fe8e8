"""Train a small causal model on every process of torchrun, under DDP or FSDP2.

torchrun --nproc-per-node 2 examples/train_many.py --sharding fsdp2

Each process has its share of the batch; attention needs nothing else. Runs on GPUs where there are
as many as processes, else on the CPU.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import scfa_core as scfa

VOCABULARY, WIDTH, HEADS, SEQLEN, BATCH = 32, 64, 4, 64, 8


class Block(nn.Module):
    """Attention among tokens of the same residue, and a feed-forward."""

    def __init__(self):
        super().__init__()
        self.mix, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x, buckets):
        """(batch, seqlen, width) and (batch, 1, seqlen) to the former's shape."""
        q, k, v = self.mix(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = scfa.attention(q, k, v, scfa.HashSparse(buckets, buckets))
        x = x + self.output(out.transpose(1, 2).flatten(2))
        return x + self.feed(x)


class Model(nn.Module):
    """Tokens to the mean loss of the next one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, text):
        """(batch, seqlen + 1) tokens to a scalar."""
        before, after = text[:, :-1], text[:, 1:]
        x = self.embed(before)
        buckets = (before % 4)[:, None]  # one hash for all heads
        for block in self.blocks:
            x = block(x, buckets)
        return functional.cross_entropy(self.head(x).flatten(0, 1), after.flatten())


def main():
    """Train, and print the mean loss of the first and the last step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sharding", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    if not {"WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
        parser.error(
            "start it by torchrun, also for one process: "
            "torchrun --nproc-per-node 2 examples/train_many.py"
        )

    ranks, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")

    torch.manual_seed(0)  # the same weights on all processes
    model = Model().to(device)
    if args.sharding == "ddp":
        model = DistributedDataParallel(model)
    else:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    generator = torch.Generator().manual_seed(1)
    for step in range(args.steps):
        start = torch.randint(0, VOCABULARY, (BATCH, 1), generator=generator)
        whole = (start + 3 * torch.arange(SEQLEN + 1)) % VOCABULARY  # the next token is plus 3
        loss = model(whole.chunk(ranks)[dist.get_rank()].to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, args.steps - 1):
            mean = loss.detach()
            dist.all_reduce(mean)
            if dist.get_rank() == 0:
                print(f"step {step}: loss {mean.item() / ranks:.4f}")

    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo that wants the GIL while Python finalizes aborts the process


if __name__ == "__main__":
    main()
