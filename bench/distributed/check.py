"""Many processes equal one, within rounding, and repeat bit by bit.

Each check runs twice on all ranks. The whole problem runs on one rank too, in the same precision;
rank 0 holds both against float64. Sharding may not make an error more than twice that of one
process, beyond what the precision itself resolves.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import scfa_core as scfa
from bench import records
from bench.distributed import group
from bench.distributed.models import VOCABULARY, Paper, Small, rows_of
from bench.lm.config import PRESETS
from bench.lm.train import World
from scfa_core import distributed
from scfa_core.distributed_exchange import gather
from scfa_core.hashing_checks import CENTER_ROWS
from scfa_core.terminal import Terminal

STEPS = 3
SLACK = {torch.float64: 1e-12, torch.bfloat16: 2e-3}  # beyond rounding

Tensors = list[Tensor]


@dataclasses.dataclass(frozen=True)
class Size:
    """The problem of the attention checks."""

    ranks: int
    seqlen: int
    head_dim: int
    dtype: torch.dtype

    @property
    def batch(self) -> int:
        """At least one for each rank."""
        return max(2, self.ranks)

    @property
    def heads(self) -> int:
        """Two to a key head."""
        return 2 * self.heads_kv

    @property
    def heads_kv(self) -> int:
        """At least one for each rank."""
        return max(2, self.ranks)

    def draw(self) -> Tensors:
        """Q, k, v and the gradient of out, on the CPU, values of `dtype` in float64."""
        generator = torch.Generator().manual_seed(0)
        heads = (self.heads, self.heads_kv, self.heads_kv, self.heads)
        shapes = [(self.batch, h, self.seqlen, self.head_dim) for h in heads]
        return [torch.randn(s, generator=generator).to(self.dtype).double() for s in shapes]

    def patterns(self) -> dict[str, Callable[[str], scfa.Pattern]]:
        """Each kind, on the device asked for."""
        generator = torch.Generator().manual_seed(1)

        def ints(heads: int, most: int) -> Tensor:
            shape = (self.batch, heads, self.seqlen)
            return torch.randint(0, most, shape, generator=generator)

        buckets = ints(self.heads, 7), ints(self.heads_kv, 7)
        keeps = ints(self.heads, 2), ints(self.heads_kv, 2)
        documents = (torch.arange(self.seqlen) // (self.seqlen // 3 + 1)).expand(self.batch, -1)

        def hashes(at: str) -> scfa.Pattern:
            return scfa.HashSparse(*(x.to(at) for x in buckets), include_self=False)

        return {
            "causal": lambda at: scfa.Causal(),
            "hash": hashes,
            "drop": lambda at: scfa.QKSparse(*(x.to(at) for x in keeps)),
            "documents, window, hash": lambda at: (
                scfa.Documents(documents.to(at).contiguous())
                & scfa.SlidingWindow(self.seqlen // 4)
                & hashes(at)
            ),
        }


@dataclasses.dataclass
class Check:
    """One comparison; `shard` is called by all ranks, twice."""

    name: str
    shard: Callable[[], tuple[Tensors, Tensors]]  # what is repeated bit by bit, what is compared
    whole: Callable[[], Tensors]
    truth: Callable[[], Tensors]
    slack: float


def _gradients(attend: Callable[..., Tensor], tensors: Tensors, dout: Tensor) -> Tensors:
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = attend(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, dout)]


def attention_checks(size: Size, where: World, backend: str | None) -> Iterator[Check]:
    """Batches, heads and sequences sharded, for each kind of pattern."""
    mesh = init_device_mesh(where.device.partition(":")[0], (where.size,))
    exact = size.draw()
    held = [x.to(where.device, size.dtype) for x in exact]
    rows = torch.arange(size.seqlen, device=where.device).view(where.size, -1)[where.rank]
    zigzag = distributed.zigzag_rows(size.seqlen, device=where.device)

    def by_dtensor(pattern: scfa.Pattern, placement: Shard) -> tuple[Tensors, Tensors]:
        *tensors, dout = (distribute_tensor(x, mesh, [placement]) for x in held)
        placed = distributed.distribute_pattern(pattern, mesh, placement)
        got = _gradients(
            lambda q, k, v: scfa.attention(q, k, v, placed, backend=backend), tensors, dout
        )
        placements = [x.placements for x in got if isinstance(x, DTensor)]
        if placements != [(placement,)] * len(got):
            raise AssertionError(f"{placement} of the inputs became {placements}")
        return [x.to_local() for x in got], [_whole(x) for x in got]

    def by_sequence(attend: Callable[..., Tensor], mine: Tensor) -> tuple[Tensors, Tensors]:
        *tensors, dout = (x.index_select(2, mine) for x in held)
        got = _gradients(attend, tensors, dout)
        order = torch.argsort(gather(mine, 0, None))
        return got, [gather(x, 2, None).index_select(2, order) for x in got]

    for kind, make in size.patterns().items():
        pattern, on_host = make(where.device), make("cpu")
        exchange = lambda q, k, v, p=pattern: distributed.ulysses_attention(  # noqa: E731
            q, k, v, p, backend=backend
        )
        gathered = lambda q, k, v, p=pattern, r=None: distributed.gathered_attention(  # noqa: E731
            q, k, v, p, rows=r, backend=backend
        )
        ways: dict[str, Callable[[], tuple[Tensors, Tensors]]] = {
            "batch, DTensor": lambda p=pattern: by_dtensor(p, Shard(0)),
            "heads, DTensor": lambda p=pattern: by_dtensor(p, Shard(1)),
            "sequence, all-to-all": lambda f=exchange: by_sequence(f, rows),
            "sequence, all-gather": lambda f=gathered: by_sequence(f, rows),
            "sequence, all-gather, zigzag": lambda f=gathered: by_sequence(
                lambda q, k, v: f(q, k, v, r=zigzag), zigzag
            ),
        }
        for way, shard in ways.items():
            yield Check(
                f"{way}: {kind}",
                shard,
                lambda p=pattern: _gradients(
                    lambda q, k, v: scfa.attention(q, k, v, p, backend=backend), held[:3], held[3]
                ),
                lambda p=on_host: _gradients(
                    lambda q, k, v: scfa.attention(q, k, v, p, backend="reference"),
                    exact[:3],
                    exact[3],
                ),
                SLACK[size.dtype],
            )


def _steps(run: nn.Module, text: Tensor, average: Callable[[Tensor], Tensor]) -> Tensors:
    """Losses of a few steps, gradients of the first, weights after the last."""
    optimizer = torch.optim.SGD(run.parameters(), lr=0.1)
    losses, first = [], []
    for step in range(STEPS):
        loss = run(text)
        loss.backward()
        losses.append(average(loss.detach()))
        if step == 0:
            first = [_whole(p.grad).clone() for p in run.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return [torch.stack(losses), *first, *(_whole(p.detach()) for p in run.parameters())]


def _whole(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.full_tensor() if isinstance(x, DTensor) else x


def training_checks(size: Size, where: World, backend: str | None) -> Iterator[Check]:
    """Steps of a small model under DDP and FSDP2, each rank with its share of the batch."""
    low = size.dtype if size.dtype == torch.bfloat16 else None
    weights = torch.float32 if low else size.dtype
    generator = torch.Generator().manual_seed(2)
    shape = (size.batch, size.seqlen + 1)
    text = torch.randint(0, VOCABULARY, shape, generator=generator)
    mine = text.chunk(where.size)[where.rank].to(where.device)

    def model(at: str = where.device, dtype: torch.dtype = weights) -> Small:
        on_host = dtype == torch.float64 and at == "cpu" and low is not None
        chosen = "reference" if on_host else backend
        made = Small(size.heads, size.head_dim, None if on_host else low, chosen)
        return made.to(at, dtype)

    def mean(loss: Tensor) -> Tensor:
        dist.all_reduce(loss)
        return loss / where.size

    def ddp() -> Tensors:
        devices = [torch.device(where.device)] if where.device != "cpu" else None
        return _steps(DistributedDataParallel(model(), device_ids=devices), mine, mean)

    def fsdp2() -> Tensors:
        sharded = model()
        mesh = init_device_mesh(where.device.partition(":")[0], (where.size,))
        for layer in sharded.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        return _steps(sharded, mine, mean)

    for name, steps in (("DDP", ddp), ("FSDP2", fsdp2)):
        yield Check(
            f"training, {name}",
            lambda run=steps: (got := run(), got),
            lambda: _steps(model(), text.to(where.device), lambda loss: loss),
            lambda: _steps(model("cpu", torch.float64), text, lambda loss: loss),
            SLACK[size.dtype],
        )


def paper_checks(size: Size, where: World, backend: str | None) -> Iterator[Check]:
    """Gradients of the paper's model with its sequence sharded, under DDP.

    Windows anywhere; hashes of activations only where no bucket turns on a rounding, in float64.
    """
    low = size.dtype == torch.bfloat16
    names = ["window9"] if low else ["window9", "hash4", "hash4r"]
    for way in ("all-to-all", "all-gather"):
        for name in names:
            length = (4 * CENTER_ROWS if name.endswith("r") else 32) * where.size
            config = dataclasses.replace(
                PRESETS["tiny"], attention=name, heads=size.heads, head_dim=size.head_dim,
                seqlen=length, backend=backend,
            )  # fmt: skip
            generator = torch.Generator().manual_seed(3)
            text = torch.randint(0, 256, (1, length + 1), generator=generator)

            def gradients(
                config: Any = config,
                text: Tensor = text,
                way: str | None = None,
                at: str = where.device,
                cast: bool = low,
            ) -> Tensors:
                text = text.to(at)
                rows = None if way is None else rows_of(way, config.seqlen, at)
                torch.manual_seed(4)
                whole = Paper(config, None, None)
                model = whole
                if rows is not None:
                    model = Paper(config, rows, way)
                    state = whole.state_dict()
                    place = "inner.embed.position.weight"
                    state[place] = state[place][rows.cpu()]
                    model.load_state_dict(state)
                model.to(at, torch.float32 if low and cast else torch.float64)
                run: nn.Module = model if rows is None else DistributedDataParallel(model)
                torch.manual_seed(5)  # the hash's directions
                mine = slice(None) if rows is None else rows
                with torch.autocast(at.partition(":")[0], torch.bfloat16, enabled=cast):
                    loss = run(text[:, :-1][:, mine], text[:, 1:][:, mine])
                loss.backward()
                found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
                if rows is not None:
                    place = "inner.embed.position.weight"
                    order = torch.argsort(gather(rows, 0, None))
                    found[place] = gather(found[place], 0, None)[order]
                return list(found.values())

            yield Check(
                f"paper's model, sequence, {way}: {name}",
                lambda run=gradients, way=way: (got := run(way=way), got),
                gradients,
                lambda run=gradients, config=config: run(
                    dataclasses.replace(config, backend="reference"), at="cpu", cast=False
                ),
                SLACK[size.dtype],
            )


def _error(got: Tensor, right: Tensor) -> float:
    """Size of the difference over the size of what is right."""
    if not bool(got.isfinite().all()):
        return float("inf")
    right = right.double().cpu()
    return float((got.double().cpu() - right).norm() / right.norm().clamp(min=1e-30))


def judge(check: Check, where: World) -> dict[str, Any]:
    """Run one check on all ranks; every rank returns the same verdict."""
    begin = time.monotonic()
    row: dict[str, Any] = {"check": check.name, "ok": False}
    error, mine, one, excess, same = "", 0.0, 0.0, 0.0, False
    try:
        kept, got = check.shard()
        again, _ = check.shard()
        same = all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
        if where.leads:
            whole, truth = check.whole(), check.truth()
            for x, single, right in zip(got, whole, truth, strict=True):
                sharded, alone = _error(x, right), _error(single, right)
                mine, one = max(mine, sharded), max(one, alone)
                excess = max(excess, sharded - 2 * alone - check.slack)
    except Exception as problem:  # the others go on; a rank that fails alone is ended by `guard`
        error = f"{type(problem).__name__}: {problem}"[:400]
    row["raised"] = group.anywhere(bool(error), where)
    if error and not where.leads:
        print(f"rank {where.rank}, {check.name}: {error}", flush=True)
    row["repeats"] = not group.anywhere(not same, where)
    excess = group.largest(excess, where)
    row |= {"error": mine, "error_of_one": one, "message": error}
    row["ok"] = row["repeats"] and not row["raised"] and excess <= 0
    row["seconds"] = round(time.monotonic() - begin, 2)
    return row


def run(
    where: World,
    *,
    seqlen: int,
    head_dim: int,
    backend: str | None,
    only: str,
    json_path: Path | None,
    commit: str | None,
) -> int:
    """Run every check whose name holds `only`; return 0 if all hold."""
    cuda = where.device.startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float64
    size = Size(where.size, seqlen, head_dim, dtype)
    record = group.head("distributed-check", where, commit)
    record["dtype"], record["seqlen"] = str(dtype).removeprefix("torch."), seqlen
    rows: list[dict[str, Any]] = record["rows"]

    def keep() -> None:
        if where.leads and json_path is not None:
            records.write(json_path, record)

    for family in (attention_checks, training_checks, paper_checks):
        for check in family(size, where, backend):
            if only not in check.name:
                continue
            record["running"] = check.name  # found in the file if the run is ended here
            keep()
            with group.guard():
                rows.append(judge(check, where))
            if where.leads and not rows[-1]["ok"]:
                print(f"FAILED {check.name}: {rows[-1]}", flush=True)
    record.pop("running", None)
    failed = [row["check"] for row in rows if not row["ok"]]
    record["failed"] = failed
    keep()
    if where.leads:
        terminal = Terminal()
        terminal.table(
            ["check", "ok", "error", "one process", "repeats", "s"],
            [
                [
                    row["check"], "yes" if row["ok"] else "NO", f"{row['error']:.1e}",
                    f"{row['error_of_one']:.1e}", "bitwise" if row["repeats"] else "NO",
                    row["seconds"],
                ]
                for row in rows
            ],
        )  # fmt: skip
        told = f"failed: {'; '.join(failed)}" if failed else f"all {len(rows)} checks hold"
        terminal.print(f"{where.size} x {record['cards'][0]}, {record['transport']}: {told}")
    return 1 if failed or not rows else 0
