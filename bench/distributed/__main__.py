"""`python -m torch.distributed.run --nproc-per-node N -m bench.distributed check | scale`.

`... report FILES` prints the tables of stored JSON and draws its plots, on one process.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from bench.distributed import check, group
from bench.records import writable


def _check(args: argparse.Namespace) -> int:
    """Many processes equal one and repeat bit by bit; exits 1 if not."""
    with group.join(args.device) as where:
        cuda = where.device.startswith("cuda")
        length = args.seqlen or (1024 if cuda else 48)
        code = check.run(
            where,
            seqlen=-(-length // (2 * where.size)) * 2 * where.size,
            head_dim=args.head_dim or (64 if cuda else 16),
            backend=args.backend,
            only=args.only,
            json_path=args.json,
            commit=args.commit,
        )
    return code


def _scale(args: argparse.Namespace) -> int:
    """Scaling of attention and of the paper's model; the longest sequence that fits."""
    from bench.distributed import scale
    from bench.lm.config import PRESETS

    config = dataclasses.replace(PRESETS[args.preset], backend=args.backend, compile="none")
    with group.join(args.device) as where:
        return scale.run(
            where,
            config,
            lengths=args.lengths,
            buckets=args.buckets,
            parts=args.parts,
            most=args.longest,
            budget=args.budget,
            json_path=args.json,
            commit=args.commit,
        )


def _report(args: argparse.Namespace) -> int:
    """Tables of stored records as Markdown; plots of those of scaling."""
    from bench.distributed import report

    report.main(args.records, args.plots)
    return 0


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=__doc__)
    commands = parser.add_subparsers(required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", choices=["cuda", "cpu"], help="by default what there is")
    shared.add_argument("--backend", help="of scfa_core; auto by default")
    shared.add_argument("--json", type=writable, help="where rows are stored")
    shared.add_argument("--commit", help="to name in the record where git cannot tell")

    one = commands.add_parser("check", parents=[shared], help=_check.__doc__)
    one.add_argument("--seqlen", type=int, help="rounded up to a multiple of twice the processes")
    one.add_argument("--head-dim", type=int)
    one.add_argument("--only", default="", help="checks whose name holds this")
    one.set_defaults(run=_check)

    two = commands.add_parser("scale", parents=[shared], help=_scale.__doc__)
    two.add_argument("--preset", choices=["paper", "small", "tiny"], default="paper")
    two.add_argument("--lengths", nargs="+", type=int, default=[2**n for n in range(14, 19)])
    two.add_argument(
        "--buckets", nargs="+", type=int, default=[0, 16], help="0: T / 1024 (on a CPU T / 16)"
    )
    parts = ["attention", "model", "longest"]
    two.add_argument("--parts", nargs="+", choices=parts, default=parts)
    two.add_argument("--longest", type=int, default=2**22, help="where the search ends")
    two.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    two.set_defaults(run=_scale)

    three = commands.add_parser("report", help=_report.__doc__)
    three.add_argument("records", nargs="+", type=Path)
    three.add_argument("--plots", type=Path)
    three.set_defaults(run=_report)

    args = parser.parse_args()
    torch.set_num_threads(max(torch.get_num_threads() // 2, 1))
    group.leave(args.run(args))


if __name__ == "__main__":
    main()
