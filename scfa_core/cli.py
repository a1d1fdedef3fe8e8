"""The command line: info, demo, verify, soak, show. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfa_core import __version__
from scfa_core.cli_verify import CUT_SHORT, INTERRUPTED, run_soak, run_verify
from scfa_core.dispatch import (
    AUTO,
    BACKEND_NAMES,
    ENVIRONMENT_VARIABLE,
    backends,
)
from scfa_core.environment import strangers
from scfa_core.errors import ScfaError
from scfa_core.terminal import Terminal
from scfa_core.versions import PACKAGES, version_of

if TYPE_CHECKING:
    from scfa_core.patterns import Pattern

PATTERN_NAMES = ("causal", "hash", "qk", "documents", "window", "ranges")


def _whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """An argparse type: an integer from `least` to `most`."""

    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {value}")
        return value

    read.__name__ = "integer"
    return read


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0 seconds, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return value


def _file(text: str) -> str:
    """A file to be written, looked at before the work: its folder exists."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise argparse.ArgumentTypeError(f"must be a file that can be written, {what}: {text}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file that can be written, got {text}")
    return text


def _picture(text: str) -> str:
    """A picture to be written: PNG where its name has no ending."""
    if not Path(text).name:
        raise argparse.ArgumentTypeError(f"must be a file that can be written, got {text!r}")
    return _file(text if Path(text).suffix or Path(text).is_dir() else f"{text}.png")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="scfa", description="Exact sparse causal flash attention."
    )
    parser.add_argument("--version", action="version", version=f"scfa_core {__version__}")
    parser.add_argument(
        "--plain", action="store_true", help="plain text, even if rich is installed"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="backends of this machine, or why not, and versions")
    info.set_defaults(run=run_info)

    demo = commands.add_parser("demo", help="train a small language model, sparse and dense")
    demo.add_argument(
        "--text", metavar="PATH", help="a file, or a folder of text files, to learn from"
    )
    demo.add_argument(
        "--out", default="demo-out", metavar="DIR", help="where pictures go (%(default)s)"
    )
    demo.add_argument("--seqlen", type=_whole(64), help="tokens in one sequence")
    demo.add_argument("--steps", type=_whole(1), help="training steps of each variant")
    demo.add_argument(
        "--time-budget",
        type=_seconds,
        default=140.0,
        metavar="SECONDS",
        help="of the whole demo, where --steps is not given (%(default)s)",
    )
    demo.add_argument("--backend", choices=BACKEND_NAMES, help="default: the best of this machine")
    demo.add_argument("--seed", type=_whole(0), default=0)
    demo.set_defaults(run=run_demo)

    verify = commands.add_parser("verify", help="random problems against the reference")
    verify.add_argument("--backend", choices=BACKEND_NAMES, default="numba-cpu")
    verify.add_argument(
        "--against",
        choices=BACKEND_NAMES,
        metavar="BACKEND",
        help="a second one: each is held against the reference, and both against each other",
    )
    verify.add_argument("--seed", type=_whole(0), default=0, help="first seed (%(default)s)")
    verify.add_argument("--count", type=_whole(1), default=100, help="problems (%(default)s)")
    verify.add_argument(
        "--deep", action="store_true", help="problems built to break tiles, groups and lists"
    )
    verify.add_argument(
        "--long",
        type=_whole(1),
        metavar="N",
        default=0,
        help="with --deep: every N-th seed is a problem of up to 131072 rows",
    )
    verify.add_argument(
        "--changed",
        action="store_true",
        help="with --deep: problems changed in up to 8 random steps, as no family alone has them",
    )
    verify.add_argument(
        "--coverage",
        action="store_true",
        help="with --deep: run nothing, count what the plans of the seeds' problems hold",
    )
    verify.add_argument(
        "--repeat",
        type=_whole(0),
        metavar="N",
        default=0,
        help="call each problem N times more: the same bits must come",
    )
    verify.add_argument("--rows", type=_whole(1), help="longest seqlen (200; with --deep 4096)")
    verify.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"))
    verify.add_argument(
        "--time-budget", type=_seconds, metavar="SECONDS", help="begin no problem after this"
    )
    verify.add_argument(
        "--workers", type=_whole(1), default=1, help="processes that share the seeds (%(default)s)"
    )
    verify.add_argument(
        "--warm",
        action="store_true",
        help="with --workers: first compile all kernels that the seeds need, each in one process; "
        "worth it for some hundreds of problems on a GPU with no compiled kernels yet",
    )
    verify.add_argument("--json", type=_file, metavar="PATH", help="where counts and failures go")
    verify.set_defaults(run=run_verify)

    soak = commands.add_parser(
        "soak", help="very many steps: memory, compiled kernels and fixed results must hold still"
    )
    soak.add_argument("--backend", choices=BACKEND_NAMES, default="numba-cpu")
    soak.add_argument(
        "--steps", type=_whole(1), help="of training (100,000 on a GPU, 25,000 on the host)"
    )
    soak.add_argument(
        "--replays", type=_whole(0), default=10_000, help="of a CUDA graph (%(default)s)"
    )
    soak.add_argument("--rows", type=_whole(2), help="longest seqlen (1024; on the host 128)")
    soak.add_argument("--seed", type=_whole(0), default=0)
    soak.add_argument(
        "--seconds", type=_seconds, help="end by then; replays get the first fifth of them at most"
    )
    soak.add_argument("--json", type=_file, metavar="PATH", help="write what was seen there")
    soak.set_defaults(run=run_soak)

    show = commands.add_parser(
        "show",
        help="draw a pattern, or the intersection of several",
        epilog="example: scfa show hash window --seqlen 512 --out pattern.png",
    )
    show.add_argument("pattern", nargs="+", choices=PATTERN_NAMES)
    show.add_argument(
        "--seqlen",
        type=_whole(1, 8192),  # every pair is looked at: 0.6 GB
        default=64,
        help="queries and keys (%(default)s), at most 8192",
    )
    show.add_argument(
        "--buckets", type=_whole(1, 2**31), default=4, help="of hash, and documents (%(default)s)"
    )
    show.add_argument("--keep", type=_share, default=0.5, help="share kept by qk (%(default)s)")
    show.add_argument(
        "--window", type=_whole(1, 2**31), default=16, help="keys in the window (%(default)s)"
    )
    show.add_argument(
        "--block", type=_whole(1), default=64, help="side of the tiles drawn (%(default)s)"
    )
    show.add_argument("--seed", type=_whole(0), default=0)
    show.add_argument(
        "--out",
        type=_picture,
        metavar="PNG",
        help="write a picture of mask and tiles instead of text",
    )
    show.set_defaults(run=run_show)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = build_parser().parse_args(arguments)
    terminal = Terminal(plain=True if options.plain else None)
    try:
        code: int = options.run(options, terminal)
    except ScfaError as error:
        print(f"scfa {options.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `scfa show ... | head`
        _drop_output()
        return CUT_SHORT
    except OSError as error:  # a full disk, say
        print(f"scfa {options.command}: {error}", file=sys.stderr)
        _drop_output()
        return 2
    except KeyboardInterrupt:
        print(f"scfa {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code


def _drop_output() -> None:
    """Let what waits to be written go nowhere: Python would try once more as it ends."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no output, or of no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_info(_options: argparse.Namespace, terminal: Terminal) -> int:
    """Print backends and versions."""
    terminal.print(
        f"scfa_core {__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU threads"
    )
    requested = os.environ.get(ENVIRONMENT_VARIABLE)
    unknown = requested and requested != AUTO and requested not in BACKEND_NAMES
    terminal.print(
        f"${ENVIRONMENT_VARIABLE}: {requested or 'not set (auto: by the device of the arrays)'}"
        f"{', which is no backend: every call will raise' if unknown else ''}"
    )
    for name, meant in strangers().items():
        terminal.print(f"${name}: nobody reads it{f'; is ${meant} meant?' if meant else ''}")
    terminal.print()
    terminal.table(("backend", "state"), list(backends().items()))
    terminal.print()
    terminal.table(("package", "version"), [(name, version_of(name)) for name in PACKAGES])
    return 0


def run_demo(options: argparse.Namespace, terminal: Terminal) -> int:
    """Train, compare, draw."""
    from scfa_core.demo import require_torch

    require_torch()
    # Read when torch loads: threads that sleep while they wait. Where cores are shared with other
    # programs, waiting in a spin costs torch more than tenfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from scfa_core.demo.run import run

    return run(options, terminal)


def run_show(options: argparse.Namespace, terminal: Terminal) -> int:
    """Draw a pattern as text or as a picture."""
    import numpy as np

    from scfa_core import plotting
    from scfa_core.api import make_plan

    pattern = named_pattern(options.pattern, options)
    rows = np.zeros((1, 1, options.seqlen, 16), np.float32)
    plan = make_plan(pattern, rows, rows, backend="reference")
    terminal.print(repr(pattern))
    terminal.print(f"{plan.visible_pairs()} visible pairs, density {plan.density():.2%}")
    if options.out is None:
        terminal.print(plotting.text_mask(plotting.original_mask(plan)))
        return 0
    try:
        plotting.plot_plan(plan, block=options.block).savefig(options.out, dpi=120)
    except (OSError, ValueError) as error:  # no right to write, no such format
        print(f"scfa show: cannot write {options.out}: {error}", file=sys.stderr)
        return 2
    terminal.print(f"wrote {options.out}")
    return 0


def named_pattern(names: Sequence[str], options: Any) -> Pattern:
    """Build the intersection of the named patterns with random arrays."""
    import numpy as np

    from scfa_core import patterns as pt

    rng = np.random.default_rng(options.seed)
    seqlen = options.seqlen
    shape = (1, 1, seqlen)

    def build(name: str) -> Pattern:
        if name == "hash":
            q_hash, k_hash = rng.integers(0, options.buckets, (2, *shape))
            return pt.HashSparse(q_hash, k_hash)
        if name == "qk":
            q_keep, k_keep = rng.random((2, *shape)) < options.keep
            return pt.QKSparse(q_keep, k_keep)
        if name == "documents":
            return pt.Documents(np.sort(rng.integers(0, options.buckets, (1, seqlen))))
        if name == "window":
            return pt.SlidingWindow(options.window)
        if name == "ranges":
            row = np.arange(seqlen)
            start = rng.integers(0, row + 1, shape)
            return pt.KeyRanges(start, np.minimum(start + options.window, row + 1))
        return pt.Causal()

    return pt.Intersection(*map(build, names))
