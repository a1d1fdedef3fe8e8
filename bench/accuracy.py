"""Error against float64 of a backend and of torch's plain attention, on the same inputs.

Torch's own is the composite formula (scores, masked softmax, product, autograd) with every tensor
in the case's dtype: what a first implementation of the same pattern does.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np
import torch

from bench import records
from bench.limits import Budget
from bench.machine import machine, resumed
from scfa_core import testing
from scfa_core.dispatch import BACKEND_NAMES, load_backend
from scfa_core.errors import BackendUnavailable, DTypeError
from scfa_core.verify import run_case

DTYPES = ("bfloat16", "float16", "float32", "float64")
TENSORS = testing.Results._fields
PARTS = {
    "dense": testing.Part("causal", number=0),
    "hash": testing.Part("hash", number=16),
    "qk": testing.Part("keep", number=50),
    "window": testing.Part("window", number=128),
    "documents": testing.Part("documents", number=8),
    "ranges": testing.Part("ranges", "random"),
}


def spec_of(pattern: str, dtype: str, seqlen: int, seed: int) -> testing.Spec:
    """Two query heads to a key head, head_dim 64: small enough for a dense truth."""
    return testing.Spec(
        heads=4,
        heads_kv=2,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        head_dim=64,
        head_dim_v=64,
        dtype=dtype,
        parts=(PARTS[pattern],),
        seed=seed,
    )


def torch_composite(case: testing.Case, device: str) -> testing.Results:
    """Masked softmax and autograd in the case's dtype, back in float64."""
    q, k, v, dout = (
        testing.as_torch(x, case.spec.dtype, device) for x in (case.q, case.k, case.v, case.dout)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    group = case.spec.heads // case.spec.heads_kv
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    hidden = ~torch.from_numpy(case.mask).to(device)
    scores = (q @ keys.transpose(-1, -2) * case.softmax_scale).masked_fill(hidden, float("-inf"))
    out = torch.softmax(scores, -1).nan_to_num(0.0) @ values
    grads = torch.autograd.grad(out, leaves, dout)
    lse = torch.logsumexp(scores, -1)
    return testing.Results(*(x.detach().double().cpu().numpy() for x in (out, lse, *grads)))


def errors(got: testing.Results, true: testing.Results) -> dict[str, dict[str, float]]:
    """Of each tensor: the largest absolute error, and the error's norm over the truth's."""
    found = {}
    for name, mine, right in zip(TENSORS, got, true, strict=True):
        seen = np.isfinite(right)
        same = mine[~seen] == right[~seen]
        difference = np.abs(mine[seen] - right[seen])
        if not same.all() or not np.isfinite(difference).all():
            difference = np.array([np.inf])
        size = max(float(np.linalg.norm(right[seen])), np.finfo(np.float64).tiny)
        found[name] = {
            "max": float(difference.max(initial=0.0)),
            "norm": float(np.linalg.norm(difference)) / size,
        }
    return found


def _worst(several: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        name: {kind: max(one[name][kind] for one in several) for kind in ("max", "norm")}
        for name in TENSORS
    }


def measure(
    backend: str, pattern: str, dtype: str, seqlen: int, seeds: int, device: str
) -> dict[str, Any]:
    """Measure one backend, dtype and pattern: the worst of `seeds` problems."""
    ours, theirs, ratios = [], [], []
    for seed in range(seeds):
        case = testing.build(spec_of(pattern, dtype, seqlen, seed))
        true = testing.truth(case)
        got, _ = run_case(case, backend)
        ours.append(errors(got, true))
        theirs.append(errors(torch_composite(case, device), true))
        verdicts = testing.judge(case, got, true)
        ratios += [max(one.max_ratio, one.norm_ratio) for one in verdicts]
    return {
        "ours": _worst(ours),
        "torch": _worst(theirs),
        "of_allowed": max(ratios),
    }


def on_host(backend: str) -> bool:
    """Whether a backend computes on arrays of the host."""
    return getattr(load_backend(backend), "memory", "host") == "host"


def show(row: dict[str, Any]) -> None:
    """Print one row: norm errors, this package before torch."""
    head = f"{row['backend']} {row['dtype']:9s} {row['pattern']:10s}"
    if "reason" in row:
        print(f"{head} not run: {row['reason']}", flush=True)
        return
    cells = "  ".join(
        f"{name} {row['ours'][name]['norm']:.1e}/{row['torch'][name]['norm']:.1e}"
        for name in TENSORS
    )
    used = f"{row['of_allowed']:.2f} of the allowed error"
    print(f"{head} {cells}  {used}", flush=True)


def main(argv: list[str]) -> int:
    """Print a row per backend, dtype and pattern and store them; 1 if any is beyond the rule."""
    parser = argparse.ArgumentParser(prog="python -m bench accuracy", description=main.__doc__)
    parser.add_argument(
        "--backend", nargs="+", default=["numba-cpu"], choices=BACKEND_NAMES, metavar="BACKEND"
    )
    parser.add_argument("--pattern", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--dtype", nargs="+", default=None, choices=DTYPES)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3, help="problems per row; the worst counts")
    parser.add_argument(
        "--json", type=records.writable, help="rows are added; rows already there are kept"
    )
    parser.add_argument("--budget", type=records.seconds, help="seconds, after which no row begins")
    parser.add_argument("--commit", help="name of the sources, where git cannot tell")
    args = parser.parse_args(argv)
    host = {on_host(backend) for backend in args.backend}
    if len(host) > 1:
        raise SystemExit("backends of the host and of a GPU go to files of their own")
    device = "cpu" if host == {True} else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("these backends need a CUDA device, and torch sees none")
    begun: dict[str, Any] = {
        "kind": "accuracy",
        "machine": machine(device, args.commit),
        "sizes": {"heads": 4, "heads_kv": 2, "seqlen": args.seqlen, "head_dim": 64},
        "seeds": args.seeds,
        "rows": [],
    }
    record = resumed(args.json, begun)
    for field in ("sizes", "seeds"):
        if record[field] != begun[field]:
            raise SystemExit(f"{args.json} holds other {field}: {record[field]}")
    done = {(row["backend"], row["dtype"], row["pattern"]) for row in record["rows"]}
    budget = Budget(args.budget)
    for backend, dtype, pattern in itertools.product(
        args.backend, args.dtype or DTYPES, args.pattern
    ):
        if budget.spent() or (backend, dtype, pattern) in done:
            continue
        row: dict[str, Any] = {"backend": backend, "dtype": dtype, "pattern": pattern}
        try:
            row |= measure(backend, pattern, dtype, args.seqlen, args.seeds, device)
        except (
            DTypeError,
            BackendUnavailable,
        ) as reason:
            row |= {"reason": str(reason).splitlines()[0]}
        show(row)
        record["rows"].append(row)
        if args.json:
            records.write(args.json, record)
    return int(any(row.get("of_allowed", 0) > 1 for row in record["rows"]))
