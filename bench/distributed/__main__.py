"""`python -m torch.distributed.run --nproc-per-node N -m bench.distributed check | scale`.

`... report FILES` makes the page's tables and plots from stored JSON, on one process.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.distributed import check, group


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


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=__doc__)
    commands = parser.add_subparsers(required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", choices=["cuda", "cpu"], help="by default what there is")
    shared.add_argument("--backend", help="of scfa_core; auto by default")
    shared.add_argument("--json", type=Path)
    shared.add_argument("--commit", help="to name in the record where git cannot tell")

    one = commands.add_parser("check", parents=[shared], help=_check.__doc__)
    one.add_argument("--seqlen", type=int, help="rounded up to a multiple of twice the processes")
    one.add_argument("--head-dim", type=int)
    one.add_argument("--only", default="", help="checks whose name holds this")
    one.set_defaults(run=_check)

    args = parser.parse_args()
    torch.set_num_threads(max(torch.get_num_threads() // 2, 1))
    group.leave(args.run(args))


if __name__ == "__main__":
    main()
